"""The planes layout: every plane against an oracle of single bits, slices bit for bit, and the shards made again."""

import json
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

import conftest
from cases import each
from matquant.core.nest import COMPANDED, RULES, UNIFORM, labels_of, stored_codes
from matquant.core.spec import Plan, Spec
from matquant.core.tensor import NestedTensor
from matquant.export import export
from matquant.format.contents import summarise
from matquant.format.manifest import MANIFEST
from matquant.format.plane_files import PLANE_BITS, pack_plane, planes_read, unpack_planes, widest
from matquant.format.plane_write import assemble
from matquant.format.read import Checkpoint, open_checkpoint
from matquant.format.seal import seal_checkpoint
from matquant.format.sizes import bits_per_weight
from matquant.format.verify import verify_checkpoint
from matquant.format.write import write_checkpoint
from matquant.system.errors import InputError
from test_checkpoint import document_json, document_tables, example_tensor, make_spec
from test_checkpoint import write as write_example

LAYER = "model.layers.0.mlp."
EMBEDDING = "model.embed_tokens"
SHAPES = {f"{LAYER}up_proj": (6, 32), f"{LAYER}down_proj": (5, 64), "model.layers.1.mlp.up_proj": (3, 32)}
ODD = {f"{LAYER}up_proj": (5, 7), f"{LAYER}down_proj": (4, 33), "model.layers.1.mlp.up_proj": (1, 1)}
CASES: dict[str, dict[str, Any]] = {
    "prefix": {},
    "round": {"rule": "round"},
    "extra": {"rule": "extra"},
    "companded": {"grid": COMPANDED},
    "zero-points": {"symmetric": False},
    "groups and own scales": {"group_size": 32, "slices": (4, 3, 2)},
    "odd columns": {"shapes": ODD, "slices": (2,)},
    "mid-range": {"slices": (3, 2), "zeros": "centre"},
    "embedding at 6 bits": {"head_bits": 6, "slices": (2,)},
    "embedding, extra": {"head_bits": 3, "rule": "extra"},
    "companded, shards": {"grid": COMPANDED, "head_bits": 4, "slices": (2,), "shard_bytes": 300},
    "shards": {"shard_bytes": 150},
}


