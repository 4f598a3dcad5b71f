"""The float grid: every label and width against OCP's element formats, on disk, in stock readers, in rtn and gptq."""

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from rich.console import Console

import conftest
import matquant
import oracle
from cases import each
from gguf_files import file_types, file_weights, from_pairs, gguf_name, metadata
from grid_checks import LABELS, WIDTHS, assert_every_slice_comes_back, assert_example_is_written_and_read
from matquant.core.grid import BLOCK, fit_grid, power_of_two
from matquant.core.nest import (
    CENTRE,
    FLOAT,
    integer_positions,
    middle,
    nearest_codes,
    position_table,
    slice_affine,
    slice_codes,
    slice_positions,
)
from matquant.core.spec import Plan, Spec
from matquant.engine.engine import Engine
from matquant.export import export
from matquant.export.blocks import CONTAINERS
from matquant.export.card import RECORD
from matquant.export.containers import Container, choose, decode, encode
from matquant.export.explain import explain, render
from matquant.format.read import open_checkpoint
from matquant.hf_torch.arrays import nested_to_numpy
from matquant.methods.parts.cells import cells_of
from matquant.methods.parts.fake import Grid, nest
from matquant.system.errors import InputError
from test_checkpoint import document_tables

# OCP Microscaling Formats v1.0: 5.3.3 (FP4, E2M1) and the first and last values of each exponent of 5.3.2 (FP6, E2M3)
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
E2M3 = {0b00000: 0, 0b00001: 0.125, 0b00111: 0.875, 0b01000: 1, 0b01111: 1.875, 0b10000: 2, 0b11000: 4, 0b11111: 7.5}

SCALES = np.array([1, 0.5, 2])  # that an export tries, relative to the scale of OCP 6.3


@each("bits", WIDTHS)
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


@each("bits", WIDTHS)
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


@each("widths", [(8, 2), (8, 5, 2), (8, 6, 4, 3, 2)])
def test_gptq_chooses_a_code_of_least_error(widths: tuple[int, ...]) -> None:
    """All targets about the thresholds of int2, in sixteenths of a code and between them, against all 256 labels."""
    place = torch.arange(-16, 5 * 64) / 64  # of an int2 code
    target_RN = torch.stack([place * 2 ** (bits - 2) + (2 ** (bits - 2) - 1) / 2 for bits in widths])
    ones_RN, zeros_RN = torch.ones_like(target_RN), torch.zeros_like(target_RN)
    lambdas_R = torch.tensor([16.0 ** (2 - bits) for bits in widths])  # each about as important as the others
    choose = cells_of("prefix", FLOAT, widths, torch.device("cpu")).choose
    codes_N, read_RN = choose(target_RN, ones_RN, zeros_RN, lambdas_R)
    every_RQ = torch.stack([slice_positions(torch.from_numpy(LABELS), bits, grid=FLOAT) for bits in widths])
    cost_NQ = torch.tensordot(lambdas_R, (target_RN[:, :, None] - every_RQ[:, None]).square(), dims=1)
    assert torch.equal(read_RN, every_RQ[:, codes_N.long()])
    chosen_N = cost_NQ.gather(1, codes_N.long()[:, None])[:, 0]
    torch.testing.assert_close(chosen_N, cost_NQ.amin(1), rtol=1e-5, atol=1e-6)


def test_stored_codes_are_an_ordinary_int8_tensor_from_which_every_slice_comes_back() -> None:
    expected = [int(oracle.float_position(label, 8)) for label in range(256)]
    assert_every_slice_comes_back(FLOAT, expected=expected, distinct=176)


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
        pytest.param("gptq", {"samples": 8, "seq_len": 32}, marks=pytest.mark.slow),
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


def test_the_example_of_the_format_page_is_what_is_written_and_read(tmp_path: Path) -> None:
    example = document_tables("The float grid: format 6")[-1]
    assert_example_is_written_and_read(example, FLOAT, tmp_path / "out", widths=(8, 6, 4, 2))


def test_a_grid_of_a_newer_format_is_damage(blocks: Path) -> None:
    record = {**open_checkpoint(blocks).spec.to_json(), "format": 5}
    del record["experts"]  # a key of format 6
    with pytest.raises(InputError) as error:
        Spec.from_json(record, where="config.json")
    assert str(error.value) == (
        "config.json has grid 'float', which format 5 does not have; the checkpoint is damaged: write it again"
    )


