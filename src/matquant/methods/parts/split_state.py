"""Training whose masters, moments and weights are split by rows among processes (hf_torch/sharded.py), and its state.

Codes, scales and zero-points of a row depend on that row only. So masters, clips, scales, zero-points and AdamW's
moments are plain tensors of a process's rows; sliced weights are written into its rows of the model's parameters, and
gradients come back as rows. What is global: the batch (each process takes its sequences of it), the sums of losses, the
gradient norm, and whether all numbers are finite.

The state is saved with torch.distributed.checkpoint in ``work/state``, each process its rows, so that any number of
processes can continue it. It becomes the state in one rename, after every process has written and hashed its files.
"""

import contextlib
import copy
import dataclasses
import json
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load as load_parts
from torch.distributed.checkpoint.state_dict_saver import save as save_parts
from torch.distributed.tensor import DTensor, Shard

from matquant.core.tensor import NestedTensor
from matquant.distributed.collect import exchange, gather_rows, held_rows, on_first, own_rows, row_counts, together
from matquant.distributed.nested import cut_rows, gather_nested
from matquant.hf_torch import Model
from matquant.hf_torch.sharded import own_views, split, split_rows
from matquant.hf_torch.views import View
from matquant.methods.parts.fake import Grid
from matquant.methods.parts.job import Job
from matquant.methods.parts.sealed import open_sealed
from matquant.methods.parts.training import STATE, State, restore, save
from matquant.options.qat import Schedule
from matquant.system import ranks
from matquant.system.errors import InputError
from matquant.system.files import explain_full_disk, json_bytes, move_into_place, sha256, sync
from matquant.system.interrupted import check_same_run

SPLIT = "state"  # the folder of a state that several processes wrote
SEAL = "seal.json"
REMEDY = "use --overwrite to start again"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """The models of a training run, and which of their rows this process holds."""

    model: Model
    teacher: Model | None  # the float model, if it teaches
    views: Mapping[str, View]  # path -> weight in this process's rows of the parameters
    counts: Mapping[str, tuple[int, ...]]  # path -> rows of the weight that each process holds


def open_training(job: Job, schedule: Schedule, *, taught: bool) -> Training:
    """Return the models to train and to learn from: the job's, or this process's rows of them."""
    counts = split_rows(job.views, job.model)
    if ranks.count() == 1:
        teacher = copy.deepcopy(job.model) if taught else None
        return Training(model=job.model, teacher=teacher, views=job.views, counts=counts)
    check_batch(schedule.batch_size, accumulate=schedule.accumulate)
    parts = [split(job.model, job.read_rows, device=job.device, autocast=schedule.autocast) for _ in range(1 + taught)]
    return Training(
        model=parts[0],
        teacher=parts[1] if taught else None,
        views=own_views(job.views, job.model),
        counts=counts,
    )


def check_batch(batch_size: int, *, accumulate: int) -> None:
    """Raise InputError if a process would have none of a batch's sequences."""
    if batch_size < ranks.count():
        same = "" if accumulate == 1 else f"; a step has --accumulate {accumulate} times as many sequences"
        raise InputError(
            f"--batch-size {batch_size} leaves some of {ranks.count()} processes without a sequence; use at least "
            f"{ranks.count()}{same}"
        )


def keep_rest(job: Job, training: Training, state: State) -> None:
    """Give the first process's ``job.model`` the trained parameters that are not quantised, whole."""
    if ranks.count() == 1:
        return
    for name, own in state.rest.items():
        rows = training.model.get_parameter(name).shape[0]
        whole = gather_rows(own.detach(), row_counts(rows))
        if ranks.leads():
            module, _, leaf = name.rpartition(".")
            setattr(job.model.get_submodule(module), leaf, torch.nn.Parameter(whole.cpu()))


