"""The companded grid: every label and width against the oracle, on disk, in stock readers and in every method."""

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import conftest
import matquant
import oracle
from cases import each
from grid_checks import LABELS, WIDTHS, assert_every_slice_comes_back, assert_example_is_written_and_read
from matquant.core.nest import (
    CENTRE,
    COMPANDED,
    UNIFORM,
    integer_positions,
    labels_of,
    nearest_codes,
    position_table,
    slice_codes,
    slice_positions,
    slice_values,
    stored_codes,
)
from matquant.core.spec import Spec
from matquant.export.blocks import CONTAINERS
from matquant.export.containers import FIXED, Misfit, decode, encode, fit
from matquant.format.read import open_checkpoint
from matquant.hf_torch.arrays import nested_to_numpy
from matquant.methods.parts.fake import Grid, nest
from matquant.system.errors import InputError
from test_checkpoint import document_tables


@each("bits", WIDTHS)
def test_positions_of_every_label_and_width_are_those_of_the_oracle(bits: int) -> None:
    expected = [float(oracle.companded_position(code, bits)) for code in range(2**bits)]
    assert position_table(bits, COMPANDED).tolist() == expected
    sliced = slice_codes(LABELS, bits)
    assert slice_positions(LABELS, bits, grid=COMPANDED).tolist() == [expected[code] for code in sliced]
    assert slice_positions(torch.from_numpy(LABELS), bits, grid=COMPANDED).tolist() == [expected[c] for c in sliced]
    step = 2 ** (8 - bits)
    values = [expected[code] * step + (step - 1) / 2 for code in sliced]
    assert slice_values(LABELS, bits, grid=COMPANDED).tolist() == values
    assert expected != [float(code) for code in range(2**bits)]  # the uniform grid fails this test


@each("bits", WIDTHS)
def test_integer_positions_are_bytes_and_exact(bits: int) -> None:
    integers, unit, offset = integer_positions(bits, COMPANDED)
    assert integers.dtype == np.uint8
    assert (integers * unit + offset).tolist() == position_table(bits, COMPANDED).tolist()
    if bits <= 6:
        assert integers[-1] == 4 * 2**bits - 5
        assert set(np.diff(integers.astype(int))) <= {3, 4, 5}


def test_the_integers_of_int2_and_int3_are_these() -> None:
    assert integer_positions(2, COMPANDED)[0].tolist() == [0, 4, 7, 11]
    assert integer_positions(3, COMPANDED)[0].tolist() == [0, 5, 9, 12, 15, 18, 22, 27]


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, pytest.param(7, marks=pytest.mark.slow), 8])
def test_nearest_codes_are_those_of_the_oracle_everywhere(bits: int) -> None:
    positions = [Fraction(n, 16) for n in range(-20, 16 * 2**bits + 20, 1 if bits < 6 else 7)]
    expected = [oracle.companded_nearest(position, bits) for position in positions]
    values = np.array([float(position) for position in positions], dtype=np.float32)
    assert nearest_codes(values, bits, grid=COMPANDED).tolist() == expected
    assert nearest_codes(torch.from_numpy(values), bits, grid=COMPANDED).tolist() == expected


def test_stored_codes_are_an_ordinary_int8_tensor_from_which_every_slice_comes_back() -> None:
    expected = [oracle.companded_int8(label) for label in range(256)]
    stored = assert_every_slice_comes_back(COMPANDED, expected=expected, distinct=224)
    assert labels_of(stored, grid=UNIFORM) is stored


