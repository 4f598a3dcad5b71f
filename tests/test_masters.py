"""A float master per width: confinement over all pairs of codes, gradients that stay with their width."""

from pathlib import Path
from typing import Any

import pytest
import torch

import conftest
from matquant.core.grid import encode
from matquant.core.nest import slice_codes
from matquant.format.read import open_checkpoint
from matquant.hf_torch.layers import select_linears
from matquant.hf_torch.loading import load_float
from matquant.methods import qat
from matquant.methods.parts import training
from matquant.methods.parts.fake import Grid, confine
from matquant.methods.parts.masters import release_blocked
from matquant.system.errors import InputError
from test_qat import RUN, masters_gradients, schedule

LOWERED = {"8": 0.95, "4": 0.95, "2": 0.8}
ALL = torch.arange(256, dtype=torch.uint8)


@pytest.mark.parametrize("narrow", range(1, 8))
def test_a_wide_code_goes_to_the_nearest_place_in_the_narrow_bin(narrow: int) -> None:
    """All 256 x 256 pairs."""
    first, second = ALL[:, None].expand(256, 256), ALL[None, :].expand(256, 256)
    codes, blocked = confine({narrow: first, 8: second})
    assert torch.equal(slice_codes(codes, narrow), slice_codes(first, narrow))
    size = 2 ** (8 - narrow)
    for bin_ in range(2**narrow):
        row = codes[bin_ * size].int()
        places = torch.arange(bin_ * size, (bin_ + 1) * size)
        nearest = (places[None, :] - ALL.int()[:, None]).abs().min(1).values
        assert torch.equal((row - ALL.int()).abs(), nearest)
    assert torch.equal(blocked[8].int(), (second.int() - codes.int()).sign())


def test_every_width_keeps_the_bits_of_all_narrower_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    encoded = {bits: torch.randint(0, 256, (64, 64), generator=generator).to(torch.uint8) for bits in (8, 6, 4, 3, 2)}
    codes, _ = confine(encoded)
    assert torch.equal(slice_codes(codes, 2), slice_codes(encoded[2], 2))
    for bits, wider in ((2, 3), (3, 4), (4, 6), (6, 8)):
        above, _ = confine({width: code for width, code in encoded.items() if width <= wider})
        below, _ = confine({width: code for width, code in encoded.items() if width <= bits})
        assert torch.equal(slice_codes(above, bits), slice_codes(below, bits))


def test_equal_masters_are_one_master(llama: Path) -> None:
    """At the first step nothing is held back, and the gradients of all masters add up to that of a single one."""
    grid = Grid(rule="prefix", affine="none")
    one, _ = masters_gradients(llama, "8,4,2", grid=grid)
    each, _ = masters_gradients(llama, "8,4,2", grid=grid, masters="each")
    for name, gradient in one.items():
        path = name.removesuffix("/weight")
        total = sum(each[f"{path}{width}/weight"] for width in ("", "/4", "/2"))
        torch.testing.assert_close(total, gradient, rtol=1e-4, atol=1e-6)


