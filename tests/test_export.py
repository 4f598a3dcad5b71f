"""Exports: what a container holds is the slice, exactly; the rest is refused; nothing half-written."""

import itertools
import json
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

import conftest
import matquant
from conftest import largest_file
from matquant.core.packing import pack, unpack
from matquant.core.spec import Plan
from matquant.core.tensor import NestedTensor
from matquant.export import FORMATS, export, make_job
from matquant.export.card import RECORD
from matquant.export.containers import (
    EXACT,
    FIXED,
    INTEGER,
    MIDRANGE,
    MINIMUM,
    Container,
    Fit,
    Misfit,
    decode,
    encode,
    fit,
)
from matquant.export.explain import explain
from matquant.format.read import manifest_sha256, open_checkpoint
from matquant.format.shards import Part, Slot, write_shards
from matquant.format.sizes import bits_per_weight
from matquant.format.verify import verify_checkpoint
from matquant.system.errors import InputError
from matquant.system.files import sha256
from oracle import RULES, slice_code

UP = "model.layers.0.mlp.up_proj"
WIDTHS = range(2, 9)


# Packing -------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 8), st.integers(1, 5), st.integers(1, 100), st.integers(0, 2**32))
def test_packing_puts_bit_i_of_code_k_at_bit_nk_plus_i(bits: int, rows: int, columns: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, (rows, columns), dtype=np.uint8)
    packed = pack(codes, bits)
    for row, words in zip(codes.tolist(), packed.tolist(), strict=True):
        number = sum(code << (bits * place) for place, code in enumerate(row))
        assert words == [(number >> (32 * place)) & 0xFFFFFFFF for place in range(-(-columns * bits // 32))]
    np.testing.assert_array_equal(unpack(packed, bits, columns), codes)


# Containers ----------------------------------------------------------------------------------------------------------


def nested(zero: float, rule: str, bits: int, scale: float = 0.75) -> NestedTensor:
    """All 256 codes in one row of one group, with this zero at ``bits`` bits."""
    affine = np.full((1, 1), scale, np.float32), np.full((1, 1), zero, np.float32)
    grid = (np.full((1, 1), 1.0, np.float32), np.full((1, 1), 128.0, np.float32))
    codes = np.arange(256, dtype=np.uint8)[None]
    return NestedTensor(codes=codes, scale=grid[0], zero=grid[1], rule=rule, slices={bits: affine})


def representable(container: Container, zero: Fraction, top: int) -> bool:
    """Whether integers 0..2^n - 1 can be f (c - zero) + o for all codes c, f 1 or 2: the definition, tried out."""
    if container.zero == MINIMUM:
        return top < 2**container.bits
    middle = [2 ** (container.bits - 1)] if container.zero == FIXED else range(2**container.bits)
    for factor in (1, 2):
        for offset in middle:
            ends = [factor * (code - zero) + offset for code in (0, top)]
            if all(end.denominator == 1 and 0 <= end < 2**container.bits for end in ends):
                return True
    return False


@pytest.mark.parametrize("kind", [FIXED, INTEGER, MINIMUM])
@pytest.mark.parametrize("rule", RULES)
def test_a_container_holds_a_slice_exactly_or_refuses_it(kind: str, rule: str) -> None:
    for bits in WIDTHS:
        half = 2.0 ** (bits - 1)
        for zero in (0.0, half, half - 0.5, half + 3, half - 0.4375, -2.5, 2.0**bits, 2.0**bits - 0.5):
            tensor = nested(zero, rule, bits)
            top = max(slice_code(code, bits, rule) for code in range(256))
            for size in range(1, 9):
                container = Container(name="test", bits=size, zero=kind, scale="F32")
                found = fit(container, tensor, bits)
                assert isinstance(found, Fit) == representable(container, Fraction(zero), top), (bits, zero, size)
                if isinstance(found, Fit):
                    encoded = encode(tensor, bits, container)
                    assert encoded.codes.max() < 2**size
                    np.testing.assert_array_equal(decode(container, encoded), tensor.read(bits))


def test_a_container_of_the_neighbouring_width_is_noticed() -> None:
    """The comparison above can fail: other codes, another zero, another scale."""
    container = Container(name="test", bits=8, zero=MINIMUM)
    tensor = nested(7.5, "prefix", 4)
    for other in (nested(7.5, "round", 4), nested(7.0, "prefix", 4), nested(7.5, "prefix", 4, scale=0.5)):
        assert (decode(container, encode(other, 4, container)) != tensor.read(4)).any()


def test_only_scales_and_minima_are_rounded_and_only_once() -> None:
    tensor = nested(7.4375, "prefix", 4, scale=0.7265625 + 2**-13)  # 14 significant bits, fp16 has 11
    container = Container(name="test", bits=4, zero=MINIMUM)
    scale, zero = tensor.affine(4)
    expected = np.float16(scale).astype(np.float32) * slice_codes(tensor, 4) + np.float32(np.float16(-scale * zero))
    np.testing.assert_array_equal(decode(container, encode(tensor, 4, container)), expected)
    assert (expected != tensor.read(4)).any()


def slice_codes(tensor: NestedTensor, bits: int) -> np.ndarray:
    return np.array([[slice_code(code, bits, tensor.rule) for code in tensor.codes[0]]], dtype=np.float32)


@pytest.mark.parametrize("scale", [1e-9, 1e6])
def test_a_scale_beyond_the_type_is_a_misfit(scale: float) -> None:
    found = fit(Container(name="test", bits=4, zero=MINIMUM), nested(7.5, "prefix", 4, scale=scale), 4)
    assert found == Misfit(f"scale {np.float32(scale):g} does not fit F16")


def test_sizes_that_no_block_divides_are_told_from_numbers_that_do_not_fit() -> None:
    tensor = nested(7.5, "prefix", 4)
    assert fit(Container(name="B", bits=4, zero=MINIMUM, block=96), tensor, 4) == Misfit(
        "in_features=256 is not a multiple of 96 (B)", blocked=True
    )
    assert fit(Container(name="B", bits=4, zero=MINIMUM, rows=2), tensor, 4) == Misfit(
        "out_features=1 is not a multiple of 2 (B)", blocked=True
    )
    assert fit(Container(name="B", bits=4, zero=FIXED, block=96), tensor, 4) == Misfit(
        "zero-point 7.5 needs integers -7 to 23 in B"
    )
    grouped = NestedTensor(
        codes=tensor.codes, scale=np.ones((1, 4), np.float32), zero=np.full((1, 4), 128, np.float32), rule="prefix"
    )
    assert fit(Container(name="B", bits=4, zero=MINIMUM, block=128), grouped, 4) == Misfit(
        "groups of 64 are not multiples of 128"
    )


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 7])
def test_centred_zeros_are_the_least_squares_fit_of_the_slice(rule: str, bits: int) -> None:
    centre = 2 ** (bits - 1) - (0.5 if rule == "prefix" else 0)
    tensor = nested(centre + 0.3125, rule, bits)
    container = Container(name="test", bits=8, zero=FIXED)
    weight = tensor.read(bits)
    steps = slice_codes(tensor, bits) - centre
    best = float((weight * steps).sum() / (steps * steps).sum())
    moved = encode(tensor, bits, container, MIDRANGE)
    found = decode(container, moved)
    scale = found[steps != 0][0] / steps[steps != 0][0]
    np.testing.assert_allclose(scale, best, rtol=2**-8)
    np.testing.assert_allclose(found, scale * steps, rtol=1e-6)


# Whole checkpoints ---------------------------------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "prefix": {},
    "prefix plain": {"affine": "none"},
    "midrange": {"zero_point": "midrange"},
    "round": {"rule": "round", "affine": "none"},
    "extra": {"rule": "extra", "affine": "none"},
    "asymmetric": {"symmetric": False},
    "groups": {"group_size": 16, "rule": "round", "affine": "none"},
    "exact scales": {"scale_dtype": "float32", "rule": "round", "affine": "none"},
    "all linears": {"scope": "linears"},
}


