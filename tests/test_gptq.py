"""Nested GPTQ against its slow oracle, its one Hessian against the layer's inputs, its errors against bad input."""

import dataclasses
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import conftest
import matquant
import oracle_gptq as oracle
from cases import each
from matquant.calibration import calibration_text
from matquant.core.grid import fit_grid
from matquant.core.nest import CENTRE, COMPANDED, UNIFORM, slice_affine
from matquant.format.read import open_checkpoint
from matquant.format.verify import verify_checkpoint
from matquant.hf.text import data_sha256, read_documents, token_stream
from matquant.hf_torch.layers import decoder_layers, linear_views
from matquant.hf_torch.layerwise import embed
from matquant.hf_torch.loading import load_float, load_tokenizer
from matquant.measure.likelihood import log_perplexity
from matquant.methods.gptq import nested_gptq
from matquant.methods.parts import compensation
from matquant.methods.parts.affines import clip_groups, refit_affine
from matquant.methods.parts.blocks import Block
from matquant.methods.parts.compensation import nested_codes, sweep
from matquant.methods.parts.fake import Grid
from matquant.methods.parts.hessians import collect_hessians, inverse_factor
from matquant.methods.parts.share import deal
from matquant.system.errors import InputError

N, K = 6, 24
CALIBRATION: dict[str, Any] = {"method": "gptq", "samples": 8, "seq_len": 32, "batch_size": 4}