def gather_all(
    own: Iterator[tuple[str, NestedTensor]], training: Training, grid: Grid, views: Mapping[str, View]
) -> Iterator[tuple[str, NestedTensor]]:
    """Yield every nested tensor whole, in every process, from the rows that each process yields.

    views: all weights, of all processes, in their order.
    """
    if ranks.count() == 1:
        yield from own
        return
    path_of_next, part = next(own)
    like = part
    for path, view in views.items():
        held = training.counts[path]
        if path == path_of_next:
            yield path, gather_nested(part, held)
            path_of_next, part = next(own, ("", part))
        else:  # another process's expert
            yield path, gather_nested(_no_rows(like, view.shape[1], grid), held)


def _no_rows(like: NestedTensor, columns: int, grid: Grid) -> NestedTensor:
    """Return a nested tensor of 0 rows and this many columns, with the dtypes and widths of ``like``."""
    none = cut_rows(like, slice(0, 0))
    groups = 1 if grid.group_size is None else columns // grid.group_size

    def empty(tensor: torch.Tensor, width: int = groups) -> torch.Tensor:
        return tensor.new_empty((0, width))

    slices = {bits: (empty(scale), empty(zero)) for bits, (scale, zero) in none.slices.items()}
    return dataclasses.replace(
        none, codes=empty(none.codes, columns), scale=empty(none.scale), zero=empty(none.zero), slices=slices
    )


# ------------------------------------------------------------------------------------------------------ the saved state


def save_state(
    training: Training, state: State, optimizer: torch.optim.Optimizer, work: Path, mark: Mapping[str, Any]
) -> None:
    """Save the state: one file, or of several processes a folder; the other form is deleted."""
    if ranks.count() > 1:
        _save_split(training, state, optimizer, work, mark)
    else:
        save(state, optimizer, work, mark)
        shutil.rmtree(work / SPLIT, ignore_errors=True)


def restore_state(
    training: Training, state: State, optimizer: torch.optim.Optimizer, work: Path, mark: Mapping[str, Any]
) -> None:
    """Continue from the state that any number of processes saved, if there is one.

    InputError naming the first setting that differs from the run that wrote it, or if the state is damaged, or not the
    same for all processes.
    """
    if not _restore_split(training, state, optimizer, work, mark) and on_first((work / STATE).is_file):
        if ranks.count() == 1:
            restore(state, optimizer, work, mark)
        else:
            _restore_whole(training, state, optimizer, work, mark)


def _save_split(
    training: Training, state: State, optimizer: torch.optim.Optimizer, work: Path, mark: Mapping[str, Any]
) -> None:
    """Write every process's rows of everything that the next step depends on; all processes succeed, or none."""
    partial, done = work / f"{SPLIT}.partial", work / SPLIT
    on_first(lambda: _make_empty(partial))
    with _explained(partial), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        save_parts(_tensors(training, state, optimizer), storage_writer=FileSystemWriter(partial, sync_files=True))
    hashes = _hashes(partial)
    seal = {"step": state.step, "fingerprint": mark, "files": hashes}

    def commit() -> None:
        with explain_full_disk(done):
            (partial / SEAL).write_bytes(json_bytes(seal))
            for file in (partial / SEAL, partial):
                sync(file)
            move_into_place(partial, done)
            shutil.rmtree(partial, ignore_errors=True)
            (work / STATE).unlink(missing_ok=True)  # of one process, from which this run continued

    on_first(commit)


