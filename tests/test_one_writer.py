"""One run at a time for each output: a lock that dies with its process, private names, nothing replaced unasked."""

import contextlib
import dataclasses
import errno
import functools
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import conftest
import matquant
from matquant import cli
from matquant.export import FORMATS, export
from matquant.format import write as write_module
from matquant.format.manifest import MANIFEST
from matquant.format.verify import verify_checkpoint
from matquant.measure.run import evaluate_checkpoint
from matquant.planning.run import run as plan
from matquant.report.page import write_report
from matquant.system import files as files_module
from matquant.system import locks
from matquant.system.errors import InputError
from matquant.system.files import replace_when_done, write_atomically
from matquant.system.locks import hold

TINY: dict[str, Any] = {"seq_len": 16, "batch_size": 2}
METHODS: dict[str, dict[str, Any]] = {
    "rtn": {},
    "gptq": {**TINY, "samples": 4},
    "omniquant": {**TINY, "samples": 4, "steps": 1},
    "qat": {**TINY, "steps": 1},
    "distill": {**TINY, "samples": 4, "steps": 1, "tune": 1},
}


@pytest.fixture(scope="module")
def nested(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, not to be changed."""
    return conftest.quantize(llama, tmp_path_factory.mktemp("one") / "nested", method="rtn")


def in_another_thread(function: Callable[..., Any], *args: Any, **options: Any) -> str:
    """The message of the InputError that a function ends with in another thread."""
    with ThreadPoolExecutor(1) as pool:
        error = pool.submit(function, *args, **options).exception()
    assert isinstance(error, InputError), error
    return str(error)


def before(function: Callable[..., Any], action: Callable[[], Any]) -> Callable[..., Any]:
    """The function, after an action at its first call."""
    waiting = [action]

    def wrapped(*args: Any, **options: Any) -> Any:
        if waiting:
            waiting.pop()()
        return function(*args, **options)

    return wrapped


def names(directory: Path) -> list[str]:
    return sorted(file.name for file in directory.iterdir())


# Two writers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_second_run_of_an_output_is_rejected_and_the_first_one_is_whole(
    method: str, llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, messages = tmp_path / "out", []
    run = functools.partial(conftest.quantize, llama, out, text=[text_file])

    def intrude() -> None:
        for other in ({"resume": True}, {"overwrite": True}, {"method": "rtn"}, {"method": "gptq", "resume": True}):
            messages.append(in_another_thread(run, **{"method": method, **METHODS[method], **other}))

    monkeypatch.setattr(write_module, "_write_tensors", before(write_module._write_tensors, intrude))
    run(method=method, **METHODS[method])
    expected = f"another run is writing {out} (process {os.getpid()}); wait until it has ended, or use another path"
    assert messages == [expected] * 4
    verify_checkpoint(out)
    assert names(tmp_path) == ["out"]


def test_a_run_inside_a_run_of_the_same_output_is_rejected(llama: Path, text_file: Path, tmp_path: Path) -> None:
    run = functools.partial(conftest.quantize, llama, tmp_path / "out", method="qat", text=[text_file])
    options = METHODS["qat"]
    with pytest.raises(InputError, match="another run is writing"):
        run(report=lambda record: run(overwrite=True, **options), **options)
    run(resume=True, **options)
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("to", ["dense", "gguf", "matquant"])
def test_an_export_holds_its_output(to: str, nested: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exporter, messages = FORMATS[to], []
    out = tmp_path / f"out{exporter.suffix}"

    def intrude() -> None:
        messages.append(in_another_thread(export, nested, out, to=to, overwrite=True))

    monkeypatch.setitem(FORMATS, to, dataclasses.replace(exporter, write=before(exporter.write, intrude)))
    export(nested, out, to=to)
    assert "another run is writing" in messages[0]
    assert names(tmp_path) == [out.name]


def test_a_saved_model_holds_its_output(nested: Path, tmp_path: Path) -> None:
    model = matquant.load(nested)
    with hold(tmp_path / "out"):
        assert "another run is writing" in in_another_thread(model.save_pretrained, tmp_path / "out")
    model.save_pretrained(tmp_path / "out")
    assert names(tmp_path) == ["out"]


def test_two_measurements_into_one_file_are_rejected_before_any_work(nested: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    runs: list[Callable[[], Any]] = [
        functools.partial(evaluate_checkpoint, nested, bits=[8], json_file=out),
        functools.partial(plan, nested, out, strategy="pyramid", bits_per_weight=5.0),
        functools.partial(write_report, nested, out, records={}),
    ]
    with hold(out):
        for run in runs:
            assert "another run is writing" in in_another_thread(run)
    assert names(tmp_path) == []


def test_the_lock_of_a_killed_process_locks_nothing(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    code = f"from matquant.system.locks import hold\nwith hold({str(out)!r}):\n print('held', flush=True)\n input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(InputError, match=rf"another run is writing {out} \(process {process.pid}\); wait until"):
            hold(out).__enter__()
        process.kill()
    assert names(out.parent) == [".out.lock"]
    with hold(out):
        pass
    assert names(out.parent) == []


def no_locks(*_arguments: Any) -> Any:
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def test_on_a_file_system_without_locks_the_file_itself_is_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fcntl.flock", no_locks)
    file = tmp_path / ".out.lock"
    with hold(tmp_path / "out"):
        message = in_another_thread(lambda: hold(tmp_path / "out").__enter__())
    assert message == (
        f"another run is writing {tmp_path / 'out'} according to {file} (process {os.getpid()}); "
        "delete that file if the run has ended"
    )
    assert names(tmp_path) == []
    file.write_text("")  # of a run that was killed before it signed
    with pytest.raises(InputError, match=r"\(an unknown process\); delete that file if the run has ended"):
        hold(tmp_path / "out").__enter__()
    assert names(tmp_path) == [".out.lock"]


def test_a_lock_that_its_owner_deletes_meanwhile_is_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / ".out.lock"
    monkeypatch.setattr(locks, "_lock", before(locks._lock, file.unlink))
    with hold(tmp_path / "out"):
        assert "another run is writing" in in_another_thread(lambda: hold(tmp_path / "out").__enter__())
    assert names(tmp_path) == []


# Nothing is replaced unasked, nothing is left ------------------------------------------------------------------------


@pytest.mark.parametrize("supported", [True, False])
def test_an_output_that_appeared_meanwhile_is_not_replaced(
    supported: bool, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not supported:
        monkeypatch.setattr("matquant.system.files._renameat2", lambda *_arguments: errno.ENOSYS)
    out, file = tmp_path / "out", tmp_path / "out.gguf"

    def appear() -> None:
        out.mkdir()
        (out / "thesis.tex").write_text("years of work")

    def write_late() -> None:
        with replace_when_done(file, overwrite=False) as partial:
            partial.write_text("mine")
            file.write_text("years of work")

    with monkeypatch.context() as patch:
        patch.setattr(write_module, "write_manifest", before(write_module.write_manifest, appear))
        with pytest.raises(InputError, match="exists; use another -o, or --overwrite to replace it"):
            conftest.quantize(llama, out, method="rtn")
    with pytest.raises(InputError, match="exists; use another -o, or --overwrite to replace it"):
        write_late()
    assert (out / "thesis.tex").read_text() == file.read_text() == "years of work"
    assert (names(tmp_path), names(out)) == (["out", "out.gguf"], ["thesis.tex"])
    (tmp_path / "new").mkdir()
    with pytest.raises(InputError, match="exists; use another -o, or --overwrite to replace it"):
        files_module._rename_to_new(tmp_path / "new", out)  # what appears after the last check
    assert names(out) == ["thesis.tex"]


def test_a_checkpoint_that_became_something_else_meanwhile_is_not_replaced(
    nested: Path, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shutil.copytree(nested, tmp_path / "out")
    lose = before(write_module.write_manifest, (out / MANIFEST).unlink)
    monkeypatch.setattr(write_module, "write_manifest", lose)
    with pytest.raises(InputError, match="is not a matquant checkpoint and will not be replaced"):
        conftest.quantize(llama, out, method="rtn", overwrite=True)
    assert names(out) == sorted(set(names(nested)) - {MANIFEST})
    assert names(tmp_path) == ["out"]


def test_what_dead_writers_left_is_deleted_and_what_a_living_one_writes_is_not(tmp_path: Path) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    mark, others = locks.HOST_MARK, [".a.json.lock.json", ".ba.json.partial", ".a.json.x-1-y.partial"]
    for name in (f".a.json.{mark}-{dead.pid}-00000000.partial", f".a.json.{mark}-{os.getpid()}-0000abcd.partial"):
        (tmp_path / name).write_text("half")
    for name in others:
        (tmp_path / name).write_text("mine")
    write_atomically(tmp_path / "a.json", b"{}\n")
    assert names(tmp_path) == sorted([*others, f".a.json.{mark}-{os.getpid()}-0000abcd.partial", "a.json"])
    with hold(tmp_path / "a.json"):  # no other writer can be at work now
        assert names(tmp_path) == sorted([*others, ".a.json.lock", "a.json"])


def test_files_get_the_permissions_of_the_umask(nested: Path, llama: Path, text_file: Path, tmp_path: Path) -> None:
    with umask(0o027):
        out = conftest.quantize(llama, tmp_path / "out", method="gptq", text=[text_file], **METHODS["gptq"])
        export(nested, tmp_path / "x.gguf", to="gguf")
        export(nested, tmp_path / "dense", to="dense")
    with umask(0o022):
        write_atomically(tmp_path / "record.json", b"{}")
        matquant.load(nested).save_pretrained(tmp_path / "saved")
    found = {file.relative_to(tmp_path): stat.S_IMODE(file.stat().st_mode) for file in tmp_path.rglob("*")}
    assert out.is_dir()
    for file, mode in found.items():
        directory = (tmp_path / file).is_dir()
        private = file.parts[0] in ("out", "x.gguf", "dense")
        assert mode == (0o777 if directory else 0o666) & ~(0o027 if private else 0o022), file


@contextlib.contextmanager
def umask(value: int) -> Iterator[None]:
    kept = os.umask(value)
    try:
        yield
    finally:
        os.umask(kept)


# Places ---------------------------------------------------------------------------------------------------------------

IMPOSSIBLE = {
    "/": "is the root directory; use the name of a new file or directory",
    "file/x": "is not a directory; use another path",
    "file/x/y": "is not a directory; use another path",
    "dangling": "is a link to nowhere, which does not exist; delete the link",
    "loop": "is a link to loop, which does not exist; delete the link",
    "loop/x": "cannot be written",
    "/dev/null": "is neither a file nor a directory and will not be replaced; use another path",
    "/proc/x": "cannot be written (No such file or directory); use another path",
    "x" * 300: "cannot be written (File name too long); use another path",
    "..": "exists; use another -o, or --overwrite to replace it",
    ".": "exists; use another -o, or --overwrite to replace it",
    "file": "exists; use another -o, or --overwrite to replace it",
}


@pytest.mark.parametrize("place", IMPOSSIBLE, ids=lambda place: place[:10])
def test_an_impossible_output_is_one_sentence_before_any_work(
    place: str, llama: Path, nested: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    Path("file").write_text("mine")
    Path("dangling").symlink_to("nowhere")
    Path("loop").symlink_to("loop")
    monkeypatch.setattr("matquant.methods.prepare.load_float", None)
    verbs = [("quantize", llama, "--method", "rtn"), ("export", nested, "--to", "dense")]
    if "exists" not in IMPOSSIBLE[place]:
        verbs += [("plan", nested, "--strategy", "pyramid", "--bits-per-weight", "5"), ("report", nested)]
    for verb in verbs:
        monkeypatch.setattr(sys, "argv", ["matquant", *map(str, verb), "-o", place])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        assert (stop.value.code, out, err.strip().count("\n")) == (2, "", 0), err
        assert IMPOSSIBLE[place] in err
        assert names(tmp_path / "here") == ["dangling", "file", "loop"]
        assert names(tmp_path) == ["here"]


def test_an_output_that_is_a_link_to_a_directory_stays_one(llama: Path, nested: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    conftest.quantize(llama, tmp_path / "link", method="rtn", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    verify_checkpoint(tmp_path / "real")
    with hold(tmp_path / "real"):
        message = in_another_thread(conftest.quantize, llama, tmp_path / "link", method="rtn", overwrite=True)
    assert message.startswith(f"another run is writing {tmp_path / 'real'}")
    assert names(tmp_path) == ["link", "real"]


def test_names_as_long_as_a_file_system_takes_work(tmp_path: Path) -> None:
    file = tmp_path / ("ä" * 127 + "x")
    with hold(file):
        write_atomically(file, b"{}")
    assert names(tmp_path) == [file.name]
