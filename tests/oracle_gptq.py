"""Slow, obvious definitions of GPTQ, of its nested form, and of the published competitor MatGPTQ.

Written from Frantar et al. 2022 ("GPTQ", arXiv 2210.17323: Eq. 2-4 and Algorithm 1), from the Matryoshka Quantization
paper's slices (arXiv 2502.06786 v3, Eq. 6 and Eq. 8) and from the published description of MatGPTQ (arXiv 2602.03537).
Pure numpy in float64, one column at a time in natural order, no blocks, no lazy updates. Nothing here imports the
package under test.

N out features, K in features, G groups of K // G neighbouring in features, T tokens, C = 256 codes. Weights are rows:
y_TN = x_TK @ weight_NK.T. A width r reads scale_r * (slice - zero_r), with scale_r and zero_r [N, G] in units of its
own r-bit code. The Hessian of the squared output error of one row is

    H = 2/T sum_t x_t x_t^T     (2/T X^T X; GPTQ writes 2 X X^T with tokens as columns and does not divide by T)

Codes do not depend on the factor in front, output errors do: d H d^T is twice the mean squared output error.
"""

import functools
from collections.abc import Mapping
from fractions import Fraction
from math import floor

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Affine = tuple[Floats, Floats]  # scale [N, G] and zero [N, G]

MASTER_BITS = 8
CODES = 2**MASTER_BITS
HALF = Fraction(1, 2)


# The Hessian ----------------------------------------------------------------------------------------------------------


def hessian(x_TK: NDArray[np.floating]) -> Floats:
    """2/T X^T X, summed token by token."""
    tokens, columns = x_TK.shape
    total_KK = np.zeros((columns, columns))
    for x_K in x_TK.astype(np.float64):
        total_KK += np.outer(x_K, x_K)
    return np.asarray(2 / tokens * total_KK)


def damped(hessian_KK: Floats, damp: float) -> Floats:
    """H + damp * mean(diag H) * I (GPTQ section 3.3, step 3: 1 % of the average diagonal)."""
    return hessian_KK + damp * np.mean(np.diag(hessian_KK)) * np.eye(len(hessian_KK))


def output_error(weight_NK: Floats, other_NK: Floats, hessian_KK: Floats) -> float:
    """Sum over rows of d H d^T with d the difference of the two."""
    total = 0.0
    for difference_K in weight_NK - other_NK:
        total += float(difference_K @ hessian_KK @ difference_K)
    return total


# Slices ---------------------------------------------------------------------------------------------------------------


def slice_code(code: int, bits: int, rule: str) -> int:
    """The ``bits``-wide slice of one 8-bit code, in exact arithmetic."""
    coarse = Fraction(code, 2 ** (MASTER_BITS - bits))
    if rule == "prefix":
        return floor(coarse)
    if rule == "round":
        return min(floor(coarse + HALF), 2**bits - 1) if bits < MASTER_BITS else code
    if rule == "extra":
        return floor(coarse + HALF) if bits < MASTER_BITS else code
    raise AssertionError(f"rule={rule!r} is unknown to the oracle")


@functools.cache
def slice_table(bits: int, rule: str) -> NDArray[np.int64]:
    """The slices of all 256 codes; read-only, since it is made once."""
    table = np.array([slice_code(code, bits, rule) for code in range(CODES)])
    table.flags.writeable = False
    return table


def slice_affine(scale_NG: Floats, zero_NG: Floats, bits: int, rule: str) -> Affine:
    """Scale and zero of the r-bit slices on the 8-bit grid: a slice stands for the middle (prefix) or for d * slice.

    scale * (d * slice + centre - zero) = (scale * d) * (slice - (zero - centre) / d).
    """
    step = 2 ** (MASTER_BITS - bits)
    centre = (step - 1) / 2 if rule == "prefix" else 0.0
    return scale_NG * step, (zero_NG - centre) / step


def read(codes_r_NK: NDArray[np.integer], scale_NG: Floats, zero_NG: Floats, group_size: int) -> Floats:
    """scale * (code - zero), group by group."""
    weight_NK = np.zeros(codes_r_NK.shape)
    for column in range(codes_r_NK.shape[1]):
        group = column // group_size
        weight_NK[:, column] = scale_NG[:, group] * (codes_r_NK[:, column] - zero_NG[:, group])
    return weight_NK


