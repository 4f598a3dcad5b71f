"""The GPTQ oracles, held to what must be true of them by construction. The package is tested elsewhere, against them.

N out features, K in features, G groups, T tokens.
"""

import functools
import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import oracle
import oracle_gptq as gptq
from cases import each

Floats = gptq.Floats
ROWS, COLUMNS, TOKENS = 6, 24, 200
WIDTHS = range(1, 9)
LAMBDAS: tuple[Mapping[int, float], ...] = (
    {8: 1.0, 4: 1.0, 2: 1.0},
    {8: 0.1, 4: 0.1, 2: 1.0},
    {8: 1.0, 6: 2.0, 3: 0.5},
)

each_rule = each("rule", oracle.RULES)
each_seed = each("seed", range(4))
each_group_size = each("group_size", [COLUMNS, 8, 1])


def problem(seed: int, *, columns: int = COLUMNS, damp: float = 0.01) -> tuple[Floats, Floats]:
    """Random weights, and the damped Hessian of inputs whose channels are correlated and of unlike size."""
    random = np.random.default_rng(seed)
    mixing_KK = random.normal(size=(columns, columns)) * np.exp(-4 * np.arange(columns) / columns)
    x_TK = random.normal(size=(TOKENS, columns)) @ mixing_KK.T + random.normal(size=columns)
    weight_NK = random.normal(size=(ROWS, columns)) / np.sqrt(columns)
    return weight_NK, gptq.damped(gptq.hessian(x_TK), damp)


def symmetric_grid(weight_NK: Floats, group_size: int, *, bits: int = 8) -> gptq.Affine:
    """A little more than max|w| of each group at both ends; the zero of a width below 8 is between two codes.

    With max|w| itself the weight -max|w| would stand at 0.5, half way between two codes, and the last bit would decide.
    """
    largest_NG = 1.003 * np.abs(weight_NK).reshape(len(weight_NK), -1, group_size).max(-1)
    zero = 128.0 if bits == 8 else (2**bits - 1) / 2
    return largest_NG * 2 / (2**bits - 1), np.full(largest_NG.shape, zero)


def sliced(affine: gptq.Affine, rule: str) -> dict[int, gptq.Affine]:
    """The affines of all widths that follow from the 8-bit grid."""
    return {bits: gptq.slice_affine(*affine, bits, rule) for bits in WIDTHS}


def summed_error(
    weight_NK: Floats,
    codes_NK: np.ndarray,
    hessian_KK: Floats,
    affines: Mapping[int, gptq.Affine],
    weights: Mapping[int, float],
    rule: str,
    group_size: int,
) -> float:
    """sum_r lambda_r * output_error_r."""
    total = 0.0
    for bits, weight in weights.items():
        read_NK = gptq.read_nested(codes_NK, bits, rule, affines[bits], group_size)
        total += weight * gptq.output_error(weight_NK, read_NK, hessian_KK)
    return total


# The parts ------------------------------------------------------------------------------------------------------------


def test_hessian_gives_twice_the_mean_squared_output_error() -> None:
    random = np.random.default_rng(0)
    x_TK, weight_NK, other_NK = (random.normal(size=(rows, 5)) for rows in (40, 3, 3))
    squared = ((x_TK @ (weight_NK - other_NK).T) ** 2).sum() / 40
    assert gptq.output_error(weight_NK, other_NK, gptq.hessian(x_TK)) == pytest.approx(2 * squared)


def test_damping_adds_a_share_of_the_mean_diagonal() -> None:
    assert np.array_equal(gptq.damped(np.diag([1.0, 3.0]), 0.5), np.diag([2.0, 4.0]))


@each_rule
def test_both_oracles_slice_alike(rule: str) -> None:
    for bits in WIDTHS:
        assert gptq.slice_table(bits, rule).tolist() == oracle.slice_code_table(bits, rule), bits
        scale_NG, zero_NG = gptq.slice_affine(np.array([[0.5]]), np.array([[128.0]]), bits, rule)
        positions = scale_NG * (gptq.slice_table(bits, rule) - zero_NG) / 0.5 + 128
        assert positions[0].tolist() == oracle.slice_value_table(bits, rule), bits


