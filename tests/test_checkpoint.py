"""The nested checkpoint on disk, held to docs/format.md byte by byte, and its damage, crashes and sizes.

The oracle below is written from the document and imports nothing of ours, not even safetensors: it reads files with
struct and json. The worked example of the document is parsed out of the page and held to the oracle and to the code.

N out features, K in features, G groups.
"""

import collections
import contextlib
import ctypes
import dataclasses
import errno
import hashlib
import inspect
import itertools
import json
import linecache
import os
import re
import shutil
import struct
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

import oracle_overflow
from conftest import largest_file
from matquant.core import overflow
from matquant.core.nest import slice_codes
from matquant.core.spec import Spec
from matquant.core.tensor import NestedTensor
from matquant.format import layout, sizes
from matquant.format import write as write_module
from matquant.format.contents import summarise
from matquant.format.read import open_checkpoint
from matquant.format.sizes import bits_per_weight, plain_bytes, size_bytes
from matquant.format.verify import verify_checkpoint
from matquant.system import files as files_module
from matquant.system.errors import InputError
from packing_extra import pack_extra

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "format.md"
RULES = ("prefix", "round", "extra")
WIDTHS = range(1, 9)
MANIFEST = "matquant_manifest.json"
AGAIN = "copy it again or write the checkpoint again"
DAMAGED = "the checkpoint is damaged: write it again"
MADE_BY = "give a checkpoint made by matquant quantize"

Array = NDArray[Any]


# The oracle: docs/format.md in plain Python ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor as it lies in a safetensors file."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


def read_safetensors(file: Path) -> dict[str, Stored]:
    """Every tensor of a file: 8 bytes of header length, the header, the bytes."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        found[name] = Stored(entry["dtype"], tuple(entry["shape"]), content[begin:end])
    return found


def read_all(directory: Path) -> dict[str, Stored]:
    """Every tensor of a checkpoint, whatever its file."""
    files = sorted(directory.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in read_safetensors(file).items()}


def numbers(tensor: Stored) -> list[Fraction]:
    """The exact numbers of a tensor, row major."""
    if tensor.dtype == "BF16":
        halves = struct.unpack(f"<{len(tensor.data) // 2}H", tensor.data)
        return [Fraction(struct.unpack("<f", struct.pack("<I", half << 16))[0]) for half in halves]
    letter, size = {"F16": ("e", 2), "F32": ("f", 4), "I32": ("i", 4), "I64": ("q", 8)}[tensor.dtype]
    return [Fraction(number) for number in struct.unpack(f"<{len(tensor.data) // size}{letter}", tensor.data)]


def bf16_bytes(values: Iterable[float]) -> bytes:
    """bfloat16 is the upper half of float32; only for values it holds exactly."""
    words = [struct.pack("<f", value) for value in values]
    assert all(word[:2] == b"\0\0" for word in words), "not a bfloat16"
    return b"".join(word[2:] for word in words)


def f16_bytes(values: Iterable[float]) -> bytes:
    return b"".join(struct.pack("<e", value) for value in values)


def packed_bytes(codes: list[list[int]]) -> bytes:
    """Rows of codes, each padded to a multiple of 4 with 0."""
    return b"".join(bytes(row) + bytes(-len(row) % 4) for row in codes)


def zero_bytes(zeros: list[list[int]]) -> bytes:
    """Zeros [N][G]: zero (n, g) is byte 4 (floor(n/4) G + g) + n mod 4, missing rows are 0."""
    groups = len(zeros[0])
    content = bytearray(4 * -(-len(zeros) // 4) * groups)
    for row, line in enumerate(zeros):
        for group, zero in enumerate(line):
            content[4 * (row // 4 * groups + group) + row % 4] = zero
    return bytes(content)


def slice_code(code: int, bits: int, rule: str) -> int:
    step = Fraction(2 ** (8 - bits))
    if rule == "prefix":
        return int(code // step)
    rounded = int((code / step + Fraction(1, 2)) // 1)
    return min(rounded, 2**bits - 1) if rule == "round" else rounded


def slice_position(code: int, bits: int, rule: str) -> Fraction:
    step = 2 ** (8 - bits)
    return slice_code(code, bits, rule) * step + (Fraction(step - 1, 2) if rule == "prefix" else 0)


def read_weight(directory: Path, path: str, bits: int) -> list[list[Fraction]]:
    """The exact ``bits``-bit weights of a checkpoint, from its files."""
    record = json.loads((directory / "config.json").read_text())["quantization_config"]["matquant"]
    tensors = read_all(directory)
    rows, columns = map(int, numbers(tensors[f"{path}.weight_shape"]))
    codes = tensors[f"{path}.weight_packed"].data
    scales = numbers(tensors[f"{path}.weight_scale"])
    groups = columns // (record["group_size"] or columns)
    own = bits in record["slices"]
    weight = []
    for row in range(rows):
        line = []
        for column in range(columns):
            group = column // (columns // groups)
            code = codes[4 * -(-columns // 4) * row + column]
            place = row * groups + group
            if own:
                scale = numbers(tensors[f"{path}.{bits}.scale"])[place]
                zero = numbers(tensors[f"{path}.{bits}.zero"])[place]
                line.append(scale * (slice_code(code, bits, record["rule"]) - zero))
                continue
            eight_bit_zero = 128
            if not record["symmetric"]:
                eight_bit_zero = tensors[f"{path}.weight_zero_point"].data[4 * (row // 4 * groups + group) + row % 4]
            line.append(scales[place] * (slice_position(code, bits, record["rule"]) - eight_bit_zero))
        weight.append(line)
    return weight


def manifest_of(directory: Path) -> dict[str, Any]:
    """The manifest that belongs to the files of a directory."""
    files = [file for file in directory.iterdir() if file.name != MANIFEST]
    entries = {
        file.name: {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        for file in files
    }
    return {"format": 1, "files": entries}


def honest_bytes(codes: Array, *, groups: int, bits: int, rule: str, scale_and_zero_bytes: int) -> Fraction:
    """Bytes of one weight at one width, counted: codes (packed under ``extra``), scales and zeros, two int64."""
    rows, columns = codes.shape
    stored = Fraction(rows * columns * bits, 8)
    if rule == "extra" and bits < 8:
        sliced = [[slice_code(code, bits, rule) for code in row] for row in codes.tolist()]
        stored = Fraction(len(oracle_overflow.pack(sliced, bits)))
    return stored + rows * groups * scale_and_zero_bytes + 16


# Small checkpoints ----------------------------------------------------------------------------------------------------

CONFIG = {"model_type": "llama", "hidden_size": 8, "architectures": ["LlamaForCausalLM"], "nested": {"ü": [1, 2.5]}}
SIDE = {"tokenizer.json": b'{"version": "1.0"}\n', "merges.txt": "#version: 0.2\nĠ t\n".encode()}
UP, DOWN, EXPERT = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.experts.0.up_proj"


def storable(generator: np.random.Generator, shape: tuple[int, int]) -> Array:
    """Positive scales of 8 significant bits."""
    return (generator.integers(128, 256, shape) * 2.0 ** generator.integers(-16, -8, shape)).astype(np.float32)


def make_tensor(
    rows: int,
    columns: int,
    *,
    rule: str = "prefix",
    group_size: int | None = None,
    symmetric: bool = True,
    slices: tuple[int, ...] = (),
    scale_dtype: str = "bfloat16",
    seed: int = 0,
) -> NestedTensor:
    """A random nested weight with every extreme code in it."""
    generator = np.random.default_rng([seed, rows, columns])
    shape = (rows, columns // (group_size or columns))
    codes = generator.integers(0, 256, (rows, columns), dtype=np.uint8)
    codes.ravel()[1:3] = [255, 0][: max(0, codes.size - 1)]
    scale = storable(generator, shape)
    if scale_dtype == "float32":
        scale = (scale * (1 + generator.random(shape))).astype(np.float32)
    zero = generator.integers(0, 256, shape).astype(np.float32)
    zero.ravel()[1:3] = [0, 255][: max(0, zero.size - 1)]
    return NestedTensor(
        codes=codes,
        scale=scale,
        zero=np.full(shape, 128, np.float32) if symmetric else zero,
        rule=rule,
        slices={
            bits: (storable(generator, shape), generator.normal(0, 4, shape).astype(np.float16).astype(np.float32))
            for bits in slices
        },
    )


def make_spec(**options: Any) -> Spec:
    return Spec(**{"rule": "prefix", "widths": (8, 4, 2), **options})


def write(directory: Path, items: Iterable[tuple[str, Any]], spec: Spec, **options: Any) -> Path:
    defaults: dict[str, Any] = {"config": CONFIG, "ignore": ("lm_head",), "files": SIDE}
    write_module.write_checkpoint(directory, items, spec=spec, **{**defaults, **options})
    return directory


SAMPLE_SPEC = make_spec(slices=(4, 2), group_size=4, symmetric=False)
SAMPLE_FILES = [
    "config.json",
    "matquant_slices.safetensors",
    "merges.txt",
    "model-00001-of-00003.safetensors",
    "model-00002-of-00003.safetensors",
    "model-00003-of-00003.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
]


def sample_items(seed: int = 0) -> list[tuple[str, Any]]:
    options: dict[str, Any] = {"slices": (4, 2), "group_size": 4, "symmetric": False, "seed": seed}
    return [
        (UP, make_tensor(6, 8, **options)),
        (DOWN, make_tensor(8, 12, **options)),
        ("model.embed_tokens.weight", np.arange(40, dtype=np.float32).reshape(5, 8).astype(ml_dtypes.bfloat16)),
        ("model.norm.weight", np.linspace(-1, 1, 8, dtype=np.float32) + np.float32(seed)),
    ]


def write_sample(directory: Path, *, seed: int = 0, **options: Any) -> Path:
    """Three shards, asymmetric, in groups, with own affines at two widths."""
    spec = dataclasses.replace(SAMPLE_SPEC, seed=seed)
    return write(directory, sample_items(seed), spec, **{"shard_bytes": 200, **options})


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample, not to be changed."""
    return write_sample(tmp_path_factory.mktemp("original") / "sample")