def test_tails_cost_the_narrow_widths_less_than_on_the_uniform_grid() -> None:
    weight = torch.from_numpy(np.random.default_rng(0).standard_t(6, (64, 256)).astype(np.float32))
    error = {}
    for kind in (UNIFORM, COMPANDED):
        tensor = nest(weight, Grid(rule="prefix", group_size=64, sliced=(2, 3, 4), kind=kind))
        error[kind] = {bits: float((tensor.read(bits) - weight).square().mean()) for bits in (6, 4, 3, 2)}
    assert all(error[COMPANDED][bits] < 0.95 * error[UNIFORM][bits] for bits in (6, 4, 3, 2)), error


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("rtn", {}),
        ("gptq", {"samples": 8, "seq_len": 32}),
        pytest.param("gptq", {"samples": 8, "seq_len": 32, "tune": 2}, marks=pytest.mark.slow),
        ("omniquant", {"samples": 8, "seq_len": 32, "steps": 2}),
        ("qat", {"steps": 2, "seq_len": 32}),
        ("qat", {"steps": 2, "seq_len": 32, "masters": "each", "objective": "8,4,2,fp->8;4;2"}),
        ("gptq", {"samples": 8, "seq_len": 32, "baseline_bits": 2}),
    ],
    ids=["rtn", "gptq", "tuned", "omniquant", "qat", "masters", "dedicated"],
)
def test_every_method_makes_codes_that_stock_transformers_reads_as_our_int8(
    method: str, options: dict[str, object], llama: Path, text_file: Path, tmp_path: Path
) -> None:
    text = {} if method == "rtn" else {"text": [text_file]}
    out = conftest.quantize(
        llama, tmp_path / "out", method=method, scope="linears", group_size=16, grid=COMPANDED, **text, **options
    )
    checkpoint = open_checkpoint(out)
    assert (checkpoint.spec.grid, checkpoint.spec.format) == (COMPANDED, 4)
    stock = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    ours = matquant.load(out, bits=8, kernels="none", dtype=torch.float32)
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(stock(tokens).logits, ours(tokens).logits)
    path = next(iter(checkpoint.shapes))
    nested = checkpoint.nested(path)
    scale, zero = (part[..., None] for part in nested.affine(2))
    rows, columns = nested.codes.shape
    expected = scale * (position_table(2, COMPANDED)[nested.codes.reshape(rows, -1, 16) >> 6] - zero)
    assert np.array_equal(nested.read(2), expected.reshape(rows, columns))


def test_a_checkpoint_read_and_written_again_is_the_same(llama: Path, tmp_path: Path) -> None:
    out = conftest.quantize(llama, tmp_path / "out", method="rtn", grid=COMPANDED)
    matquant.load(out, kernels="none").save_pretrained(tmp_path / "again")
    first, second = open_checkpoint(out), open_checkpoint(tmp_path / "again")
    for path in first.shapes:
        packed = [checkpoint.array(f"{path}.weight_packed") for checkpoint in (first, second)]
        assert np.array_equal(*packed)
        assert np.array_equal(packed[0].view(np.uint8)[:, : first.shapes[path][1]], stored(first, path))
    assert json.loads((out / "config.json").read_text())["quantization_config"]["matquant"]["grid"] == COMPANDED


def stored(checkpoint: matquant.format.read.Checkpoint, path: str) -> np.ndarray:
    return np.asarray(stored_codes(checkpoint.nested(path).codes, grid=COMPANDED))


@each(("bits", "exact"), [(2, "Q5_0"), (3, "Q6_K"), (4, "Q8_0"), (6, "Q8_0"), (8, "Q8_0")])
def test_a_narrow_slice_is_held_exactly_by_a_type_with_room_for_its_integers(bits: int, exact: str) -> None:
    weight = torch.from_numpy(np.random.default_rng(1).standard_normal((32, 512)).astype(np.float32) * 0.02)
    grid = Grid(rule="prefix", group_size=256, zeros=CENTRE, sliced=(2, 3, 4), kind=COMPANDED)
    tensor = nested_to_numpy(nest(weight, grid))
    container = next(found for found in CONTAINERS if found.name == exact)
    encoded = encode(tensor, bits, container)
    assert np.array_equal(decode(container, encoded), tensor.read(bits))
    smaller = [found for found in CONTAINERS if found.zero == FIXED and found.bits < container.bits]
    assert all(isinstance(fit(found, tensor, bits), Misfit) for found in smaller)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "round"}, "grid='companded' needs rule='prefix', found 'round'; use grid 'uniform'"),
        ({"symmetric": False}, "grid='companded' needs symmetric=True, found False; use grid 'uniform'"),
        ({"grid": "bent"}, "grid='bent' is not known; use one of uniform, companded, float"),
    ],
)
def test_what_the_grid_cannot_hold_is_rejected(options: dict[str, object], message: str, llama: Path) -> None:
    with pytest.raises(InputError) as error:
        conftest.quantize(llama, "unused", method="rtn", **({"grid": COMPANDED} | options))
    assert str(error.value) == message


def test_the_example_of_the_format_page_is_what_is_written_and_read(tmp_path: Path) -> None:
    example = document_tables("The companded grid: format 4")[1]
    assert_example_is_written_and_read(example, COMPANDED, tmp_path / "out", widths=(8, 4, 2))


def test_a_uniform_record_stays_in_its_old_format() -> None:
    assert Spec(rule="prefix", widths=(8,)).format == 1
    assert "grid" not in Spec(rule="prefix", widths=(8,)).to_json()
    assert Spec(rule="prefix", widths=(8,), grid=COMPANDED).to_json()["format"] == 4