@each_rule
def test_code_values_are_the_reads_of_all_codes(rule: str) -> None:
    scale, zero = np.array([[0.25]]), np.array([[1.5]])
    for bits in WIDTHS:
        codes_NK = np.arange(256, dtype=np.uint8)[None]
        read_NK = gptq.read_nested(codes_NK, bits, rule, (scale, zero), 256)
        assert np.array_equal(gptq.code_values(scale[:, 0], zero[:, 0], bits, rule), read_NK), bits


def test_compensation_is_the_best_move_of_the_later_columns() -> None:
    """Fixing one weight off by 1, no move of the others costs less than the one GPTQ makes."""
    _, hessian_KK = problem(0)
    move_K = np.zeros(COLUMNS)
    move_K[0] = -1.0
    move_K[1:] = -gptq.compensation(gptq.inverse(hessian_KK), 0)
    assert (hessian_KK @ move_K)[1:] == pytest.approx(np.zeros(COLUMNS - 1), abs=1e-9 * np.trace(hessian_KK))


def test_inverse_without_a_column_is_the_inverse_of_the_rest() -> None:
    _, hessian_KK = problem(1)
    rest_KK = gptq.without_column(gptq.inverse(hessian_KK), 0)
    assert rest_KK[1:, 1:] == pytest.approx(np.linalg.inv(hessian_KK[1:, 1:]), rel=1e-8)
    assert np.abs(rest_KK[0]).max() < 1e-9 * np.abs(rest_KK).max()


# GPTQ -----------------------------------------------------------------------------------------------------------------


@each_seed
@each_group_size
@each("bits", [2, 4, 8])
def test_elimination_and_cholesky_give_identical_codes(seed: int, group_size: int, bits: int) -> None:
    weight_NK, hessian_KK = problem(seed)
    affine = symmetric_grid(weight_NK, group_size, bits=bits)
    plain = gptq.gptq_codes(weight_NK, hessian_KK, *affine, bits, group_size)
    cholesky = gptq.gptq_codes_cholesky(weight_NK, hessian_KK, *affine, bits, group_size)
    assert np.array_equal(plain, cholesky)


@each_seed
def test_gptq_without_correlations_is_round_to_nearest(seed: int) -> None:
    weight_NK, _ = problem(seed)
    affine = symmetric_grid(weight_NK, COLUMNS, bits=3)
    diagonal_KK = np.diag(np.random.default_rng(seed).uniform(1, 9, COLUMNS))
    expected = gptq.rtn_codes(weight_NK, *affine, 3, COLUMNS)
    assert np.array_equal(gptq.gptq_codes(weight_NK, diagonal_KK, *affine, 3, COLUMNS), expected)
    assert np.array_equal(gptq.gptq_codes_cholesky(weight_NK, diagonal_KK, *affine, 3, COLUMNS), expected)


@each_seed
@each("bits", [2, 3, 4, 8])
def test_gptq_beats_round_to_nearest_on_correlated_inputs(seed: int, bits: int) -> None:
    weight_NK, hessian_KK = problem(seed)
    affine = symmetric_grid(weight_NK, COLUMNS, bits=bits)
    errors = [
        gptq.output_error(weight_NK, gptq.read(codes_NK, *affine, COLUMNS), hessian_KK)
        for codes_NK in (
            gptq.gptq_codes(weight_NK, hessian_KK, *affine, bits, COLUMNS),
            gptq.rtn_codes(weight_NK, *affine, bits, COLUMNS),
        )
    ]
    assert errors[0] < 0.7 * errors[1]


def test_output_error_is_the_sum_of_the_conditional_costs() -> None:
    """What makes the column-by-column choice greedy: d H d^T = sum_j (T_j - read_j)^2 / U_jj^2."""
    weight_NK, hessian_KK = problem(2)
    affine = symmetric_grid(weight_NK, COLUMNS, bits=3)
    codes_NK = gptq.gptq_codes(weight_NK, hessian_KK, *affine, 3, COLUMNS)
    read_NK = gptq.read(codes_NK, *affine, COLUMNS)
    upper_KK = np.linalg.cholesky(gptq.inverse(hessian_KK)).T
    running_NK, total = weight_NK.copy(), 0.0
    for column in range(COLUMNS):
        error_N = (running_NK[:, column] - read_NK[:, column]) / upper_KK[column, column]
        running_NK[:, column:] -= np.outer(error_N, upper_KK[column, column:])
        total += float(error_N @ error_N)
    assert total == pytest.approx(gptq.output_error(weight_NK, read_NK, hessian_KK))


# Nested GPTQ ----------------------------------------------------------------------------------------------------------