def test_the_gradient_of_a_width_stays_with_its_master(llama: Path) -> None:
    grid = Grid(rule="prefix", affine="none")
    each, _ = masters_gradients(llama, "8,4,2", grid=grid, masters="each")
    for bits, weight in ((4, 0.1), (2, 1.0)):
        alone, _ = masters_gradients(llama, str(bits), grid=grid)
        for name, gradient in alone.items():
            path = name.removesuffix("/weight")
            torch.testing.assert_close(each[f"{path}/{bits}/weight"], weight * gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("pull", [0.0, 0.5])
def test_what_is_held_back_pulls_the_narrower_master(pull: float, llama: Path) -> None:
    """One weight whose 8-bit master lies far above its int2 bin and whose gradient would raise it further."""
    model = load_float(llama, dtype=torch.float32)
    views, plan = select_linears(model, "ffn"), schedule(masters="each")
    grid = Grid(rule="prefix", affine="none")
    state = training.start(model, views, grid, plan, trained=(8, 2))
    path = next(iter(views))
    wide, narrow = state.masters[path], state.coarse[path][2]
    narrow[0, 0], wide[0, 0] = -0.5 * wide.abs().max(), 0.5 * wide.abs().max()
    nested = qat._nest(state, grid, ())[path]
    assert slice_codes(nested.codes, 2)[0, 0] == slice_codes(encode(narrow, nested.scale, nested.zero), 2)[0, 0]
    for master, value in ((wide, -2.0), (narrow, 1.0)):
        master.requires_grad_()
        master.grad = torch.full_like(master, value)
    release_blocked({8: wide, **state.coarse[path]}, nested, pull=pull)
    assert wide.grad is not None
    assert narrow.grad is not None
    assert (wide.grad[0, 0], narrow.grad[0, 0]) == (0.0, 1.0 - 2.0 * pull)
    assert (wide.grad[0, 1], narrow.grad[0, 1]) == (-2.0, 1.0)


def test_training_each_master_lowers_every_width(llama: Path, text_file: Path, tmp_path: Path) -> None:
    records: list[dict[str, Any]] = []
    options = {**RUN, "steps": 40, "lr": 3e-3, "masters": "each", "wide_lr": 0.5, "pull": 0.0}
    conftest.quantize(llama, tmp_path / "out", text=[text_file], objective="8,4,2", report=records.append, **options)
    assert all(records[-1]["loss"][bits] < share * records[0]["loss"][bits] for bits, share in LOWERED.items())


def test_wide_masters_learn_at_their_own_rate(llama: Path) -> None:
    model = load_float(llama, dtype=torch.float32)
    views, plan = select_linears(model, "ffn"), schedule(masters="each", wide_lr=0.25, learn_clip=False)
    state = training.start(model, views, Grid(rule="prefix", affine="none"), plan, trained=(8, 5, 2))
    factors = {
        group["params"][0].data_ptr(): group["factor"] for group in training.make_optimizer(state, plan).param_groups
    }
    path = next(iter(views))
    found = [
        factors[master.data_ptr()] for master in (state.masters[path], state.coarse[path][5], state.coarse[path][2])
    ]
    assert found == [0.25, 0.5, 1.0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"masters": "two"}, "masters='two' is not known; use one of one, each"),
        ({"masters": "each", "rule": "round"}, "masters='each' needs nested bins, not rule 'round'; use rule"),
        ({"pull": 2.0}, "pull=2.0; give a number from 0 to 1"),
        ({"freeze": -1}, "freeze=-1; give a number of at least 0"),
        ({"freeze": 4}, "freeze=4 needs a master for each width, found masters='one'; use masters='each'"),
        ({"freeze": 3, "masters": "each"}, "freeze=3 is not one of the trained widths, .8, 4, 2.; use one of them"),
        ({"freeze": 4, "masters": "each", "learn_clip": False}, "freeze=4 needs a fixed grid"),
    ],
)
def test_what_masters_cannot_do_is_refused(
    changes: dict[str, Any], message: str, llama: Path, text_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        conftest.quantize(llama, tmp_path / "out", text=[text_file], **{**RUN, **changes})


# Starting from a nested checkpoint ------------------------------------------------------------------------------------


@pytest.mark.parametrize("masters", ["one", "each"])
def test_training_starts_from_the_codes_of_a_checkpoint(
    masters: str, llama: Path, text_file: Path, tmp_path: Path
) -> None:
    """With a vanishing learning rate the codes and affines come out as they went in."""
    calibration: dict[str, Any] = {"samples": 8, "seq_len": 32, "text": [text_file]}
    first = conftest.quantize(llama, tmp_path / "first", method="gptq", **calibration)
    options: dict[str, Any] = {**RUN, "steps": 1, "lr": 1e-12, "objective": "8,4,2", "masters": masters}
    out = conftest.quantize(llama, tmp_path / "out", text=[text_file], start=first, **options)
    plain = conftest.quantize(llama, tmp_path / "plain", text=[text_file], **options)
    for path in open_checkpoint(first).shapes:
        before, after, other = (open_checkpoint(where).nested(path) for where in (first, out, plain))
        assert (before.codes == after.codes).mean() > 0.999
        assert (before.codes == other.codes).mean() < 0.9, "the comparison must be able to fail"
        for bits in (4, 2):
            assert abs(before.read(bits) - after.read(bits)).max() <= 2**-7 * abs(before.read(bits)).max()


def test_frozen_widths_keep_their_codes_and_learn_the_rest(llama: Path, text_file: Path, tmp_path: Path) -> None:
    calibration: dict[str, Any] = {"samples": 8, "seq_len": 32, "text": [text_file]}
    first = conftest.quantize(llama, tmp_path / "first", method="gptq", **calibration)
    options: dict[str, Any] = {**RUN, "lr": 3e-3, "objective": "8,6,4,2", "masters": "each", "start": first}
    out = conftest.quantize(llama, tmp_path / "out", text=[text_file], freeze=4, **options)
    free = conftest.quantize(llama, tmp_path / "free", text=[text_file], **options)
    for path in open_checkpoint(first).shapes:
        before, after, moved = (open_checkpoint(where).nested(path) for where in (first, out, free))
        assert (slice_codes(before.codes, 4) == slice_codes(after.codes, 4)).all()
        assert (slice_codes(before.codes, 4) != slice_codes(moved.codes, 4)).any(), (
            "the comparison must be able to fail"
        )
        assert (before.codes != after.codes).any(), "the low bits are trained"
        assert (before.scale == after.scale).all()
        assert all((before.affine(bits)[0] != after.affine(bits)[0]).any() for bits in (4, 2)), "affines are learned"


def test_a_start_that_does_not_fit_is_refused(llama: Path, text_file: Path, tmp_path: Path) -> None:
    first = conftest.quantize(llama, tmp_path / "first", method="rtn")
    run = {**RUN, "text": [text_file], "start": first}
    for changes, message in (
        ({"rule": "round"}, "has rule='prefix', this run needs 'round'; quantise it again with 'round'"),
        ({"group_size": 16}, "has group_size=None, this run needs 16; quantise it again with 16"),
        ({"baseline_bits": 2}, "has baseline_bits=8, this run needs 2; quantise it again with 2"),
        ({"scope": "all"}, "quantise different weights: model.layers.0.self_attn"),
    ):
        with pytest.raises(InputError, match=message):
            conftest.quantize(llama, tmp_path / "out", **{**run, **changes})
    with pytest.raises(InputError, match="--start does not work with method 'gptq', which starts from the float model"):
        conftest.quantize(llama, tmp_path / "out", method="gptq", text=[text_file], start=first, samples=8, seq_len=32)


@pytest.mark.parametrize("bits", [2, 3])
def test_a_dedicated_model_starts_from_its_codes_too(bits: int, llama: Path, text_file: Path, tmp_path: Path) -> None:
    calibration: dict[str, Any] = {"samples": 8, "seq_len": 32, "text": [text_file], "baseline_bits": bits}
    first = conftest.quantize(llama, tmp_path / "first", method="gptq", **calibration)
    options: dict[str, Any] = {**RUN, "steps": 1, "lr": 1e-12, "baseline_bits": bits}
    out = conftest.quantize(llama, tmp_path / "out", text=[text_file], start=first, **options)
    for path in open_checkpoint(first).shapes:
        before, after = (open_checkpoint(where).nested(path) for where in (first, out))
        same = slice_codes(before.codes, bits) == slice_codes(after.codes, bits)
        assert same.mean() > 0.98
