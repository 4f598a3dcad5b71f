"""Python callers: a wrong type is a TypeError that names the argument, before anything else is done."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import conftest
import matquant
from matquant.engine.sampling import Sampling
from matquant.system.arguments import check_fields
from matquant.system.errors import InputError

WRONG: dict[str, tuple[Any, ...]] = {
    "bits": ("4", 4.0, True, [4], None),
    "max_bits": ("8", 8.0, True, None),
    "plan": ([4], 4, True, "x"),
    "threads": ("2", 2.0, True, [2]),
    "activations": (1, None, True),
    "check_hashes": ("yes", 1, None),
    "mmap": ("no", 0, None),
    "max_tokens": ("5", 5.5, True, None, [5]),
    "temperature": ("1", True, [1.0]),
    "top_k": ("3", 1.5, True),
    "top_p": ("1", True),
    "min_p": ("0", False),
    "seed": ("1", 1.5, True),
    "stop": ("x", [1], b"x", 5, None),
    "session": ("x", 1),
    "speculate": (None, 2.0, True, [3]),
    "prompt": (None, 5, b"x", ["a"], [1.5], [True], {"a": 1}),
    "document": (None, 5, b"x", ["a"], [1.5]),
    "capacity": ("9", 9.5, True),
    "length": ("1", 1.0, True, None),
    "ids": ("12", 1, None, [1.5]),
    "path": (None, 5, [], b"x"),
    "directory": (None, 5, [], b"x"),
    "overwrite": (1, "yes", None),
}


@pytest.fixture(scope="module")
def checkpoint(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return conftest.quantize(llama, tmp_path_factory.mktemp("arguments") / "out", method="rtn", scope="all")


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> matquant.Engine:
    return matquant.Engine(checkpoint, threads=1)


def assert_rejected(name: str, call: Callable[[Any], object], *, none: bool = False, also: str = "") -> None:
    """Every wrong value of ``name`` is a TypeError whose message begins with it; none: None is allowed here."""
    for value in WRONG[name]:
        if value is None and none:
            continue
        with pytest.raises(TypeError) as caught:
            call(value)
        assert isinstance(caught.value, InputError)
        assert str(caught.value).startswith(f"{also or name}=")


def test_assert_rejected_fails_where_a_value_is_taken() -> None:
    with pytest.raises(pytest.fail.Exception):
        assert_rejected("bits", lambda value: None)
    with pytest.raises(AssertionError):
        assert_rejected("bits", lambda value: int([]))  # a TypeError of another sort, without the name


def test_an_engine_rejects_wrong_types_by_name(checkpoint: Path, engine: matquant.Engine) -> None:
    assert_rejected("path", lambda value: matquant.Engine(value))
    for name in ("max_bits", "threads", "activations", "check_hashes", "mmap"):
        also = "bits" if name == "max_bits" else ""
        assert_rejected(name, lambda value, name=name: matquant.Engine(checkpoint, **{name: value}), also=also)
    for name in ("bits", "plan"):
        assert_rejected(name, lambda value, name=name: engine.widths(**{name: value}), none=True)
        assert_rejected(name, lambda value, name=name: engine.score("a cat", **{name: value}), none=True)
    assert_rejected("capacity", engine.session, none=True)
    assert_rejected("document", engine.score)


def test_streams_reject_wrong_types_by_name(engine: matquant.Engine) -> None:
    assert_rejected("prompt", engine.stream)
    assert_rejected("prompt", engine.generate)
    sampling = ("temperature", "top_k", "top_p", "min_p", "seed")
    for name in ("max_tokens", "stop", "speculate", *sampling, "bits", "plan", "session"):
        optional = name not in ("max_tokens", "stop", "speculate")
        assert_rejected(name, lambda value, name=name: engine.stream("The cat", **{name: value}), none=optional)
    assert_rejected("temperature", lambda value: Sampling(temperature=value))


def test_sessions_reject_wrong_types_by_name(engine: matquant.Engine) -> None:
    session, widths = engine.session(), engine.widths(8)
    assert_rejected("length", session.rewind)
    assert_rejected("ids", lambda value: session.extend(value, widths))
    for value in (None, [8], 8):
        with pytest.raises(TypeError, match=r"^widths="):
            session.extend([1], value)
    other = matquant.Engine(engine.path, threads=1).session()
    with pytest.raises(TypeError, match="not a session of this engine"):
        engine.stream("The cat", session=other)
    assert session.ids == []
    assert len(session.extend([np.int64(1), 2], widths)) == 300  # numpy's integers are integers


def test_loading_rejects_wrong_types_by_name(checkpoint: Path, tmp_path: Path) -> None:
    assert_rejected("path", matquant.load)
    assert_rejected("bits", lambda value: matquant.load(checkpoint, value))
    assert_rejected("check_hashes", lambda value: matquant.load(checkpoint, 4, check_hashes=value))
    for name, value in (("dtype", "float32"), ("device", 0), ("kernels", 1), ("plan", [4])):
        with pytest.raises(TypeError, match=rf"^{name}="):
            matquant.load(checkpoint, 4, **{name: value})
    model = matquant.load(checkpoint, 4)
    assert_rejected("bits", model.set_bits)
    assert_rejected("overwrite", lambda value: model.save_pretrained(tmp_path / "copy", overwrite=value))
    assert_rejected("directory", model.save_pretrained)
    with pytest.raises(TypeError, match=r"^bits="):
        matquant.evaluate(model, np.arange(200), bits=4)
    with pytest.raises(TypeError, match=r"^stream="):
        matquant.evaluate(model, [1, 2, 3])
    with pytest.raises(TypeError, match=r"^context="):
        matquant.evaluate(model, np.arange(200), context="64")
    assert_rejected("directory", matquant.open_checkpoint)
    assert_rejected("directory", matquant.verify_checkpoint)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("group_size", "64"), ("group_size", 32.0), ("symmetric", "yes"), ("method", 1), ("rule", None)),
        *(("scope", ["ffn"]), ("exclude", "experts"), ("text", "file.txt"), ("weights", "1,2"), ("objective", 8)),
        *(
            ("affine", 1),
            ("zero_point", None),
            ("scale_dtype", 16),
            ("baseline_bits", "4"),
            ("start", 1),
            ("threads", "2"),
        ),
        *(("resume", 1), ("overwrite", "no"), ("steps", "5"), ("lr", "1"), ("steps", 1.5), ("seed", True)),
    ],
)
def test_quantize_rejects_wrong_types_by_name(name: str, value: Any, llama: Path, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=rf"^{name}="):
        conftest.quantize(llama, tmp_path / "out", **{"method": "qat", "text": [llama / "config.json"], name: value})
    assert list(tmp_path.iterdir()) == []
    for model, out, wrong in ((None, tmp_path, "model"), (llama, 5, "out")):
        with pytest.raises(TypeError, match=rf"^{wrong}="):
            conftest.quantize(model, out, method="rtn")


def test_slices_plans_and_specs_reject_wrong_types_by_name() -> None:
    codes = np.zeros(3, np.uint8)
    for call in (matquant.slice_codes, matquant.slice_values):
        assert_rejected("bits", lambda value, call=call: call(codes, value))
        for value in ([1, 2], None, 5):
            with pytest.raises(TypeError, match=r"^codes="):
                call(value, 4)
    assert_rejected("bits", lambda value: matquant.Plan(default=value), none=True)
    assert_rejected("bits", lambda value: matquant.Plan(bits={"a": value}))
    with pytest.raises(TypeError, match=r"^plan="):
        matquant.Plan(bits=[4])
    for name, value in (("widths", "8"), ("group_size", "64"), ("symmetric", 1), ("seed", "0"), ("slices", (2.0,))):
        with pytest.raises(TypeError, match=rf"^{name}="):
            matquant.Spec(**{"rule": "prefix", "widths": (8,), name: value})


def test_fields_are_checked_by_their_annotations() -> None:
    kinds = {"steps": "int", "lr": "float | None", "on": bool, "other": "Mapping[str, int]"}
    check_fields(kinds, {"steps": 1, "lr": None, "on": True, "other": 5, "unknown": 5})
    for values in ({"steps": None}, {"lr": "1"}, {"on": 1}):
        with pytest.raises(TypeError):
            check_fields(kinds, values)
