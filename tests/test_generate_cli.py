"""matquant generate, chat and bench: what they print, how they end, what they refuse."""

import functools
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import conftest
import matquant
from conftest import Interrupt
from matquant import cli
from matquant.engine import terminal
from matquant.hf import renderer, templates
from matquant.hf.vocabulary import TextStream

REFERENCE = Path(__file__).resolve().parents[1] / "examples" / "reference" / "model"
PROMPT = "Once upon a time"
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model with a chat template."""
    out = conftest.quantize(REFERENCE, tmp_path_factory.mktemp("cli") / "model", method="rtn", scope="all")
    manifest = json.loads((out / "matquant_manifest.json").read_text())
    (out / "chat_template.jinja").write_text(TEMPLATE)
    digest = hashlib.sha256(TEMPLATE.encode()).hexdigest()
    manifest["files"]["chat_template.jinja"] = {"bytes": len(TEMPLATE), "sha256": digest}
    (out / "matquant_manifest.json").write_text(json.dumps(manifest))
    return out


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Arguments -> exit code, stdout, stderr."""

    def call(*arguments: object, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["matquant", *map(str, arguments)])
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return call


def test_speculation_changes_the_speed_line_only(checkpoint: Path, run: Run) -> None:
    options = ("--prompt", PROMPT, "--bits", 8, "--max-tokens", 24, "--threads", 1)
    plain, drafted = run("generate", checkpoint, *options), run("generate", checkpoint, *options, "--speculate", 3)
    assert drafted[:2] == plain[:2]
    assert re.search(r"tokens/s, \d+ of \d+ drafts accepted in \d+ steps\n$", drafted[2])
    for verb in ("generate", "chat"):
        code, out, err = run(verb, checkpoint, "--speculate", "9")
        assert (code, out) == (2, "")
        assert "speculate=9 is not known; use 'auto', 'off' or a number of tokens to draft from 1 to 7" in err
    assert run("chat", checkpoint, "--speculate", "fast")[0] == 2
    turns = [
        run("chat", checkpoint, "--max-tokens", 16, "--threads", 1, "--speculate", how, stdin="A cat\nA dog\n/quit\n")
        for how in ("off", 3)
    ]
    assert turns[0][:2] == turns[1][:2]
    assert (turns[0][2].count("drafts accepted"), turns[1][2].count("drafts accepted")) == (0, 2)


def test_generate_prints_the_text_and_how_fast_it_was(checkpoint: Path, run: Run) -> None:
    expected = matquant.Engine(checkpoint, threads=1).generate(PROMPT, bits=4, max_tokens=12)
    options = ("--bits", 4, "--max-tokens", 12, "--threads", 1)
    code, out, err = run("generate", checkpoint, "--prompt", PROMPT, *options)
    assert (code, out) == (0, expected + "\n")
    assert err.startswith("4 + 12 tokens at int4, ")
    assert err.endswith(" tokens/s\n")
    assert run("generate", checkpoint, "--prompt", "-", *options, stdin=PROMPT)[1] == out


def test_every_option_of_generate_arrives(checkpoint: Path, run: Run, tmp_path: Path) -> None:
    engine = matquant.Engine(checkpoint, threads=1, activations="float")
    settings: dict[str, Any] = {"temperature": 1.3, "top_k": 50, "top_p": 0.95, "min_p": 0.01, "seed": 4}
    plan = {"model.layers.0.mlp.up_proj": 8}
    expected = engine.generate(PROMPT, bits=3, plan=plan, max_tokens=20, **settings)
    word = expected.split()[-3]
    file = tmp_path / "plan.json"
    file.write_text(json.dumps({"default": 3, "bits": plan}))
    flags = [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", value)]
    base = ("generate", checkpoint, "--prompt", PROMPT, "--plan", file, "--max-tokens", 20, "--threads", 1, *flags)
    code, out, err = run(*base, "--activations", "float", "--no-check-hashes")
    assert (code, out) == (0, expected + "\n")
    assert "at plan plan.json" in err
    out = run(*base, "--activations", "float", "--stop", word, "--stop", "never said")[1]
    assert out == expected[: expected.index(word)] + "\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--bits", 9), "bits=9 is not a width; use one of 1 to 8"),
        (
            ("--bits", 8, "--max-bits", 4),
            "bits=8 for model.layers.0.self_attn.q_proj exceeds max_bits=4 of this engine",
        ),
        (("--bits", 2, "--plan", "{plan}"), "--bits 2 and --plan "),
        (("--plan", "nowhere.json"), "--plan nowhere.json: no such file; give a JSON file"),
        (("--max-tokens", 0), "max_tokens=0; give a number above 0"),
        (("--top-p", 2), "top_p=2.0; give a number above 0 and at most 1"),
        (("--threads", 0), "threads=0; give a number above 0"),
        (("--activations", "fp8"), "activations='fp8' is not known; use int8 or float"),
        (("--stop", ""), "--stop '' is empty"),
    ],
    ids=str,
)
def test_generate_refuses_in_one_line(
    arguments: tuple[object, ...], message: str, checkpoint: Path, run: Run, tmp_path: Path
) -> None:
    (tmp_path / "plan.json").write_text("{}")
    filled = [tmp_path / "plan.json" if part == "{plan}" else part for part in arguments]
    code, out, err = run("generate", checkpoint, "--prompt", "x", *filled)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1


