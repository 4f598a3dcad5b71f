"""Find the source of NaN and infinity: the first tensor or layer of a model that is not finite.

A second pass, with a hook on every module, runs only if a result is not finite.
Hooks run from the inside out, so the first module found is the smallest one whose output is not finite.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from matquant.hf_torch import Model
from matquant.system.errors import InputError


def check_result(value: float, model: Model, ids: torch.Tensor, *, what: str) -> None:
    """Raise InputError naming the width and the layer if ``value``, computed from a model's logits, is not finite.

    what: name of the value, such as "log-perplexity". ids: its token ids [B, T].
    """
    if not math.isfinite(value):
        raise InputError(f"{describe(model)} has {what} {value}: {find_cause(model, ids)}")


@contextlib.contextmanager
def checked_logits(model: Model) -> Iterator[None]:
    """Within this context, raise InputError naming the width and the layer if logits are NaN or +infinity."""

    def check(module: torch.nn.Module, arguments: Any, options: Mapping[str, Any], output: Any) -> None:
        logits = getattr(output, "logits", None)
        ids = arguments[0] if arguments else options.get("input_ids")
        if isinstance(logits, torch.Tensor) and not bool((logits < math.inf).all()):
            hook.remove()
            raise InputError(f"{describe(model)} gives logits that are not finite: {find_cause(model, ids)}")

    hook = model.register_forward_hook(check, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def describe(model: Model) -> str:
    """Return the width and the name of a model: a nested checkpoint at a width or a plan, or a float model."""
    name = model.config.name_or_path
    bits = getattr(model, "bits_by_path", None)
    if not bits:
        return f"the float model {name}"
    widths = sorted(set(bits.values()))
    if len(widths) == 1:
        return f"int{widths[0]} of {name}"
    return f"a plan of {', '.join(f'int{width}' for width in widths)} of {name}"


def find_cause(model: Model, ids: Any) -> str:
    """Return what is not finite in ``model``, and what to do, in words."""
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            path = name.removesuffix(".weight")
            if path in getattr(model, "bits_by_path", {}):
                return f"the weights of {path}{_width(model, path)} are not finite; run matquant verify"
            return f"{name} holds NaN or infinity; repair the float model and quantise it again"
    name = first_bad_module(model, ids)
    if name is None:
        return "no layer is at fault, but a token of the text has probability 0; quantise again, or use other text"
    where = f"the output of {name}{_width(model, name)} is the first that is not finite"
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    if dtype == "float32":
        return f"{where}; use a wider width there, or quantise the model again with calibration text"
    largest = torch.finfo(next(model.parameters()).dtype).max
    wider = "float32 or bfloat16" if dtype == "float16" else "float32"
    return f"{where}, in {dtype} up to {largest:.3g}; convert the float model to {wider} and quantise it again"


def _width(model: Model, name: str) -> str:
    """Return " (int2)" for a layer that has a width, or whose linear layers share one."""
    bits = getattr(model, "bits_by_path", None) or {}
    widths = {width for path, width in bits.items() if path == name or path.startswith(f"{name}.")}
    return f" (int{widths.pop()})" if len(widths) == 1 else ""


@torch.no_grad()
def first_bad_module(model: Model, ids: Any) -> str | None:
    """Return the first module whose output for ``ids`` [B, T] has NaN or infinity, None if all outputs are finite."""
    found: list[str] = []

    def look(name: str) -> Any:
        def hook(module: torch.nn.Module, arguments: Any, output: Any) -> None:
            if not found and any(not bool(torch.isfinite(part).all()) for part in _floats(output)):
                found.append(name)

        return hook

    hooks = [module.register_forward_hook(look(name)) for name, module in model.named_modules()]
    try:
        model(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return (found[0] or "the model") if found else None


def _floats(output: Any) -> Iterator[torch.Tensor]:
    """Yield all floating-point tensors inside the output of a module."""
    if isinstance(output, torch.Tensor):
        if output.is_floating_point():
            yield output
        return
    parts: Iterable[Any] = output.values() if isinstance(output, Mapping) else ()
    for part in output if isinstance(output, tuple | list) else parts:
        yield from _floats(part)