@pytest.fixture
def sample(original: Path, tmp_path: Path) -> Path:
    """A copy of the sample, to be damaged."""
    return shutil.copytree(original, tmp_path / "sample")


def rehash(directory: Path) -> None:
    """Give a damaged checkpoint the manifest of its files: somebody meant it."""
    (directory / MANIFEST).write_text(json.dumps(manifest_of(directory)))


def edit_json(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


def edit_record(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the "matquant" object and the manifest with it."""
    edit_json(directory / "config.json", lambda config: change(config["quantization_config"]["matquant"]))
    rehash(directory)


def edit_tensors(directory: Path, name: str, change: Callable[[dict[str, Array]], Any]) -> None:
    """Change the file that holds the tensor ``name``, and the manifest with it."""
    for file in directory.glob("*.safetensors"):
        with safe_open(file, "np") as handle:
            tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
        if name in tensors:
            change(tensors)
            safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})
    rehash(directory)


def flip_bit(file: Path, position: int, bit: int = 0) -> None:
    """Flip one bit in place; flipping it again repairs the file."""
    with file.open("r+b") as stream:
        stream.seek(position)
        (byte,) = stream.read(1)
        stream.seek(position)
        stream.write(bytes([byte ^ 1 << bit]))


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


# Comparisons ----------------------------------------------------------------------------------------------------------


def assert_same_array(found: Array, expected: Array) -> None:
    """The same dtype, shape and bits."""
    assert found.dtype == expected.dtype, f"dtype {found.dtype}, not {expected.dtype}"
    assert found.shape == expected.shape, f"shape {found.shape}, not {expected.shape}"
    assert found.tobytes() == expected.tobytes(), "other numbers"


def assert_same_nested(found: NestedTensor, expected: NestedTensor) -> None:
    """The same codes, grid, rule and slices, bit for bit."""
    assert found.rule == expected.rule
    assert set(found.slices) == set(expected.slices), f"slices {set(found.slices)}, not {set(expected.slices)}"
    assert_same_array(found.codes, expected.codes)
    for found_affine, expected_affine in [
        ((found.scale, found.zero), (expected.scale, expected.zero)),
        *((found.slices[bits], expected.slices[bits]) for bits in expected.slices),
    ]:
        for found_part, expected_part in zip(found_affine, expected_affine, strict=True):
            assert_same_array(found_part, expected_part)


def assert_weights(found: Array, expected: list[list[Fraction]]) -> None:
    """Equal to the exact weights within two roundings of float32."""
    wanted = np.array([[float(weight) for weight in row] for row in expected])
    assert found.shape == wanted.shape
    gap = np.abs(found.astype(np.float64) - wanted)
    if not (gap <= 2.0**-23 * np.abs(wanted)).all():
        raise AssertionError(f"weights differ by {gap.max()}")


def assert_rejected(directory: Path, message: str) -> None:
    """Opening and verifying both raise InputError with exactly this text."""
    for read in (open_checkpoint, verify_checkpoint):
        with pytest.raises(InputError) as caught:
            read(directory)
        assert str(caught.value) == message


def assert_rejected_naming(directory: Path, *parts: str) -> None:
    """Opening and verifying both raise InputError, and its text names all of this."""
    for read in (open_checkpoint, verify_checkpoint):
        with pytest.raises(InputError) as caught:
            read(directory)
        for part in parts:
            assert part in str(caught.value)


def assert_whole_or_input_error(directory: Path) -> None:
    """Reading everything without hashes succeeds or raises InputError: no other exception."""
    with contextlib.suppress(InputError):
        found = open_checkpoint(directory, check_hashes=False)
        for path in found.shapes:
            found.nested(path)


def assert_only(directory: Path, *names: str) -> None:
    """The directory holds these and nothing else, hidden or not."""
    assert sorted(file.name for file in directory.iterdir()) == sorted(names)


def test_comparisons_of_arrays_and_tensors_fail_on_any_difference() -> None:
    tensor = make_tensor(3, 4, slices=(2,))
    other_slices = {2: (tensor.slices[2][0], tensor.slices[2][1] + 1)}
    assert_same_nested(tensor, dataclasses.replace(tensor))
    for change in (
        {"codes": tensor.codes ^ 1},
        {"codes": tensor.codes.astype(np.int16)},
        {"scale": tensor.scale[:, :0]},
        {"zero": tensor.zero + 1},
        {"rule": "round"},
        {"slices": {}},
        {"slices": other_slices},
    ):
        with pytest.raises(AssertionError):
            assert_same_nested(dataclasses.replace(tensor, **change), tensor)
    with pytest.raises(AssertionError, match="weights differ by 1"):
        assert_weights(np.ones((1, 1), np.float32), [[Fraction(2)]])


def test_comparisons_of_errors_and_directories_fail_on_any_difference(original: Path, tmp_path: Path) -> None:
    for attempt in (assert_rejected, assert_rejected_naming):
        with pytest.raises(AssertionError):
            attempt(tmp_path, "another text")
        with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
            attempt(original, "")
    with pytest.raises(AssertionError):
        assert_only(original, "config.json")


# The document ---------------------------------------------------------------------------------------------------------


def document_tables(heading: str) -> list[list[dict[str, str]]]:
    """The tables of a section of docs/format.md, each row a dict by column, back quotes taken off."""
    section = DOCUMENT.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    tables = []
    for block in re.findall(r"(?:^\|.*\|$\n?)+", section, flags=re.MULTILINE):
        lines = [[cell.strip().strip("`") for cell in line.split("|")[1:-1]] for line in block.splitlines()]
        tables.append([dict(zip(lines[0], line, strict=True)) for line in lines[2:]])
    return tables


def document_json(heading: str) -> Any:
    section = DOCUMENT.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return json.loads(re.findall(r"```json\n(.*?)```", section, flags=re.DOTALL)[0])


def table_with(heading: str, *columns: str) -> list[dict[str, str]]:
    """All rows of the tables of a section that have exactly these columns."""
    return [row for table in document_tables(heading) for row in table if tuple(row) == columns]


EXAMPLE = "Worked example"
PARAMETERS = ("row", "scale", "codes", "scale_2", "zero_2")
STORED = ("tensor", "dtype", "shape", "bytes")
SLICED = ("rule", "bits", "row 0", "row 1")


def example_rows() -> list[dict[str, Any]]:
    rows = table_with(EXAMPLE, *PARAMETERS)
    return [
        {key: [int(code) for code in row[key].split()] if key == "codes" else float(row[key]) for key in row}
        for row in rows
    ]


def example_zeros() -> list[int]:
    section = DOCUMENT.read_text().split(f"\n## {EXAMPLE}\n")[1]
    return [int(zero) for zero in re.findall(r"(\d+) \(row [01]\)(?= and| differs)", section.split("asymmetric")[1])]


def example_tensor(rule: str, *, own: bool, symmetric: bool = True) -> NestedTensor:
    rows = example_rows()

    def column(key: str) -> Array:
        return np.array([[row[key]] for row in rows], dtype=np.float32)

    return NestedTensor(
        codes=np.array([row["codes"] for row in rows], dtype=np.uint8),
        scale=column("scale"),
        zero=np.array([[128.0], [128.0]] if symmetric else [[zero] for zero in example_zeros()], dtype=np.float32),
        rule=rule,
        slices={2: (column("scale_2"), column("zero_2"))} if own else {},
    )


def example_slices() -> list[tuple[str, str, int, list[list[Fraction]]]]:
    """(kind, rule, bits, two rows of numbers) of both tables of slices; kind: codes, weights or own."""
    codes, weights = (table for table in document_tables(EXAMPLE) if tuple(table[0]) == SLICED)
    found = []
    for kind, table in (("codes", codes), ("weights", weights)):
        for row in table:
            rule, own = row["rule"].replace("`", "").removesuffix(", own"), row["rule"].endswith("own")
            values = [[Fraction(number) for number in row[f"row {index}"].split()] for index in (0, 1)]
            for each in RULES if rule == "all" else (rule,):
                found.append(("own" if own else kind, each, int(row["bits"]), values))
    return found


def test_the_document_shows_every_rule_at_three_widths() -> None:
    shown = {(kind, rule, bits) for kind, rule, bits, _ in example_slices()}
    expected = set(itertools.product(("codes", "weights"), RULES, (8, 4, 2))) | {("own", "prefix", 2)}
    assert shown == expected
    assert len(example_rows()) == 2
    assert len(example_rows()[0]["codes"]) == 5
    assert example_zeros() == [3, 200]


def test_the_bytes_of_the_document_are_what_its_text_says() -> None:
    rows = example_rows()
    expected = {
        "linear.weight_packed": Stored("I32", (2, 2), packed_bytes([row["codes"] for row in rows])),
        "linear.weight_scale": Stored("BF16", (2, 1), bf16_bytes(row["scale"] for row in rows)),
        "linear.weight_shape": Stored("I64", (2,), struct.pack("<2q", 2, 5)),
        "linear.2.scale": Stored("BF16", (2, 1), bf16_bytes(row["scale_2"] for row in rows)),
        "linear.2.zero": Stored("F16", (2, 1), f16_bytes(row["zero_2"] for row in rows)),
    }
    assert document_tensors(symmetric=True) == expected
    expected["linear.weight_scale"] = Stored("F32", (2, 1), struct.pack("<2f", *(row["scale"] for row in rows)))
    expected["linear.weight_zero_point"] = Stored("I32", (1, 1), zero_bytes([[zero] for zero in example_zeros()]))
    assert document_tensors(symmetric=False) == expected
    words = re.search(r"codes are (.*?) \(row 0\) and (.*?) \(row 1\)", DOCUMENT.read_text())
    assert words is not None
    shown = [int(word) for group in words.groups() for word in group.split()]
    assert numbers(expected["linear.weight_packed"]) == shown


def document_tensors(*, symmetric: bool) -> dict[str, Stored]:
    """The tensors of the example: the first table, and for an asymmetric checkpoint what the second one changes."""
    tables = [table for table in document_tables(EXAMPLE) if tuple(table[0]) == STORED]
    assert len(tables) == 2
    return {
        row["tensor"]: Stored(row["dtype"], tuple(map(int, row["shape"].split())), bytes.fromhex(row["bytes"]))
        for table in (tables[:1] if symmetric else tables)
        for row in table
    }


def test_the_slices_of_the_document_are_what_its_formulas_give() -> None:
    rows = example_rows()
    for kind, rule, bits, values in example_slices():
        for row, shown in zip(rows, values, strict=True):
            if kind == "codes":
                expected = [Fraction(slice_code(code, bits, rule)) for code in row["codes"]]
            elif kind == "weights":
                scale = Fraction(row["scale"])
                expected = [scale * (slice_position(code, bits, rule) - 128) for code in row["codes"]]
            else:
                scale, zero = Fraction(row["scale_2"]), Fraction(row["zero_2"])
                expected = [scale * (slice_code(code, bits, rule) - zero) for code in row["codes"]]
            assert shown == expected, (kind, rule, bits)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_worked_example_is_written_with_the_bytes_of_the_document(symmetric: bool, tmp_path: Path) -> None:
    spec = make_spec(slices=(2,), symmetric=symmetric)
    out = write(tmp_path / "out", [("linear", example_tensor("prefix", own=True, symmetric=symmetric))], spec)
    assert read_all(out) == document_tensors(symmetric=symmetric)
    in_slices = set(read_safetensors(out / "matquant_slices.safetensors"))
    assert in_slices == {"linear.2.scale", "linear.2.zero"}


def test_the_worked_example_is_read_as_the_document_says(tmp_path: Path) -> None:
    for number, (kind, rule, bits, values) in enumerate(example_slices()):
        own = kind == "own"
        spec = make_spec(rule=rule, slices=(2,) if own else ())
        out = write(tmp_path / str(number), [("linear", example_tensor(rule, own=own))], spec)
        tensor = verify_checkpoint(out).nested("linear")
        if kind == "codes":
            found = [[slice_code(int(code), bits, rule) for code in row] for row in tensor.codes]
            assert found == values
        else:
            assert tensor.read(bits).tolist() == values  # exact: few significant bits
            assert tensor.read(bits - 1).tolist() != values


def test_the_configuration_of_the_document_is_what_is_written(tmp_path: Path) -> None:
    shown = document_json("config.json")
    spec = Spec.from_json(shown["matquant"], where="the document")
    out = write(tmp_path / "out", [("linear", example_tensor("prefix", own=True))], spec)
    written = json.loads((out / "config.json").read_text())
    assert written == {**CONFIG, "quantization_config": shown}
    assert open_checkpoint(out).spec == spec
    assert spec.data_sha256 == hashlib.sha256(struct.pack("<3q", 0, 1, 2)).hexdigest()
    asymmetric = write(tmp_path / "asymmetric", sample_items(), SAMPLE_SPEC)
    quantised = json.loads((asymmetric / "config.json").read_text())["quantization_config"]
    assert quantised["dequantize"] is True
    weights = quantised["config_groups"]["group_0"]["weights"]
    assert (weights["symmetric"], weights["strategy"], weights["group_size"]) == (False, "group", 4)


def test_the_document_explains_every_key_of_the_record_with_its_default() -> None:
    table = {row["key of `matquant"].strip("`"): row["if absent"] for row in keys_table()}
    defaults = {"format": "refuse"} | {
        field.name: "refuse" if field.default is dataclasses.MISSING else field.default
        for field in dataclasses.fields(Spec)
    }
    assert list(table) == list(defaults)
    for name, shown in table.items():
        default = defaults[name]
        if shown != "refuse":
            default = list(default) if isinstance(default, tuple) else default
            assert json.loads(shown) == default, name
        else:
            assert default == "refuse", name


def keys_table() -> list[dict[str, str]]:
    return next(table for table in document_tables("config.json") if "if absent" in table[0])


def test_the_manifest_entry_of_the_document_is_what_is_written(tmp_path: Path) -> None:
    out = write(tmp_path / "out", [("linear", make_tensor(2, 5))], make_spec(), files={"a.txt": b"\x61\x0a"})
    manifest = json.loads((out / MANIFEST).read_text())
    assert manifest["files"]["a.txt"] == document_json("The manifest")
    assert manifest == manifest_of(out)


def test_the_lines_of_the_document_are_short() -> None:
    assert max(map(len, DOCUMENT.read_text().splitlines())) <= 120


# Writing and reading back ---------------------------------------------------------------------------------------------

SHAPES: dict[str, tuple[int, int, int | None]] = {
    "channel": (8, 12, None),
    "groups": (8, 12, 4),
    "ragged": (3, 5, None),
    "ragged_groups": (5, 6, 3),
    "groups_of_one": (2, 3, 1),
    "one_row": (1, 9, None),
    "one_column": (7, 1, None),
    "one_weight": (1, 1, None),
}
each_shape = pytest.mark.parametrize("shape", SHAPES)
each_symmetry = pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
each_rule = pytest.mark.parametrize("rule", RULES)


@each_rule
@each_symmetry
@each_shape
def test_everything_comes_back_bit_for_bit(shape: str, symmetric: bool, rule: str, tmp_path: Path) -> None:
    rows, columns, group_size = SHAPES[shape]
    options: dict[str, Any] = {"rule": rule, "group_size": group_size, "symmetric": symmetric, "slices": (4, 3, 2)}
    tensors = {UP: make_tensor(rows, columns, **options), DOWN: make_tensor(rows, columns, seed=1, **options)}
    spec = make_spec(**options, seed=7, weights=(0.1, 0.1, 1.0), objective="8,4,2", data_sha256="ab", steps=3)
    found = verify_checkpoint(write(tmp_path / "out", tensors.items(), spec))
    assert found.spec == spec
    assert found.config == CONFIG
    assert found.ignore == ("lm_head",)
    assert found.shapes == dict.fromkeys((DOWN, UP), (rows, columns))
    assert found.plain_names() == []
    for path, tensor in tensors.items():
        assert_same_nested(found.nested(path), tensor)
    with pytest.raises(AssertionError, match="other numbers"):
        assert_same_nested(found.nested(UP), tensors[DOWN])


@each_rule
@each_symmetry
@pytest.mark.parametrize("shape", ["groups", "ragged", "ragged_groups", "one_weight"])
def test_every_width_reads_as_the_oracle_reads_the_files(
    shape: str, symmetric: bool, rule: str, tmp_path: Path
) -> None:
    rows, columns, group_size = SHAPES[shape]
    options: dict[str, Any] = {"rule": rule, "group_size": group_size, "symmetric": symmetric, "slices": (3, 2)}
    out = write(tmp_path / "out", [(UP, make_tensor(rows, columns, **options))], make_spec(**options))
    tensor = open_checkpoint(out).nested(UP)
    expected = {bits: read_weight(out, UP, bits) for bits in WIDTHS}
    for bits in WIDTHS:
        assert_weights(tensor.read(bits), expected[bits])
        for neighbour in {bits - 1, bits + 1} & set(WIDTHS):
            if expected[neighbour] != expected[bits]:
                with pytest.raises(AssertionError, match="weights differ"):
                    assert_weights(tensor.read(bits), expected[neighbour])


@pytest.mark.parametrize(("path", "scale_dtype", "stored"), [
    (UP, "bfloat16", "BF16"),
    (UP, "float32", "F32"),
    (EXPERT, "bfloat16", "F32"),
    (EXPERT, "float32", "F32"),
    (f"{UP} asymmetric", "bfloat16", "F32"),
])  # fmt: skip
def test_scales_are_stored_in_the_dtype_of_the_document(
    path: str, scale_dtype: str, stored: str, tmp_path: Path
) -> None:
    path, _, asymmetric = path.partition(" ")
    options: dict[str, Any] = {"group_size": 2, "scale_dtype": scale_dtype, "symmetric": not asymmetric}
    tensor = make_tensor(3, 6, **options)
    out = write(tmp_path / "out", [(path, tensor)], make_spec(**options))
    scale = read_all(out)[f"{path}.weight_scale"]
    assert scale.dtype == stored
    assert scale.shape == (3, 3)
    assert numbers(scale) == [Fraction(float(value)) for value in tensor.scale.ravel()]
    assert_same_nested(verify_checkpoint(out).nested(path), tensor)


@each_symmetry
@each_shape
def test_the_stored_bytes_are_those_of_the_document(shape: str, symmetric: bool, tmp_path: Path) -> None:
    rows, columns, group_size = SHAPES[shape]
    options: dict[str, Any] = {"group_size": group_size, "symmetric": symmetric}
    tensor = make_tensor(rows, columns, **options)
    groups, scales = tensor.scale.shape[1], tensor.scale.ravel().tolist()
    found = read_all(write(tmp_path / "out", [(UP, tensor)], make_spec(**options)))
    expected = {
        f"{UP}.weight_packed": Stored("I32", (rows, -(-columns // 4)), packed_bytes(tensor.codes.tolist())),
        f"{UP}.weight_scale": Stored("BF16", (rows, groups), bf16_bytes(scales)),
        f"{UP}.weight_shape": Stored("I64", (2,), struct.pack("<2q", rows, columns)),
    }
    if not symmetric:
        zeros = tensor.zero.astype(int).tolist()
        expected[f"{UP}.weight_scale"] = Stored("F32", (rows, groups), struct.pack(f"<{len(scales)}f", *scales))
        expected[f"{UP}.weight_zero_point"] = Stored("I32", (-(-rows // 4), groups), zero_bytes(zeros))
    assert found == expected


def test_codes_that_do_not_lie_row_after_row_are_written_as_what_they_are(tmp_path: Path) -> None:
    tensor = make_tensor(8, 12)
    wide = np.zeros((8, 24), np.uint8)
    wide[:, ::2] = tensor.codes
    for number, codes in enumerate((np.asfortranarray(tensor.codes), wide[:, ::2])):
        scale = np.asfortranarray(tensor.scale)
        out = write(tmp_path / str(number), [(UP, dataclasses.replace(tensor, codes=codes, scale=scale))], make_spec())
        assert_same_nested(verify_checkpoint(out).nested(UP), tensor)


PLAIN: dict[str, Array] = {
    "float32": np.array([[np.pi, -0.0, np.inf], [np.nan, 1e-45, 3e38]], np.float32),
    "float16": np.array([1.5, -65504, 6e-8], np.float16),
    "bfloat16": np.array([[1.0, -3.0e38], [0.1, 1e-40]], ml_dtypes.bfloat16),
    "int64": np.array([-(2**63), 2**63 - 1], np.int64),
    "int32": np.arange(6, dtype=np.int32).reshape(1, 2, 3),
    "uint8": np.arange(256, dtype=np.uint8),
    "bool": np.array([True, False]),
    "empty": np.zeros((0, 3), np.float32),
    "scalar": np.array(2.5, np.float32),
    "transposed": np.arange(6, dtype=np.float32).reshape(2, 3).T,
}


@pytest.mark.parametrize("name", PLAIN)
def test_plain_tensors_come_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    items: list[tuple[str, Any]] = [(UP, make_tensor(2, 5)), ("plain.weight", PLAIN[name])]
    found = verify_checkpoint(write(tmp_path / "out", items, make_spec()))
    assert found.plain_names() == ["plain.weight"]
    assert_same_array(found.array("plain.weight"), PLAIN[name])


def test_side_files_are_copied_as_they_are(original: Path) -> None:
    assert_only(original, *SAMPLE_FILES, MANIFEST)
    for name, content in SIDE.items():
        assert (original / name).read_bytes() == content


def test_json_is_sorted_indented_and_ends_with_a_newline(original: Path) -> None:
    for name in ("config.json", MANIFEST, "model.safetensors.index.json"):
        text = (original / name).read_text()
        assert text == json.dumps(json.loads(text), indent=2, sort_keys=True) + "\n"


def test_writing_twice_gives_the_same_bytes(original: Path, tmp_path: Path) -> None:
    files = dict(reversed(SIDE.items()))
    config = dict(reversed(CONFIG.items()))
    again = write_sample(tmp_path / "elsewhere", files=files, config=config)
    assert contents(again) == contents(original)
    ignored = [
        write(tmp_path / str(number), sample_items(), SAMPLE_SPEC, ignore=names)
        for number, names in enumerate([("b", "a"), ("a", "b")])
    ]
    assert contents(ignored[0]) == contents(ignored[1])
    assert open_checkpoint(ignored[0]).ignore == ("a", "b")


def test_no_file_is_a_pickle(original: Path) -> None:
    for file in original.iterdir():
        content = file.read_bytes()
        if file.suffix == ".safetensors":
            assert read_safetensors(file)
        else:
            assert content.decode("utf-8").isprintable() or "\n" in content.decode("utf-8")
        assert not content.startswith((b"\x80", b"PK", b"\x1f\x8b")), f"{file.name} is a pickle or an archive"
        assert file.suffix in (".safetensors", ".json", ".txt")


def test_a_file_added_later_does_not_matter(sample: Path) -> None:
    (sample / "README.md").write_text("# A model card\n")
    assert set(verify_checkpoint(sample).shapes) == {UP, DOWN}


# Shards ---------------------------------------------------------------------------------------------------------------


def shard_contents(directory: Path) -> dict[str, dict[str, Stored]]:
    return {file.name: read_safetensors(file) for file in sorted(directory.glob("model*.safetensors"))}


@pytest.mark.parametrize("limit", [1, 64, 100, 150, 200, 260, 300, 10**6])
def test_shards_keep_to_the_limit_and_the_index_finds_every_tensor(limit: int, tmp_path: Path) -> None:
    out = write_sample(tmp_path / "out", shard_bytes=limit)
    shards = shard_contents(out)
    sizes = {name: sum(len(tensor.data) for tensor in tensors.values()) for name, tensors in shards.items()}
    for name, tensors in shards.items():
        weights = {re.sub(r"\.weight_(packed|scale|shape|zero_point)$", "", key) for key in tensors}
        assert sizes[name] <= limit or len(weights) == 1, f"{name} has {sizes[name]} bytes of {weights}"
    for before, after in itertools.pairwise(shards.values()):
        first = [key for key in after if key.startswith((UP, DOWN))] or list(after)
        filled = sum(len(tensor.data) for tensor in before.values()) + sum(len(after[key].data) for key in first)
        assert filled > limit, "a shard was closed too early"
    if len(shards) == 1:
        assert list(shards) == ["model.safetensors"]
    else:
        count = len(shards)
        assert list(shards) == [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(sizes.values())}
    assert index["weight_map"] == {key: name for name, tensors in shards.items() for key in tensors}
    found = verify_checkpoint(out)
    for name, value in sample_items():
        if isinstance(value, NestedTensor):
            assert_same_nested(found.nested(name), value)
        else:
            assert_same_array(found.array(name), value)


def test_one_shard_has_an_index_only_beside_slices(tmp_path: Path) -> None:
    plain = write(tmp_path / "plain", [(UP, make_tensor(8, 12))], make_spec())
    assert not (plain / "model.safetensors.index.json").exists()
    single = write_sample(tmp_path / "single", shard_bytes=10**6)
    before = open_checkpoint(single)
    (single / "model.safetensors.index.json").unlink()  # as checkpoints were written at first
    rehash(single)
    found = open_checkpoint(single)
    assert found.files == before.files
    assert_same_nested(found.nested(UP), before.nested(UP))


def test_a_shard_may_be_filled_exactly(tmp_path: Path) -> None:
    weight = make_tensor(2, 4)
    items: list[tuple[str, Any]] = [(UP, weight), ("plain", np.zeros(64, np.uint8))]
    size = 2 * 4 + 2 * 2 + 16 + 64
    assert len(shard_contents(write(tmp_path / "one", items, make_spec(), shard_bytes=size))) == 1
    assert len(shard_contents(write(tmp_path / "two", items, make_spec(), shard_bytes=size - 1))) == 2


def test_shards_say_that_stock_loaders_may_read_them_and_slices_do_not(original: Path) -> None:
    for file in original.glob("*.safetensors"):
        with safe_open(file, "np") as handle:
            expected = {"format": "pt"} if file.name.startswith("model") else None
            assert handle.metadata() == expected
    index = json.loads((original / "model.safetensors.index.json").read_text())
    assert "matquant_slices.safetensors" not in index["weight_map"].values()


def test_only_one_shard_is_in_memory_while_writing(tmp_path: Path) -> None:
    alive: list[weakref.ref[Array]] = []
    most = 0

    def items() -> Iterator[tuple[str, Any]]:
        nonlocal most
        yield UP, make_tensor(2, 5)
        for number in range(12):
            array = np.full(1000, number, np.uint8)
            alive.append(weakref.ref(array))
            yield f"plain.{number}", array
            del array
            most = max(most, sum(reference() is not None for reference in alive))

    write(tmp_path / "out", items(), make_spec(), shard_bytes=2500)
    assert most <= 3  # two in the shard, one on its way


# Damage ---------------------------------------------------------------------------------------------------------------


def remedy(file: Path) -> str:
    """What to do about a file that is not as listed: only a small one may have been edited on purpose."""
    small = not file.name.startswith(("model", "matquant"))
    return f"{AGAIN}, or accept your own edit with: matquant verify --seal {file.parent}" if small else AGAIN


def damaged_text(file: Path, before: bytes) -> str:
    found, wanted = (hashlib.sha256(content).hexdigest()[:12] for content in (file.read_bytes(), before))
    return f"{file} is damaged: sha256 {found}…, the manifest says {wanted}…; {remedy(file)}"


@pytest.mark.parametrize("name", SAMPLE_FILES)
def test_a_flipped_bit_in_any_file_is_found(name: str, sample: Path) -> None:
    file = sample / name
    before = file.read_bytes()
    for position in (0, len(before) // 2, len(before) - 1):
        flip_bit(file, position, position % 8)
        assert_rejected(sample, damaged_text(file, before))
        flip_bit(file, position, position % 8)
    verify_checkpoint(sample)


def test_a_flipped_bit_in_the_manifest_is_found_wherever_it_is(tmp_path: Path) -> None:
    out = write(tmp_path / "out", [(UP, make_tensor(2, 5))], make_spec(), files={})
    manifest = out / MANIFEST
    unnoticed = []
    for position, bit in itertools.product(range(manifest.stat().st_size), range(8)):
        flip_bit(manifest, position, bit)
        try:
            open_checkpoint(out)
            unnoticed.append((position, bit, manifest.read_bytes()[max(0, position - 12) : position + 4]))
        except InputError:
            pass
        flip_bit(manifest, position, bit)
    assert unnoticed == []


def test_a_damaged_manifest_is_named_with_what_is_wrong(sample: Path) -> None:
    manifest = sample / MANIFEST
    whole = manifest.read_bytes()
    entry = json.loads(whole)["files"]["config.json"]
    size, digest = entry["bytes"], entry["sha256"]
    other_digest = ("0" if digest[0] != "0" else "1") + digest[1:]
    for old, new, message in [
        (f'"bytes": {size}', f'"bytes": {size + 1}', f"{sample / 'config.json'} has {size} bytes, "
         f"the manifest says {size + 1}; {remedy(sample / 'config.json')}"),
        (digest, other_digest, f"{sample / 'config.json'} is damaged: sha256 {digest[:12]}…, "
         f"the manifest says {other_digest[:12]}…; {remedy(sample / 'config.json')}"),
        ("{", "[", f"{manifest} is not JSON (Expecting ',' delimiter: line 2 column 10 (char 11)); {AGAIN}"),
        ('"config.json"', '"konfig.json"', f"{manifest} lists no files; {AGAIN}"),
        ('"merges.txt"', '"nerges.txt"', f"{sample / 'nerges.txt'} is missing; {remedy(sample / 'nerges.txt')}"),
    ]:  # fmt: skip
        assert old.encode() in whole
        manifest.write_bytes(whole.replace(old.encode(), new.encode(), 1))
        assert_rejected(sample, message)
    manifest.write_bytes(b"\xff" + whole)
    assert_rejected_naming(sample, f"{manifest} is not JSON (", AGAIN)
    for text in ("[]", "1", "null", '"format"'):
        manifest.write_text(text)
        assert_rejected(sample, f"{manifest} is not a JSON object; {AGAIN}")
    for text in ('{"format": 1}', '{"format": 1, "files": []}', '{"format": 1, "files": {}}'):
        manifest.write_text(text)
        assert_rejected(sample, f"{manifest} lists no files; {AGAIN}")


@pytest.mark.parametrize("entry", [None, 3, [], {}, {"bytes": 5}, {"sha256": "ab"}, {"bytes": "5", "sha256": 3}])
def test_a_manifest_entry_without_size_and_sum_is_refused(entry: Any, sample: Path) -> None:
    edit_json(sample / MANIFEST, lambda manifest: manifest["files"].update({"merges.txt": entry}))
    assert_rejected_naming(sample, "merges.txt", AGAIN)


def test_json_that_is_nested_too_deep_is_refused(sample: Path) -> None:
    (sample / MANIFEST).write_text("[" * 200_000)
    assert_rejected_naming(sample, f"{sample / MANIFEST} is not JSON", AGAIN)


@pytest.mark.parametrize("name", [name for name in SAMPLE_FILES if name.endswith(".safetensors")])
def test_a_truncated_tensor_file_is_found(name: str, sample: Path) -> None:
    file = sample / name
    whole = file.read_bytes()
    for kept in (0, 4, 8, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:kept])
        assert_rejected(sample, f"{file} has {kept} bytes, the manifest says {len(whole)}; {AGAIN}")
        rehash(sample)
        with pytest.raises(SafetensorError) as caught:
            safe_open(file, "np").__enter__()
        assert_rejected(sample, f"{file} cannot be read ({caught.value}); {AGAIN}")
        shutil.copy(sample / MANIFEST, sample.parent / "manifest")
        file.write_bytes(whole)
        rehash(sample)


@pytest.mark.parametrize("name", SAMPLE_FILES)
def test_a_missing_file_is_named(name: str, sample: Path) -> None:
    (sample / name).unlink()
    without = AGAIN if name == "config.json" else remedy(sample / name)
    assert_rejected(sample, f"{sample / name} is missing; {without}")


@pytest.mark.parametrize("name", [name for name in SAMPLE_FILES if name.startswith(("model", "matquant", "config"))])
def test_a_file_missing_from_the_manifest_too_is_refused(name: str, sample: Path) -> None:
    (sample / name).unlink()
    rehash(sample)
    assert_rejected_naming(sample, str(sample))


def test_a_directory_without_manifest_is_no_checkpoint(sample: Path) -> None:
    (sample / MANIFEST).unlink()
    assert_rejected(sample, f"{sample} has no {MANIFEST}; {MADE_BY}")
    assert_rejected(sample / "nowhere", f"{sample / 'nowhere'}: no such directory; {MADE_BY}")
    assert_rejected(sample / "config.json", f"{sample / 'config.json'}: no such directory; {MADE_BY}")


def test_without_hashes_the_structure_is_still_checked(sample: Path) -> None:
    file = sample / SAMPLE_FILES[3]
    flip_bit(file, file.stat().st_size - 1)
    assert set(open_checkpoint(sample, check_hashes=False).shapes) == {UP, DOWN}
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InputError, match="cannot be read"):
        open_checkpoint(sample, check_hashes=False)


# Damage that somebody meant: the manifest fits ------------------------------------------------------------------------


def grown(array: Array, axis: int) -> Array:
    """One more row (axis 0) or column (axis 1)."""
    return np.concatenate([array, np.take(array, [0], axis=axis)], axis=axis)


@pytest.mark.parametrize(("part", "shape"), [
    ("weight_packed", [6, 2]),
    ("weight_scale", [6, 2]),
    ("weight_zero_point", [2, 2]),
    ("4.scale", [6, 2]),
    ("4.zero", [6, 2]),
    ("2.scale", [6, 2]),
    ("2.zero", [6, 2]),
])  # fmt: skip
@pytest.mark.parametrize("axis", [0, 1])
def test_a_tensor_of_the_wrong_shape_is_named(part: str, shape: list[int], axis: int, sample: Path) -> None:
    name = f"{UP}.{part}"
    edit_tensors(sample, name, lambda tensors: tensors.update({name: grown(tensors[name], axis)}))
    found = [shape[0] + (axis == 0), shape[1] + (axis == 1)]
    assert_rejected(sample, f"{name} has shape {found}, {UP} of 6 x 8 needs {shape}; {DAMAGED}")


@pytest.mark.parametrize("part", ["weight_packed", "weight_scale", "weight_zero_point", "4.scale", "2.zero"])
def test_a_tensor_with_too_few_axes_is_named(part: str, sample: Path) -> None:
    name = f"{UP}.{part}"
    edit_tensors(sample, name, lambda tensors: tensors.update({name: tensors[name].ravel()}))
    assert_rejected_naming(sample, f"{name} has shape [", f"{UP} of 6 x 8 needs [", DAMAGED)


@pytest.mark.parametrize(("stored", "tensor", "found", "wanted"), [
    ([7, 8], "weight_packed", [6, 2], [7, 2]),
    ([6, 12], "weight_packed", [6, 2], [6, 3]),
    ([5, 8], "weight_packed", [6, 2], [5, 2]),
])  # fmt: skip
def test_a_stored_shape_that_does_not_fit_is_named(
    stored: list[int], tensor: str, found: list[int], wanted: list[int], sample: Path
) -> None:
    name = f"{UP}.weight_shape"
    edit_tensors(sample, name, lambda tensors: tensors.update({name: np.array(stored, np.int64)}))
    size = " x ".join(map(str, stored))
    assert_rejected(sample, f"{UP}.{tensor} has shape {found}, {UP} of {size} needs {wanted}; {DAMAGED}")


@pytest.mark.parametrize("stored", [[6], [6, 8, 1], [[6, 8]], 6, [0, 8], [6, 0], [0, 0], [-6, 8], [6, -8]])
def test_a_stored_shape_that_is_no_matrix_is_named(stored: Any, sample: Path) -> None:
    name = f"{UP}.weight_shape"
    edit_tensors(sample, name, lambda tensors: tensors.update({name: np.array(stored, np.int64)}))
    assert_rejected_naming(sample, UP, DAMAGED)


@pytest.mark.parametrize(("part", "dtype", "found", "wanted"), [
    ("weight_packed", np.int64, "I64", "I32"),
    ("weight_packed", np.float32, "F32", "I32"),
    ("weight_packed", np.uint8, "U8", "I32"),
    ("weight_scale", ml_dtypes.bfloat16, "BF16", "F32"),
    ("weight_scale", np.float16, "F16", "F32"),
    ("weight_scale", np.int32, "I32", "F32"),
    ("weight_scale", ml_dtypes.float8_e4m3fn, "F8_E4M3", "F32"),
    ("weight_zero_point", np.int64, "I64", "I32"),
    ("weight_zero_point", np.float32, "F32", "I32"),
    ("weight_shape", np.int32, "I32", "I64"),
    ("weight_shape", np.float64, "F64", "I64"),
    ("4.scale", np.float32, "F32", "BF16"),
    ("2.zero", ml_dtypes.bfloat16, "BF16", "F16"),
])  # fmt: skip
def test_a_tensor_of_the_wrong_dtype_is_named(part: str, dtype: Any, found: str, wanted: str, sample: Path) -> None:
    name = f"{UP}.{part}"
    edit_tensors(sample, name, lambda tensors: tensors.update({name: tensors[name].astype(dtype)}))
    assert_rejected(sample, f"{name} has dtype {found}, {UP} needs {wanted}; {DAMAGED}")


def test_a_symmetric_scale_of_the_wrong_dtype_is_named(tmp_path: Path) -> None:
    out = write(tmp_path / "out", [(UP, make_tensor(2, 5))], make_spec())
    name = f"{UP}.weight_scale"
    edit_tensors(out, name, lambda tensors: tensors.update({name: tensors[name].astype(np.float32)}))
    assert_rejected(out, f"{name} has dtype F32, {UP} needs BF16; {DAMAGED}")


PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "4.scale", "4.zero", "2.scale", "2.zero")


@pytest.mark.parametrize("part", PARTS)
def test_a_missing_tensor_is_named(part: str, sample: Path) -> None:
    name = f"{UP}.{part}"
    edit_tensors(sample, name, lambda tensors: tensors.pop(name))
    assert_rejected(sample, f"{sample} lacks the tensor {name}; {DAMAGED}")


def test_a_checkpoint_without_quantised_weights_is_refused(tmp_path: Path) -> None:
    out = write(tmp_path / "out", [("model.norm.weight", np.ones(3, np.float32))], make_spec())
    assert_rejected(out, f"{out} holds no quantised weight; {DAMAGED}")


def test_a_tensor_in_two_shards_is_refused(sample: Path) -> None:
    first, second = SAMPLE_FILES[3], SAMPLE_FILES[4]
    name = f"{DOWN}.weight_scale"
    extra = np.ones((6, 2), ml_dtypes.bfloat16)
    edit_tensors(sample, f"{UP}.weight_packed", lambda tensors: tensors.update({name: extra}))
    assert_rejected(sample, f"{sample} has the tensor {name} in {first} and in {second}; {DAMAGED}")


@pytest.mark.parametrize("part", ["weight_scale", "4.scale", "2.scale"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 0.0, -1.0])
def test_verifying_finds_a_scale_that_is_no_positive_number(part: str, value: float, sample: Path) -> None:
    assert_verify_finds_number(sample, f"{UP}.{part}", value)


@pytest.mark.parametrize("part", ["4.zero", "2.zero"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_verifying_finds_a_zero_that_is_no_number(part: str, value: float, sample: Path) -> None:
    assert_verify_finds_number(sample, f"{UP}.{part}", value)


def assert_verify_finds_number(sample: Path, name: str, value: float) -> None:
    """Verifying, which reads the numbers, refuses a tensor with this number; opening, which does not, accepts it."""

    def change(tensors: dict[str, Array]) -> None:
        tensors[name] = tensors[name].copy()
        tensors[name][1, 1] = value

    edit_tensors(sample, name, change)
    open_checkpoint(sample)
    with pytest.raises(InputError) as caught:
        verify_checkpoint(sample)
    assert (
        str(caught.value) == f"{UP} has a scale or zero-point that is not a positive number; write the checkpoint again"
    )


@pytest.mark.parametrize("version", [7, 8, 1000, "1", "4", None, 1.5, True, 0, -1, [1]])
def test_a_format_that_is_not_known_is_refused(version: Any, sample: Path) -> None:
    reads = "this matquant reads formats up to 6: upgrade matquant"
    edit_record(sample, lambda record: record.update(format=version))
    assert_rejected(sample, f"{sample / 'config.json'} is in format {version!r}; {reads}")
    edit_json(sample / MANIFEST, lambda manifest: manifest.update(format=version))
    assert_rejected(sample, f"{sample} is in format {version!r}; {reads}")


def test_a_manifest_and_a_record_of_different_formats_are_damage(sample: Path) -> None:
    edit_json(sample / MANIFEST, lambda manifest: manifest.update(format=2))
    by = f"{sample} has format 2 in {MANIFEST}, but 1 in config.json"
    assert_rejected(sample, f"{by}; copy it again or write the checkpoint again")


def test_a_record_without_format_is_refused(sample: Path) -> None:
    reads = "this matquant reads formats up to 6: upgrade matquant"
    edit_record(sample, lambda record: record.pop("format"))
    assert_rejected(sample, f"{sample / 'config.json'} is in format None; {reads}")


@pytest.mark.parametrize(("unknown", "nearest"), [
    ("grup_size", "group_size"),
    ("Rule", "rule"),
    ("slice", "slices"),
    ("width", "widths"),
    ("scale_dtypes", "scale_dtype"),
    ("x", None),
])  # fmt: skip
def test_an_unknown_key_is_named_with_the_nearest(unknown: str, nearest: str | None, sample: Path) -> None:
    edit_record(sample, lambda record: record.update({unknown: 1}))
    start = f"{sample / 'config.json'} has the unknown key {unknown!r} (format 1); nearest: "
    if nearest is None:
        assert_rejected_naming(sample, start)
    else:
        assert_rejected(sample, f"{start}{nearest!r}")


@pytest.mark.parametrize("key", ["rule", "widths"])
def test_a_record_without_what_it_needs_is_refused(key: str, sample: Path) -> None:
    edit_record(sample, lambda record: record.pop(key))
    assert_rejected(sample, f"{sample / 'config.json'} lacks {key!r}; {DAMAGED}")


def test_a_record_may_leave_out_what_has_a_default(tmp_path: Path) -> None:
    spec = make_spec()
    out = write(tmp_path / "out", [(UP, make_tensor(2, 5))], spec)
    edit_record(
        out, lambda record: [record.pop(key) for key in list(record) if key not in ("format", "rule", "widths")]
    )
    assert verify_checkpoint(out).spec == spec


def test_an_unknown_rule_or_width_in_the_record_is_refused(sample: Path) -> None:
    config = str(sample / "config.json")
    edit_record(sample, lambda record: record.update(rule="nearest"))
    assert_rejected_naming(sample, config, "rule='nearest'", "prefix, round")
    for key in ("widths", "slices"):
        edit_record(sample, lambda record, key=key: record.update({"rule": "prefix", key: [8, 9]}))
        assert_rejected_naming(sample, config, key, "9", "8")
        edit_record(sample, lambda record, key=key: record.update({key: [2]}))


KINDS = {
    "rule": "a string",
    "widths": "a list of integers",
    "slices": "a list of integers",
    "group_size": "null or an integer above 0",
    "symmetric": "true or false",
    "scale_dtype": "bfloat16 or float32",
    "scope": "a string",
    "method": "a string",
    "objective": "a string",
    "weights": "a list of numbers",
    "baseline_bits": "null or an integer 1..8",
    "steps": "an integer of at least 0",
    "seed": "an integer",
    "data_sha256": "a string",
}
WRONG_VALUES: list[tuple[str, Any]] = [
    *(("rule", value) for value in (None, 3, [], {}, True)),
    *(("widths", value) for value in (None, 8, "842", {}, ["8"], [8.0], [True], [None], [[8]])),
    *(("slices", value) for value in (None, 2, "42", {}, ["2"], [2.0])),
    *(("group_size", value) for value in (0, -4, "4", 4.0, True, [4], {})),
    *(("symmetric", value) for value in (None, 0, "no", [], "false")),
    *(("scale_dtype", value) for value in (None, "float16", "F32", 16, [], {})),
    *(("scope", value) for value in (None, 3, [])),
    *(("method", value) for value in (None, 3, [])),
    *(("objective", value) for value in (None, 3, [])),
    *(("weights", value) for value in (None, 3, "1", ["a"], [None], {})),
    *(("baseline_bits", value) for value in (0, 9, "2", 2.0, True, [])),
    *(("steps", value) for value in (None, "many", 1.5, -1, [])),
    *(("seed", value) for value in (None, "0", 0.5, [])),
    *(("data_sha256", value) for value in (None, 0, [])),
]


@pytest.mark.parametrize(("key", "value"), WRONG_VALUES, ids=[f"{key}={value!r}" for key, value in WRONG_VALUES])
def test_a_record_with_a_value_of_the_wrong_kind_is_refused(key: str, value: Any, sample: Path) -> None:
    edit_record(sample, lambda record: record.update({key: value}))
    assert_rejected(sample, f"{sample / 'config.json'} has {key}={value!r}, which must be {KINDS[key]}; {DAMAGED}")


@pytest.mark.parametrize("size", [3, 5, 16])
def test_a_group_size_that_does_not_fit_the_tensors_is_refused(size: int, sample: Path) -> None:
    edit_record(sample, lambda record: record.update(group_size=size))
    assert_rejected_naming(sample, DOWN, DAMAGED)


@pytest.mark.parametrize("value", [None, 3, "x", [], [1]])
def test_a_record_that_is_no_object_is_refused(value: Any, sample: Path) -> None:
    config = sample / "config.json"
    whole = config.read_bytes()
    message = f'{config} has no "matquant" object; {MADE_BY}'
    edit_json(config, lambda values: values["quantization_config"].update(matquant=value))
    rehash(sample)
    assert_rejected(sample, message)
    config.write_bytes(whole)
    edit_json(config, lambda values: values.update(quantization_config=value))
    rehash(sample)
    assert_rejected(sample, message)


def test_a_model_that_is_not_ours_is_refused(sample: Path) -> None:
    edit_json(sample / "config.json", lambda config: config.pop("quantization_config"))
    rehash(sample)
    assert_rejected(sample, f'{sample / "config.json"} has no "matquant" object; {MADE_BY}')


@pytest.mark.parametrize("change", [
    lambda index: index.pop("weight_map"),
    lambda index: index.update(weight_map=[]),
    lambda index: index.update(weight_map=None),
    lambda index: index.update(weight_map={}),
    lambda index: index["weight_map"].update({f"{UP}.weight_scale": 3}),
    lambda index: index["weight_map"].update({f"{UP}.weight_scale": None}),
    lambda index: index["weight_map"].update({f"{UP}.weight_scale": ["x"]}),
    lambda index: index["weight_map"].update({f"{UP}.weight_scale": "model-00009-of-00003.safetensors"}),
], ids=["none", "list", "null", "empty", "number", "null_shard", "list_shard", "no_such_shard"])  # fmt: skip
def test_an_index_that_does_not_lead_to_the_tensors_is_refused(
    change: Callable[[dict[str, Any]], Any], sample: Path
) -> None:
    edit_json(sample / "model.safetensors.index.json", change)
    rehash(sample)
    assert_rejected_naming(sample, str(sample))


def test_tensors_are_read_from_listed_files_only(tmp_path: Path) -> None:
    out = write(tmp_path / "out", [(UP, make_tensor(2, 5))], make_spec())
    other = write(tmp_path / "other", sample_items(), SAMPLE_SPEC, shard_bytes=200)
    for name in contents(other):
        if name.startswith("model"):
            shutil.copy(other / name, out / name)  # as when one checkpoint is unpacked over another
    index = out / "model.safetensors.index.json"
    assert_rejected(out, f"{index} is not listed in {MANIFEST}; {AGAIN}")
    index.unlink()
    shutil.copy(other / "matquant_slices.safetensors", out)
    assert_rejected(out, f"{out / 'matquant_slices.safetensors'} is not listed in {MANIFEST}; {AGAIN}")


def test_names_that_leave_the_directory_are_refused(sample: Path) -> None:
    outside = sample.parent / "outside.safetensors"
    shutil.move(sample / SAMPLE_FILES[3], outside)
    name = f"../{outside.name}"

    def redirect(index: dict[str, Any]) -> None:
        index["weight_map"] = {k: name if v == SAMPLE_FILES[3] else v for k, v in index["weight_map"].items()}

    edit_json(sample / "model.safetensors.index.json", redirect)
    rehash(sample)
    assert_rejected_naming(sample, name)
    entry = {"bytes": outside.stat().st_size, "sha256": hashlib.sha256(outside.read_bytes()).hexdigest()}
    edit_json(sample / MANIFEST, lambda manifest: manifest["files"].update({name: entry}))
    assert_rejected(sample, f"{sample / MANIFEST} lists {name!r}, which is not a file name; {AGAIN}")


# one bit of every third byte, and all bits of all bytes
@pytest.mark.parametrize(("apart", "each"), [(3, 1), pytest.param(1, 8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [name for name in SAMPLE_FILES if name.startswith(("model", "matquant", "config"))])
def test_no_flipped_bit_ends_in_another_exception_even_without_hashes(
    name: str, apart: int, each: int, sample: Path
) -> None:
    file = sample / name
    whole = file.read_bytes()
    end = len(whole)
    if file.suffix == ".safetensors":
        end = 8 + struct.unpack("<Q", whole[:8])[0]  # past the header there are only numbers
    for position, turn in itertools.product(range(0, end, apart), range(each)):
        bit = (position + turn) % 8
        flip_bit(file, position, bit)
        assert_whole_or_input_error(sample)
        flip_bit(file, position, bit)


# Replacing ------------------------------------------------------------------------------------------------------------


def test_what_exists_is_not_replaced_without_being_asked(sample: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("mine")
    for target in (sample, tmp_path / "empty", tmp_path / "file"):
        before = contents(target) if target.is_dir() else target.read_bytes()
        with pytest.raises(InputError) as caught:
            write_sample(target, seed=1)
        assert str(caught.value) == f"{target} exists; use another -o, or --overwrite to replace it"
        assert (contents(target) if target.is_dir() else target.read_bytes()) == before
    assert_only(tmp_path, "sample", "empty", "file")


@pytest.mark.parametrize("overwrite", [True, False])
def test_what_is_no_checkpoint_is_never_replaced(overwrite: bool, original: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"meow")
    (tmp_path / "parent" / "child").mkdir(parents=True)
    (tmp_path / "file").write_text("mine")
    shutil.copytree(original, tmp_path / "model")
    (tmp_path / "model" / MANIFEST).unlink()
    names = ("photos", "parent", "file", "model")
    for name in names:
        with pytest.raises(InputError) as caught:
            write_sample(tmp_path / name, overwrite=overwrite)
        reason = "is not a matquant checkpoint and will not be replaced; use another -o"
        if not overwrite:
            reason = "exists; use another -o, or --overwrite to replace it"
        assert str(caught.value) == f"{tmp_path / name} {reason}"
    assert_only(tmp_path, *names)
    assert_only(tmp_path / "photos", "cat.png")
    assert_only(tmp_path / "parent", "child")
    assert (tmp_path / "file").read_text() == "mine"
    assert_only(tmp_path / "model", *SAMPLE_FILES)


def test_overwriting_leaves_nothing_of_the_old_checkpoint(tmp_path: Path) -> None:
    out = write_sample(tmp_path / "out", seed=1, files={"old.txt": b"old\n"})
    write_sample(out, overwrite=True)
    assert contents(out) == contents(write_sample(tmp_path / "fresh"))
    assert_only(tmp_path, "out", "fresh")


def test_an_empty_directory_may_be_overwritten(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    verify_checkpoint(write_sample(tmp_path / "out", overwrite=True))
    assert_only(tmp_path, "out")


def test_a_damaged_checkpoint_may_be_overwritten(sample: Path, original: Path) -> None:
    (sample / "config.json").unlink()
    (sample / MANIFEST).write_text("not JSON")
    write_sample(sample, overwrite=True)
    assert contents(sample) == contents(original)


def test_parents_are_made(tmp_path: Path) -> None:
    verify_checkpoint(write_sample(tmp_path / "a" / "b" / "out"))


def test_overwriting_through_a_link_replaces_what_it_points_to(sample: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(sample)
    write_sample(link, seed=1, overwrite=True)
    assert link.is_symlink()
    assert verify_checkpoint(link).spec.seed == 1
    assert verify_checkpoint(sample).spec.seed == 1
    assert_only(tmp_path, "sample", "link")


def test_what_a_killed_writer_left_is_cleaned_up(original: Path, tmp_path: Path) -> None:
    shutil.copytree(original, tmp_path / ".out.partial")
    (tmp_path / ".out.partial" / "stray").write_text("from before")
    out = write_sample(tmp_path / "out")
    assert contents(out) == contents(original)
    assert_only(tmp_path, "out")


# Crashes --------------------------------------------------------------------------------------------------------------

SOURCES = {inspect.getsourcefile(module) for module in (layout, write_module, files_module)}


class CrashAt:
    """Raise ``error`` when the n-th line of the writer (SOURCES) is about to run, and remember its ``place``."""

    def __init__(self, number: int, error: BaseException) -> None:
        self.number, self.error, self.lines, self.place = number, error, 0, ""

    def __call__(self, frame: Any, event: str, _argument: Any) -> Any:
        if frame.f_code.co_filename not in SOURCES:
            return None
        if event == "line":
            self.lines += 1
            if self.lines == self.number:
                self.place = f"{frame.f_lineno}: {linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()}"
                raise self.error
        return self

    def __enter__(self) -> "CrashAt":
        self.before = sys.gettrace()
        sys.settrace(self)
        return self

    def __exit__(self, *_error: object) -> None:
        sys.settrace(self.before)


def small_items(seed: int) -> Iterator[tuple[str, Any]]:
    yield UP, make_tensor(2, 5, slices=(2,), seed=seed)
    yield "model.norm.weight", np.full(3, seed, np.float32)


def write_small(directory: Path, seed: int, *, overwrite: bool = False) -> None:
    spec = make_spec(slices=(2,), seed=seed)
    write(directory, small_items(seed), spec, overwrite=overwrite, shard_bytes=40, files={"merges.txt": b"a b\n"})


def crash_everywhere(directory: Path, *, existing: bool) -> Iterator[tuple[str, Path]]:
    """Crash a writer before each of its lines in turn; yields the line and the directory around the target."""
    old = directory / "old"
    write_small(old, 1)
    for number in itertools.count(1):
        root = directory / str(number)
        root.mkdir()
        if existing:
            shutil.copytree(old, root / "out")
        crash = CrashAt(number, RuntimeError("crash") if number % 2 else KeyboardInterrupt("Ctrl-C"))
        try:
            with crash:
                write_small(root / "out", 2, overwrite=existing)
        except (RuntimeError, KeyboardInterrupt) as caught:
            assert caught is crash.error  # noqa: PT017
        if not crash.place:
            return  # the writer has no more lines
        yield crash.place, root
        shutil.rmtree(root)


def test_a_crash_at_any_line_leaves_the_old_checkpoint_or_the_new_one(tmp_path: Path) -> None:
    seen: dict[frozenset[Any], int] = {}
    seeds = collections.Counter(check_crash(*crash, seen) for crash in crash_everywhere(tmp_path, existing=True))
    assert seeds[1] > 100, "hardly any line was tried"
    assert seeds[1] > seeds[2]


def check_crash(place: str, root: Path, seen: dict[frozenset[Any], int]) -> int:
    """After a crash: the checkpoint's seed, old or new; nothing is beside it unless the cleaning up itself crashed.

    seen: the same bytes on disk -> the seed, so that they are read and written over once.
    """
    cleaning = "rmtree" in place
    assert cleaning or [file.name for file in root.iterdir()] == ["out"], place
    files = (file for file in root.rglob("*") if file.is_file())
    state = frozenset((str(file.relative_to(root)), file.read_bytes()) for file in files)
    if state not in seen:
        seen[state] = verify_checkpoint(root / "out").spec.seed
        write_small(root / "out", 3, overwrite=True)
        assert verify_checkpoint(root / "out").spec.seed == 3
        assert_only(root, "out")
    return seen[state]


def test_a_crash_at_any_line_without_an_old_checkpoint_leaves_nothing_or_the_new_one(tmp_path: Path) -> None:
    outcomes = collections.Counter()
    for place, root in crash_everywhere(tmp_path, existing=False):
        left = sorted(file.name for file in root.iterdir())
        assert left in ([], ["out"]) or "rmtree" in place, f"{place} leaves {left}"
        if "out" in left:
            assert verify_checkpoint(root / "out").spec.seed == 2
        outcomes["out" in left] += 1
    assert outcomes[False] > 100


@pytest.mark.slow
def test_a_crash_leaves_a_checkpoint_where_directories_cannot_be_exchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_arguments: Any) -> Any:
        raise OSError(errno.ENOSYS, "no such function")

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    seen: dict[frozenset[Any], int] = {}
    for place, root in crash_everywhere(tmp_path, existing=True):
        assert (root / "out").is_dir(), f"{place} leaves no checkpoint at all"
        check_crash(place, root, seen)


def test_every_file_is_synced_before_it_is_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, after = set(), set()

    def sync(descriptor: int) -> None:
        (after if (tmp_path / "out").exists() else before).add(os.fstat(descriptor).st_ino)

    monkeypatch.setattr(os, "fsync", sync)
    out = write_sample(tmp_path / "out")
    assert {file.stat().st_ino for file in (out, *out.iterdir())} <= before
    assert after == {tmp_path.stat().st_ino}  # the renaming itself


def test_items_that_fail_half_way_leave_the_old_checkpoint(sample: Path, original: Path, tmp_path: Path) -> None:
    def items() -> Iterator[tuple[str, Any]]:
        yield from sample_items()[:2]
        raise InputError("the loss is not finite")

    with pytest.raises(InputError, match="the loss is not finite"):
        write(sample, items(), SAMPLE_SPEC, overwrite=True, shard_bytes=1)
    assert contents(sample) == contents(original)
    assert_only(tmp_path, "sample")


# A full disk ----------------------------------------------------------------------------------------------------------

FREE = 12345


@pytest.fixture
def known_free_space(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil._ntuple_diskusage(10**6, 10**6 - FREE, FREE)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda _directory: usage)


def assert_full_disk_is_said(target: Path, **options: Any) -> None:
    """Writing raises InputError with the exact text for a full disk."""
    with pytest.raises(InputError) as caught:
        write_sample(target, seed=1, **options)
    assert str(caught.value) == (
        f"{target} was not written: no space left on the device ({FREE} bytes free); "
        "free some space, or use another path"
    )


@pytest.mark.parametrize("what", ["shard", "side_file"])
def test_a_file_that_cannot_grow_is_said_and_leaves_nothing(what: str, sample: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"files": {"big.txt": b"x" * 40_000}} if what == "side_file" else {}
    for target, more in ((tmp_path / "out", options), (sample, {"overwrite": True, **options})):
        with largest_file(20_000 if what == "side_file" else 100), pytest.raises((InputError, OSError)):
            write_sample(target, seed=1, **more)
    assert_only(tmp_path, "sample")
    assert verify_checkpoint(sample).spec.seed == 0


def full_disk(code: int) -> Callable[..., Any]:
    def fail(*_arguments: Any, **_options: Any) -> Any:
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.usefixtures("known_free_space")
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize(("where", "fail"), [
    ("matquant.format.write.write_safetensors", full_disk),
    ("pathlib.Path.write_bytes", full_disk),
    ("pathlib.Path.mkdir", full_disk),
    ("os.fsync", full_disk),
    ("pathlib.Path.rename", full_disk),
])  # fmt: skip
def test_a_full_disk_is_said_wherever_it_is_met(
    where: str, fail: Callable[[int], Any], code: int, sample: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(where, fail(code))
    assert_full_disk_is_said(tmp_path / "out")
    assert_full_disk_is_said(sample, overwrite=True)
    assert_only(tmp_path, "sample")
    assert verify_checkpoint(sample).spec.seed == 0


def test_other_errors_of_the_system_come_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pathlib.Path.write_bytes", full_disk(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        write_sample(tmp_path / "out")
    assert_only(tmp_path)


# Sizes ----------------------------------------------------------------------------------------------------------------

SIZE_CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "slices": {"slices": (4, 3, 2)},
    "own_eight": {"slices": (8, 2)},
    "groups": {"group_size": 4, "slices": (2,)},
    "asymmetric": {"symmetric": False},
    "asymmetric_groups": {"symmetric": False, "group_size": 4, "slices": (4, 2)},
    "float32": {"scale_dtype": "float32"},
    "asymmetric_float32": {"scale_dtype": "float32", "symmetric": False, "slices": (2,)},
    "extra": {"rule": "extra"},
    "extra_slices": {"rule": "extra", "slices": (4, 2), "symmetric": False},
    "round": {"rule": "round"},
}


@pytest.mark.parametrize("case", SIZE_CASES)
def test_sizes_are_the_bytes_counted_by_hand(case: str, tmp_path: Path) -> None:
    options = SIZE_CASES[case]
    tensors = {UP: make_tensor(8, 12, **options), EXPERT: make_tensor(3, 20, **options)}
    found = open_checkpoint(write(tmp_path / "out", tensors.items(), make_spec(**options)))
    symmetric = options.get("symmetric", True)
    scale_bytes = {UP: 2 if symmetric and "scale_dtype" not in options else 4, EXPERT: 4}
    zero_bytes_each = 0 if symmetric else 1
    expected: dict[tuple[str, int], Fraction] = {}
    for bits in WIDTHS:
        own = bits in options.get("slices", ())
        for path, tensor in tensors.items():
            each = 4 if own else scale_bytes[path] + zero_bytes_each
            expected[path, bits] = honest_bytes(
                tensor.codes,
                groups=tensor.scale.shape[1],
                bits=bits,
                rule=tensor.rule,
                scale_and_zero_bytes=each,
            )
            assert size_bytes(found, path, bits) == pytest.approx(float(expected[path, bits]), rel=1e-6)
        both = sum(expected[path, bits] for path in tensors)
        uniform = bits_per_weight(found, dict.fromkeys(tensors, bits))
        assert uniform == pytest.approx(float(8 * both / (8 * 12 + 3 * 20)), rel=1e-6)
        assert uniform > bits
    mixed = 8 * (expected[UP, 2] + expected[EXPERT, 6]) / (8 * 12 + 3 * 20)
    assert bits_per_weight(found, {UP: 2, EXPERT: 6}) == pytest.approx(float(mixed), rel=1e-6)


@pytest.mark.parametrize("share", [Fraction(0), Fraction(1, 32), Fraction(1, 16), Fraction(1, 4), Fraction(1)])
def test_overflow_costs_its_stored_bytes_and_the_paper_counts_a_bit_each(share: Fraction, tmp_path: Path) -> None:
    tensor = make_tensor(8, 16, rule="extra")
    codes = np.full(128, 100, np.uint8)
    codes[: int(128 * share)] = 255
    tensor = dataclasses.replace(tensor, codes=codes.reshape(8, 16))
    found = open_checkpoint(write(tmp_path / "out", [(UP, tensor)], make_spec(rule="extra")))
    widths = summarise(found)["widths"]
    for bits in range(1, 8):
        sliced = slice_codes(tensor.codes, bits, rule="extra")
        size = len(pack_extra(sliced, bits)) + 8 * 2 + 16
        assert size_bytes(found, UP, bits) == size_bytes(found, UP, bits) == size
        assert widths[bits]["overflow"] == share
        assert widths[bits]["paper_bits"] == bits + share
        assert widths[bits]["bits_per_weight"] == 8 * size / 128
        assert widths[bits]["bytes"] == widths[bits]["model_bytes"] == size
    assert widths[8]["paper_bits"] == 8
    assert widths[8]["overflow"] == 0
    assert size_bytes(found, UP, 8) == 128 + 8 * 2 + 16


@pytest.mark.parametrize(
    "case", ["plain", "groups", "asymmetric", "asymmetric_groups", "float32", "asymmetric_float32"]
)
@pytest.mark.parametrize(("rows", "columns"), [(8, 12), (8, 16), (3, 8), (5, 20)])
def test_eight_bits_cost_what_the_file_holds(case: str, rows: int, columns: int, tmp_path: Path) -> None:
    """Up to the zero points of rows that are not there (N is padded to 4)."""
    options = SIZE_CASES[case]
    tensor = make_tensor(rows, columns, **options)
    plain = np.ones((5, 3), ml_dtypes.bfloat16)
    found = open_checkpoint(write(tmp_path / "out", [(UP, tensor), ("plain", plain)], make_spec(**options)))
    file = found.directory / "model.safetensors"
    (header,) = struct.unpack("<Q", file.read_bytes()[:8])
    padding = 0 if options.get("symmetric", True) else -rows % 4 * tensor.scale.shape[1]
    assert plain_bytes(found) == 30
    assert file.stat().st_size - 8 - header == size_bytes(found, UP, 8) + padding + 30
    summary = summarise(found)
    assert summary["file_bytes"] == sum(file.stat().st_size for file in found.directory.glob("*.safetensors"))
    assert summary["widths"][8]["model_bytes"] == size_bytes(found, UP, 8) + 30
    assert summary["weights"] == rows * columns


def test_overflow_is_counted_once_for_each_width(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = open_checkpoint(write(tmp_path / "out", [(UP, make_tensor(8, 12, rule="extra"))], make_spec(rule="extra")))
    counted: list[int] = []

    def count(codes: Array, bits: int) -> int:
        counted.append(bits)
        return overflow.packed_bytes(codes, bits)

    monkeypatch.setattr(sizes, "packed_bytes", count)
    assert summarise(found) == summarise(found)
    assert sorted(counted) == list(range(1, 8))


def test_the_summary_counts_every_code(tmp_path: Path) -> None:
    tensors = {UP: make_tensor(8, 12, rule="extra"), DOWN: make_tensor(3, 5, rule="extra", seed=3)}
    found = open_checkpoint(write(tmp_path / "out", tensors.items(), make_spec(rule="extra")))
    codes = [int(code) for tensor in tensors.values() for code in tensor.codes.ravel()]
    for bits, row in summarise(found)["widths"].items():
        counted = collections.Counter(slice_code(code, bits, "extra") for code in codes)
        assert {code: count for code, count in enumerate(row["histogram"]) if count} == counted