@pytest.fixture(scope="module")
def checkpoints(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {name: conftest.quantize(llama, root / name, method="rtn", **options) for name, options in OPTIONS.items()}


@pytest.fixture
def checkpoint(checkpoints: dict[str, Path]) -> Path:
    return checkpoints["prefix"]


def stock_weight(directory: Path, path: str) -> np.ndarray:
    """A weight of a compressed-tensors directory, from the format's description: bits from config.json, row by row."""
    tensors = load_file(directory / "model.safetensors")
    quantised = json.loads((directory / "config.json").read_text())["quantization_config"]
    groups = quantised["config_groups"].values()
    found = [
        g["weights"] for g in groups if g["targets"] == ["Linear"] or f"re:^{path}$".replace(".", r"\.") in g["targets"]
    ]
    assert len(found) == 1
    bits = found[0]["num_bits"]
    rows, columns = tensors[f"{path}.weight_shape"].tolist()
    scale = tensors[f"{path}.weight_scale"].astype(np.float32)

    def integers(words: np.ndarray, count: int) -> list[int]:
        number = sum((int(word) & 0xFFFFFFFF) << (32 * place) for place, word in enumerate(words))
        return [(number >> (bits * place)) & (2**bits - 1) for place in range(count)]

    codes = np.array([integers(words, columns) for words in tensors[f"{path}.weight_packed"]], dtype=np.float32)
    zero = np.full_like(scale, 2 ** (bits - 1))
    if not found[0]["symmetric"]:
        packed = tensors[f"{path}.weight_zero_point"]
        zero = np.array([integers(words, rows) for words in packed.T], dtype=np.float32).T
    grouped = codes.reshape(rows, scale.shape[1], -1)
    return (scale[..., None] * (grouped - zero[..., None])).reshape(rows, columns)


@pytest.mark.parametrize("name", OPTIONS)
def test_compressed_tensors_is_the_slice_exactly_or_refused(
    name: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(checkpoints[name])
    held, refused = [], []
    for bits in WIDTHS:
        try:
            made = export(checkpoints[name], tmp_path / str(bits), to="compressed-tensors", bits=bits)
        except InputError as error:
            refused.append(str(error))
            assert not (tmp_path / str(bits)).exists()
            continue
        held.append(bits)
        for path in checkpoint.shapes:
            weight = stock_weight(tmp_path / str(bits), path)
            np.testing.assert_array_equal(weight, checkpoint.nested(path).read(bits))
        file = (tmp_path / str(bits) / "model.safetensors").stat().st_size
        assert made["bytes"] <= file < made["bytes"] + 20_000
    assert all("; use --to " in message for message in refused)
    expected = {
        "round": list(WIDTHS), "extra": list(WIDTHS), "groups": list(WIDTHS), "exact scales": list(WIDTHS),
        "midrange": [2, 3, 4, 5, 8],
    }  # fmt: skip
    assert held == expected.get(name, [8])


@pytest.mark.parametrize("name", ["prefix", "prefix plain", "all linears"])
def test_with_centred_zeros_prefix_takes_one_bit_more(name: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(checkpoints[name])
    for bits in (2, 3, 4, 6, 7):
        made = export(checkpoints[name], tmp_path / str(bits), to="compressed-tensors", bits=bits, zero_point=MIDRANGE)
        assert made["containers"] == {f"int{bits + 1}": len(checkpoint.shapes)}
        for path in checkpoint.shapes:
            tensor = checkpoint.nested(path)
            scale, _ = tensor.affine(bits)
            gap = np.abs(stock_weight(tmp_path / str(bits), path) - tensor.read(bits)) / np.repeat(
                scale, tensor.codes.shape[1] // scale.shape[1], axis=1
            )
            limit = abs(tensor.affine(bits)[1] - (2**bits - 1) / 2).max()  # what moving the zeros alone would do
            assert np.sqrt(np.square(gap).mean(axis=1)).max() <= limit + 1e-3, (path, bits)


def test_a_plan_is_exported_path_by_path(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(checkpoints["round"])
    plan = Plan(default=4, bits={UP: 2, "model.layers.1.mlp.down_proj": 6})
    made = export(checkpoints["round"], tmp_path / "out", to="compressed-tensors", plan=plan)
    assert made["containers"] == {"int2": 1, "int4": 4, "int6": 1}
    for path, bits in plan.resolve(checkpoint.shapes).items():
        np.testing.assert_array_equal(stock_weight(tmp_path / "out", path), checkpoint.nested(path).read(bits))
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    assert record["bits"] == plan.resolve(checkpoint.shapes)
    assert record["containers"][UP] == "int2"


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, marks=[] if dtype is None or name in ("prefix", "exact scales") else pytest.mark.slow)
        for name, dtype in itertools.product(OPTIONS, (None, "float32", "bfloat16", "float16"))
    ],
)
def test_dense_is_what_load_gives(name: str, dtype: str | None, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(checkpoints[name], out, to="dense", bits=3, dtype=dtype)
    kind = getattr(torch, dtype or "float32")
    ours = matquant.load(checkpoints[name], 3, kernels="none", dtype=kind)
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert theirs.dtype == kind
    for key, value in ours.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[key]), key


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "asymmetric"])
@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_a_smaller_nested_checkpoint_slices_as_the_whole_one(
    name: str, bits: int, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    whole, out = open_checkpoint(checkpoints[name]), tmp_path / "out"
    made = export(checkpoints[name], out, to="matquant", bits=bits)
    part = verify_checkpoint(out)
    assert (part.spec.format, part.spec.stored_bits) == (3 if name == "midrange" else 2, bits + 1)
    assert part.spec.zeros == whole.spec.zeros
    assert made["bits_per_weight"] < bits_per_weight(whole, dict.fromkeys(whole.shapes, 8)) - (6.8 - bits)
    for path in whole.shapes:
        for width in range(1, bits + 1):
            np.testing.assert_array_equal(part.nested(path).read(width), whole.nested(path).read(width))
            np.testing.assert_array_equal(part.nested(path, mapped=True).read(width), part.nested(path).read(width))
        np.testing.assert_array_equal(stock_weight(out, path), part.nested(path).read(8))


def test_a_smaller_nested_checkpoint_is_a_stock_model_near_its_widest_slice(checkpoint: Path, tmp_path: Path) -> None:
    export(checkpoint, tmp_path / "out", to="matquant", bits=4)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    eight = matquant.load(tmp_path / "out", kernels="none")
    tokens = torch.arange(3, 22)[None]
    assert torch.equal(stock(tokens).logits, eight(tokens).logits)
    whole, part = open_checkpoint(checkpoint), open_checkpoint(tmp_path / "out")
    for path in whole.shapes:  # without own affines the int4 slice is off by half an 8-bit step
        tensor = whole.nested(path)
        plain = NestedTensor(codes=tensor.codes, scale=tensor.scale, zero=tensor.zero, rule="prefix")
        gap = np.abs(part.nested(path).read(8) - plain.read(4)) / tensor.scale
        np.testing.assert_allclose(gap, 0.5, atol=1e-3)


def test_a_smaller_nested_checkpoint_of_a_plan_and_of_a_smaller_one(checkpoint: Path, tmp_path: Path) -> None:
    whole = open_checkpoint(checkpoint)
    export(checkpoint, tmp_path / "plan", to="matquant", plan=Plan(default=4, bits={UP: 2}))
    part = verify_checkpoint(tmp_path / "plan")
    assert part.spec.stored_bits == {path: 3 if path == UP else 5 for path in whole.shapes}
    export(tmp_path / "plan", tmp_path / "again", to="matquant", bits=2)
    again = verify_checkpoint(tmp_path / "again")
    assert again.spec.stored_bits == 3
    for path in whole.shapes:
        np.testing.assert_array_equal(part.nested(path).read(2), whole.nested(path).read(2))
        np.testing.assert_array_equal(again.nested(path).read(2), whole.nested(path).read(2))
    served = matquant.load(tmp_path / "again", 2)
    expected = matquant.load(checkpoint, 2)
    tokens = torch.arange(3, 22)[None]
    assert torch.equal(served(tokens).logits, expected(tokens).logits)
    assert list(matquant.Engine(tmp_path / "again", max_bits=2).generate([5, 6, 7], bits=2, max_tokens=8)) == list(
        matquant.Engine(checkpoint, max_bits=2).generate([5, 6, 7], bits=2, max_tokens=8)
    )


def test_exporting_twice_gives_the_same_bytes(checkpoint: Path, tmp_path: Path) -> None:
    for to in FORMATS:
        suffix = FORMATS[to].suffix
        if to in ("gptq", "gptq_v2"):
            continue
        places = [tmp_path / f"{to}-{number}{suffix}" for number in range(2)]
        for place in places:
            export(checkpoint, place, to=to, bits=8)
        first, second = (sorted([place] if suffix else place.iterdir()) for place in places)
        assert [file.read_bytes() for file in first] == [file.read_bytes() for file in second]


def test_explain_says_of_every_width_what_export_does(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    for name in ("prefix", "round", "asymmetric"):
        checkpoint = open_checkpoint(checkpoints[name])
        table = explain(checkpoint, plan=dict.fromkeys(checkpoint.shapes, 3))
        assert list(table) == list(FORMATS)
        for to, outcomes in table.items():
            assert list(outcomes) == ["8", "7", "6", "5", "4", "3", "2", "plan"]
            assert outcomes["plan"] == outcomes["3"]
            out = tmp_path / f"{name}-{to}{FORMATS[to].suffix}"
            if "rejected" in outcomes["4"]:
                with pytest.raises(InputError) as caught:
                    export(checkpoints[name], out, to=to, bits=4)
                assert str(caught.value) == outcomes["4"]["rejected"]
            else:
                made = export(checkpoints[name], out, to=to, bits=4)
                assert {key: made[key] for key in ("containers", "bits_per_weight")} == outcomes["4"]


def test_what_travels_along(checkpoint: Path, tmp_path: Path) -> None:
    evaluated = tmp_path / "eval.json"
    evaluated.write_text('{"bits_per_weight": {"4": 4.25}, "log_perplexity": {"4": 3.5}, "task_average": {"4": 0.5}}')
    export(checkpoint, tmp_path / "out", to="dense", bits=4, base_model="someone/tiny", measured=evaluated)
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "README.md", RECORD} <= names
    assert not {"training.jsonl", "matquant_manifest.json", "matquant_slices.safetensors"} & names
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nbase_model: someone/tiny\nbase_model_relation: quantized\n")
    assert "| int4 (this export) | 4.250 | 3.5000 | 50.00 % |" in card
    assert "| quality | perplexity 33.12; the float model was not measured |" in card
    assert "| method | rtn |" in card


def test_the_card_says_first_what_it_is_what_it_costs_and_how_to_run_it(checkpoint: Path, tmp_path: Path) -> None:
    evaluated, shapes = tmp_path / "eval.json", open_checkpoint(checkpoint).shapes
    record: dict[str, Any] = {
        "checkpoint": manifest_sha256(checkpoint),
        "bits_per_weight": {"4": 4.25, "8": 8.25, "plan": 3.5},
        "log_perplexity": {"4": 3.55, "8": 3.5, "plan": 5.0},
        "kld": {"4": 0.0625},
        "reference": 3.4951,
        "plan": {"name": "p", "bits": dict.fromkeys(shapes, 3)},
    }
    evaluated.write_text(json.dumps(record))

    def card(to: str, **width: Any) -> str:
        out = tmp_path / f"{to}{len(list(tmp_path.iterdir()))}"
        export(checkpoint, out, to=to, measured=evaluated, **width)
        tensors = sum(file.stat().st_size for file in out.glob("*.safetensors"))
        text = (out / "README.md").read_text()
        kilobytes = re.findall(r"\| size \| ([\d.]+) kB, \d+ % of the float32 model \|", text)
        assert float(*kilobytes) == pytest.approx(tensors / 1000, rel=0.1)  # headers of a tiny file
        return text

    four = card("dense", bits=4)
    headings = re.findall(r"^#+ (.*)$", four, re.MULTILINE)
    assert headings[1:] == ["How to run it", "Quality", "How it was made"]
    assert headings[0] == f"{checkpoint.name}, 4 bits, for any tool that reads Hugging Face models"
    assert "| quality | slightly worse: perplexity 34.81 instead of 32.95 |" in four
    assert "| int4 (this export) | slightly worse | 4.250 | 3.5500 | 0.055 | 0.06250 |" in four
    assert "| int8 | as good as the float model | 8.250 | 3.5000 | 0.005 |  |" in four
    assert "pipeline('text-generation', 'DIR')" in four
    assert "| quality | not measured at this width |" in card("dense", bits=6)
    assert "| quality | not usable for text: perplexity 148.41" in card("mlx", plan=Plan(bits=record["plan"]["bits"]))
    moved = card("compressed-tensors", bits=4, zero_point="midrange")
    assert "instead of 32.95 (before it was moved to mid-range) |" in moved
    assert "vllm serve DIR" in moved
    evaluated.write_text(json.dumps(record | {"checkpoint": "0123"}))
    with pytest.raises(InputError) as caught:
        export(checkpoint, tmp_path / "other", to="dense", bits=4, measured=evaluated)
    here = manifest_sha256(checkpoint)[:12]
    assert str(caught.value) == (
        f"--measured {evaluated} was measured on checkpoint 0123…, but {checkpoint} is {here}…; "
        "evaluate this checkpoint"
    )
    assert not (tmp_path / "other").exists()


# Streaming -----------------------------------------------------------------------------------------------------------


def test_shards_are_cut_at_the_limit_and_hold_everything(tmp_path: Path) -> None:
    arrays = {f"t{number}": np.full((10, 10), number, np.float32) for number in range(5)}
    parts = [Part((Slot(name, "F32", (10, 10)),), lambda a=array: [a]) for name, array in arrays.items()]
    told: list[int] = []
    write_shards(tmp_path, parts, report=told.append, shard_bytes=900)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    assert (index["metadata"]["total_size"], sum(told)) == (2000, 2000)
    for name, file in index["weight_map"].items():
        np.testing.assert_array_equal(load_file(tmp_path / file)[name], arrays[name])


def test_few_parts_are_in_memory_at_once(tmp_path: Path) -> None:
    alive = highest = 0

    def make(array: np.ndarray) -> Iterator[Any]:
        nonlocal alive, highest
        alive += 1
        highest = max(highest, alive)
        return [array]

    def report(count: int) -> None:
        nonlocal alive
        alive -= 1

    one = np.zeros((4, 4), np.float32)
    parts = [Part((Slot(f"t{n}", "F32", (4, 4)),), lambda: make(one)) for n in range(40)]
    write_shards(tmp_path, parts, report=report)
    assert (alive, highest <= 4) == (0, True)


# Bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["dense", "compressed-tensors", "matquant"])
def test_a_disk_that_is_full_half_way_leaves_nothing_new(to: str, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(checkpoint, out, to="dense", bits=4)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    with largest_file(20_000), pytest.raises(InputError, match="no space left on the device"):
        export(checkpoint, out, to=to, bits=8, overwrite=True)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_targets_that_exist_are_kept(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="exists; use another -o, or --overwrite to replace it"):
        export(checkpoint, tmp_path / "mine", to="dense")
    with pytest.raises(InputError, match="is not an export of matquant and will not be replaced; use another -o"):
        export(checkpoint, tmp_path / "mine", to="dense", overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_mistakes_are_said_in_three_parts(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    out, prefix = tmp_path / "out", checkpoints["prefix"]
    for options, message in (
        ({"to": "onnx"}, "--to 'onnx' is not a format; give "),
        ({"to": "dense", "bits": 9}, "bits=9 is not a width; use one of 1 to 8"),
        ({"to": "dense", "bits": 4, "plan": Plan()}, "bits and a plan exclude each other; use one of them"),
        ({"to": "dense", "dtype": "int8"}, "dtype='int8' is not supported; use float32, float16, bfloat16"),
        ({"to": "dense", "zero_point": "round"}, "zero_point='round' is not supported; use exact or midrange"),
        (
            {"to": "dense", "plan": Plan(bits={"model.up": 4})},
            "the plan names 'model.up', which the model does not quant",
        ),
        ({"to": "dense", "measured": tmp_path / "none.json"}, "none.json"),
        (
            {"to": "compressed-tensors", "bits": 6},
            "--to compressed-tensors cannot hold model.layers.0.mlp.down_proj at 6 bits, rule prefix, exactly (6 of 6 "
            "weights): zero-point 31.625 is not a multiple of 1/2; use --to ",
        ),
    ):
        with pytest.raises(InputError) as caught:
            export(prefix, out, **options)
        assert message in str(caught.value)
        assert not out.exists()
    with pytest.raises(
        InputError,
        match="zero_point='midrange' needs a symmetric checkpoint: zero-points of this one are far",
    ):
        export(checkpoints["asymmetric"], out, to="compressed-tensors", bits=4, zero_point=MIDRANGE)
    with pytest.raises(InputError, match="the zero-points of an asymmetric checkpoint need all 8 bits; use --to"):
        export(checkpoints["asymmetric"], out, to="matquant", bits=4)


def test_a_refusal_names_what_would_do(checkpoint: Path) -> None:
    with pytest.raises(InputError) as caught:
        make_job(open_checkpoint(checkpoint), "compressed-tensors", {UP: 4})
    remedy = str(caught.value).split("; use ")[1]
    for to in remedy.split(", or ")[0].removeprefix("--to ").split(" or "):
        make_job(open_checkpoint(checkpoint), to, {UP: 4})
    assert "--bits 8" in remedy
    assert "--zero-point midrange" in remedy
    make_job(open_checkpoint(checkpoint), "compressed-tensors", {UP: 4}, zero_point=MIDRANGE)


# Format 2 -------------------------------------------------------------------------------------------------------------


def edit_record(directory: Path, **changes: Any) -> None:
    """Change the record in config.json and make its hash right again."""
    file, manifest = directory / "config.json", directory / "matquant_manifest.json"
    config, listed = json.loads(file.read_text()), json.loads(manifest.read_text())
    config["quantization_config"]["matquant"] |= changes
    file.write_text(json.dumps(config))
    listed["files"]["config.json"] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    manifest.write_text(json.dumps(listed))


def test_the_example_of_the_document() -> None:
    tensor = NestedTensor(
        codes=np.array([[0, 127, 128, 136, 255]], np.uint8), scale=np.ones((1, 1), np.float32),
        zero=np.full((1, 1), 128, np.float32), rule="prefix",
    )  # fmt: skip
    stored = FORMATS["matquant"].encode(tensor, 2, Container(name="top 3", bits=3, zero=FIXED), EXACT).codes
    assert stored.tolist() == [[1, 3, 5, 5, 7]]
    assert pack(stored, 3).tobytes().hex(" ") == "59 7b 00 00"
    assert (stored << 5).tolist() == [[32, 96, 160, 160, 224]]
    text = (Path(__file__).resolve().parents[1] / "docs" / "format.md").read_text()
    for shown in ("1 3 5 5 7 in 3 bits", "`59 7b 00 00`", "32 96 160 160 224, whose"):
        assert shown in text


@pytest.mark.parametrize("stored", [1, 9, "5", True, {UP: 5}, {UP: 0}, [5]])
def test_a_record_of_impossible_stored_bits_is_damage(stored: Any, checkpoint: Path, tmp_path: Path) -> None:
    export(checkpoint, tmp_path / "out", to="matquant", bits=4)
    edit_record(tmp_path / "out", stored_bits=stored)
    with pytest.raises(InputError, match="the checkpoint is damaged: write it again"):
        open_checkpoint(tmp_path / "out")


@pytest.mark.parametrize("stored", [2, 4, 6, 8])
def test_other_stored_bits_than_the_tensors_have_are_damage(stored: int, checkpoint: Path, tmp_path: Path) -> None:
    export(checkpoint, tmp_path / "out", to="matquant", bits=4)
    edit_record(tmp_path / "out", stored_bits=stored)
    with pytest.raises(InputError, match=r"weight_packed has shape .*; the checkpoint is damaged"):
        open_checkpoint(tmp_path / "out")


def test_format_1_has_no_stored_bits(checkpoint: Path, tmp_path: Path) -> None:
    assert "stored_bits" not in open_checkpoint(checkpoint).spec.to_json()
    export(checkpoint, tmp_path / "out", to="matquant", bits=4)
    edit_record(tmp_path / "out", format=1)
    with pytest.raises(InputError, match="has the key 'stored_bits', which format 1 does not"):
        open_checkpoint(tmp_path / "out")
