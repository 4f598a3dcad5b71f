"""Resuming an interrupted run: only the same run goes on, and only from work that is as it was left."""

import functools
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import conftest
from conftest import Interrupt
from matquant.methods import gptq, qat
from matquant.methods.parts.sealed import open_sealed, save_sealed
from matquant.system import interrupted
from matquant.system.errors import InputError

RUNS: dict[str, dict[str, Any]] = {  # method -> options of a run that is interrupted with some of its work finished
    "qat": {"seq_len": 16, "batch_size": 2, "steps": 3, "save_every": 1},
    "gptq": {"seq_len": 16, "samples": 4},
    "distill": {"seq_len": 16, "batch_size": 2, "samples": 4, "steps": 1, "tune": 0},
}
STOPS = {"qat": (qat, "train_step", 3), "gptq": (gptq, "_solve", 2), "distill": (qat, "train_step", 1)}
Resume = Callable[..., Path]


@pytest.fixture
def stopped(llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Resume]:
    """stopped(method): interrupt a run of a copy of the model, tmp_path/model; returns what continues it."""

    def stop(method: str) -> Resume:
        model = shutil.copytree(llama, tmp_path / "model")
        options = {"text": [text_file], "method": method, **RUNS[method]}
        run = functools.partial(conftest.quantize, model, tmp_path / "out", **options)
        module, name, call = STOPS[method]
        with monkeypatch.context() as patch:
            patch.setattr(module, name, Interrupt(getattr(module, name), call))
            with pytest.raises(KeyboardInterrupt):
                run()
        return functools.partial(run, resume=True)

    return stop