def correlated(seed: int, columns: int = K) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [N, K] and a Hessian of correlated inputs, float64."""
    random = np.random.default_rng(seed)
    inputs = random.normal(size=(4 * columns, columns)) @ random.normal(size=(columns, columns))
    return torch.from_numpy(random.normal(size=(N, columns))), torch.from_numpy(oracle.hessian(inputs))


def grids(weight: torch.Tensor, widths: tuple[int, ...], rule: str, group_size: int | None) -> dict[int, Any]:
    """A symmetric 8-bit grid and the affines of its slices, float64."""
    scale, zero = fit_grid(weight.float(), group_size=group_size, gamma=0.8, beta=0.8)
    return {bits: slice_affine(scale.double(), zero.double(), bits, rule=rule) for bits in widths}


@pytest.mark.parametrize("group_size", [None, 8])
@pytest.mark.parametrize("rule", ["prefix", "round", "extra"])
@pytest.mark.parametrize("widths", [(8, 4, 2), (8, 6, 4, 3, 2), (8, 3), (8, 2), (8,)])
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_codes_equal_an_exhaustive_search_over_all_256(
    seed: int, widths: tuple[int, ...], rule: str, group_size: int | None
) -> None:
    weight, hessian = correlated(seed)
    affines = grids(weight, widths, rule, group_size)
    weights = {bits: [1.0, 0.3, 0.1][index % 3] for index, bits in enumerate(widths)}
    codes = nested_codes(weight, inverse_factor(hessian, damp=0.01, reorder=False), affines, weights, rule=rule)
    expected = oracle.nested_codes(
        weight.numpy(),
        oracle.damped(hessian.numpy(), 0.01),
        {bits: (scale.numpy(), zero.numpy()) for bits, (scale, zero) in affines.items()},
        weights,
        rule,
        group_size or K,
    )
    np.testing.assert_array_equal(codes.numpy(), expected)
    wrong = nested_codes(weight, inverse_factor(hessian, damp=0.5, reorder=False), affines, weights, rule=rule)
    assert (wrong.numpy() != expected).any(), "the comparison must be able to fail"


@each("descends", [False, True])
@each(
    "widths, rule, grid",
    [
        ((8, 6, 4, 3, 2), "prefix", UNIFORM),
        ((8, 6, 4, 3, 2), "prefix", COMPANDED),
        ((8, 4, 2), "round", UNIFORM),
        ((8, 4, 2), "extra", UNIFORM),
        ((3,), "prefix", COMPANDED),
        ((8,), "prefix", UNIFORM),
    ],
)
@each("dtype", [torch.float32, torch.float64])
def test_a_gpu_chooses_the_codes_of_native_code(
    dtype: torch.dtype, widths: tuple[int, ...], rule: str, grid: str, descends: bool
) -> None:
    """The columns in torch, here on the CPU, and native ones: the same codes and the same changes to compensate."""
    weight, hessian = (part.to(dtype) for part in correlated(3))
    weight[0, 1], weight[1, 2] = 40.0, 0.0  # beyond every grid; halfway between two codes
    affines = grids(weight, widths, rule, 8)
    order = torch.randperm(K, generator=torch.Generator().manual_seed(0))
    reading = compensation._reading(
        weight, affines, {bits: 0.5**bits for bits in widths}, rule=rule, grid=grid, order_K=order
    )
    values = weight[:, order].expand(len(widths), -1, -1) * (hessian.diagonal().mean() if descends else 1)
    now, codes = slice(0, K), torch.full(weight.shape, 2 ** widths[0] - 2, dtype=torch.uint8)
    expected_codes = codes.clone()
    expected = compensation._solve_in_torch(reading, values, hessian, expected_codes, now, descends=descends)
    changes = compensation._solve(reading, values, hessian, codes, now, descends=descends)
    assert torch.equal(codes, expected_codes)
    assert len(codes.unique()) > 3, "the comparison must be able to fail"
    torch.testing.assert_close(changes, expected, rtol=1e-4 if dtype == torch.float32 else 1e-12, atol=1e-4)


@each("columns", [24, 160])  # 160: more than one block of columns compensated together
@each("bits", [2, 3, 4, 8])
@each("reorder", [False, True])
def test_a_dedicated_width_is_the_gptq_of_the_paper(bits: int, reorder: bool, columns: int) -> None:
    weight, hessian = correlated(bits, columns)
    scale, zero = (part.double() for part in fit_grid(weight.float(), bits=bits, symmetric=False))
    factor = inverse_factor(hessian, damp=0.01, reorder=reorder)
    codes = nested_codes(weight, factor, {bits: (scale, zero)}, {bits: 1.0}, rule="prefix")
    order = factor.order_K.numpy()
    expected = oracle.gptq_codes(
        weight.numpy()[:, order],
        oracle.damped(hessian.numpy(), 0.01)[np.ix_(order, order)],
        scale.numpy(),
        zero.numpy(),
        bits,
        columns,
    )
    np.testing.assert_array_equal(codes.numpy()[:, order], expected)


@pytest.mark.parametrize("kind", [UNIFORM, COMPANDED])
def test_the_largest_weight_of_a_long_row_is_not_clipped_away_for_the_narrow_widths(kind: str) -> None:
    random = np.random.default_rng(0)
    rows, columns = np.arange(8), random.integers(0, 1536, 8)
    values = random.normal(size=(8, 1536))
    values[rows, columns] = 40.0
    weight = torch.from_numpy(values).float()
    grid = Grid(rule="prefix", group_size=None, affine="refit", zeros=CENTRE, sliced=(2, 3, 4), kind=kind)
    tensor = clip_groups(weight, torch.ones(1536), grid, {8: 10.0, 4: 2.2, 2: 1.0}, "weight")
    np.testing.assert_allclose(tensor.read(8).numpy()[rows, columns], 40.0, atol=40 / 127)


@pytest.mark.parametrize("group_size", [None, 8])
def test_refitted_affines_are_the_normal_equations_solution(group_size: int | None) -> None:
    weight, hessian = correlated(1)
    noise = torch.from_numpy(np.random.default_rng(0).normal(size=(N, K)))
    codes = (2 * weight + noise + 3.5).round().clamp(0, 7)
    fallback = tuple(part.double() for part in fit_grid(weight.float(), bits=3, group_size=group_size, symmetric=False))
    scale, zero = refit_affine(weight, codes, hessian, fallback=fallback)
    expected_scale, expected_zero = oracle.refit_affine(weight.numpy(), codes.numpy(), hessian.numpy(), group_size or K)
    usable = (expected_scale > 2**-20).all(1)
    assert usable.any()
    np.testing.assert_allclose(scale.numpy()[usable], expected_scale[usable], rtol=2**-8)  # stored with 8 bits
    np.testing.assert_allclose(
        (scale * zero).numpy()[usable], (expected_scale * expected_zero)[usable], rtol=0.02, atol=0.02
    )


def fitted_scales(positions: torch.Tensor, weight: torch.Tensor, hessian: torch.Tensor, group_size: int) -> np.ndarray:
    """The scales [N, G] of positions [N, K] that minimise d H d^T: D^T H D s = D^T H w, one column of D a group."""
    found = np.zeros((N, K // group_size))
    for row in range(N):
        design = np.zeros((K, K // group_size))
        for column in range(K):
            design[column, column // group_size] = float(positions[row, column])
        left = design.T @ hessian.numpy() @ design
        found[row] = np.linalg.solve(left, design.T @ hessian.numpy() @ weight[row].numpy())
    return found


@pytest.mark.parametrize("group_size", [None, 8])
def test_refitted_scales_about_the_centre_are_the_normal_equations_solution(group_size: int | None) -> None:
    weight, hessian = correlated(1)
    noise = torch.from_numpy(np.random.default_rng(0).normal(size=(N, K)))
    codes = (2 * weight + noise + 3.5).round().clamp(0, 7)
    fallback = (
        torch.full((N, K // (group_size or K)), 9.0).double(),
        torch.full((N, K // (group_size or K)), 3.5).double(),
    )
    scale, zero = refit_affine(weight, codes, hessian, fallback=fallback, fits_zero=False)
    assert bool((zero == 3.5).all())
    expected = fitted_scales(codes - 3.5, weight, hessian, group_size or K)
    usable = (expected > 2**-20).all(1)
    assert usable.any()
    np.testing.assert_allclose(scale.numpy()[usable], expected[usable], rtol=2**-8)  # stored with 8 bits
    own, _ = refit_affine(weight, codes, hessian, fallback=fallback)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(own.numpy()[usable], expected[usable], rtol=2**-8)


@each("kind", [UNIFORM, COMPANDED])
@each("group_size", [None, 8])
@each("symmetric", [True, False])
def test_the_8_bit_scale_is_the_best_for_the_chosen_codes(kind: str, group_size: int | None, symmetric: bool) -> None:
    if kind == COMPANDED and not symmetric:
        return
    weight, hessian = correlated(2)
    grid = Grid(rule="prefix", group_size=group_size, symmetric=symmetric, sliced=(2, 4), kind=kind)
    lambdas = {8: 3.0, 4: 2.0, 2: 1.0}
    tensor = nested_gptq(weight.float(), hessian.float(), grid, lambdas)
    zero = tensor.zero.repeat_interleave(group_size or K, dim=1)
    expected = fitted_scales(tensor.positions(8) - zero, weight, hessian, group_size or K)
    np.testing.assert_allclose(tensor.scale.numpy(), expected, rtol=2**-7)  # stored with 8 bits, if not worse for it
    shared = dataclasses.replace(grid, affine="none")  # all widths have this one, which clipping chose for them
    start = clip_groups(weight.float(), hessian.diagonal().float(), shared, lambdas, "weight")
    found = nested_gptq(weight.float(), hessian.float(), shared, lambdas)
    np.testing.assert_array_equal(found.scale.numpy(), start.scale.numpy())


@each("rule", ["prefix", "round", "extra"])
@each("group_size", [None, 8])
@each("symmetric", [True, False])
def test_every_width_is_better_than_rounding_in_the_norm_of_the_hessian(
    rule: str, group_size: int | None, symmetric: bool
) -> None:
    weight, hessian = (part.float() for part in correlated(3))
    grid = Grid(rule=rule, group_size=group_size, symmetric=symmetric, sliced=(2, 3, 4))
    weights = {8: 1.0, 4: 1.0, 3: 1.0, 2: 1.0}
    ours = nested_gptq(weight, hessian, grid, weights)
    identity = torch.eye(K)
    plain = nested_gptq(weight, identity, grid, weights)
    total = {
        name: sum(oracle.output_error(weight.numpy(), tensor.read(bits).numpy(), hessian.numpy()) for bits in weights)
        for name, tensor in (("ours", ours), ("plain", plain))
    }
    assert total["ours"] < total["plain"]


def test_an_indefinite_hessian_is_damped_until_it_is_not() -> None:
    hessian = torch.eye(8, dtype=torch.float64)
    hessian[0, 1] = hessian[1, 0] = 1.05
    factor = inverse_factor(hessian, damp=0.01)
    assert factor.damp == pytest.approx(0.1)
    with pytest.raises(InputError, match="not positive definite even with damping 1; give more text"):
        inverse_factor(torch.eye(8) + 9 * (torch.ones(8, 8) - torch.eye(8)), damp=0.01)
    with pytest.raises(InputError, match="its inputs are not usable"):
        inverse_factor(torch.full((4, 4), torch.nan), damp=0.01)


def test_columns_without_input_are_rounded_to_nearest() -> None:
    weight, hessian = correlated(5)
    hessian[:, 3] = hessian[3, :] = 0
    affines = grids(weight, (8,), "prefix", None)
    codes = nested_codes(weight, inverse_factor(hessian, damp=1e-6), affines, {8: 1.0}, rule="prefix")
    scale, zero = affines[8]
    assert torch.equal(codes[:, 3].double(), torch.floor(weight[:, 3:4] / scale + zero + 0.5).clamp(0, 255)[:, 0])


# The whole model --------------------------------------------------------------------------------------------------


def quantize(model: Path, out: Path, text: Path, **changes: Any) -> Path:
    return conftest.quantize(model, out, text=[text], **{**CALIBRATION, **changes})


SHAPES = ["llama", "gemma3", "opt", "qwen3_moe"]  # plain, norms about each part, biases and positions, experts
MORE = ["mistral", "gemma2", "qwen2", "qwen3", "phi3", "gpt_neox", "falcon"]


@pytest.mark.parametrize("family", [*SHAPES, *(pytest.param(family, marks=pytest.mark.slow) for family in MORE)])
def test_every_family_is_solved_block_by_block(
    family: str, family_model: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    directory = family_model(family)
    out = quantize(directory, tmp_path / "out", text_file, scope="all", objective="8,4")
    verify_checkpoint(out)
    checkpoint = open_checkpoint(out)
    assert (checkpoint.spec.method, checkpoint.spec.widths) == ("gptq", (8, 4))
    stream = token_stream(read_documents([text_file]), load_tokenizer(directory))[:1000]
    reference = log_perplexity(load_float(directory, dtype=torch.float32), stream, context=32)
    served = log_perplexity(matquant.load(out, dtype=torch.float32, kernels="none"), stream, context=32)
    assert served == pytest.approx(reference, rel=0.02)


# In gptj attention and feed-forward read the same tensor; a linear layer of deepseek_v3 reads [B, 1, T, K].
@pytest.mark.parametrize("family", ["llama", "gptj", "deepseek_v3"])
def test_feed_forward_inputs_are_divided_by_the_fourth_root_of_the_mean_square_of_what_the_layer_returns(
    family: str, family_model: Callable[[str], Path]
) -> None:
    model = load_float(family_model(family), dtype=torch.float32)
    (hidden,), calls = embed(model, [torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(1))])
    hidden[:, 0] *= 100  # a token as long as the first one is in real models
    name, module = decoder_layers(model)[0]
    views = {path: view for path, view in linear_views(model).items() if path.startswith(f"{name}.")}
    seen: dict[str, np.ndarray] = {}
    for path in views:

        def keep(_: Any, args: tuple[torch.Tensor, ...], path: str = path) -> None:
            seen[path] = args[0].numpy()

        model.get_submodule(path).register_forward_pre_hook(keep)
    share = deal(2, 2, steps=False, ordered=False)
    found = collect_hessians(
        Block(index=0, count=1, name=name, module=module, views=views, inputs={8: [hidden]}, share=share,
              call=calls[0], config=model.config)
    )  # fmt: skip
    with torch.no_grad():
        outputs = calls[0](module, hidden).numpy()
    lengths = np.sqrt((outputs**2).mean(axis=-1, keepdims=True))
    assert lengths.max() > 10 * lengths.min()
    for path, inputs in seen.items():
        rows = inputs if "attn" in path else inputs / lengths**0.25
        rows = rows.reshape(-1, rows.shape[-1])
        hessian = found.of[found.leaders[path]].numpy()
        np.testing.assert_allclose(hessian, rows.T @ rows, rtol=1e-3, atol=1e-5 * np.abs(hessian).max(), err_msg=path)


def test_the_same_run_gives_the_same_bits_and_another_text_others(llama: Path, text_file: Path, tmp_path: Path) -> None:
    first = quantize(llama, tmp_path / "a", text_file)
    second = quantize(llama, tmp_path / "b", text_file)
    other = quantize(llama, tmp_path / "c", text_file, seed=1)
    weights = [(out / "model.safetensors").read_bytes() for out in (first, second, other)]
    assert weights[0] == weights[1] != weights[2]


def test_calibration_text_that_is_too_small_says_how_much_is_needed(
    llama: Path, text_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        InputError, match=r"samples=9999 sequences of 32 tokens need 319,969 tokens, the text has [\d,]+; "
    ):
        quantize(llama, tmp_path / "out", text_file, samples=9999)
    with pytest.raises(InputError, match=r"the Hessian of \S+down_proj needs at least 48 calibration tokens, found 32"):
        quantize(llama, tmp_path / "out", text_file, samples=1)
    assert not (tmp_path / "out").exists()


def test_what_gptq_cannot_do_is_refused(llama: Path, text_file: Path, tmp_path: Path) -> None:
    for changes, message in (
        ({"objective": "8,4,2,8->2"}, "method 'gptq' does not support distillation"),
        ({"affine": "learned"}, "--affine learned needs a method that trains, found method 'gptq'"),
        ({"damp": 0.0}, "damp=0.0"),
        (
            {"steps": 3},
            r"method 'gptq' has no option 'steps'; did you mean 'sweeps'\? "
            "It has samples, seq_len, batch_size, damp, sweeps, tune, lr, pull, ",
        ),
    ):
        with pytest.raises(InputError, match=message):
            quantize(llama, tmp_path / "out", text_file, **changes)


def test_without_text_it_uses_the_calibration_text_of_the_package(llama: Path, tmp_path: Path) -> None:
    made = verify_checkpoint(conftest.quantize(llama, tmp_path / "out", method="gptq", samples=8, seq_len=32))
    tokenizer = load_tokenizer(llama)
    assert made.spec.data_sha256 == data_sha256(token_stream(calibration_text(), tokenizer))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_dedicated_baseline_is_served_at_its_width(bits: int, llama: Path, text_file: Path, tmp_path: Path) -> None:
    out = quantize(llama, tmp_path / "out", text_file, baseline_bits=bits)
    nested = open_checkpoint(out).nested("model.layers.0.mlp.up_proj")
    assert len(np.unique(nested.codes)) <= 2**bits


@each("rule", ["prefix", "round", "extra"])
@each("columns", [24, 160])
def test_a_sweep_never_raises_the_summed_error(rule: str, columns: int) -> None:
    weight, hessian = correlated(7, columns)
    weights = {8: 1.0, 4: 0.3, 2: 0.1}
    affines = grids(weight, (8, 4, 2), rule, None)
    damped = torch.from_numpy(oracle.damped(hessian.numpy(), 0.01))
    codes = torch.full(weight.shape, 128, dtype=torch.uint8)  # a bad start

    def cost(codes: torch.Tensor) -> float:
        total = 0.0
        for bits, factor in weights.items():
            scale, zero = (part.numpy() for part in affines[bits])
            read = oracle.read_nested(codes.numpy(), bits, rule, (scale, zero), columns)
            total += factor * oracle.output_error(weight.numpy(), read, damped.numpy())
        return total

    costs = [cost(codes)]
    for _ in range(4):
        codes = sweep(weight, codes, damped, affines, weights, rule=rule)
        costs.append(cost(codes))
    assert costs[1] < 0.5 * costs[0]
    assert all(after <= before * (1 + 1e-12) for before, after in pairwise(costs))