@pytest.fixture(scope="module")
def blocks(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in groups of 32."""
    return quantized(llama, tmp_path_factory.mktemp("float") / "blocks", group_size=BLOCK)


@pytest.fixture(scope="module")
def channels(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with one scale for each row, which is not a power of two."""
    return quantized(llama, tmp_path_factory.mktemp("float") / "channels", group_size=None)


def quantized(llama: Path, out: Path, **options: Any) -> Path:
    return conftest.quantize(
        llama, out, method="rtn", scope="linears", exclude=["down_proj"], grid=FLOAT, zero_point="midrange", **options
    )


@pytest.mark.parametrize("plan", [{}, {"model.layers.0.self_attn.k_proj": 8, "model.layers.1.mlp.up_proj": 2}])
def test_stock_transformers_reads_int4_as_mxfp4(plan: dict[str, int], blocks: Path, tmp_path: Path) -> None:
    out, checkpoint = tmp_path / "out", open_checkpoint(blocks)
    made = export(blocks, out, to="compressed-tensors", plan=Plan(default=4, bits=plan))
    assert made["containers"]["MXFP4"] == len(checkpoint.shapes) - len(plan)
    assert bool(plan) or made["bits_per_weight"] == 4.25
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert model(torch.arange(4)[None]).logits.dtype == torch.bfloat16
    for path in checkpoint.shapes:
        weight = model.get_submodule(path).weight.detach().float().numpy()
        ours = torch.from_numpy(checkpoint.nested(path).read(plan.get(path, 4))).bfloat16()
        assert np.array_equal(weight, ours.float().numpy()), path


def test_gguf_holds_int4_as_mxfp4(blocks: Path, tmp_path: Path) -> None:
    export(blocks, tmp_path / "out.gguf", to="gguf", bits=4)
    checkpoint, weights, types = (
        open_checkpoint(blocks),
        file_weights(tmp_path / "out.gguf"),
        file_types(tmp_path / "out.gguf"),
    )
    assert metadata(tmp_path / "out.gguf")["general.file_type"] == gguf.LlamaFileType.MOSTLY_MXFP4_MOE
    for path in checkpoint.shapes:
        name = gguf_name(path)
        assert types[name] == "MXFP4"
        heads = checkpoint.config[f"num_{'attention' if 'q_proj' in path else 'key_value'}_heads"]
        found = from_pairs(weights[name], heads) if path.endswith(("q_proj", "k_proj")) else weights[name]
        assert np.array_equal(found, checkpoint.nested(path).read(4)), path


def test_scales_that_are_no_powers_of_two_take_a_wider_type_or_a_loss(channels: Path, tmp_path: Path) -> None:
    told: list[str] = []
    made = export(channels, tmp_path / "exact", to="compressed-tensors", bits=4, notice=told.append)
    assert list(made["containers"]) == ["int5"]
    assert told == [
        "float slices take wider types to be exact, 4 bits int5; "
        "--requantise fits them to 4-bit types at a loss, or quantise in groups of 32"
    ]
    made = export(channels, tmp_path / "fitted", to="compressed-tensors", bits=4, requantise=True)
    assert list(made["containers"]) == ["MXFP4"]
    checkpoint = open_checkpoint(channels)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "fitted")
    model(torch.arange(4)[None])  # decompresses
    distance = size = 0.0
    for path in checkpoint.shapes:
        ours = checkpoint.nested(path).read(4).astype(np.float64)
        theirs = model.get_submodule(path).weight.detach().float().numpy()
        assert np.array_equal(theirs, nearest_mxfp4(ours)), path
        distance, size = distance + float(((theirs - ours) ** 2).sum()), size + float((ours**2).sum())
    assert json.loads((tmp_path / "fitted" / RECORD).read_text())["requantised"] == pytest.approx(
        distance / size, rel=1e-5
    )
    assert 0 < distance / size < 0.03


def nearest_mxfp4(weight_NK: np.ndarray) -> np.ndarray:
    """MXFP4 of weights, float64: of three scales of each block the one with the least squared error, halves away from
    zero, except below 0, where they go up."""
    values = np.array([*(-value for value in reversed(E2M1[1:])), *E2M1])
    thresholds = (values[1:] + values[:-1]) / 2
    found = np.zeros_like(weight_NK)
    for row, start in np.ndindex(len(weight_NK), weight_NK.shape[1] // BLOCK):
        part = slice(start * BLOCK, (start + 1) * BLOCK)
        block = weight_NK[row, part]
        usual = 2 ** (np.floor(np.log2(np.abs(block).max())) - 2)
        tries = [scale * values[np.searchsorted(thresholds, block / scale, side="right")] for scale in usual * SCALES]
        found[row, part] = min(tries, key=lambda numbers: float(((numbers - block) ** 2).sum()))
    return found


def test_what_is_mxfp4_already_is_requantised_without_a_loss(blocks: Path, tmp_path: Path) -> None:
    export(blocks, tmp_path / "out.gguf", to="gguf", bits=4)
    export(blocks, tmp_path / "fitted.gguf", to="gguf", bits=4, requantise=True)
    plain, fitted = (file_weights(tmp_path / name) for name in ("out.gguf", "fitted.gguf"))
    assert all(np.array_equal(plain[name], fitted[name]) for name in plain)


@each(("bits", "exact"), [(2, "Q4_0"), (3, "Q5_0"), (4, "MXFP4"), (8, "Q8_0")])
def test_each_slice_is_held_exactly_by_a_type_of_gguf(bits: int, exact: str) -> None:
    weight = torch.from_numpy(np.random.default_rng(1).standard_normal((32, 256)).astype(np.float32) * 0.02)
    grid = Grid(rule="prefix", group_size=BLOCK, zeros=CENTRE, sliced=(2, 3), kind=FLOAT)
    tensor = nested_to_numpy(nest(weight, grid))
    container = choose(CONTAINERS, tensor, bits)
    assert isinstance(container, Container)
    assert container.name == exact
    assert np.array_equal(decode(container, encode(tensor, bits, container)), tensor.read(bits))


def test_explain_shows_mxfp4(blocks: Path) -> None:
    checkpoint = open_checkpoint(blocks)
    outcomes = explain(checkpoint)
    assert {to for to, found in outcomes.items() if "MXFP4" in found["4"].get("containers", {})} == {
        "gguf",
        "compressed-tensors",
    }
    console = Console(width=80)
    with console.capture() as capture:
        console.print(render(outcomes, checkpoint))
    shown = capture.get()
    assert "Slices of the float grid take wider types" in shown
    assert "In groups of 32, int4 is MXFP4 without a loss." in shown