@each_rule
@each_seed
@each_group_size
def test_nested_with_width_8_alone_is_gptq(rule: str, seed: int, group_size: int) -> None:
    weight_NK, hessian_KK = problem(seed)
    affine = symmetric_grid(weight_NK, group_size)
    nested = gptq.nested_codes(weight_NK, hessian_KK, {8: affine}, {8: 0.3}, rule, group_size)
    assert np.array_equal(nested, gptq.gptq_codes(weight_NK, hessian_KK, *affine, 8, group_size))


@each_seed
@each("bits", [1, 2, 4])
def test_nested_with_one_prefix_width_is_gptq_at_that_width(seed: int, bits: int) -> None:
    weight_NK, hessian_KK = problem(seed)
    affines = sliced(symmetric_grid(weight_NK, COLUMNS), "prefix")
    nested = gptq.nested_codes(weight_NK, hessian_KK, affines, {bits: 1.0}, "prefix", COLUMNS)
    dedicated = gptq.gptq_codes(weight_NK, hessian_KK, *affines[bits], bits, COLUMNS)
    assert np.array_equal(nested >> (8 - bits), dedicated)


@each_rule
def test_nested_without_correlations_decides_every_weight_by_itself(rule: str) -> None:
    """The exhaustive argmin, written again for one weight at a time in exact positions."""
    weight_NK, _ = problem(3)
    scale_NG, zero_NG = symmetric_grid(weight_NK, 8)
    weights = LAMBDAS[0]
    affines = sliced((scale_NG, zero_NG), rule)
    codes_NK = gptq.nested_codes(weight_NK, np.eye(COLUMNS), affines, weights, rule, 8)
    tables = {bits: oracle.slice_value_table(bits, rule) for bits in weights}
    for (row, column), weight in np.ndenumerate(weight_NK):
        position = weight / scale_NG[row, column // 8] + 128
        costs = [sum(w * (position - tables[bits][code]) ** 2 for bits, w in weights.items()) for code in range(256)]
        assert costs[codes_NK[row, column]] == pytest.approx(min(costs), rel=1e-9, abs=1e-12)


@each(
    ("weight", "expected"),
    [(0.3, 100), (0.5, 101), (-0.5, 100), (0.4999, 100), (155.5, 255), (400.0, 255), (-101.0, 0)],
)
def test_equally_cheap_codes_are_decided_by_the_nearest_8_bit_code(weight: float, expected: int) -> None:
    """Zero 100, scale 1. Halves go up, and beyond the ends is the end."""
    affines = {8: (np.ones((1, 1)), np.full((1, 1), 100.0))}
    codes_NK = gptq.nested_codes(np.array([[weight]]), np.eye(1), affines, {8: 1.0}, "prefix", 1)
    assert codes_NK.tolist() == [[expected]]


@each(("weight", "expected"), [(3.2, 103), (-3.0, 97), (100.0, 127), (-60.0, 64)])
def test_width_8_decides_inside_a_bin_even_without_a_lambda(weight: float, expected: int) -> None:
    """All of 64..127 read as one int2 weight; the int2 affine here makes that bin the best one by far."""
    affines = {8: (np.ones((1, 1)), np.full((1, 1), 100.0)), 2: (np.full((1, 1), 1000.0), np.ones((1, 1)))}
    codes_NK = gptq.nested_codes(np.array([[weight]]), np.eye(1), affines, {2: 1.0}, "prefix", 1)
    assert codes_NK.tolist() == [[expected]]


def test_a_tie_of_the_tie_takes_the_smallest_code() -> None:
    assert gptq.first_of_cheapest(np.where(np.isin(np.arange(256), (99, 101)), 0.0, 1.0), 100.0) == 99
    assert gptq.first_of_cheapest(np.zeros(256), 7.0) == 7
    assert gptq.first_of_cheapest(np.zeros(256), -3.0) == 0


@each_rule
@each("weights", LAMBDAS)
def test_own_targets_beat_a_shared_one_and_rounding(rule: str, weights: Mapping[int, float]) -> None:
    """Summed over problems: the reason for a target per width."""
    totals = dict.fromkeys(("own", "shared", "rounded"), 0.0)
    for seed in range(2):
        weight_NK, hessian_KK = problem(seed)
        affines = sliced(symmetric_grid(weight_NK, COLUMNS), rule)
        nested = functools.partial(gptq.nested_codes, weight_NK, hessian_KK, affines, weights, rule, COLUMNS)
        choices = {
            "own": nested(),
            "shared": nested(shared=1.0),
            "rounded": gptq.rtn_codes(weight_NK, *affines[8], 8, COLUMNS),
        }
        for name, codes_NK in choices.items():
            totals[name] += summed_error(weight_NK, codes_NK, hessian_KK, affines, weights, rule, COLUMNS)
    assert totals["own"] < 0.8 * totals["shared"]
    assert totals["own"] < 0.8 * totals["rounded"]


# The refit ------------------------------------------------------------------------------------------------------------


def refit_case(seed: int, group_size: int) -> tuple[Floats, Floats, np.ndarray, gptq.Affine]:
    weight_NK, hessian_KK = problem(seed)
    grid = symmetric_grid(weight_NK, group_size, bits=4)
    return weight_NK, hessian_KK, gptq.rtn_codes(weight_NK, *grid, 4, group_size), grid


@each_seed
@each("group_size", [COLUMNS, 8])
def test_refit_is_stationary(seed: int, group_size: int) -> None:
    weight_NK, hessian_KK, codes_NK, _ = refit_case(seed, group_size)
    affine = gptq.refit_affine(weight_NK, codes_NK, hessian_KK, group_size)
    best = gptq.output_error(weight_NK, gptq.read(codes_NK, *affine, group_size), hessian_KK)
    for part in (0, 1):
        for row in range(ROWS):
            for group in range(COLUMNS // group_size):
                errors = []
                for move in (-1e-4, 1e-4):
                    moved = (affine[0].copy(), affine[1].copy())
                    moved[part][row, group] += move * abs(moved[part][row, group])
                    read_NK = gptq.read(codes_NK, *moved, group_size)
                    errors.append(gptq.output_error(weight_NK, read_NK, hessian_KK))
                assert min(errors) >= best
                rise = sum(errors) / 2 - best
                assert abs(errors[1] - errors[0]) / 2 < 0.05 * rise + 1e-12 * best  # no slope, only curvature


@each_seed
@each("group_size", [COLUMNS, 8])
def test_refit_beats_plain_least_squares_under_the_hessian(seed: int, group_size: int) -> None:
    weight_NK, hessian_KK, codes_NK, grid = refit_case(seed, group_size)
    ours, plain = (
        gptq.refit_affine(weight_NK, codes_NK, metric_KK, group_size) for metric_KK in (hessian_KK, np.eye(COLUMNS))
    )
    errors = [
        gptq.output_error(weight_NK, gptq.read(codes_NK, *affine, group_size), hessian_KK)
        for affine in (ours, plain, grid)
    ]
    assert errors[0] < errors[1]
    assert errors[0] < errors[2]


@each_seed
@each_rule
def test_refit_with_identity_is_the_least_squares_oracle(seed: int, rule: str) -> None:
    weight_NK, _ = problem(seed)
    scale_NG, zero_NG = symmetric_grid(weight_NK, 8)
    codes_NK = gptq.rtn_codes(weight_NK, scale_NG, zero_NG, 8, 8)
    for bits in (2, 4):
        default_NG, _ = gptq.slice_affine(scale_NG, zero_NG, bits, rule)
        codes_r_NK = gptq.slice_table(bits, rule)[codes_NK]
        ours = gptq.refit_affine(weight_NK, codes_r_NK, np.eye(COLUMNS), 8, default_NG=default_NG)
        theirs = oracle.fit_slice(weight_NK, codes_NK, bits, rule=rule, scale_NG=scale_NG, zero_NG=zero_NG)
        assert ours[0] == pytest.approx(theirs[0])
        assert ours[1] == pytest.approx(theirs[1])


def test_refit_finds_the_affine_that_made_the_weights() -> None:
    _, hessian_KK = problem(0)
    random = np.random.default_rng(0)
    scale_NG, zero_NG = random.uniform(0.1, 1, (ROWS, 3)), random.uniform(-3, 3, (ROWS, 3))
    codes_NK = np.tile(np.arange(8), (ROWS, 3))
    weight_NK = gptq.read(codes_NK, scale_NG, zero_NG, 8)
    found = gptq.refit_affine(weight_NK, codes_NK, hessian_KK, 8)
    assert found[0] == pytest.approx(scale_NG)
    assert found[1] == pytest.approx(zero_NG)


def test_refit_keeps_the_slope_of_constant_and_of_backward_groups() -> None:
    weight_NK, hessian_KK = problem(1, damp=10.0)  # weak correlations: the third group keeps a positive slope
    default_NG = np.full((ROWS, 3), 0.01)
    codes_NK = gptq.rtn_codes(weight_NK, *symmetric_grid(weight_NK, 8, bits=4), 4, 8)
    codes_NK[:, :8] = 5  # constant
    codes_NK[:, 8:16] = 15 - codes_NK[:, 8:16]  # falls where the weights rise
    scale_NG, zero_NG = gptq.refit_affine(weight_NK, codes_NK, hessian_KK, 8, default_NG=default_NG)
    assert np.array_equal(scale_NG[:, :2], default_NG[:, :2])
    assert (scale_NG[:, 2] != 0.01).all()
    best = gptq.output_error(weight_NK, gptq.read(codes_NK, scale_NG, zero_NG, 8), hessian_KK)
    moved = gptq.read(codes_NK, scale_NG, zero_NG + 1e-3, 8)
    assert gptq.output_error(weight_NK, moved, hessian_KK) > best


# MatGPTQ --------------------------------------------------------------------------------------------------------------


@each_seed
def test_matgptq_with_width_8_alone_is_gptq(seed: int) -> None:
    weight_NK, hessian_KK = problem(seed)
    affine = symmetric_grid(weight_NK, 8)
    theirs = gptq.matgptq_codes(weight_NK, hessian_KK, affine[0], 128, {8: 1.0}, 8)
    assert np.array_equal(theirs, gptq.gptq_codes(weight_NK, hessian_KK, *affine, 8, 8))


@each_seed
@each("rule", ["round", "prefix"])
@each("weights", LAMBDAS)
def test_matgptq_is_nested_gptq_with_a_shared_error(seed: int, rule: str, weights: Mapping[int, float]) -> None:
    weight_NK, hessian_KK = problem(seed)
    affine = symmetric_grid(weight_NK, 8)
    theirs = gptq.matgptq_codes(weight_NK, hessian_KK, affine[0], 128, weights, 8, rule=rule)
    ours = gptq.nested_codes(weight_NK, hessian_KK, sliced(affine, rule), weights, rule, 8, shared=1.0)
    assert np.array_equal(theirs, ours)


def test_the_error_matgptq_propagates_is_not_weighted_by_lambda() -> None:
    """Two columns that are nearly the same input: the second repays the plain mean of the first one's errors."""
    hessian_KK = np.array([[1.0, 0.999], [0.999, 1.0]])
    scale_NG = np.ones((1, 1))
    weight_NK = np.array(
        [[20.0, 0.0]]
    )  # int2 reads 0 or 64; int8 20. With this lambda the code is 20, int2 is off by 20
    codes_NK = gptq.matgptq_codes(weight_NK, hessian_KK, scale_NG, 128, {8: 1000.0, 2: 1.0}, 2)
    assert codes_NK.tolist() == [[148, 138]]  # the mean of 0 and 20, times 0.999


@functools.cache
def benchmark() -> dict[str, Any]:
    """The names of experiments/matgptq.py."""
    return runpy.run_path(str(Path(__file__).resolve().parents[1] / "experiments" / "matgptq.py"))


@each("reorder", [False, True])
@each("rule", ["round", "prefix"])
@each("weights", LAMBDAS)
def test_the_look_up_of_the_benchmark_is_the_search(rule: str, weights: Mapping[int, float], reorder: bool) -> None:
    for seed in range(2):
        weight_NK, hessian_KK = problem(seed, damp=0.0)
        order = np.argsort(-np.diag(hessian_KK), kind="stable") if reorder else np.arange(COLUMNS)
        group_size = COLUMNS if reorder else 8  # groups would be torn apart by the order
        scale_NG, _ = symmetric_grid(weight_NK, group_size)
        ordered_KK = gptq.damped(hessian_KK[order][:, order], 0.01)
        slow = np.empty(weight_NK.shape, dtype=np.uint8)
        slow[:, order] = gptq.matgptq_codes(
            weight_NK[:, order], ordered_KK, scale_NG, 128, weights, group_size, rule=rule
        )
        fast = benchmark()["matgptq_codes"](
            *(torch.from_numpy(array) for array in (weight_NK, hessian_KK, scale_NG)),
            128.0,
            weights,
            rule=rule,
            reorder=reorder,
        )
        assert np.array_equal(fast.numpy(), slow)
