"""Streams of the command line: any text is printed in any encoding, and input is UTF-8."""

import io
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import conftest
import matquant
from matquant import cli
from matquant.system.streams import accept_any_text

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Arguments -> exit code, stdout, stderr of the command line with streams of an encoding."""

    def call(*arguments: object, stdin: bytes = b"", encoding: str = "ascii") -> tuple[int, str, str]:
        streams = {name: io.TextIOWrapper(io.BytesIO(), encoding=encoding) for name in ("stdout", "stderr")}
        streams["stdin"] = io.TextIOWrapper(io.BytesIO(stdin), encoding=encoding)
        with monkeypatch.context() as patch:
            for name, stream in streams.items():
                patch.setattr(sys, name, stream)
            patch.setattr(sys, "argv", ["matquant", *map(str, arguments)])
            with pytest.raises(SystemExit) as ended:
                cli.main()
        texts = []
        for name in ("stdout", "stderr"):
            streams[name].flush()
            texts.append(streams[name].buffer.getvalue().decode(encoding))  # type: ignore[attr-defined]
        return int(ended.value.code or 0), texts[0], texts[1]

    return call


@pytest.fixture(scope="module")
def checkpoint(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a chat template that has characters beyond ASCII."""
    directory = tmp_path_factory.mktemp("streams")
    source = shutil.copytree(llama, directory / "source")
    (source / "chat_template.jinja").write_text("«{{ messages[-1].content }}» 🐱", encoding="utf-8")
    return conftest.quantize(source, directory / "modèle", method="rtn", scope="all")


def test_tables_and_help_are_ascii_where_the_terminal_is(checkpoint: Path, run: Run) -> None:
    code, out, err = run("inspect", checkpoint)
    assert (code, err) == (0, "")
    assert re.search(r"\| +int2 .*\| [1-8]{4} ", out), "bars of a histogram become digits"
    assert "mod?le" in out
    assert run("inspect", checkpoint, encoding="utf-8")[1].count("█") > 8
    for verb in ("quantize", "chat"):
        code, out, err = run(verb, "--help")
        assert (code, err) == (0, "")
        assert "Options" in out


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "utf-8"])
def test_generated_text_is_printed_in_any_encoding(
    encoding: str, checkpoint: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = iter(["caf", "é ", "🐱", " 日本 ", "\udcff", "— “x”…"])
    monkeypatch.setattr("matquant.engine.engine.TextStream.push", lambda *_: next(said, ""))
    monkeypatch.setattr("matquant.engine.engine.TextStream.finish", lambda _: "")
    code, out, err = run("generate", checkpoint, "--prompt", "x", "--max-tokens", 8, "--threads", 1, encoding=encoding)
    assert code == 0
    assert "Traceback" not in err
    expected = {
        "ascii": 'caf? ? ?? ?- "x".',
        "latin-1": 'café ? ?? ?- "x".',
        "cp1252": "café ? ?? ?— “x”…",
        "utf-8": "café 🐱 日本 ?— “x”…",
    }
    assert out == expected[encoding] + "\n"


def test_errors_are_printed_in_any_encoding(run: Run) -> None:
    code, out, err = run("inspect", "né—🐱")
    assert (code, out) == (2, "")
    assert err == "error: n?-?: no such directory; give a checkpoint made by matquant quantize\n"
    assert run("frob", "é")[0] == 2


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_chat_and_generate_read_utf8_whatever_the_encoding(encoding: str, checkpoint: Path, run: Run) -> None:
    options = ("--max-tokens", 2, "--threads", 1)
    ids = matquant.Engine(checkpoint, threads=1).prompt_ids("«café 🐱» 🐱")
    for mark in (b"", b"\xef\xbb\xbf"):
        code, _, err = run("chat", checkpoint, *options, stdin=mark + "café 🐱\n".encode(), encoding=encoding)
        assert code == 0
        assert f"{len(ids)} + 2 tokens at int8" in err
    code, _, err = run(
        "generate", checkpoint, "--prompt", "-", *options, stdin="«café 🐱» 🐱".encode(), encoding=encoding
    )
    assert code == 0
    assert f"{len(ids)} + 2 tokens at int8" in err


def test_input_that_is_not_utf8_is_one_line(checkpoint: Path, run: Run) -> None:
    code, _, err = run("chat", checkpoint, "--threads", 1, stdin=b"caf\xe9\n")
    assert code == 2
    assert err.splitlines()[1:] == ["error: the input is not UTF-8 (invalid continuation byte at byte 3); convert it"]
    code, _, err = run("generate", checkpoint, "--prompt", "-", stdin=b"caf\xe9\n")
    assert (code, err) == (2, "error: standard input is not UTF-8 (invalid continuation byte at byte 3); convert it\n")


@pytest.mark.parametrize("missing", ["stdin", "stdout", "stderr"])
def test_streams_may_be_missing_or_not_files(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for stream in (None, io.StringIO("x")):
        monkeypatch.setattr(sys, missing, stream)
        accept_any_text()


class Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("before", "after"), [("ascii", "utf-8-sig"), ("latin-1", "latin-1"), ("utf-8", "utf-8")])
def test_a_terminal_keeps_its_encoding_unless_that_is_ascii(
    before: str, after: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stdin: Any = Terminal(io.BytesIO(b""), encoding=before)
    monkeypatch.setattr(sys, "stdin", stdin)
    accept_any_text()
    assert stdin.encoding == after
