"""The contract of BACKENDS: every row computes the product with what core/nest.py reads, on all codes at all widths.

Units: rounding of float32 sums, 2^-24 of sum |x| * scale * (|position| + |zero-point|). Any order of summation stays
within a few units, the neighbouring width is thousands away. The
expected product is that of core/nest.py's reading, in float64.
"""

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from cases import each
from matquant.backends import BACKENDS, DENSE, choose
from matquant.core.nest import RULES, slice_codes, slice_positions
from matquant.core.tensor import NestedTensor

ROWS, COLUMNS, TOKENS = 6, 256, 5  # every row has all 256 codes
UNITS, UNIT = 64, 2.0**-24  # sums of 256 terms, in any order
GRIDS: dict[str, dict[str, Any]] = {
    "per-channel": {"groups": 1},
    "groups": {"groups": 8},
    "per-channel, zero-points": {"groups": 1, "zero": True},
    "groups, zero-points": {"groups": 8, "zero": True},
    "groups, own scale and zero-point of int3 and int2": {"groups": 8, "own": (3, 2)},
}
CASES = [(rule, options) for rule in RULES for options in GRIDS.values()]
CASES.append(("prefix", {"groups": 8, "grid": "companded"}))  # a grid that is sliced by prefix only


def make_weight(
    rule: str, *, groups: int, zero: bool = False, own: tuple[int, ...] = (), grid: str = "uniform"
) -> NestedTensor:
    """A weight [ROWS, COLUMNS] whose every row is a shuffle of all codes."""
    random = np.random.default_rng(0)
    codes = np.stack([random.permutation(256) for _ in range(ROWS)]).astype(np.uint8)

    def scale() -> np.ndarray:
        return np.exp(random.normal(-3, 0.5, (ROWS, groups))).astype(np.float32)

    zeros = random.integers(90, 160, (ROWS, groups)) if zero else np.full((ROWS, groups), 128)
    slices = {
        bits: (scale(), (2 ** (bits - 1) + random.normal(0, 0.3, (ROWS, groups))).astype(np.float32)) for bits in own
    }
    return NestedTensor(codes=codes, scale=scale(), zero=zeros.astype(np.float32), rule=rule, slices=slices, grid=grid)