def test_ctrl_c_ends_with_130_and_keeps_what_was_shown(checkpoint: Path) -> None:
    options = ("--prompt", PROMPT, "--threads", "1", "--max-tokens", "500", "--activations", "float")
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "matquant", "generate", checkpoint, *options],
        env={**os.environ, "MATQUANT_ISA": "scalar"},  # slow, so that the signal comes in time
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # ignored in a background job
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    shown = process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert shown + out.rstrip(b"\n")
    assert err.decode().endswith(", interrupted\n")
    assert "Traceback" not in err.decode()


def test_chat_switches_the_width_and_remembers(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = iter(["", "Tell me a story.", "/bits 2", "Go on.", "/bits 9", "/help", "word " * 600, "And then?", "/quit"])
    code = terminal.chat(
        checkpoint, bits=8, plan=None, system="", engine={"threads": 1}, read=lambda _: next(lines), max_tokens=8
    )
    out, err = capsys.readouterr()
    assert code == 0
    assert len(out.splitlines()) >= 3
    notes = err.splitlines()
    assert notes[0] == f"{checkpoint}, int8; /bits N switches the width, /quit ends"
    assert " + 8 tokens at int8, " in notes[1]
    assert notes[2] == "int2 from here on"
    assert " + 8 tokens at int2, " in notes[3]
    assert notes[4] == "bits=9 is not a width; use one of 1 to 8"
    assert notes[5] == "'/help' is not a command; /bits N switches the width, /quit ends"
    assert notes[6].startswith("the prompt has ")
    assert notes[6].endswith(" reads at most 512; shorten it")
    assert " + 8 tokens at int2, " in notes[7], "what did not fit is forgotten"


@pytest.mark.parametrize(("ending", "code"), [(EOFError, 0), (KeyboardInterrupt, 130)])
def test_chat_ends_at_the_end_of_its_input(ending: type[BaseException], code: int, checkpoint: Path) -> None:
    def read(_: str) -> str:
        raise ending

    assert terminal.chat(checkpoint, bits=None, plan=None, system="", engine={"threads": 1}, read=read) == code


def test_ctrl_c_in_chat_ends_the_reply_wherever_it_comes_and_keeps_the_conversation(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = iter(["One.", "Two.", "Three."])
    rendering = Interrupt(renderer.render_template, 2)  # after the trial when the chat begins
    pushing = Interrupt(TextStream.push, 3)
    monkeypatch.setattr(templates, "render_template", rendering)
    monkeypatch.setattr(TextStream, "push", lambda *arguments: pushing(*arguments))
    code = terminal.chat(
        checkpoint,
        bits=8,
        plan=None,
        system="",
        engine={"threads": 1},
        read=lambda _: next(lines, "/quit"),
        max_tokens=8,
    )
    _, err = capsys.readouterr()
    assert code == 0
    notes = err.splitlines()
    assert notes[1] == "interrupted", "while the template was rendered"
    assert notes[2].endswith(", interrupted"), "after two tokens"
    assert " + 8 tokens at int8, " in notes[3]
    assert len(notes) == 4


def test_chat_without_a_template_says_what_would_do(checkpoint: Path, run: Run, tmp_path: Path) -> None:
    bare = shutil.copytree(checkpoint, tmp_path / "bare")
    manifest = json.loads((bare / "matquant_manifest.json").read_text())
    del manifest["files"]["chat_template.jinja"]
    (bare / "matquant_manifest.json").write_text(json.dumps(manifest))
    (bare / "chat_template.jinja").unlink()
    code, out, err = run("chat", bare)
    assert (code, out) == (2, "")
    assert err == (
        "error: the model has no chat template; use matquant generate, or add chat_template.jinja to its directory\n"
    )


def test_bench_measures_every_width_and_the_limit(checkpoint: Path, run: Run) -> None:
    code, out, err = run(
        "bench", checkpoint, "--bits", "8,2", "--tokens", 4, "--rounds", 2, "--threads", 1, "--context", 8
    )
    assert (code, err) == (0, "")
    record = json.loads(out.splitlines()[-1])
    assert set(record["widths"]) == {"8", "2"}
    assert record["stream_gb_s"] > 0
    for row in record["widths"].values():
        assert row["fraction"] == pytest.approx(row["gb_s"] / record["stream_gb_s"])
        assert row["gb_s"] == pytest.approx(row["tok_s"] * row["mb_per_token"] / 1e3)
        assert 0 < row["overhead"] < 1
    assert record["widths"]["8"]["mb_per_token"] > 1.5 * record["widths"]["2"]["mb_per_token"]
    assert "the model fits the last-level cache" in out
    assert run("bench", checkpoint, "--tokens", 600)[2].startswith(
        "error: --context 16 and --tokens 600 exceed the context of 512"
    )