def contents(directory: Path) -> dict[str, bytes]:
    return {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


def assert_rejected(resume: Callable[[], Path], directory: Path, pattern: str) -> None:
    """The run is rejected in one line, and nothing below the directory has changed."""
    before = contents(directory)
    with pytest.raises(InputError, match=pattern) as caught:
        resume()
    assert "\n" not in str(caught.value)
    assert contents(directory) == before


def flip_bit(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1 << position % 8
    file.write_bytes(content)


# Another run ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", RUNS)
def test_resume_with_another_method_is_rejected_and_loses_nothing(
    method: str, stopped: Callable[[str], Resume], llama: Path, text_file: Path, tmp_path: Path
) -> None:
    resume = stopped(method)
    for other in ("rtn", "gptq", "omniquant", "qat", "distill"):
        if other != method:
            run = functools.partial(
                conftest.quantize, tmp_path / "model", tmp_path / "out", text=[text_file], method=other, resume=True
            )
            expected = f"^--resume needs method='{method}' as in the interrupted run, found '{other}'; "
            expected += "use the same settings, or"
            assert_rejected(run, tmp_path, expected)
            assert_rejected(functools.partial(run, overwrite=True), tmp_path, expected)
    shutil.copytree(llama, tmp_path / "other")
    if method != "distill":
        other_model = functools.partial(
            conftest.quantize, tmp_path / "other", tmp_path / "out", text=[text_file], method=method, **RUNS[method]
        )
        assert_rejected(
            functools.partial(other_model, resume=True),
            tmp_path,
            r"^--resume needs model=.*/model' as in the interrupted run, found '.*/other'; use",
        )
    if method != "distill":  # takes seconds
        resume()
        assert not (tmp_path / ".out.work").exists()


def test_a_run_interrupted_before_it_saved_anything_is_recognised(
    stopped: Callable[[str], Resume], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(STOPS, "qat", (qat, "train_step", 1))
    resume = stopped("qat")
    assert not (tmp_path / ".out.work" / "state.safetensors").exists()
    assert_rejected(
        functools.partial(resume, seed=1), tmp_path, "^--resume needs seed=0 as in the interrupted run, found 1;"
    )
    assert_rejected(
        functools.partial(resume, method="rtn"),
        tmp_path,
        "^--resume needs method='qat' as in the interrupted run, found 'rtn'",
    )
    resume()


def test_resume_with_other_text_or_another_start_is_rejected(
    stopped: Callable[[str], Resume], llama: Path, text_file: Path, tmp_path: Path
) -> None:
    resume = stopped("qat")
    (tmp_path / "more.txt").write_text(text_file.read_text() + "More.")
    assert_rejected(
        functools.partial(resume, text=[tmp_path / "more.txt"]), tmp_path,
        "^--resume needs the text of the interrupted run, found other text; "
        "use the same text, or use --overwrite to start again$",
    )  # fmt: skip
    start = conftest.quantize(llama, tmp_path / "start", method="rtn")
    with pytest.raises(InputError, match=r"^--resume needs method='qat' as in the interrupted run, found 'rtn, qat'"):
        resume(start=start)
    with pytest.raises(
        InputError, match=r"^--resume needs the --start checkpoint of the interrupted run, found another; use"
    ):
        interrupted.check_same_run({"start": "a"}, {"start": "b"})


@pytest.mark.parametrize("method", RUNS)
def test_work_of_an_earlier_version_is_rejected_in_one_sentence(
    method: str, stopped: Callable[[str], Resume], tmp_path: Path
) -> None:
    resume = stopped(method)
    (record,) = [file for file in (tmp_path / ".out.work").rglob("run.json") if ".2.work" not in str(file)]
    for damage in ("", "{}", '{"format": 2, "run": {}}', "\0"):
        record.write_text(damage)
        assert_rejected(resume, tmp_path, rf"^{re.escape(str(record))} is damaged; use --overwrite to start again$")
    record.unlink()
    expected = "was left by an earlier version of matquant and cannot be continued; finish it with that version, or"
    assert_rejected(resume, tmp_path, expected)
    assert_rejected(functools.partial(resume, method="rtn"), tmp_path, expected)


def test_what_a_killed_run_left_unfinished_is_deleted(tmp_path: Path) -> None:
    work = tmp_path / ".out.work"
    interrupted.claim(work, {"seed": 0}, resume=False)
    (work / ".1.0badcafe-1-00000000.partial").mkdir()
    (work / ".1.0badcafe-1-00000000.partial" / "config.json").write_text("{}")
    (work / ".state.safetensors.partial").write_text("half")
    interrupted.claim(work, {"seed": 0}, resume=True)
    assert [file.name for file in work.iterdir()] == ["run.json"]
    (work / "run.json").unlink()
    (work / ".run.json.partial").write_text("half")  # killed before it had begun
    interrupted.claim(work, {"seed": 1}, resume=True)
    assert [file.name for file in work.iterdir()] == ["run.json"]


def test_a_rejected_start_of_blocks_keeps_an_interrupted_run(stopped: Callable[[str], Resume], tmp_path: Path) -> None:
    stopped("gptq")
    run = functools.partial(conftest.quantize, tmp_path / "model", tmp_path / "out", method="gptq", overwrite=True)
    (tmp_path / "short.txt").write_text("too short")
    assert_rejected(functools.partial(run, text=[tmp_path / "short.txt"]), tmp_path, "the text has 10 tokens")


# A source model that changed ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", RUNS)
def test_resume_notices_a_source_model_that_changed_in_place(
    method: str, stopped: Callable[[str], Resume], tmp_path: Path
) -> None:
    resume, model = stopped(method), tmp_path / "model"
    weights, config = model / "model.safetensors", model / "config.json"
    for file, change in ((weights, functools.partial(flip_bit, weights, weights.stat().st_size - 5)),
                         (config, lambda: config.write_text(config.read_text() + "\n"))):  # fmt: skip
        whole, times = file.read_bytes(), file.stat()
        change()
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # the hash tells it
        assert_rejected(
            resume, tmp_path, rf"^{file} has changed since the interrupted run began; restore the model, or"
        )
        file.write_bytes(whole)
    (model / "model.safetensors.index.json").write_text("{}")
    assert_rejected(resume, tmp_path, r"model\.safetensors\.index\.json is new since the interrupted run began")
    (model / "model.safetensors.index.json").unlink()
    (model / "README.md").write_text("not read")
    (model / "generation_config.json").rename(tmp_path / "kept")
    assert_rejected(resume, tmp_path, r"generation_config\.json is missing since the interrupted run began")
    (tmp_path / "kept").rename(model / "generation_config.json")
    if method != "distill":
        resume()  # other times, the same contents


def test_large_files_are_told_by_size_time_and_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupted, "HASHED_BYTES", 99)
    monkeypatch.setattr(interrupted, "HEADER_BYTES", 10)
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(100))
    os.utime(file, ns=(0, 123))
    whole = interrupted.describe_files(tmp_path)
    for content, time_ns in ((bytes(101), 123), (bytes(100), 124), (b"\1" + bytes(99), 123)):
        file.write_bytes(content)
        os.utime(file, ns=(0, time_ns))
        assert interrupted.describe_files(tmp_path) != whole
    file.write_bytes(bytes(100))
    os.utime(file, ns=(0, 123))
    assert interrupted.describe_files(tmp_path) == whole


# Damaged work ---------------------------------------------------------------------------------------------------------


def test_every_flipped_bit_of_a_sealed_file_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "state.safetensors"
    tensors = {"a": torch.arange(3.0), "b": torch.zeros((), dtype=torch.bfloat16), "c": torch.zeros(0, 2)}
    save_sealed(file, tensors, {"step": "3", "fingerprint": '{"seed": 0}'})
    whole = file.read_bytes()
    for position in range(len(whole)):
        flip_bit(file, position)
        try:
            with open_sealed(file, remedy="delete it") as (stored, metadata):
                same = all(torch.equal(stored.get_tensor(name), tensors[name]) for name in tensors)
                assert metadata == {"step": "3", "fingerprint": '{"seed": 0}'}
                assert same, position  # a space of the header became another kind of space
        except InputError as error:
            assert str(error).endswith("; delete it"), position  # noqa: PT017
        file.write_bytes(whole)
    assert len(whole) > 300


@pytest.mark.parametrize(("method", "names", "remedy"), [
    ("qat", ["state.safetensors"], "use --overwrite to start again"),
    ("gptq", ["blocks/00000.safetensors"], "delete it to solve this block again"),
    ("distill", ["*/1/model.safetensors", "*/1/config.json"], "delete the finished stage .*/1 to make it again"),
])  # fmt: skip
def test_one_flipped_bit_in_finished_work_is_named(
    method: str, names: list[str], remedy: str, stopped: Callable[[str], Resume], tmp_path: Path
) -> None:
    resume = stopped(method)
    for name in names:
        (file,) = (tmp_path / ".out.work").glob(name)
        position = file.stat().st_size - 9
        flip_bit(file, position)
        assert_rejected(resume, tmp_path, rf"^{re.escape(str(file))} is damaged.*; {remedy}$")
        flip_bit(file, position)


def test_a_damaged_log_of_training_is_named(stopped: Callable[[str], Resume], tmp_path: Path) -> None:
    resume, log = stopped("qat"), tmp_path / ".out.work" / "training.jsonl"
    for damage in (b"\xff\n", b"{}\n", b"[]\n"):
        log.write_bytes(damage)
        assert_rejected(resume, tmp_path, r"training\.jsonl is damaged; delete it to continue without its records$")
    log.unlink()
    out = resume()
    assert [json.loads(line)["step"] for line in (out / "training.jsonl").read_text().splitlines()] == [3]
