"""Preview a run: its settings, the reason for each derived one, and an estimate of time and memory.

The estimate counts multiplications and divides by this machine's speed, which is measured for a moment. Its factors
were fitted to runs on two cores (docs/choose-a-recipe.md) and are within a factor of two on the models of that page. It
is only meant to tell minutes from hours; the progress line has a better estimate.
"""

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from matquant.hf.gguf import as_directory, quantised_notice
from matquant.hf_torch.layers import decoder_layers
from matquant.hf_torch.views import View
from matquant.methods.parts.ends import head_path
from matquant.methods.parts.share import SOLVING_BYTES, most_weights
from matquant.methods.prepare import Prepared, prepare
from matquant.options import METHODS
from matquant.options.declare import options_of
from matquant.options.distill import LR, stages
from matquant.options.recipes import RECIPES, WIDTHS
from matquant.options.request import Request

ENCODE_S = 2e-7  # seconds to round one weight
SEARCH_S = 1e-6  # seconds to choose one nested code by GPTQ, including one sweep
PASSES = 6  # multiply-adds of a GPTQ pass per weight and token: two forward passes and the Hessian, each 2 FLOP
STEP = 6  # FLOP of a training step per weight and token, forward and backward
PYTHON_BYTES = 400e6  # memory of the process with torch, before any model


def preview(model: Path | str, request: Request) -> list[str]:
    """Return the lines of ``--dry-run``, from names and shapes only."""
    notice = quantised_notice(model)
    with as_directory(model, with_numbers=False) as directory:
        lines = describe(prepare(directory, request, with_numbers=False))
    return [*lines, f"note: {notice}"] if notice else lines


def describe(prepared: Prepared) -> list[str]:
    """Return the lines that are printed before a run starts."""
    request = prepared.request
    choice, common = request.choice, request.common
    lines = []
    if choice.recipe is not None:
        recipe = RECIPES[choice.recipe]
        lines.append(f"recipe       {choice.recipe}: {recipe.why}")
        widths = ", ".join(f"int{bits} {value}" for bits, value in zip(WIDTHS, recipe.perplexity, strict=True))
        lines.append(f"measured     SmolLM2-135M in {recipe.cost} on one core: perplexity {widths}; float 29.37")
    lines.append(f"method       {choice.method}: {request.method.summary}")
    lines.append(
        f"layers       {len(prepared.views)} (--scope {common.scope}), {_weights(prepared) / 1e6:,.1f} million weights"
        f"{_ends(prepared)}"
    )
    size = "one group per row" if prepared.group_size is None else str(prepared.group_size)
    lines.append(f"group size   {size}{_because(prepared, 'group_size')}")
    zero_point = "" if request.affine == "none" else f", zero-points of int2 to int5 {common.zero_point}"
    lines.append(f"grid         {common.grid}, rule {common.rule}{zero_point}")
    if request.widths:
        lines.append(f"objective    {request.objective}")
    lines += _settings(prepared)
    if request.documents:
        source = (
            f"{len(common.text)} file(s)"
            if common.text
            else "the text that comes with matquant; use --text FILE for your own"
        )
        lines.append(f"text         {source}")
    memory = f"{memory_bytes(prepared) / 1e9:.1f} GB of memory"
    lines.append(f"estimate     {in_words(seconds(prepared))} on this machine, {memory}")
    return lines


def _ends(prepared: Prepared) -> str:
    """Return what else is quantised, in words."""
    if not prepared.ends:
        return ""
    count = _count(prepared.ends)
    names = " and ".join(path.rpartition(".")[2] for path in prepared.ends)
    return f"; {names} with {count / 1e6:,.1f} million at int{prepared.request.common.head_bits} or wider"


def _because(prepared: Prepared, name: str) -> str:
    return f" ({prepared.reasons[name]})" if name in prepared.reasons else ""


def _settings(prepared: Prepared) -> Iterator[str]:
    """Yield the options of the method that differ from its defaults."""
    known = options_of(prepared.request.method.settings)
    for name, value in prepared.options.items():
        if value != known[name].default or name in prepared.reasons:
            yield f"{known[name].flags.split('/')[0]:<12} {value}{_because(prepared, name)}"