def read_nested(codes_NK: NDArray[np.integer], bits: int, rule: str, affine: Affine, group_size: int) -> Floats:
    """The ``bits``-bit weights of 8-bit codes."""
    return read(slice_table(bits, rule)[codes_NK], *affine, group_size)


# GPTQ -----------------------------------------------------------------------------------------------------------------


def nearest_codes(weight_N: Floats, scale_N: Floats, zero_N: Floats, bits: int) -> NDArray[np.uint8]:
    """Round half up onto the grid, then clamp."""
    return np.clip(np.floor(weight_N / scale_N + zero_N + 0.5), 0, 2**bits - 1).astype(np.uint8)


def rtn_codes(weight_NK: Floats, scale_NG: Floats, zero_NG: Floats, bits: int, group_size: int) -> NDArray[np.uint8]:
    """Round to nearest: GPTQ that never compensates."""
    codes_NK = np.zeros(weight_NK.shape, dtype=np.uint8)
    for column in range(weight_NK.shape[1]):
        group = column // group_size
        codes_NK[:, column] = nearest_codes(weight_NK[:, column], scale_NG[:, group], zero_NG[:, group], bits)
    return codes_NK


def gptq_codes(
    weight_NK: Floats, hessian_KK: Floats, scale_NG: Floats, zero_NG: Floats, bits: int, group_size: int
) -> NDArray[np.uint8]:
    """GPTQ in its OBS form: GPTQ Eq. 2 and Eq. 3, column by column, on a grid that is fixed beforehand.

    After column j the weights right of it take up its error, delta = -(w_j - read_j) / [H^-1]_jj * [H^-1]_j:, and j is
    removed from the inverse by one step of Gaussian elimination, H^-1 -= [H^-1]_:j [H^-1]_j: / [H^-1]_jj.
    """
    running_NK = weight_NK.astype(np.float64)
    inverse_KK = inverse(hessian_KK)
    codes_NK = np.zeros(weight_NK.shape, dtype=np.uint8)
    for column in range(weight_NK.shape[1]):
        scale_N, zero_N = scale_NG[:, column // group_size], zero_NG[:, column // group_size]
        codes_NK[:, column] = nearest_codes(running_NK[:, column], scale_N, zero_N, bits)
        error_N = running_NK[:, column] - scale_N * (codes_NK[:, column] - zero_N)
        running_NK[:, column + 1 :] -= np.outer(error_N, compensation(inverse_KK, column))
        inverse_KK = without_column(inverse_KK, column)
    return codes_NK


def inverse(hessian_KK: Floats) -> Floats:
    """H^-1."""
    return np.asarray(np.linalg.inv(hessian_KK), dtype=np.float64)


def compensation(inverse_KK: Floats, column: int) -> Floats:
    """How much each later column moves against one unit of error in ``column``."""
    return np.asarray(inverse_KK[column, column + 1 :] / inverse_KK[column, column])


def without_column(inverse_KK: Floats, column: int) -> Floats:
    """The inverse Hessian of the columns that remain (GPTQ Eq. 3); the row and column removed become 0."""
    return np.asarray(inverse_KK - np.outer(inverse_KK[:, column], inverse_KK[column, :]) / inverse_KK[column, column])


def gptq_codes_cholesky(
    weight_NK: Floats, hessian_KK: Floats, scale_NG: Floats, zero_NG: Floats, bits: int, group_size: int
) -> NDArray[np.uint8]:
    """GPTQ as Algorithm 1 writes it, with blocks of one column: the rows of Cholesky(H^-1)^T hold every elimination."""
    running_NK = weight_NK.astype(np.float64)
    upper_KK = np.linalg.cholesky(inverse(hessian_KK)).T  # H^-1 = U^T U
    codes_NK = np.zeros(weight_NK.shape, dtype=np.uint8)
    for column in range(weight_NK.shape[1]):
        scale_N, zero_N = scale_NG[:, column // group_size], zero_NG[:, column // group_size]
        codes_NK[:, column] = nearest_codes(running_NK[:, column], scale_N, zero_N, bits)
        read_N = scale_N * (codes_NK[:, column] - zero_N)
        error_N = (running_NK[:, column] - read_N) / upper_KK[column, column]
        running_NK[:, column:] -= np.outer(error_N, upper_KK[column, column:])
    return codes_NK


# Nested GPTQ ----------------------------------------------------------------------------------------------------------


def code_values(scale_N: Floats, zero_N: Floats, bits: int, rule: str) -> Floats:
    """What each of the 256 codes reads as at one width, [N, C]."""
    return scale_N[:, None] * (slice_table(bits, rule)[None, :] - zero_N[:, None])


def nested_codes(
    weight_NK: Floats,
    hessian_KK: Floats,
    affines: Mapping[int, Affine],
    weights: Mapping[int, float],
    rule: str,
    group_size: int,
    *,
    shared: float = 0.0,
) -> NDArray[np.uint8]:
    """One 8-bit code per weight for all widths of ``weights`` (width -> lambda), each width with a target of its own.

    affines: width -> (scale_r, zero_r); 8 must be there even if it has no lambda (it then follows the others with a
    target of its own and lambda 0). Every width starts with T_r = W. At column j, row n, the code is

        q = argmin over 0..255 of sum_r lambda_r (T_r[n, j] - scale_r * (slice(q, r) - zero_r))^2

    and each T_r takes up its own error in its later columns as in GPTQ, with the one inverse Hessian. The conditional
    cost of column j is 1/(2 [H^-1]_jj) times the sum above, for every width, so this is the greedy minimiser of
    sum_r lambda_r * output_error_r.

    Equal costs: the code nearest to floor(T_8/scale_8 + zero_8 + 1/2), not clamped; then the smallest code. With width
    8 alone that is rounding half up and clamping.

    shared: how much of the propagated error is the plain mean over the widths with a lambda instead of a width's own.
    1.0 keeps all targets equal, which is MatGPTQ's compensation.
    """
    widths = sorted({MASTER_BITS, *weights})
    targets = {bits: weight_NK.astype(np.float64) for bits in widths}
    inverse_KK = inverse(hessian_KK)
    codes_NK = np.zeros(weight_NK.shape, dtype=np.uint8)
    for column in range(weight_NK.shape[1]):
        group = column // group_size
        local = {bits: (scale[:, group], zero[:, group]) for bits, (scale, zero) in affines.items()}
        values = {bits: code_values(*local[bits], bits, rule) for bits in widths}
        cost_NC = np.zeros((len(weight_NK), CODES))
        for bits, weight in weights.items():
            cost_NC += weight * (targets[bits][:, column, None] - values[bits]) ** 2
        scale_N, zero_N = local[MASTER_BITS]
        nearest_N = np.floor(targets[MASTER_BITS][:, column] / scale_N + zero_N + 0.5)
        for row in range(len(weight_NK)):
            codes_NK[row, column] = first_of_cheapest(cost_NC[row], float(nearest_N[row]))
        errors = {
            bits: targets[bits][:, column] - values[bits][np.arange(len(weight_NK)), codes_NK[:, column]]
            for bits in widths
        }
        mean_N = np.mean([errors[bits] for bits in weights], axis=0)
        for bits in widths:
            error_N = (1 - shared) * errors[bits] + shared * mean_N
            targets[bits][:, column + 1 :] -= np.outer(error_N, compensation(inverse_KK, column))
        inverse_KK = without_column(inverse_KK, column)
    return codes_NK


def first_of_cheapest(cost_C: Floats, nearest: float) -> int:
    """The cheapest code; of equally cheap ones the nearest to ``nearest``; of those the smallest."""
    cheapest = np.flatnonzero(cost_C == cost_C.min()).tolist()
    return min(cheapest, key=lambda code: (abs(code - nearest), code))


# The refit ------------------------------------------------------------------------------------------------------------


def refit_affine(
    weight_NK: Floats,
    codes_r_NK: NDArray[np.integer],
    hessian_KK: Floats,
    group_size: int,
    *,
    default_NG: Floats | None = None,
) -> Affine:
    """Scale and zero of every group of a row that minimise d H d^T, d = w - scale * (code - zero), all groups at once.

    codes_r_NK: r-bit codes, already sliced. With slope = scale and offset = scale * zero the read is linear in 2G
    unknowns, read = D @ (slopes, offsets), and D^T H D x = D^T H w. Unlike plain least squares (H = I) this does not
    fall apart into groups. A group whose codes are all equal, or whose best slope is not positive, keeps the slope of
    ``default_NG`` and only its offset is fitted; the other groups are then solved again beside it.
    """
    rows, columns = weight_NK.shape
    groups = columns // group_size
    scale_NG, zero_NG = np.zeros((rows, groups)), np.zeros((rows, groups))
    for row in range(rows):
        codes_K = codes_r_NK[row].astype(np.float64)
        slopes_KG, offsets_KG = np.zeros((columns, groups)), np.zeros((columns, groups))
        for column in range(columns):
            slopes_KG[column, column // group_size] = codes_K[column]
            offsets_KG[column, column // group_size] = -1.0
        by_group = codes_K.reshape(groups, group_size)
        kept = {group for group in range(groups) if len(set(by_group[group])) == 1}
        while True:
            assert default_NG is not None or not kept, f"row {row} has groups {sorted(kept)} without a slope"
            free = [group for group in range(groups) if group not in kept]
            slope_G = np.zeros(groups)
            for group in kept:
                assert default_NG is not None
                slope_G[group] = default_NG[row, group]
            design = np.concatenate([slopes_KG[:, free], offsets_KG], axis=1)
            wanted_K = weight_NK[row] - slopes_KG @ slope_G
            solution = np.linalg.solve(design.T @ hessian_KK @ design, design.T @ hessian_KK @ wanted_K)
            slope_G[free] = solution[: len(free)]
            negative = {group for group in free if slope_G[group] <= 0}
            if not negative:
                break
            kept |= negative
        scale_NG[row], zero_NG[row] = slope_G, solution[len(free) :] / slope_G
    return scale_NG, zero_NG


# MatGPTQ --------------------------------------------------------------------------------------------------------------


def matgptq_codes(
    weight_NK: Floats,
    hessian_KK: Floats,
    scale_NG: Floats,
    zero: float,
    weights: Mapping[int, float],
    group_size: int,
    *,
    rule: str = "round",
) -> NDArray[np.uint8]:
    """The published joint GPTQ: one running weight for all widths.

    At each column the code is the argmin over 0..255 of sum_r lambda_r (w - scale * (value_r(q) - zero))^2, value_r(q)
    being Eq. 6's slice times 2^(8-r) on the shared 8-bit grid (``rule="prefix"``: the bin's middle instead). The error
    that later columns take up is the mean over the widths, not weighted by lambda, of w minus its read, divided by the
    diagonal of the upper Cholesky factor of the inverse Hessian. Equal costs: the smallest code.
    """
    running_NK = weight_NK.astype(np.float64)
    upper_KK = np.linalg.cholesky(inverse(hessian_KK)).T
    zero_NG = np.full(scale_NG.shape, float(zero))
    affines = {bits: slice_affine(scale_NG, zero_NG, bits, rule) for bits in weights}
    codes_NK = np.zeros(weight_NK.shape, dtype=np.uint8)
    for column in range(weight_NK.shape[1]):
        group = column // group_size
        values = {
            bits: code_values(scale_r[:, group], zero_r[:, group], bits, rule)
            for bits, (scale_r, zero_r) in affines.items()
        }
        cost_NC = np.zeros((len(weight_NK), CODES))
        for bits, weight in weights.items():
            cost_NC += weight * (running_NK[:, column, None] - values[bits]) ** 2
        for row in range(len(weight_NK)):
            codes_NK[row, column] = int(np.argmin(cost_NC[row]))  # of equally cheap ones the first
        reads = [values[bits][np.arange(len(weight_NK)), codes_NK[:, column]] for bits in weights]
        error_N = np.mean([running_NK[:, column] - read_N for read_N in reads], axis=0) / upper_KK[column, column]
        running_NK[:, column:] -= np.outer(error_N, upper_KK[column, column:])
    return codes_NK