def _restore_split(
    training: Training, state: State, optimizer: torch.optim.Optimizer, work: Path, mark: Mapping[str, Any]
) -> bool:
    """Continue from the state of several processes; return whether there is one."""
    seals = exchange(together(lambda: _read_seal(work / SPLIT)))
    if any(seal != seals[0] for seal in seals):
        raise InputError(
            f"the processes found different saved states in {work}; use an -o that all machines of the run share"
        )
    seal = seals[0]
    if seal is None:
        return False
    check_same_run(seal["fingerprint"], mark)
    if _hashes(work / SPLIT) != seal["files"]:
        raise InputError(f"{work / SPLIT} is damaged; {REMEDY}")
    reader = FileSystemReader(work / SPLIT)
    saved = set(reader.read_metadata().state_dict_metadata)
    for name, tensor in state.named():
        found = {}
        if f"{name}//exp_avg" in saved:
            found = {"step": torch.zeros((), device=tensor.device)}
            found |= {key: torch.zeros_like(tensor, requires_grad=False) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[tensor] = found
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a single process needs no torch.distributed
        load_parts(_tensors(training, state, optimizer), storage_reader=reader, no_dist=ranks.count() == 1)
    state.step = int(seal["step"])
    return True


def _restore_whole(
    training: Training, state: State, optimizer: torch.optim.Optimizer, work: Path, mark: Mapping[str, Any]
) -> None:
    """Continue from the state of a single process, each process with its rows of it."""
    with open_sealed(work / STATE, remedy=REMEDY) as (file, metadata), torch.no_grad():
        check_same_run(json.loads(metadata["fingerprint"]), mark)
        names = set(file.keys())
        for name, tensor in state.named():
            rows = _rows(training, name)
            tensor.copy_(file.get_slice(name)[rows])
            moments = [key for key in names if key.startswith(f"{name}//")]
            optimizer.state[tensor] = {
                key.rpartition("//")[2]: (
                    file.get_slice(key)[rows] if file.get_slice(key).get_shape() else file.get_tensor(key)
                ).to(tensor.device)
                for key in moments
            }
        state.step = int(metadata["step"])


def _rows(training: Training, name: str) -> slice:
    """Return which rows of a trained tensor this process holds."""
    path, _, kind = name.partition("/")
    if kind == "rest":
        return own_rows(training.model.get_parameter(path).shape[0])
    return held_rows(training.counts[path])


def _tensors(training: Training, state: State, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return masters, learned tensors and moments by name, as parts of tensors that are split by rows."""
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in state.named():
        tensors[name] = _as_part(training, name, tensor)
        for key, value in optimizer.state[tensor].items():
            tensors[f"{name}//{key}"] = _as_part(training, name, value) if value.ndim else value
    return tensors


def _as_part(training: Training, name: str, own: torch.Tensor) -> torch.Tensor:
    """Return this process's rows as a DTensor; a tensor that one process holds whole stays as it is."""
    path, _, kind = name.partition("/")
    if ranks.count() == 1:
        return own.detach()
    rows = training.model.get_parameter(path).shape[0] if kind == "rest" else sum(training.counts[path])
    if kind != "rest" and max(training.counts[path]) == rows:
        return own.detach()
    shape = torch.Size((rows, *own.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    mesh = next(iter(training.model.parameters())).device_mesh
    return DTensor.from_local(own.detach(), mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


@contextlib.contextmanager
def _explained(target: Path) -> Iterator[None]:
    """Turn a process's failure to write, of which all processes hear, into an InputError in all of them."""
    try:
        yield
    except CheckpointException as error:
        rank, (failure, _) = next(iter(sorted(error.failures.items())))
        with explain_full_disk(target):
            if isinstance(failure, OSError):
                raise failure from None
        raise InputError(f"{target} was not written by process {rank} ({failure}); use another path") from None


def _hashes(folder: Path) -> dict[str, str]:
    """Return file name -> sha256 of the files of a saved state; each process reads some of them."""
    names = on_first(lambda: sorted(file.name for file in folder.iterdir() if file.name != SEAL))
    own = together(lambda: {name: sha256(folder / name) for name in names[ranks.rank() :: ranks.count()]})
    return {name: value for found in exchange(own) for name, value in found.items()}


def _read_seal(folder: Path) -> dict[str, Any] | None:
    """Return what is recorded about a saved state; None if there is none."""
    if not (folder / SEAL).is_file():
        return None
    try:
        seal = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        return {"step": int(seal["step"]), "fingerprint": dict(seal["fingerprint"]), "files": dict(seal["files"])}
    except (ValueError, KeyError, TypeError, RecursionError):
        raise InputError(f"{folder / SEAL} is damaged; {REMEDY}") from None