def seconds(prepared: Prepared) -> float:
    """Return an estimate of the time of a run on this machine, in seconds."""
    speed = measured_flops()
    if prepared.request.method.stages is None:
        return _method_seconds(prepared, prepared.request.choice.method, prepared.settings, speed)
    total = 0.0
    for stage in stages(prepared.request.choice.options, default_lr=LR):
        options = {name: value for name, value in stage.items() if name not in ("method", "objective", "weights")}
        record = METHODS[stage["method"]].settings
        total += _method_seconds(prepared, stage["method"], record(**options), speed)
    return total


def _method_seconds(prepared: Prepared, method: str, settings: Any, speed: float) -> float:
    weights, ends = float(_weights(prepared)), float(_count(prepared.ends))
    widths = len(prepared.request.widths) or 5
    if settings is None:
        return ENCODE_S * (weights + ends)
    batch = float(settings.batch_size * settings.seq_len)
    if method == "gptq":
        search = SEARCH_S * (weights + _head(prepared)) * (1 + settings.sweeps) / 2
        tuning = settings.tune * widths * STEP * weights * batch / speed
        return float(search + PASSES * weights * settings.samples * settings.seq_len / speed + tuning)
    if method == "omniquant":
        return float(settings.steps) * widths * STEP * weights * batch / speed
    parameters = _parameters(prepared)
    return float(settings.steps * settings.accumulate * (widths * STEP + 2) * parameters * batch / speed)


def memory_bytes(prepared: Prepared) -> float:
    """Return an estimate of the peak resident memory of a run, in bytes."""
    config = prepared.shards.model.config.get_text_config()
    parameters = _parameters(prepared)
    layer = parameters / max(1, len(decoder_layers(prepared.shards.model)))
    settings = prepared.settings
    if settings is None:
        return PYTHON_BYTES + 4 * parameters
    stream = float(getattr(settings, "samples", 0) * settings.seq_len * config.hidden_size * 4)
    if prepared.request.choice.method == "gptq":
        streams = 1 if not settings.tune else 2 + len(prepared.request.widths)
        head = _head(prepared)
        solving = 4 * layer * (12 if settings.tune else 6)
        at_once = min(head, most_weights(prepared.device, head=True))
        return PYTHON_BYTES + max(solving, 6 * head + SOLVING_BYTES * at_once) + streams * stream
    if prepared.request.choice.method == "omniquant":
        return PYTHON_BYTES + 4 * layer * 6 + (2 + len(prepared.request.widths)) * stream
    masters = 5 if getattr(settings, "masters", "each") == "each" else 1
    logits = float(settings.batch_size * settings.seq_len * config.vocab_size * 4)
    return PYTHON_BYTES + 4 * parameters * (3 + 3 * masters) + 6 * logits


def in_words(value_s: float) -> str:
    """Return a rough time, such as "about 40 seconds", "about 25 minutes" or "about 7 hours"."""
    if value_s < 90:
        return f"about {max(5, round(value_s / 5) * 5)} seconds"
    if value_s < 5400:
        return f"about {round(value_s / 60)} minutes"
    return f"about {round(value_s / 3600)} hours"


def _weights(prepared: Prepared) -> int:
    return _count(prepared.views)


def _head(prepared: Prepared) -> int:
    """Return the weights of the head that gptq solves, 0 if it stays float."""
    path = head_path(prepared.shards.model, prepared.ends)
    return 0 if path is None else _count({path: prepared.ends[path]})


def _count(views: Mapping[str, View]) -> int:
    return sum(rows * columns for rows, columns in (view.shape for view in views.values()))


def _parameters(prepared: Prepared) -> int:
    return sum(parameter.numel() for parameter in prepared.shards.model.parameters())


def measured_flops() -> float:
    """Return float32 FLOP/s of a large product on this machine, measured for a tenth of a second."""
    left, right = torch.ones(512, 1024), torch.ones(1024, 1024)
    torch.mm(left, right)
    began, rounds = time.perf_counter(), 0
    while time.perf_counter() - began < 0.1:
        torch.mm(left, right)
        rounds += 1
    return 2 * 512 * 1024 * 1024 * rounds / (time.perf_counter() - began)