def make(
    directory: Path,
    *,
    shapes: dict[str, tuple[int, int]] = SHAPES,
    rule: str = "prefix",
    grid: str = UNIFORM,
    symmetric: bool = True,
    group_size: int | None = None,
    slices: tuple[int, ...] = (),
    zeros: str = "own",
    head_bits: int | None = None,
    shard_bytes: int = 10**9,
) -> Path:
    """A checkpoint of random codes, all 256 among them where they fit."""
    random = np.random.default_rng(7)
    spec = Spec(
        rule=rule, widths=(8, 2), slices=slices, group_size=group_size, symmetric=symmetric, zeros=zeros, grid=grid,
        head_bits=head_bits,
    )  # fmt: skip

    def tensor(rows: int, columns: int) -> NestedTensor:
        codes = random.permutation(np.resize(np.arange(256), rows * columns)).astype(np.uint8).reshape(rows, columns)
        affine = (rows, columns // (group_size or columns))
        scale = lambda: np.exp2(random.integers(-6, 0, affine)).astype(np.float32)  # noqa: E731
        zero = np.full(affine, 128, np.float32) if symmetric else random.integers(0, 256, affine).astype(np.float32)
        middle = {bits: np.full(affine, (2**bits - 1) / 2, np.float32) for bits in slices}
        return NestedTensor(
            codes=labels_of(stored_codes(codes, grid=grid), grid=grid), scale=scale(), zero=zero, rule=rule, grid=grid,
            slices={bits: (scale(), middle[bits]) for bits in slices},
        )  # fmt: skip

    wanted = shapes if head_bits is None else {**shapes, EMBEDDING: (40, 32)}
    items: list[Any] = [(path, tensor(*shape)) for path, shape in wanted.items()]
    items += [("model.norm.weight", np.arange(7, dtype=ml_dtypes.bfloat16)), ("odd", np.ones((3, 5), np.float16))]
    config = {"model_type": "llama", "dtype": "bfloat16", "tie_word_embeddings": head_bits is not None}
    files = {"tokenizer_config.json": b"{}\n", "training.jsonl": b'{"step": 1}\n'}
    write_checkpoint(
        directory, items, spec=spec, config=config, ignore=["lm_head"], files=files, shard_bytes=shard_bytes
    )
    return directory


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name of a case -> its checkpoint, made once."""
    root = tmp_path_factory.mktemp("sources")

    def get(case: str) -> Path:
        directory = root / case.replace(" ", "-")
        return directory if directory.is_dir() else make(directory, **CASES[case])

    return get


def planes_of(directory: Path, out: Path, bits: int = 8) -> Path:
    export(directory, out, to="planes", bits=bits)
    return out


def content(directory: Path) -> dict[str, bytes]:
    return {str(f.relative_to(directory)): f.read_bytes() for f in sorted(directory.rglob("*")) if f.is_file()}


def assert_reads_like(directory: Path, stock: Path) -> Checkpoint:
    """Every weight that can be read equals that of the stock directory bit for bit, and so does everything else."""
    found, wanted = open_checkpoint(directory, partial=True), open_checkpoint(stock)
    assert found.shapes == wanted.shapes
    assert found.config == wanted.config
    for path in wanted.shapes:
        for bits in range(1, 9):
            if bits <= max(found.max_bits, found.least.get(path, 1)):
                ours, theirs = found.nested(path).read(bits), wanted.nested(path).read(bits)
                assert ours.tobytes() == theirs.tobytes(), f"{path} at {bits} bits"
    assert sorted(found.plain_names()) == sorted(wanted.plain_names())
    for name in wanted.plain_names():
        assert found.array(name).tobytes() == wanted.array(name).tobytes(), name
        assert found.stored_dtype(name) == wanted.stored_dtype(name)
    return found


# -------------------------------------------------------------------------------------------------------------- planes


def plane_bits(codes: list[int], plane: int) -> bytes:
    """A row of a plane, bit by bit: the field of code k begins at bit k * width of the row, lowest bit first."""
    low, width = ((6, 2), (5, 1), (4, 1), (2, 2), (0, 2))[plane]
    row = [code >> (low + bit) & 1 for code in codes for bit in range(width)]
    row += [0] * (-len(row) % 8)
    return bytes(sum(bit << place for place, bit in enumerate(row[at : at + 8])) for at in range(0, len(row), 8))


@each("columns", [1, 3, 7, 8, 33, 256])
@each("plane", range(5))
def test_a_plane_is_that_of_the_oracle(plane: int, columns: int) -> None:
    codes = np.random.default_rng(columns).integers(0, 256, (3, columns)).astype(np.uint8)
    codes[0] = np.resize(np.arange(256), columns)
    packed = pack_plane(codes, plane)
    assert packed.shape == (3, -(-columns * PLANE_BITS[plane] // 8))
    assert [row.tobytes() for row in packed] == [plane_bits(row.tolist(), plane) for row in codes]
    assert packed.tobytes() != pack_plane(codes ^ 255, plane).tobytes()


@each("shape", [(256, 256), (2, 1), (3, 77), (1, 2**17 + 5)])
def test_planes_give_the_top_bits_of_the_codes(shape: tuple[int, int]) -> None:
    codes = np.resize(np.arange(256), shape).astype(np.uint8)
    planes = [pack_plane(codes, plane) for plane in range(5)]
    for count, dropped in zip(range(1, 6), (6, 5, 4, 2, 0), strict=True):
        assert np.array_equal(unpack_planes(planes[:count], shape[1]), codes >> dropped << dropped)


@each("rule", RULES)
def test_widths_need_the_planes_of_their_rule(rule: str) -> None:
    wanted = {"prefix": [1, 1, 2, 3, 4, 4, 5, 5], "round": [1, 2, 3, 4, 4, 5, 5, 5]}
    assert [planes_read(bits, rule) for bits in range(1, 9)] == wanted.get(rule, wanted["round"])
    served = {"prefix": [2, 3, 4, 6, 8], "round": [1, 2, 3, 5, 8]}
    assert [widest(planes, rule) for planes in range(1, 6)] == served.get(rule, served["round"])


PAGE = "Planes"


def test_the_example_of_the_page_is_what_is_written(tmp_path: Path) -> None:
    """docs/format.md: the bytes of every plane follow from its codes, and are those of the files."""
    codes = {number: [int(code) for code in row["codes"].split()] for number, row in enumerate(rows_of_the_page())}
    stock = write_example(tmp_path / "stock", [("linear", example_tensor("prefix", own=True))], make_spec(slices=(2,)))
    directory = planes_of(stock, tmp_path / "planes") / "planes"
    shown = [row for table in document_tables(PAGE) for row in table if "bytes of row 0" in row]
    assert [row["tensor"] for row in shown] == [f"linear.plane{plane}" for plane in range(5)]
    for plane, row in enumerate(shown):
        said = [bytes.fromhex(row[f"bytes of row {number}"].strip("`")) for number in (0, 1)]
        assert said == [plane_bits(codes[number], plane) for number in (0, 1)]
        with safe_open(directory / row["file"], "np") as handle:
            assert [line.tobytes() for line in handle.get_tensor(row["tensor"])] == said
    assert json.loads((directory / "manifest.json").read_text()) == document_json(PAGE)
    with safe_open(directory / "rest-00001.planes", "np") as rest:
        assert set(rest.keys()) == {"linear.weight_shape", "linear.weight_scale", "model.safetensors/header"}
        header = rest.get_tensor("model.safetensors/header").tobytes()
    assert len(header) == 264
    assert (stock / "model.safetensors").read_bytes().startswith(header)


def rows_of_the_page() -> list[dict[str, str]]:
    return [row for table in document_tables("Worked example") for row in table if "codes" in row]


# ------------------------------------------------------------------------------------------------------- the directory


@pytest.mark.parametrize("case", CASES)
def test_slices_of_the_planes_equal_those_of_the_shards(
    case: str, source: Callable[[str], Path], tmp_path: Path
) -> None:
    directory = planes_of(source(case), tmp_path / "planes")
    for planes in (5, 4, 3, 2, 1):
        for part in (directory / "planes").glob(f"p{planes}-*"):
            part.unlink()
        found = assert_reads_like(directory, source(case))
        assert found.max_bits == widest(planes, found.spec.rule)


def test_an_export_of_a_width_has_its_planes_only(source: Callable[[str], Path], tmp_path: Path) -> None:
    for bits, planes in ((6, 4), (2, 1)):
        parts = (planes_of(source("shards"), tmp_path / str(bits), bits) / "planes").iterdir()
        kinds = {"manifest.json", "rest", *(f"p{plane}" for plane in range(planes))}
        assert {part.name.split("-")[0] for part in parts} == kinds


@pytest.mark.parametrize("case", CASES)
def test_assembling_gives_the_directory_byte_for_byte(case: str, source: Callable[[str], Path], tmp_path: Path) -> None:
    directory = planes_of(source(case), tmp_path / "planes")
    assert not list(directory.glob("model*.safetensors"))
    verify_checkpoint(directory)
    assemble(directory)
    assert content(directory) == content(source(case))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["planes"]


@pytest.mark.slow
def test_fewer_stored_bits_have_fewer_planes(source: Callable[[str], Path], tmp_path: Path) -> None:
    mixed = Plan(default=2, bits={f"{LAYER}down_proj": 4})
    for name, options in (("int2", {"bits": 2}), ("int5", {"bits": 5}), ("mixed", {"plan": mixed})):
        stock = tmp_path / name
        export(source("prefix"), stock, to="matquant", **options)
        assert open_checkpoint(stock).spec.format == 2
        directory = planes_of(stock, tmp_path / f"{name}-planes")
        assert_reads_like(directory, stock)
        assemble(directory)
        listed = json.loads((stock / MANIFEST).read_text())["files"]
        assert all((directory / file).read_bytes() == (stock / file).read_bytes() for file in [MANIFEST, *listed])
    files = json.loads((planes_of(tmp_path / "int2", tmp_path / "again") / "planes/manifest.json").read_text())["files"]
    assert sorted(files) == ["p0-00001.planes", "p1-00001.planes", "rest-00001.planes"]


def test_planes_of_embedding_and_head_that_every_width_reads_lie_in_rest(
    source: Callable[[str], Path], tmp_path: Path
) -> None:
    directory = planes_of(source("embedding at 6 bits"), tmp_path / "planes") / "planes"
    with safe_open(directory / "rest-00001.planes", "np") as rest, safe_open(directory / "p4-00001.planes", "np") as p4:
        assert {name for name in rest.keys() if EMBEDDING in name and "plane" in name} == {  # noqa: SIM118
            f"{EMBEDDING}.plane{plane}" for plane in range(4)
        }
        assert f"{EMBEDDING}.plane4" in p4.keys()  # noqa: SIM118


def test_a_part_holds_its_share_of_the_codes_only(tmp_path: Path) -> None:
    stock = make(tmp_path / "stock", shapes={f"{LAYER}up_proj": (256, 1024)})
    directory = planes_of(stock, tmp_path / "planes") / "planes"
    codes = 256 * 1024
    for plane, bits in enumerate(PLANE_BITS):
        size = (directory / f"p{plane}-00001.planes").stat().st_size
        assert codes * bits / 8 < size < 1.01 * codes * bits / 8
    rest = (stock / "model.safetensors").stat().st_size - codes
    assert (directory / "rest-00001.planes").stat().st_size < rest + 600  # the header of the shard, and of the part


def test_a_plan_and_bits_per_weight_are_those_of_the_stock_directory(
    source: Callable[[str], Path], tmp_path: Path
) -> None:
    stock = open_checkpoint(source("embedding at 6 bits"))
    found = open_checkpoint(planes_of(stock.directory, tmp_path / "planes", 3), partial=True)
    for bits in (1, 2, 3):
        assert found.widths(bits) == stock.widths(bits)
        assert bits_per_weight(found, found.widths(bits)) == bits_per_weight(stock, stock.widths(bits))
    assert found.widths(Plan(default=2, bits={EMBEDDING: 5}))[EMBEDDING] == 5
    whole, ours = summarise(stock), summarise(found)
    assert ours["widths"] == {bits: row for bits, row in whole["widths"].items() if bits <= 3}
    assert ours["plain_bytes"] == whole["plain_bytes"]


def test_a_changed_small_file_can_be_sealed_beside_planes(source: Callable[[str], Path], tmp_path: Path) -> None:
    directory = planes_of(source("prefix"), tmp_path / "planes", 2)
    (directory / "tokenizer_config.json").write_text('{"a": 1}\n')
    _, changes = seal_checkpoint(directory)
    assert [str(change) for change in changes] == ["changed: tokenizer_config.json (3 -> 9 bytes)"]
    assert verify_checkpoint(directory).max_bits == 2


def test_planes_in_the_cache_of_the_hub_are_read_through_its_links(
    source: Callable[[str], Path], tmp_path: Path
) -> None:
    directory = planes_of(source("prefix"), tmp_path / "planes", 2)
    snapshot, blobs = tmp_path / "models--a--b/snapshots/1f", tmp_path / "models--a--b/blobs"
    blobs.mkdir(parents=True)
    for name, data in content(directory).items():
        (blobs / sha256(data).hexdigest()).write_bytes(data)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(blobs / sha256(data).hexdigest())
    assert assert_reads_like(snapshot, source("prefix")).max_bits == 2
    (snapshot / "planes/p0-00001.planes").unlink()
    (snapshot / "planes/p0-00001.planes").symlink_to(directory / "planes/p0-00001.planes")
    assert "outside the directory" in message(open_checkpoint, snapshot, partial=True)


# -------------------------------------------------------------------------------------------------------------- errors


def message(function: Callable[..., Any], *args: Any, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        function(*args, **options)
    return str(caught.value)


def test_what_is_not_there_is_named_with_what_to_do(source: Callable[[str], Path], tmp_path: Path) -> None:
    directory = planes_of(source("prefix"), tmp_path / "planes", 2)
    fetch = f"fetch them with: matquant pull REPO --bits 8 -o {directory}"
    assert message(open_checkpoint, directory) == (
        f"{directory} has the planes of int2 only, and all of them are needed; {fetch}"
    )
    checkpoint, path = open_checkpoint(directory, partial=True), min(SHAPES)
    assert message(checkpoint.widths, 4) == (
        f"{directory} has the planes of int2 only, so {path} cannot be read at int4; {fetch.replace('8', '4', 1)}"
    )
    assert message(assemble, directory) == message(open_checkpoint, directory)
    (directory / "planes/origin.json").write_text('{"repo": "acme/tiny", "commit": "1f"}')
    assert message(open_checkpoint, directory).endswith(f"matquant pull acme/tiny --bits 8 -o {directory}")
    (directory / "planes/p0-00001.planes").unlink()
    assert message(open_checkpoint, directory, partial=True) == (
        f"{directory}/planes/p0-00001.planes is missing, so no width can be read; "
        f"fetch them with: matquant pull acme/tiny --bits 2 -o {directory}"
    )
    assert message(assemble, source("prefix")) == (
        f"{source('prefix')} has no planes to assemble; give a directory that matquant pull wrote"
    )
    out = tmp_path / "again"
    assert message(export, planes_of(source("prefix"), tmp_path / "all"), out, to="planes") == (
        f"{tmp_path / 'all'} holds planes already; copy it, or make the shards first with: matquant assemble"
    )
    assert not out.exists()


@pytest.mark.parametrize("part", ["rest-00001.planes", "p0-00001.planes", "p3-00001.planes"])
def test_a_tampered_part_is_rejected_by_name(part: str, source: Callable[[str], Path], tmp_path: Path) -> None:
    directory = planes_of(source("prefix"), tmp_path / "planes")
    file = directory / "planes" / part
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    for function in (verify_checkpoint, assemble, seal_checkpoint):
        assert message(function, directory).startswith(f"{file} is damaged: sha256 ")
    file.write_bytes(whole[:-1])
    assert message(verify_checkpoint, directory).startswith(f"{file} has {len(whole) - 1} bytes, the manifest says ")


def test_planes_of_another_checkpoint_are_rejected(source: Callable[[str], Path], tmp_path: Path) -> None:
    directory = planes_of(source("prefix"), tmp_path / "planes")
    other = planes_of(source("companded"), tmp_path / "other")
    shutil.rmtree(directory / "planes")
    shutil.copytree(other / "planes", directory / "planes")
    assert message(open_checkpoint, directory).startswith(
        f"{directory}/planes holds planes of another model.safetensors than the manifest lists; "
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: r | {"format": 2}, "is in format 2; this matquant reads format 1: upgrade matquant"),
        (lambda r: r | {"files": {}}, "lists no files; "),
        (lambda r: r | {"files": {"../x": {"bytes": 1, "sha256": ""}}}, "lists '../x', which is not a file name; "),
        (lambda r: r | {"files": {"x": {"bytes": 1, "sha256": ""}}}, "lists 'x', which is not the name of a part; "),
        (lambda r: r | {"files": {k.replace("1", "2", 1): v for k, v in r["files"].items()}}, "does not list one part"),
        (lambda r: r | {"shards": []}, "lists no files; "),
    ],
)
def test_a_hostile_record_is_rejected(
    change: Callable[[Any], Any], said: str, source: Callable[[str], Path], tmp_path: Path
) -> None:
    directory = planes_of(source("prefix"), tmp_path / "planes")
    record = directory / "planes/manifest.json"
    record.write_text(json.dumps(change(json.loads(record.read_text()))))
    assert message(open_checkpoint, directory).startswith(f"{record} {said}")


def test_bits_that_planes_do_not_keep_are_found_before_anything_is_written(tmp_path: Path) -> None:
    stock = make(tmp_path / "stock", shapes=ODD)
    file = stock / "model.safetensors"
    data = bytearray(file.read_bytes())
    length = int.from_bytes(data[:8], "little")
    start = json.loads(data[8 : 8 + length])["model.layers.1.mlp.up_proj.weight_packed"]["data_offsets"][0]
    data[8 + length + start + 1] = 1  # in the padding of a row
    file.write_bytes(data)
    list_again(stock)
    said = message(export, stock, tmp_path / "out", to="planes")
    assert said == (
        f"model.layers.1.mlp.up_proj.weight_packed of {stock} has bits that no code uses, which planes do not keep; "
        "write the checkpoint again"
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["stock"]


def list_again(directory: Path) -> None:
    """List the files as they are now."""
    manifest = json.loads((directory / MANIFEST).read_text())
    for name in manifest["files"]:
        data = (directory / name).read_bytes()
        manifest["files"][name] = {"bytes": len(data), "sha256": sha256(data).hexdigest()}
    (directory / MANIFEST).write_text(json.dumps(manifest))


def test_an_interrupted_assembly_goes_on_and_a_full_disk_leaves_the_planes(
    source: Callable[[str], Path], tmp_path: Path
) -> None:
    stock = source("shards")
    directory = planes_of(stock, tmp_path / "planes")
    before = content(directory)
    with conftest.largest_file(200), pytest.raises(InputError, match="no space left"):
        assemble(directory)
    assert content(directory) == before
    shards = sorted(stock.glob("model-*.safetensors"))
    assert len(shards) > 2
    shutil.copy(shards[0], directory)
    shutil.copy(shards[1], directory)
    (directory / shards[1].name).write_bytes(b"half")
    assert_reads_like(directory, stock)
    assemble(directory)
    assert content(directory) == content(stock)


def test_planes_left_beside_all_shards_are_only_deleted(source: Callable[[str], Path], tmp_path: Path) -> None:
    directory = planes_of(source("prefix"), tmp_path / "planes", 2)
    shutil.copy(source("prefix") / "model.safetensors", directory)
    assert open_checkpoint(directory).planes is None
    assert assemble(directory) == []
    assert content(directory) == content(source("prefix"))
