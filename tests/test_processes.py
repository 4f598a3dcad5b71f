"""Several processes give what one gives: training, one-shot methods and evaluation, saved states, and errors."""

import functools
import math
import os
import signal
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load as load_parts

import conftest
import matquant
import processes
from matquant.format.read import open_checkpoint
from matquant.system import ranks

TRAINED: dict[str, Any] = {
    "method": "qat",
    "scope": "linears",
    "objective": "8,4,2,8->2,fp->8;4;2",
    "masters": "each",
    "hidden": 1.0,
    "checkpoint_activations": True,
    "steps": 5,
    "save_every": 4,
    "batch_size": 4,
    "seq_len": 16,
    "lr": 1e-4,
}


def train(model: Path, text: Path, out: Path, *, stop: int | None = 5, **options: Any) -> None:
    """Train, and be interrupted once step ``stop`` is done; the last state saved is that of step 4."""

    def report(record: Mapping[str, Any]) -> None:
        if record.get("step") == stop:
            raise KeyboardInterrupt

    conftest.quantize(model, out, **{"text": [text], "report": report, **TRAINED, **options})


def interrupted(function: Callable[[], Any]) -> None:
    with pytest.raises(KeyboardInterrupt):
        function()


def saved(out: Path) -> dict[str, torch.Tensor]:
    """The tensors of a saved state, in whichever form."""
    work = out.with_name(f".{out.name}.work")
    if (work / "state.safetensors").is_file():
        return load_file(work / "state.safetensors")
    reader = FileSystemReader(work / "state")
    found = reader.read_metadata().state_dict_metadata
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in found.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch.distributed is not used
        load_parts(tensors, storage_reader=reader, no_dist=True)
    return tensors


def assert_close(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor], *, tolerance: float) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        gap = float((found[name].double() - tensor.double()).abs().max())
        if not gap <= tolerance:
            raise AssertionError(f"{name} differs by {gap:.1e}")


def test_two_processes_train_as_one(llama: Path, text_file: Path, tmp_path: Path) -> None:
    interrupted(functools.partial(train, llama, text_file, tmp_path / "one"))
    processes.run(functools.partial(train, llama, text_file, tmp_path / "two"), 2)
    one, two = saved(tmp_path / "one"), saved(tmp_path / "two")
    assert any(name.endswith("/2/weight") for name in one)
    assert_close(two, one, tolerance=1e-6)
    with pytest.raises(AssertionError, match="differs"):
        assert_close({name: tensor + 2e-6 for name, tensor in two.items()}, one, tolerance=1e-6)


RESUMED = {"steps": 8, "save_every": 2, "batch_size": 6}


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [(3, 2), (1, 2), (2, 1), (2, 2)])
def test_any_number_of_processes_continues_a_saved_state(
    first: int, then: int, llama: Path, text_file: Path, tmp_path: Path
) -> None:
    def start(out: Path, count: int, **options: Any) -> None:
        work = functools.partial(train, llama, text_file, out, **{**RESUMED, **options})
        interrupted(work) if count == 1 else processes.run(work, count)

    start(tmp_path / "whole", then, stop=7)
    start(tmp_path / "out", first, stop=5)  # the state of step 4 is there
    start(tmp_path / "out", then, stop=7, resume=True)
    same = first == then
    assert_close(saved(tmp_path / "out"), saved(tmp_path / "whole"), tolerance=0.0 if same else 1e-6)


@pytest.mark.slow
def test_a_killed_process_ends_the_run_and_all_continue_bit_identically(
    llama: Path, text_file: Path, tmp_path: Path
) -> None:
    options = {**RESUMED, "stop": None}

    def killed() -> None:
        def report(record: Mapping[str, Any]) -> None:
            if record.get("step") == 5 and ranks.rank() == 1:
                os.kill(os.getpid(), signal.SIGKILL)

        conftest.quantize(llama, tmp_path / "out", text=[text_file], report=report, **{**TRAINED, **RESUMED})

    processes.run(functools.partial(train, llama, text_file, tmp_path / "whole", **options), 2)
    found = processes.run_all(killed, 2)
    assert found[0][1][0] == "LostProcessError", found[0]
    assert not (tmp_path / "out").exists()
    processes.run(functools.partial(train, llama, text_file, tmp_path / "out", resume=True, **options), 2)
    assert_same_checkpoint(tmp_path / "out", tmp_path / "whole")


def assert_same_checkpoint(found: Path, wanted: Path) -> None:
    for file in sorted(wanted.glob("*.safetensors")):
        assert (found / file.name).read_bytes() == file.read_bytes(), file.name


def assert_similar_checkpoint(found: Path, wanted: Path, *, share: float) -> None:
    """At most this share of the codes differ, and other tensors by at most 1e-5."""
    one, two = open_checkpoint(wanted), open_checkpoint(found)
    assert list(one.shapes) == list(two.shapes)
    assert sorted(one.plain_names()) == sorted(two.plain_names())
    differing = sum(int((one.nested(path).codes != two.nested(path).codes).sum()) for path in one.shapes)
    if differing > share * sum(math.prod(shape) for shape in one.shapes.values()):
        raise AssertionError(f"{differing} codes differ")
    for name in one.plain_names():
        np.testing.assert_allclose(
            two.array(name).astype(np.float64), one.array(name).astype(np.float64), rtol=0, atol=1e-5
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"train_rest": True, "scope": "ffn"}),
        ("llama", {"masters": "one", "affine": "refit", "learn_clip": False, "accumulate": 2, "mix": 0.5}),
        ("qwen3_moe", {"masters": "one"}),
        ("qwen3_moe", {"scope": "ffn"}),
    ],
)
def test_two_processes_write_the_checkpoint_of_one(
    family: str, options: dict[str, Any], family_model: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    model = family_model(family)
    for count, name in ((1, "one"), (2, "two")):
        work = functools.partial(train, model, text_file, tmp_path / name, stop=None, **options)
        work() if count == 1 else processes.run(work, count)
    assert_similar_checkpoint(tmp_path / "two", tmp_path / "one", share=1e-3)


@pytest.mark.slow
def test_two_processes_start_from_a_checkpoint(llama: Path, text_file: Path, tmp_path: Path) -> None:
    common: dict[str, Any] = {"scope": "all", "group_size": 16}
    matquant.quantize(llama, tmp_path / "start", method="gptq", samples=8, seq_len=32, text=[text_file], **common)
    options = {**common, "start": tmp_path / "start", "objective": "8,4,2,fp->8;4;2", "freeze": 2}
    for count, name in ((1, "one"), (2, "two")):
        work = functools.partial(train, llama, text_file, tmp_path / name, stop=None, **options)
        work() if count == 1 else processes.run(work, count)
    assert_similar_checkpoint(tmp_path / "two", tmp_path / "one", share=1e-3)
