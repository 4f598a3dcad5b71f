"""The contract of FORMATS: every row exports a slice exactly, or says why it does not and leaves nothing.

READERS (readers.py) decode each format from its own description and import nothing of matquant.export. A
format without a reader fails here.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from exports import nested_checkpoint
from matquant.core.nest import RULES
from matquant.core.spec import Plan
from matquant.export import FORMATS, export
from matquant.format.read import open_checkpoint
from matquant.system.errors import InputError
from readers import FLOAT32, READERS, ROUNDINGS, assert_slice

HIDDEN, INNER, HEADS = 64, 96, 2
LAYER = "model.layers.0."
UP = f"{LAYER}mlp.up_proj"
SHAPES = {
    f"{LAYER}self_attn.q_proj": (HIDDEN, HIDDEN),
    f"{LAYER}self_attn.k_proj": (HIDDEN // 2, HIDDEN),
    f"{LAYER}self_attn.v_proj": (HIDDEN // 2, HIDDEN),
    f"{LAYER}self_attn.o_proj": (HIDDEN, HIDDEN),
    f"{LAYER}mlp.gate_proj": (INNER, HIDDEN),
    UP: (INNER, HIDDEN),
    f"{LAYER}mlp.down_proj": (HIDDEN, INNER),
}
CONFIG = {
    **{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", "vocab_size": 4},
    **{"hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 1, "num_attention_heads": HEADS},
    **{"num_key_value_heads": 1, "max_position_embeddings": 64, "tie_word_embeddings": False},
}
GRIDS: dict[str, dict[str, Any]] = {
    "own scales and zero-points of int3 and int2": {},
    "groups": {"group_size": 32, "own": False},
    "zero-points": {"symmetric": False, "own": False},
}
WIDTHS = range(8, 0, -1)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """(rule, grid) -> a checkpoint of a tiny Llama with random codes, made once."""
    root = tmp_path_factory.mktemp("sources")

    def vector() -> np.ndarray:
        return np.ones(HIDDEN, dtype=ml_dtypes.bfloat16)

    def get(rule: str, grid: str) -> Path:
        directory = root / f"{rule}-{list(GRIDS).index(grid)}"
        plain = {f"{LAYER}{name}.weight": vector() for name in ("input_layernorm", "post_attention_layernorm")}
        plain |= {"model.norm.weight": vector(), "lm_head.weight": np.ones((4, HIDDEN), dtype=ml_dtypes.bfloat16)}
        if not directory.is_dir():
            nested_checkpoint(directory, SHAPES, rule=rule, config=CONFIG, plain=plain, **GRIDS[grid])
        return directory

    return get


@pytest.fixture
def plain(source: Callable[..., Path]) -> Path:
    """A checkpoint whose int4 every format holds."""
    return source("round", "groups")


def place(folder: Path, to: str, name: str = "out") -> Path:
    return folder / f"{name}{FORMATS[to].suffix}"


def write(directory: Path, out: Path, to: str, **options: Any) -> dict[str, Any]:
    return export(directory, out, to=to, dtype="float32" if to == "dense" else None, **options)


def content(out: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in ([out] if out.is_file() else sorted(out.iterdir()))}


def exported(directory: Path, folder: Path, to: str) -> Iterator[tuple[int, Path | str]]:
    """(width, the export, or why there is none) for every width."""
    for bits in WIDTHS:
        out = place(folder, to, f"int{bits}")
        before = sorted(folder.iterdir())
        try:
            write(directory, out, to, bits=bits)
            yield bits, out
        except InputError as error:
            assert sorted(folder.iterdir()) == before, "a rejected export leaves nothing"
            yield bits, str(error)


def test_every_format_has_a_reader() -> None:
    assert READERS.keys() == FORMATS.keys()


# By default every grid with rule prefix, and every other rule with one grid.
SOURCES = [
    pytest.param(grid, rule, marks=[] if rule == "prefix" or grid == "zero-points" else pytest.mark.slow)
    for grid in GRIDS
    for rule in RULES
]


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize(("grid", "rule"), SOURCES)
def test_a_slice_is_exported_exactly_or_rejected_with_the_reason(
    to: str, rule: str, grid: str, source: Callable[..., Path], tmp_path: Path
) -> None:
    directory = source(rule, grid)
    checkpoint, unit = open_checkpoint(directory), ROUNDINGS.get(to, FLOAT32)
    for bits, found in exported(directory, tmp_path, to):
        if isinstance(found, str):
            assert found.startswith(f"--to {to} cannot hold {LAYER}"), found
            assert f" at {bits} bits, rule {rule}, exactly (" in found
            assert "; use --" in found, "what to do instead"
            continue
        for path in SHAPES:
            weight = READERS[to](found, path, bits, checkpoint)
            assert_slice(weight, checkpoint, path, bits, unit)
            for other in {bits - 1, bits + 1} & set(WIDTHS):
                with pytest.raises(AssertionError, match="is off by"):
                    assert_slice(weight, checkpoint, path, other, unit)


@pytest.mark.parametrize("to", FORMATS)
def test_a_format_holds_some_slice(to: str, plain: Path, tmp_path: Path) -> None:
    for bits in (8, 4):  # or it would be rejected
        write(plain, place(tmp_path, to, f"int{bits}"), to, bits=bits)


@pytest.mark.parametrize("to", FORMATS)
def test_what_a_format_does_not_know_is_rejected(to: str, plain: Path, tmp_path: Path) -> None:
    out = place(tmp_path, to)
    for options, message in (
        ({"zero_point": "middle"}, "zero_point='middle' is not supported; use exact or midrange"),
        ({"dtype": "float8"}, "dtype='float8' is not supported; use float32, float16, bfloat16"),
        ({"bits": 4, "plan": Plan(default=4)}, "bits and a plan exclude each other; use one of them"),
    ):
        with pytest.raises(InputError) as caught:
            export(plain, out, to=to, **options)
        assert str(caught.value) == message
    with pytest.raises(InputError, match="bits=9"):
        export(plain, out, to=to, bits=9)
    with pytest.raises(TypeError, match="unexpected keyword argument 'width'"):
        export(plain, out, to=to, width=4)  # type: ignore[call-arg]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", FORMATS)
def test_an_output_that_exists_is_replaced_only_if_asked(to: str, plain: Path, tmp_path: Path) -> None:
    out = place(tmp_path, to)
    write(plain, out, to, bits=4)
    before = content(out)
    with pytest.raises(InputError, match=r"exists; .*--overwrite"):
        write(plain, out, to, bits=8)
    assert content(out) == before
    write(plain, out, to, bits=8, overwrite=True)
    assert content(out) != before
    write(plain, out, to, bits=4, overwrite=True)
    assert content(out) == before, "the same export is the same bytes"
    assert [file.name for file in tmp_path.iterdir()] == [out.name]


@pytest.mark.parametrize("to", FORMATS)
def test_an_export_that_fails_half_way_leaves_what_was_there(to: str, plain: Path, tmp_path: Path) -> None:
    class PulledPlugError(Exception):
        pass

    def fail(done: int, total: int) -> None:
        assert 0 < done <= total
        raise PulledPlugError

    out = place(tmp_path, to)
    with pytest.raises(PulledPlugError):
        write(plain, out, to, bits=4, report=fail)
    assert not list(tmp_path.iterdir())
    write(plain, out, to, bits=8)
    before = content(out)
    with pytest.raises(PulledPlugError):
        write(plain, out, to, bits=4, report=fail, overwrite=True)
    assert content(out) == before
    assert [file.name for file in tmp_path.iterdir()] == [out.name]


@pytest.mark.parametrize("to", FORMATS)
def test_the_bytes_reported_are_those_written(to: str, plain: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    made = write(plain, place(tmp_path, to), to, bits=4, report=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] >= made["bytes"] > 0
    assert {total for _, total in seen} == {made["bytes"]}


def test_an_unknown_format_is_rejected(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        export(plain, tmp_path / "out", to="onnx")
    assert str(caught.value) == f"--to 'onnx' is not a format; give {', '.join([*FORMATS, 'planes'])}"
