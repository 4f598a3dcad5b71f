"""The README's code runs as it stands."""

import io
import re
import shlex
import shutil
from pathlib import Path

import pytest

from matquant import cli

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


CONCEPTS = (ROOT / "docs" / "concepts.md").read_text()


def blocks(language: str, text: str = README) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    return [block for name, block in found if name == language]


@pytest.mark.parametrize("text", [README, CONCEPTS], ids=["README", "concepts"])
def test_the_python_blocks_run_and_print_what_they_say(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    said = []
    for block in blocks("python", text):
        exec(compile(block, "README.md", "exec"), {})
        said += [line.split("#", 1)[1].split() for line in block.splitlines() if line.startswith("print(")]
    assert capsys.readouterr().out.split() == [word for line in said for word in line]


def test_the_commands_run(
    llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "MODEL"
    shutil.copytree(llama, model)
    (model / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello!\n/bits 2\nGo on.\n/quit\n"))
    made = ("OUT", "BEST", "PORTABLE", "SLICE", "CT", "APPLE", "SMALL", "model.gguf", "plan.json", "report.html")
    texts = dict.fromkeys(("a.txt", "b.txt", "heldout.txt"), text_file)
    names = {"MODEL": model, **texts, **{name: tmp_path / name for name in made}}
    commands = [line for block in blocks("") for line in block.splitlines() if line.startswith("matquant ")]
    assert len(commands) == 19
    for line in commands:
        words = [str(names.get(word, word)) for word in shlex.split(line, comments=True)]
        if words[1] == "serve":  # it does not end: tests/test_serve_process.py runs it
            continue
        if words[1] == "quantize":
            words += ["--samples", "8", "--seq-len", "32"]
            words += ["--steps", "2", "--tune", "2"] if "best" in words else []
            words += ["--group-size", "channel"] if "--portable" in words else []  # rows are too short for MLX's blocks
        words += ["--tokens", "4", "--rounds", "1"] if words[1] == "bench" else []
        monkeypatch.setattr("sys.argv", words)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code in (0, None), capsys.readouterr().err


def test_every_file_the_readme_names_exists() -> None:
    for name in re.findall(r"\b(?:docs|bench|examples)/[\w./-]*\w", README):
        assert (ROOT / name).exists(), name
