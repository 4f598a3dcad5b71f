"""The float grid: every label and width against OCP's element formats, on disk, in stock readers, in rtn and gptq."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import conftest
import matquant
import oracle
from matquant.core.grid import BLOCK, fit_grid, power_of_two
from matquant.core.nest import (
    FLOAT,
    integer_positions,
    labels_of,
    middle,
    nearest_codes,
    position_table,
    slice_affine,
    slice_codes,
    slice_positions,
    stored_codes,
)
from matquant.engine.engine import Engine
from matquant.format.read import open_checkpoint
from matquant.methods.parts.fake import Grid, nest
from matquant.system.errors import InputError

LABELS = np.arange(256, dtype=np.uint8)
WIDTHS = range(1, 9)
# OCP Microscaling Formats v1.0: 5.3.3 (FP4, E2M1) and the first and last values of each exponent of 5.3.2 (FP6, E2M3)
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
E2M3 = {0b00000: 0, 0b00001: 0.125, 0b00111: 0.875, 0b01000: 1, 0b01111: 1.875, 0b10000: 2, 0b11000: 4, 0b11111: 7.5}


@pytest.mark.parametrize("bits", WIDTHS)
def test_positions_of_every_label_and_width_are_those_of_the_oracle(bits: int) -> None:
    expected = [float(oracle.float_position(code, bits)) for code in range(2**bits)]
    assert position_table(bits, FLOAT).tolist() == expected == sorted(expected)
    read = [expected[code] for code in slice_codes(LABELS, bits)]
    assert slice_positions(LABELS, bits, grid=FLOAT).tolist() == read
    assert slice_positions(torch.from_numpy(LABELS), bits, grid=FLOAT).tolist() == read


def test_the_oracle_decodes_the_elements_that_the_standard_prints() -> None:
    assert [float(oracle.ocp_float(code, 1)) for code in range(8)] == E2M1
    assert {code: float(oracle.ocp_float(code, 3)) for code in E2M3} == E2M3


def test_int4_has_the_values_of_mxfp4_and_cuts_where_e2m5_rounds_to_them() -> None:
    scale, zero = slice_affine(np.float32(0.25), np.float32(128), 4, grid=FLOAT)
    values = scale * (position_table(4, FLOAT) - zero)
    assert values.tolist() == [*(-4 * value for value in reversed(E2M1)), *(4 * value for value in E2M1)]
    for magnitude in range(16, 128):
        value = oracle.ocp_float(magnitude - 8, 5)  # the E2M5 number at which the label begins
        near = oracle.nearest_code(value, [oracle.ocp_float(code, 1) for code in range(8)])
        assert near == magnitude >> 4, magnitude


def test_int6_cuts_where_e2m5_truncates_to_e2m3() -> None:
    for magnitude in range(16, 128):
        code = magnitude - 8
        assert oracle.ocp_float(code >> 2, 3) <= oracle.ocp_float(code, 5) < oracle.ocp_float((code >> 2) + 1, 3)
        lower = 16 * oracle.ocp_float((magnitude >> 2) - 2, 3)
        upper = 16 * oracle.ocp_float((magnitude >> 2) - 1, 3)
        assert oracle.float_distance(magnitude >> 2, 6) == (lower + upper) / 2, magnitude


@pytest.mark.parametrize("bits", WIDTHS)
def test_integer_positions_are_bytes_and_exact(bits: int) -> None:
    integers, unit, offset = integer_positions(bits, FLOAT)
    assert integers.dtype == np.uint8
    assert (integers * unit + offset).tolist() == position_table(bits, FLOAT).tolist()


def test_the_integers_of_int2_to_int4_are_these() -> None:
    assert integer_positions(2, FLOAT)[0].tolist() == [0, 5, 9, 14]
    assert integer_positions(3, FLOAT)[0].tolist() == [0, 5, 8, 10, 12, 14, 17, 22]
    assert integer_positions(4, FLOAT)[0].tolist() == [0, 4, 6, 8, 9, 10, 11, 12, 12, 13, 14, 15, 16, 18, 20, 24]


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, pytest.param(6, marks=pytest.mark.slow), 8])
def test_nearest_codes_are_those_of_the_oracle_everywhere(bits: int) -> None:
    step = 5 if bits < 5 else 13 if bits == 5 else 97
    sixteenths = range(-3 * 2 ** (8 - bits), 16 * 256 + 3 * 2 ** (8 - bits), step)  # of an 8-bit code
    positions = [Fraction(n, 16 * 2 ** (8 - bits)) for n in sixteenths]
    places = [oracle.float_position(code, bits) for code in range(2**bits)]
    expected = [oracle.nearest_code(position, places) for position in positions]
    values = np.array([float(position) for position in positions], dtype=np.float32)
    assert nearest_codes(values, bits, grid=FLOAT).tolist() == expected
    assert nearest_codes(torch.from_numpy(values), bits, grid=FLOAT).tolist() == expected


def test_stored_codes_are_an_ordinary_int8_tensor_from_which_every_slice_comes_back() -> None:
    stored = stored_codes(LABELS, grid=FLOAT)
    assert stored.tolist() == [int(oracle.float_position(label, 8)) for label in range(256)]
    labels = labels_of(stored, grid=FLOAT)
    for bits in range(1, 7):  # labels that share a position share these bits
        assert np.array_equal(slice_codes(labels, bits), slice_codes(LABELS, bits))
    assert np.array_equal(stored_codes(labels, grid=FLOAT), stored)
    assert len(np.unique(stored)) == 176


def test_scales_of_blocks_are_powers_of_two_and_cover_every_weight() -> None:
    weight = np.random.default_rng(0).standard_normal((8, 256)).astype(np.float32)
    weight[0, :BLOCK], weight[1, :BLOCK] = 0, 14.0  # a group of zeros; the end of the grid times a power of two
    for given in (weight, torch.from_numpy(weight)):
        scale, zero = (np.asarray(part) for part in fit_grid(given, group_size=BLOCK, grid=FLOAT))
        assert (np.frexp(scale)[0] == 0.5).all()
        assert (zero == 128).all()
        largest = np.abs(weight).reshape(8, -1, BLOCK).max(-1)
        assert (largest <= 112 * scale).all()
        assert (largest[1:] > 56 * scale[1:]).all()
        assert scale[1, 0] == 0.125
    wide, _ = fit_grid(weight, group_size=64, grid=FLOAT)
    assert (np.frexp(wide)[0] != 0.5).any()
    assert power_of_two(np.float32([0.5, 0.50001, 3e-30, 1e30])).tolist() == [0.5, 1, 2**-24, 2**15]


def test_int4_of_a_block_is_as_near_as_mxfp4_of_the_float_weights() -> None:
    weight = np.random.default_rng(1).standard_t(6, (64, 256)).astype(np.float32)
    tensor = nest(torch.from_numpy(weight), Grid(rule="prefix", group_size=BLOCK, kind=FLOAT))
    table = np.array(E2M1)
    block = np.abs(weight.reshape(-1, BLOCK))
    scale = 2 ** (np.floor(np.log2(block.max(1))) - 2)[:, None]  # OCP 6.3: the largest exponent of the block, less 2
    near = scale * table[np.abs(np.minimum(block / scale, 6)[..., None] - table).argmin(-1)]
    error = float((tensor.read(4) - torch.from_numpy(weight)).square().sum())
    assert error < 1.05 * ((near - block) ** 2).sum()
    assert error > 0.8 * ((near - block) ** 2).sum()  # uniform int4 of these groups would be 0.6


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("rtn", {}),
        ("gptq", {"samples": 8, "seq_len": 32}),
        pytest.param("gptq", {"samples": 8, "seq_len": 32, "tune": 2}, marks=pytest.mark.slow),
        pytest.param("gptq", {"samples": 8, "seq_len": 32, "baseline_bits": 4}, marks=pytest.mark.slow),
    ],
    ids=["rtn", "gptq", "tuned", "dedicated"],
)
def test_every_method_makes_codes_that_stock_transformers_reads_as_our_int8(
    method: str, options: dict[str, object], llama: Path, text_file: Path, tmp_path: Path
) -> None:
    text = {} if method == "rtn" else {"text": [text_file]}
    out = conftest.quantize(
        llama,
        tmp_path / "out",
        method=method,
        scope="linears",
        exclude=["down_proj"],
        group_size=BLOCK,
        grid=FLOAT,
        **text,
        **options,
    )
    checkpoint = open_checkpoint(out)
    assert (checkpoint.spec.grid, checkpoint.spec.format) == (FLOAT, 6)
    stock = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    ours = matquant.load(out, bits=8, dtype=torch.float32)
    assert ours.kernels.endswith("kernels read the grids uniform and companded, found 'float'")
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(stock(tokens).logits, ours(tokens).logits)
    for path in checkpoint.shapes:
        nested = checkpoint.nested(path)
        scale, zero = nested.affine(4)
        assert (np.frexp(scale)[0] == 0.5).all()
        assert (zero == middle(4)).all()
        rows, columns = nested.codes.shape
        expected = scale[..., None] * (position_table(4, FLOAT)[nested.codes.reshape(rows, -1, BLOCK) >> 4] - middle(4))
        assert np.array_equal(nested.read(4), expected.reshape(rows, columns))


def test_the_engine_names_what_reads_the_grid(llama: Path, tmp_path: Path) -> None:
    out = conftest.quantize(llama, tmp_path / "out", method="rtn", grid=FLOAT)
    with pytest.raises(InputError) as error:
        Engine(out)
    assert str(error.value) == (
        "kernels read the grids uniform and companded, found 'float'; use matquant.load(..., kernels='none'), "
        "or export --bits 4 to another engine"
    )


def test_methods_that_train_the_scales_are_rejected(llama: Path) -> None:
    with pytest.raises(InputError) as error:
        conftest.quantize(llama, "unused", method="qat", grid=FLOAT)
    assert str(error.value) == (
        "--grid float works with methods rtn and gptq, found method 'qat', which would train its power-of-two scales; "
        "use --method gptq, or --grid companded"
    )
