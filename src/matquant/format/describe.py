"""Describe a checkpoint in plain words, for the report and for model cards."""

import math
import re

from matquant.format.read import Checkpoint
from matquant.format.sizes import plain_bytes

ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}
UNITS = ("bytes", "kB", "MB", "GB", "TB")
SCOPES = {
    "all": "linear layers, embedding and head",
    "linears": "linear layers",
    "ffn": "linear layers of the feed-forward blocks",
    "attention": "linear layers of attention",
}


def size(count: float) -> str:
    """Format bytes for people: three digits and a decimal unit."""
    power = min(int(math.log10(max(count, 1)) // 3), len(UNITS) - 1)
    return f"{count:,.0f} bytes" if power == 0 else f"{count / 1000**power:.3g} {UNITS[power]}"


def parameters(checkpoint: Checkpoint) -> int:
    """Return the number of the model's parameters; a tied embedding and head count once."""
    return sum(math.prod(shape) for shape in checkpoint.weight_shapes().values())


def count_words(count: int) -> str:
    """Format a number of parameters for people: 135 million."""
    for unit, name in ((10**9, "billion"), (10**6, "million")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count:,}"


def float_dtype(checkpoint: Checkpoint) -> str | None:
    """Return the float model's dtype, such as "bfloat16"; None if its configuration names none that we know."""
    dtype = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    return dtype if isinstance(dtype, str) and dtype in ITEM_BYTES else None


def float_bytes(checkpoint: Checkpoint) -> int | None:
    """Return the bytes of the float model's weights in its dtype; None if the dtype is not known."""
    dtype = float_dtype(checkpoint)
    if dtype is None:
        return None
    return ITEM_BYTES[dtype] * sum(n * k for n, k in checkpoint.shapes.values()) + plain_bytes(checkpoint)


def model_words(checkpoint: Checkpoint) -> str:
    """Return what the model is: "Language model with 135 million parameters (Llama)"."""
    architectures = checkpoint.config.get("architectures")
    name = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    family = re.sub(r"(For[A-Z]\w*|LMHeadModel|Model)$", "", name)
    words = f"Language model with {count_words(parameters(checkpoint))} parameters"
    return f"{words} ({family})" if family else words


def scope_words(checkpoint: Checkpoint) -> str:
    """Return which weights are quantised; before embedding and head could be, "all" meant all linear layers."""
    scope = checkpoint.spec.scope
    return SCOPES["linears"] if scope == "all" and not checkpoint.ends else SCOPES.get(scope, scope)


def ends_words(checkpoint: Checkpoint) -> str:
    """Return at which width embedding and head are read."""
    least = checkpoint.spec.head_bits or 1
    if not checkpoint.ends:
        return "not quantised"
    return "quantised, read at the width of the row" if least == 1 else f"quantised, read at int{least} or wider"


def plain(text: str) -> str:
    """Return text for Markdown on one line: what Markdown or HTML would interpret is escaped."""
    return re.sub(r"([\\`*_{}\[\]<>#|&~])", r"\\\1", " ".join(text.split()))
