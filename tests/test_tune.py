"""Tuning after nested GPTQ: every width gains, the codes stay nested, and a run repeats bit for bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import conftest
import matquant
from conftest import Interrupt
from matquant.core.grid import encode
from matquant.core.nest import CENTRE, slice_codes
from matquant.core.tensor import NestedTensor
from matquant.format.read import open_checkpoint
from matquant.hf.text import read_documents, token_stream
from matquant.hf_torch.loading import load_float, load_tokenizer
from matquant.methods.parts import tune
from matquant.methods.parts.fake import Grid, nest
from matquant.methods.parts.masters import encode_masters
from matquant.system.errors import InputError

RUN: dict[str, Any] = {"method": "gptq", "samples": 16, "seq_len": 32, "batch_size": 4, "scope": "linears"}
RUN |= {"tune": 30, "lr": 0.01}
WIDTHS = (8, 6, 4, 3, 2)


def run(model: Path, text: Path, out: Path, **changes: Any) -> tuple[Path, list[dict[str, Any]]]:
    """The checkpoint and its records."""
    records: list[dict[str, Any]] = []
    return conftest.quantize(model, out, text=[text], report=records.append, **{**RUN, **changes}), records


def run_plain(model: Path, text: Path, out: Path, **changes: Any) -> Path:
    """The checkpoint of the pass alone."""
    tuning = ("tune", "lr")
    return conftest.quantize(model, out, text=[text], **{n: RUN[n] for n in RUN if n not in tuning}, **changes)


def distances(model: Path, text: Path, directory: Path, widths: tuple[int, ...]) -> dict[int, float]:
    """Mean squared distance of a checkpoint's logits to the float model's."""
    tokens = torch.from_numpy(token_stream(read_documents([text]), load_tokenizer(model))[: 16 * 32]).reshape(16, 32)
    served, found = matquant.load(directory, dtype=torch.float32, kernels="none"), {}
    with torch.no_grad():
        expected = load_float(model, dtype=torch.float32)(tokens).logits
        for bits in widths:
            served.set_bits(bits)
            found[bits] = float((served(tokens).logits - expected).square().mean())
    return found


@pytest.mark.parametrize(("family", "lr"), [("llama", 0.01), pytest.param("qwen3_moe", 0.003, marks=pytest.mark.slow)])
def test_tuning_brings_every_width_nearer_to_the_float_model(
    family: str, lr: float, family_model: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    model = family_model(family)
    plain = run_plain(model, text_file, tmp_path / "plain")
    tuned, records = run(model, text_file, tmp_path / "tuned", lr=lr)
    assert [record["tuned"] for record in records] == [30, 30]
    for record in records:
        assert sum(record["loss"][str(b)] / record["loss_before"][str(b)] for b in WIDTHS) < len(WIDTHS)
        assert record["loss"]["2"] < record["loss_before"]["2"]
    before, after = (distances(model, text_file, directory, (4, 3, 2)) for directory in (plain, tuned))
    assert all(after[bits] < before[bits] for bits in before), (before, after)


@pytest.mark.parametrize(
    "changes",
    [
        {"group_size": 16, "affine": "none"},
        pytest.param({"group_size": 16}, marks=pytest.mark.slow),
        pytest.param({"symmetric": False}, marks=pytest.mark.slow),
    ],
)
def test_tuning_keeps_the_grid_it_was_given(
    changes: dict[str, Any], llama: Path, text_file: Path, tmp_path: Path
) -> None:
    plain = run_plain(llama, text_file, tmp_path / "plain", **changes)
    tuned, records = run(llama, text_file, tmp_path / "tuned", **changes)
    assert records[0]["loss"]["2"] < 0.95 * records[0]["loss_before"]["2"]
    path = "model.layers.0.mlp.up_proj"  # of the first block, which gets the same inputs in both
    before, after = (open_checkpoint(directory).nested(path) for directory in (plain, tuned))
    np.testing.assert_array_equal(after.scale, before.scale)
    np.testing.assert_array_equal(after.zero, before.zero)
    assert (after.codes != before.codes).any()
    assert set(after.slices) == set(before.slices)


def begun(grid: Grid, widths: tuple[int, ...]) -> tune._Weight:
    """A weight before its first step."""
    weight = torch.randn(12, 32, generator=torch.Generator().manual_seed(0))
    return tune._start(weight, nest(weight, grid), grid, widths)


GRIDS = [
    Grid(rule="prefix", group_size=group_size, symmetric=symmetric, affine=affine, sliced=(2, 3, 4))
    for group_size in (None, 16)
    for symmetric in (True, False)
    for affine in ("none", "refit")
] + [Grid(rule="prefix", group_size=16, zeros=CENTRE, sliced=(2, 3, 4))]


@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: f"{g.group_size}-{g.symmetric}-{g.affine}-{g.zeros}")
def test_tuning_starts_from_the_codes_and_affines_it_was_given(grid: Grid) -> None:
    weight = begun(grid if grid.affine != "none" else Grid(**{**vars(grid), "sliced": ()}), WIDTHS)
    nested = weight.nested()
    assert torch.equal(nested.codes, weight.start.codes)
    for bits in WIDTHS:
        torch.testing.assert_close(nested.read(bits), weight.start.read(bits), rtol=0, atol=2e-3)
    assert set(weight.learned.affines) == set(weight.start.slices)


def test_each_width_reads_its_own_master_as_far_as_narrower_ones_leave_it_free() -> None:
    """The definition, weight by weight: a code is moved to the nearest one with the bits of the narrower width."""
    weight = begun(GRIDS[1], WIDTHS)
    generator = torch.Generator().manual_seed(1)
    for master in weight.masters.values():
        master.add_(torch.randn(master.shape, generator=generator), alpha=0.3)
    codes = weight.nested().codes
    grid = weight.start.scale, weight.start.zero
    own = {bits: encode(master, *grid).flatten().tolist() for bits, master in weight.masters.items()}
    moved = 0
    for index, code in enumerate(codes.flatten().tolist()):
        expected = own[2][index]
        for bits, narrower in ((3, 2), (4, 3), (6, 4), (8, 6)):
            size = 2 ** (8 - narrower)
            inside = range(expected // size * size, expected // size * size + size)
            expected = min(inside, key=lambda place: abs(place - own[bits][index]))
            moved += expected != own[bits][index]
        assert code == expected
    assert moved > 100, "the comparison must be able to fail"
    assert torch.equal(slice_codes(codes, 2), slice_codes(encode(weight.masters[2], *grid), 2))
    assert torch.equal(encode_masters({2: weight.masters[2]}, weight.start)[0], encode(weight.masters[2], *grid))


def test_a_width_that_was_not_tuned_gets_the_affine_of_the_new_codes() -> None:
    weight = begun(GRIDS[1], (8, 4, 2))
    weight.masters[2].mul_(-1)
    assert set(weight.learned.affines) == {4, 2}
    tensor = tune._finish(weight, GRIDS[1])
    gap = (tensor.read(3) - weight.masters[8]).mean(1)
    stale = (weight.nested().read(3) - weight.masters[8]).mean(1)
    assert gap.abs().max() < 2e-3
    assert stale.abs().max() > 10 * gap.abs().max(), "the comparison must be able to fail"


def test_a_step_is_that_of_adam_in_units_of_the_row() -> None:
    generator = torch.Generator().manual_seed(0)
    tensor, unit = torch.randn(4, 8, generator=generator), 0.1 + torch.rand(4, 2, generator=generator)
    every = unit.repeat_interleave(4, dim=1)
    oracle = (tensor / every).clone().requires_grad_()
    adam = torch.optim.Adam([oracle], lr=0.1, betas=tune.BETAS, eps=tune.EPSILON)
    ours = tune.Adam([(tensor, unit)])
    for lr in (0.1, 0.07, 0.02):
        gradient = torch.randn(4, 8, generator=generator)
        tensor.grad, oracle.grad = gradient.clone(), gradient * every
        adam.param_groups[0]["lr"] = lr
        adam.step()
        ours.step(lr)
        assert tensor.grad is None
    torch.testing.assert_close(tensor, oracle.detach() * every)


def test_tuning_that_does_not_gain_is_dropped(llama: Path, text_file: Path, tmp_path: Path) -> None:
    plain = run_plain(llama, text_file, tmp_path / "plain", affine="none")
    wild, records = run(llama, text_file, tmp_path / "wild", tune=2, lr=1e3, affine="none", objective="8,6,5,4,3,2")
    assert records[0]["loss"] == records[0]["loss_before"]
    path = "model.layers.0.mlp.up_proj"
    np.testing.assert_array_equal(open_checkpoint(wild).nested(path).codes, open_checkpoint(plain).nested(path).codes)


@pytest.mark.parametrize("bits", [3, 4])
def test_a_dedicated_width_is_tuned_alone(bits: int, llama: Path, text_file: Path, tmp_path: Path) -> None:
    out, records = run(llama, text_file, tmp_path / "out", baseline_bits=bits, lr=0.004)
    assert all(record["loss"].keys() == {str(bits)} for record in records)
    assert all(record["loss"][str(bits)] < 0.95 * record["loss_before"][str(bits)] for record in records)
    tensor: NestedTensor = open_checkpoint(out).nested("model.layers.1.mlp.down_proj")
    step = 2 ** (8 - bits)
    assert (tensor.codes % step == step // 2).all()


@pytest.mark.slow
def test_a_tuned_run_resumed_at_a_block_ends_with_the_same_bits(llama: Path, text_file: Path, tmp_path: Path) -> None:
    options = {**RUN, "tune": 4, "text": [text_file]}
    whole = conftest.quantize(llama, tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        conftest.quantize(llama, tmp_path / "killed", report=Interrupt(print, 1), **options)
    with pytest.raises(InputError, match="--resume needs tune=4 as in the interrupted run, found 5"):
        conftest.quantize(llama, tmp_path / "killed", resume=True, **{**options, "tune": 5})
    resumed = conftest.quantize(llama, tmp_path / "killed", resume=True, **options)
    for file in ("model.safetensors", "matquant_slices.safetensors"):
        assert (whole / file).read_bytes() == (resumed / file).read_bytes()


@pytest.mark.slow
def test_bf16_tunes_too(llama: Path, text_file: Path, tmp_path: Path) -> None:
    _, records = run(llama, text_file, tmp_path / "out", autocast=True)
    assert records[0]["loss"]["2"] < records[0]["loss_before"]["2"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tune": -1}, "tune=-1; give a number of at least 0"),
        ({"tune": 0}, "--lr has no effect without --tune; add --tune STEPS"),
        ({"pull": 1.5}, "pull=1.5; give a number from 0 to 1"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"rule": "round"}, "tune=30 needs nested bins, which rule 'round' does not have; use rule 'prefix'"),
        (
            {"lr": 1e9},
            r"training of model.layers.0 diverged: its loss at \d bits is (nan|inf) at step 2 of 30; use a",
        ),
    ],
)
def test_what_cannot_be_tuned_is_refused(
    changes: dict[str, Any], message: str, llama: Path, text_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        run(llama, text_file, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()