def read(tensor: NestedTensor, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """The weight at ``bits`` bits, and the size of what it is the difference of: float64 [N, K] each."""
    position = np.asarray(slice_positions(tensor.codes, bits, rule=tensor.rule, grid=tensor.grid), dtype=np.float64)
    scale, zero = (np.asarray(part, dtype=np.float64) for part in tensor.affine(bits))
    scale_NK, zero_NK = (np.repeat(part, COLUMNS // part.shape[1], axis=1) for part in (scale, zero))
    return scale_NK * (position - zero_NK), np.abs(scale_NK) * (np.abs(position) + np.abs(zero_NK))


def assert_product(found: torch.Tensor, x_TK: np.ndarray, tensor: NestedTensor, bits: int) -> None:
    """``found`` is x W^T at ``bits`` bits to UNITS roundings."""
    weight, size = read(tensor, bits)
    x = x_TK.astype(np.float64)
    gap = np.abs(found.double().cpu().numpy() - x @ weight.T)
    allowed = UNITS * UNIT * (np.abs(x) @ size.T)
    if (gap > allowed).any():
        raise AssertionError(f"off by {(gap / allowed).max() * UNITS:.0f} units at {bits} bits")


def inputs() -> np.ndarray:
    """Random rows, and one that picks a single input: its product is one column of the weight."""
    x = np.random.default_rng(1).normal(size=(TOKENS, COLUMNS)).astype(np.float32)
    x[-1] = np.eye(COLUMNS, dtype=np.float32)[37]
    return x


@pytest.fixture(params=BACKENDS)
def name(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    reason = BACKENDS[found].why_not("cpu", torch.float32, "float")
    if reason is not None:
        pytest.skip(f"{found}: {reason}")
    return found


@each(("rule", "options"), CASES)
def test_the_product_is_that_of_the_slice_and_of_no_neighbour(name: str, rule: str, options: dict[str, Any]) -> None:
    tensor, x = make_weight(rule, **options), inputs()
    if BACKENDS[name].why_not_weight(tensor) is not None:
        assert (name, rule == "prefix") == ("gpu", False)
        return
    packed = BACKENDS[name].pack(tensor, device="cpu")
    for bits in range(1, 9):
        found = BACKENDS[name].matmul(packed, torch.from_numpy(x), bits=bits, activations="float")
        assert found.shape == (TOKENS, ROWS)
        assert_product(found, x, tensor, bits)
        for other in {bits - 1, bits + 1} & set(range(1, 9)):
            with pytest.raises(AssertionError, match="off by"):
                assert_product(found, x, tensor, other)


def test_every_single_code_is_read_exactly_at_every_width(name: str) -> None:
    """One input at a time: all columns of the weight, to one rounding of each of three terms."""
    tensor = make_weight("prefix", groups=1)
    packed = BACKENDS[name].pack(tensor, device="cpu")
    for bits in range(1, 9):
        columns = BACKENDS[name].matmul(packed, torch.eye(COLUMNS), bits=bits, activations="float")
        weight, size = read(tensor, bits)
        assert (np.abs(columns.double().numpy().T - weight) <= 4 * UNIT * size).all(), bits
        code = np.rint(columns.double().numpy().T / tensor.affine(bits)[0] + tensor.affine(bits)[1])
        np.testing.assert_array_equal(code, slice_codes(tensor.codes, bits, rule="prefix"))


def test_leading_shapes_strides_and_no_tokens_at_all(name: str) -> None:
    tensor = make_weight("prefix", groups=8)
    packed = BACKENDS[name].pack(tensor, device="cpu")
    x = torch.randn(3, 2, 2 * COLUMNS, generator=torch.manual_seed(0))[:, :, ::2]

    def product(inputs: torch.Tensor) -> torch.Tensor:
        return BACKENDS[name].matmul(packed, inputs, bits=4, activations="float")

    whole = product(x)
    assert whole.shape == (3, 2, ROWS)
    assert_product(whole.reshape(-1, ROWS), x.reshape(-1, COLUMNS).numpy(), tensor, 4)
    torch.testing.assert_close(product(x[0, 0]), whole[0, 0])
    assert product(x[:0]).shape == (0, 2, ROWS)


def test_a_row_says_of_every_device_and_dtype_whether_it_serves() -> None:
    for backend, device, dtype in itertools.product(
        BACKENDS.values(), ("cpu", "meta", torch.device("cuda:0")), (torch.float32, torch.bfloat16, torch.float64)
    ):
        reason = backend.why_not(device, dtype, "float")
        assert reason is None or (reason and reason == reason.strip()), reason
        assert backend.activations[0] == "float"
        assert backend.describe(3, "float")


def test_the_first_row_that_serves_is_chosen_and_the_reason_of_the_one_before_is_kept() -> None:
    assert choose("cpu", torch.bfloat16, activations="int8") == ("native", "")
    assert choose("meta", torch.float32, activations="float") == (DENSE, "kernels run on cpu and cuda, found meta")
    assert choose("cpu", torch.float64, activations="int8") == (
        DENSE,
        "kernels take float32, bfloat16, float16, found float64",
    )
    if not torch.cuda.is_available():
        reason = "no CUDA device is available"
        assert choose("cuda", torch.bfloat16, activations="float") == (DENSE, reason)
    assert list(BACKENDS)[-1] == DENSE, "what serves everything comes last"


def test_the_comparison_can_fail() -> None:
    tensor, x = make_weight("prefix", groups=1), inputs()
    right, _ = read(tensor, 4)
    found = torch.from_numpy(x.astype(np.float64) @ right.T)
    assert_product(found, x, tensor, 4)
    with pytest.raises(AssertionError, match="off by"):
        assert_product(found * 1.0001, x, tensor, 4)
