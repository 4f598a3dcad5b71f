"""The engine on planes: the same tokens as from the shards, more widths as planes arrive, and memory given back."""

import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import conftest
import matquant
from matquant.core.planes import add_planes as add_to_weight
from matquant.core.planes import hold, load_weight, matmul
from matquant.core.tensor import NestedTensor
from matquant.export import export
from matquant.format.plane_write import assemble
from matquant.system.errors import InputError

IDS = [1, 7, 42, 3, 250, 17, 99]


@pytest.fixture(scope="module")
def stock(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama, embedding and head at int6 or wider, with scales for int2 to int4."""
    out = tmp_path_factory.mktemp("planes") / "stock"
    return conftest.quantize(llama, out, method="rtn", scope="all", affine="refit", group_size=16)


@pytest.fixture(scope="module")
def whole(stock: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as planes, all of them."""
    out = tmp_path_factory.mktemp("planes") / "whole"
    export(stock, out, to="planes")
    return out


@pytest.fixture(scope="module")
def reference(stock: Path) -> dict[int, np.ndarray]:
    """Width -> scores of IDS by an engine on the shards."""
    engine = matquant.Engine(stock, threads=1)
    return {bits: engine.score(IDS, bits=bits) for bits in range(1, 9)}


@pytest.fixture
def partial(whole: Path, tmp_path: Path) -> Path:
    """A directory that has what int2 needs."""
    out = tmp_path / "partial"
    shutil.copytree(whole, out, ignore=shutil.ignore_patterns("p[1-4]-*"))
    return out


def arrive(whole: Path, directory: Path, *planes: int) -> None:
    for plane in planes:
        shutil.copy(whole / "planes" / f"p{plane}-00001.planes", directory / "planes")


def assert_serves(engine: matquant.Engine, reference: dict[int, np.ndarray]) -> None:
    """The scores of every width up to max_bits are exactly those of the shards; wider ones are rejected."""
    for bits in range(1, engine.max_bits + 1):
        assert np.array_equal(engine.score(IDS, bits=bits), reference[bits]), bits
        assert not np.array_equal(engine.score(IDS, bits=bits), reference[bits % 8 + 1])
    if engine.max_bits < 8:
        with pytest.raises(InputError, match="exceeds max_bits"):
            engine.score(IDS, bits=engine.max_bits + 1)


def test_an_engine_serves_what_is_there_and_more_as_planes_arrive(
    whole: Path, partial: Path, reference: dict[int, np.ndarray]
) -> None:
    engine = matquant.Engine(partial, threads=1)
    session = engine.session()
    first = session.extend(IDS, engine.widths(2)).copy()
    assert engine.max_bits == 2
    assert_serves(engine, reference)
    with pytest.raises(InputError) as caught:
        engine.score(IDS, bits=4)
    assert str(caught.value) == (
        "bits=4 for model.layers.0.self_attn.q_proj exceeds max_bits=2 of this engine; "
        f"fetch them with: matquant pull REPO --bits 4 -o {partial}"
    )
    assert engine.add_planes() == 2
    arrive(whole, partial, 2)  # of no use without the one before
    assert engine.add_planes() == 2
    for plane, bits in ((1, 4), (3, 6), (4, 8)):
        arrive(whole, partial, plane)
        assert engine.add_planes() == bits
        assert_serves(engine, reference)
    session.rewind(0)
    assert np.array_equal(session.extend(IDS, engine.widths(2)), first)


@pytest.mark.slow
def test_planes_are_brought_back_after_the_directory_was_assembled(
    whole: Path, partial: Path, reference: dict[int, np.ndarray]
) -> None:
    engine = matquant.Engine(partial, threads=1)
    arrive(whole, partial, 1, 2, 3, 4)
    assemble(partial)
    assert engine.add_planes(max_bits=4) == 4
    assert engine.add_planes() == 8
    assert_serves(engine, reference)


def test_max_bits_limits_what_is_loaded(whole: Path, reference: dict[int, np.ndarray]) -> None:
    engine = matquant.Engine(whole, threads=1, max_bits=3)
    assert {weight.planes.resident_bits for path, weight in engine.model.weights.items() if "layers" in path} == {3}
    assert_serves(engine, reference)


@pytest.mark.parametrize("directory", ["stock", pytest.param("whole", marks=pytest.mark.slow)])
def test_evicted_planes_come_back(
    directory: str, reference: dict[int, np.ndarray], request: pytest.FixtureRequest
) -> None:
    engine = matquant.Engine(request.getfixturevalue(directory), threads=1)
    full = sum(weight.planes.bytes for weight in engine.model.weights.values())
    for bits in (6, 2, 4, 3):
        engine.evict(bits)
        assert engine.max_bits == min(bits, engine.max_bits)
        assert_serves(engine, reference)
        assert sum(weight.planes.bytes for weight in engine.model.weights.values()) < full
    assert engine.add_planes(max_bits=4) == 4
    assert_serves(engine, reference)
    assert engine.add_planes() == 8
    assert_serves(engine, reference)
    assert sum(weight.planes.bytes for weight in engine.model.weights.values()) == full


def test_a_completion_at_an_evicted_width_ends_with_what_to_do(stock: Path) -> None:
    engine = matquant.Engine(stock, threads=1)
    session = engine.session()
    wide, narrow = engine.widths(8), engine.widths(2)
    session.extend(IDS, wide)
    engine.evict(2)
    with pytest.raises(InputError) as caught:
        session.extend([5], wide)
    assert str(caught.value) == ("a width is not held in memory: it was evicted; bring it back with Engine.add_planes")
    session.extend([5], narrow)


def test_steps_of_other_threads_go_on_while_planes_come_and_go(stock: Path, reference: dict[int, np.ndarray]) -> None:
    engine = matquant.Engine(stock, threads=1)
    stop, wrong = threading.Event(), []

    def score() -> None:
        while not stop.is_set():
            if not np.array_equal(engine.score(IDS, bits=2), reference[2]):
                wrong.append("int2")

    threads = [threading.Thread(target=score) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(3):
        engine.evict(2)
        assert engine.add_planes() == 8
        assert np.array_equal(engine.score(IDS, bits=8), reference[8])
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_damaged_plane_changes_nothing_and_names_the_file(
    whole: Path, partial: Path, reference: dict[int, np.ndarray]
) -> None:
    engine = matquant.Engine(partial, threads=1)
    arrive(whole, partial, 1)
    file = partial / "planes/p1-00001.planes"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(InputError) as caught:
        engine.add_planes()
    assert str(caught.value).startswith(f"{file} is damaged: sha256 ")
    assert engine.max_bits == 2
    assert_serves(engine, reference)
    arrive(whole, partial, 1)
    assert engine.add_planes() == 3
    assert_serves(engine, reference)


def test_an_error_while_planes_are_made_leaves_none_of_them(
    stock: Path, reference: dict[int, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = matquant.Engine(stock, threads=1)
    engine.evict(2)
    held = sum(weight.planes.bytes for weight in engine.model.weights.values())
    with monkeypatch.context() as patch:
        patch.setattr("matquant.engine.model.add_planes", conftest.Interrupt(add_to_weight, 4))
        with pytest.raises(KeyboardInterrupt):
            engine.add_planes()
    assert sum(weight.planes.bytes for weight in engine.model.weights.values()) == held
    assert_serves(engine, reference)
    assert engine.add_planes() == 8
    assert_serves(engine, reference)


@pytest.mark.slow
def test_another_checkpoint_in_the_directory_is_rejected(stock: Path, llama: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(stock, copy)
    engine = matquant.Engine(copy, threads=1)
    engine.evict(2)
    shutil.rmtree(copy)
    conftest.quantize(llama, copy, method="rtn", scope="linears")
    with pytest.raises(InputError) as caught:
        engine.add_planes()
    assert str(caught.value) == f"{copy} holds another checkpoint than this engine; open it again"


@pytest.mark.parametrize("rule", ["prefix", "extra"])
def test_a_weight_that_was_widened_equals_one_loaded_whole(rule: str) -> None:
    random = np.random.default_rng(3)
    codes = random.integers(0, 256, (40, 96)).astype(np.uint8)
    scale, zero = np.full((40, 3), 0.5, np.float32), np.full((40, 3), 128, np.float32)
    own = {bits: (scale * bits, zero / 2 ** (8 - bits)) for bits in (3, 5)}
    tensor = NestedTensor(codes=codes, scale=scale, zero=zero, rule=rule, slices=own)
    x = random.normal(size=(3, 96)).astype(np.float32)
    loaded, grown = load_weight(tensor), load_weight(tensor, max_bits=1)
    for bits in (2, 3, 4, 6, 8):
        grown = hold(add_to_weight(grown, tensor, max_bits=bits), max_bits=bits)
        for width in range(1, bits + 1):
            assert np.array_equal(matmul(grown, x, bits=width), matmul(loaded, x, bits=width))
    assert grown.planes.bytes == loaded.planes.bytes
    for _ in range(3):  # scales stay, and are not added again
        grown = hold(grown, max_bits=2)
        grown = hold(add_to_weight(grown, tensor, max_bits=8), max_bits=8)
    assert grown.planes.bytes == loaded.planes.bytes
    other = NestedTensor(codes=codes[1:], scale=scale[1:], zero=zero[1:], rule=rule)
    with pytest.raises(InputError, match="do not belong to a weight of"):
        add_to_weight(grown, other, max_bits=8)


def test_evicting_gives_memory_back_to_the_system(tmp_path: Path) -> None:
    """In a fresh process, on 33 million codes: resident memory falls by the planes, and rises again."""
    if not Path("/proc/self/status").exists():
        pytest.skip("resident memory is read from /proc")
    script = """
import pathlib, sys
import numpy as np
from matquant import _native
from matquant.core.planes import add_planes, hold, load_weight
from matquant.core.tensor import NestedTensor

def resident():
    fields = dict(line.split(":") for line in pathlib.Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) * 1024

codes = np.random.default_rng(0).integers(0, 256, (1024, 512)).astype(np.uint8)
ones = np.ones((1024, 1), np.float32)
tensor = NestedTensor(codes=codes, scale=ones, zero=ones, rule="prefix")
count = 64  # each plane of a weight is smaller than a page, as in most models
weights = [load_weight(tensor) for _ in range(count)]
stays = load_weight(tensor)  # like an embedding, which shares pages with the last layers
before, total = resident(), count * codes.size
for bits in (6, 4, 3, 2):
    weights = [hold(weight, max_bits=bits) for weight in weights]
    given = before - resident()
    wanted = total * (8 - bits) / 8
    assert abs(given - wanted) <= 0.1 * total, (bits, given / total)
weights = [hold(add_planes(weight, tensor, max_bits=8), max_bits=8) for weight in weights]
assert abs(before - resident()) <= 0.1 * total
kept = set()
for turn in range(6):  # half of them in turn, of which some stay: parts of pages are used again
    for number, weight in enumerate(weights):
        bits = 8 if number in kept or number % 2 == turn % 2 else 2
        weights[number] = hold(add_planes(weight, tensor, max_bits=bits), max_bits=bits)
    kept |= set(range(turn, count, 16))
assert before - resident() >= -0.1 * total
"""
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True)
