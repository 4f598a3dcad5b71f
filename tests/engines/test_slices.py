"""Every slice in MLX, stock transformers and GPTQModel: the weights they compute with, what they write, how well.

Beside each is our own slice: the dense export of the same widths, in the transformers of this environment and in the
dtype that the engine computes in.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import matquant
from engines.conftest import WIDTHS, Run, Subject, spread, work
from exports import nested_checkpoint, sliced
from matquant.core.nest import slice_codes
from matquant.export import export
from matquant.export.containers import EXACT, MIDRANGE, read_affine
from matquant.format.read import open_checkpoint
from matquant.system.errors import InputError

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]


@dataclass(frozen=True)
class Route:
    """A format in an engine. zero_point: how slices of rule ``prefix`` are exported. dtype: what it computes in.

    apart: how far log-perplexity may be from ours, relative.
    """

    engine: str
    zero_point: str
    dtype: torch.dtype
    apart: float


ROUTES = {
    "mlx": Route("mlx", EXACT, torch.float32, 1e-4),  # before the first product, activations are still bfloat16
    "compressed-tensors": Route("compressed_tensors", MIDRANGE, torch.float32, 1e-6),
    "gptq": Route("gptqmodel", MIDRANGE, torch.bfloat16, 1e-5),
    "gptq_v2": Route("gptqmodel", MIDRANGE, torch.bfloat16, 1e-5),
}
FAMILIES = {
    "mlx": ("mistral", "qwen2", "qwen3", "gemma2"),
    "gptq": ("mistral", "qwen2", "qwen3", "gemma2"),
    "compressed-tensors": ("gemma2", "phi3", "opt"),
}


def assert_same_weights(found: np.ndarray, subject: Subject, path: str, bits: int, route: Route) -> None:
    """Equal to the slice: bit for bit, or but for one rounding of the minimum where the format stores one."""
    tensor = subject.checkpoint.nested(path)
    scale, zero = (
        part[..., None].astype(np.float64) for part in read_affine(tensor, bits, zero_point=route.zero_point)
    )
    code = slice_codes(tensor.codes, bits, rule=tensor.rule).astype(np.float64)
    grouped = code.reshape(len(code), scale.shape[1], -1)
    expected = (scale * (grouped - zero)).reshape(code.shape)
    if route.engine == "mlx":
        largest = (scale * np.maximum(grouped, zero)).reshape(code.shape)
        assert np.all(np.abs(found - expected) <= 2**-23 * largest), path
    else:
        np.testing.assert_array_equal(found, torch.from_numpy(expected).to(route.dtype).double().numpy(), err_msg=path)


def assert_same_text(found: list[int], ours: Mapping[str, Any], route: Route) -> None:
    """The same tokens, up to a place where two are equally likely to us, in the numbers the engine computes with."""
    pairs = enumerate(zip(found, ours["tokens"], strict=True))
    first = next(((place, theirs, mine) for place, (theirs, mine) in pairs if theirs != mine), None)
    if first is not None:
        place, theirs, mine = first
        logits = ours["logits"][place]
        unit = 8 * torch.finfo(route.dtype).eps * float(logits.abs().max())
        assert float(logits[mine] - logits[theirs]) <= unit, f"token {place}: {theirs} for {mine}"


def check(
    to: str, names: tuple[str, ...], subject: Subject, run: Run, folder: Path, keep: Callable[..., None] | None = None
) -> None:
    """Export, run, and compare weights, greedy text and log-perplexity with our own slice."""
    route = ROUTES[to]
    made = {name: subject.export(name, folder / f"{to}-{name}", to=to, zero_point=route.zero_point) for name in names}
    found = run(route.engine, subject, {name: folder / f"{to}-{name}" for name in names})
    for name, result in found.items():
        for path, bits in subject.bits(name).items():
            assert_same_weights(result["weights"][path], subject, path, bits, route)
            with pytest.raises(AssertionError):
                assert_same_weights(result["weights"][path], subject, path, bits - 1, route)
        subject.export(
            name, folder / f"dense-{name}", to="dense", zero_point=route.zero_point, dtype="float32", overwrite=True
        )
        ours = subject.ours(folder / f"dense-{name}", route.dtype)
        if keep is not None:
            keep(**record(to, subject, name, made[name], result, ours, route))
        assert_same_text(result["tokens"], ours, route)
        assert result["log_perplexity"] == pytest.approx(ours["log_perplexity"], rel=route.apart), name


def record(
    to: str,
    subject: Subject,
    name: str,
    made: Mapping[str, Any],
    result: Mapping[str, Any],
    ours: Mapping[str, Any],
    route: Route,
) -> dict[str, Any]:
    """One line of the table in docs/engines.md."""
    return {
        "format": to,
        "model": subject.name,
        "slice": name,
        "zero_point": route.zero_point,
        "dtype": str(route.dtype).removeprefix("torch."),
        "containers": made["containers"],
        "bits_per_weight": made["bits_per_weight"],
        "log_perplexity": result["log_perplexity"],
        "ours": ours["log_perplexity"],
        "same_text": result["tokens"] == ours["tokens"],
    }


@pytest.mark.parametrize("to", ROUTES)
def test_every_slice_of_a_real_model(
    to: str, subject: Subject, run: Run, keep: Callable[..., None], tmp_path: Path
) -> None:
    check(to, (*WIDTHS, "plan"), subject, run, tmp_path, keep)


@pytest.mark.parametrize("to", [to for to, route in ROUTES.items() if route.zero_point == MIDRANGE])
def test_zeros_between_integers_are_refused(to: str, subject: Subject, tmp_path: Path) -> None:
    for name in ("6", "4", "3", "2", "plan"):
        with pytest.raises(
            InputError, match=r"is not a multiple of 1/2.*--zero-point midrange, which moves the slice's zero-points"
        ):
            subject.export(name, tmp_path / "out", to=to)
    subject.export("8", tmp_path / "out", to=to)


@pytest.mark.parametrize(("to", "family"), [(to, family) for to, found in FAMILIES.items() for family in found])
def test_every_family(to: str, family: str, family_model: Callable[[str], Path], run: Run, tmp_path: Path) -> None:
    matquant.quantize(family_model(family), tmp_path / "in", method="rtn", scope="linears")
    subject = Subject(
        name=family,
        directory=tmp_path / "in",
        plan=spread(open_checkpoint(tmp_path / "in").shapes),
        prompt=[5, 6, 7],
        windows=np.random.default_rng(0).integers(0, 256, (4, 33)),
    )
    check(to, ("4", "plan"), subject, run, tmp_path)


@pytest.mark.parametrize("rule", ["prefix", "round", "extra"])
def test_every_width_and_block_of_mlx(rule: str, tmp_path: Path) -> None:
    """Against mlx.core.dequantize, in every dtype of scales, for every code."""
    shapes = {"model.x128": (4, 256), "model.x64": (4, 192), "model.x32": (4, 96)}
    source = nested_checkpoint(tmp_path / "in", shapes, rule=rule)
    checkpoint, exports = open_checkpoint(source), {}
    for bits in range(1, 9):
        for dtype in ("float32", "float16", "bfloat16"):
            exports[f"{bits}-{dtype}"] = str(tmp_path / f"{bits}-{dtype}")
            export(source, exports[f"{bits}-{dtype}"], to="mlx", bits=bits, dtype=dtype)
    for name, result in work("mlx", "mlx_blocks_worker.py", tmp_path, {"exports": exports}).items():
        bits, dtype = name.split("-")
        for path in shapes:
            weight = sliced(checkpoint, path, int(bits))
            largest = np.abs(weight).max(axis=1, keepdims=True) + np.ptp(weight, axis=1, keepdims=True)
            # of a scale or bias, a product and a sum in that type
            unit = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype]
            assert np.all(np.abs(result["weights"][path] - weight) <= 2 * unit * largest), (name, path)
            if dtype == "float32":
                other = sliced(checkpoint, path, int(bits) - 1 or 2)
                assert not np.all(np.abs(result["weights"][path] - other) <= 2 * unit * largest), (name, path)
