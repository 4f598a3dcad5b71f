"""Equivalent transformations of a decoder layer, which do not change its function (MatQuant Eq. 4, OmniQuant's LET).

If a source (a norm or a linear layer) feeds only linear layers, each of its output channels may be shifted and divided,
and the linear layers after it undo that:

    x' = (x - delta) / s        source: weight' = weight / s, bias' = (bias - delta) / s   (rows, for a linear layer)
    W' = W * s  (columns),      bias' = bias + W @ delta                                   of each linear it feeds

In float nothing changes. After quantisation the result differs: columns with large activations get finer steps. The
transformation is folded into tensors that the checkpoint holds anyway, so serving needs no extra work. Eq. 4 needs a
bias wherever it shifts; we shift only where source and consumers have one (OPT, GPT-NeoX), so that the architecture
stays unchanged.

Norms and biases are stored in the model's dtype. A folded norm is rounded to it *before* its linear layers are
multiplied by s = weight / weight', so that this rounding is undone as well.

The rows of each family are data (hf/families.py). A row applies if all its linear layers are quantised; other rows,
such as one norm before experts and a float router, are skipped. ``bind`` tries each row on the real layer and drops
rows that change its output, so that an unforeseen variant of a family costs accuracy, never correctness.

Shapes: N out features, K in features, C channels of an equivalence.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from matquant.hf.families import supported
from matquant.methods.parts.clip import straight_through

LARGEST_SCALE = 1e3
TOLERANCE = 1e-3  # mean change relative to the layer's update: far above float32 rounding, far below a wrong row


# (config, source rows N, consumer columns K) -> source row of each channel [C], channel of each consumer column [K]
Layout = Callable[[Any, int, int], tuple[torch.Tensor, torch.Tensor]]


def _each(config: Any, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(rows), torch.arange(columns)


def _last(config: Any, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(rows - columns, rows), torch.arange(columns)


def _value_last(config: Any, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Lay out grouped-query attention: the query heads of a value head share its channels."""
    heads = config.num_attention_heads
    value_heads = getattr(config, "num_key_value_heads", None) or heads
    size = columns // heads
    channels = torch.arange(value_heads * size).view(value_heads, 1, size)
    return (
        torch.arange(rows - value_heads * size, rows),
        channels.expand(-1, heads // value_heads, -1).reshape(-1).contiguous(),
    )


def _value_per_head(config: Any, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Lay out rows [head, (query, key, value), channel]."""
    return torch.arange(rows).view(config.num_attention_heads, 3, -1)[:, 2].reshape(-1), torch.arange(columns)


LAYOUTS: Mapping[str, Layout] = {
    "each": _each,
    "last": _last,
    "value": _value_last,
    "value last": _value_last,
    "value per head": _value_per_head,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bound:
    """An equivalence found in one layer; names are full module names."""

    source: str  # the norm or linear layer that is divided
    consumers: tuple[str, ...]  # the linear layers it feeds
    linear: bool  # the source is a linear layer
    one_plus: bool  # the norm multiplies by 1 + weight
    shift: bool  # delta is learned too
    rows: torch.Tensor  # source row of each channel [C]
    columns: torch.Tensor  # channel of each consumer column [K]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transform:
    """The learned tensors of one equivalence, [C]."""

    log_scale: torch.Tensor  # s = exp(log_scale)
    shift: torch.Tensor | None  # delta = shift * unit; None: no delta
    unit: torch.Tensor  # typical size of the channel's activations; not learned


def candidates(name: str, tensors: Mapping[str, torch.Tensor], *, config: Any, quantised: set[str]) -> list[Bound]:
    """Return the rows of the family's table that apply to the layer ``name`` and whose linear layers are all quantised.

    tensors: the layer's parameters by full name. quantised: full parameter names that become codes.
    """
    found = []
    for row in supported("equivalences").get(config.model_type, ()):
        if row.needs is not None and getattr(config, row.needs[0]) != row.needs[1]:
            continue
        source, consumers = f"{name}.{row.source}", tuple(f"{name}.{consumer}" for consumer in row.consumers)
        if f"{source}.weight" not in tensors or not all(f"{path}.weight" in quantised for path in consumers):
            continue
        weight = tensors[f"{source}.weight"]
        if weight.ndim == 2 and f"{source}.weight" not in quantised:
            continue
        columns_count = tensors[f"{consumers[0]}.weight"].shape[1]
        rows, columns = LAYOUTS[row.layout](config, weight.shape[0], columns_count)
        found.append(
            Bound(
                source=source,
                consumers=consumers,
                linear=weight.ndim == 2,
                one_plus=row.one_plus,
                shift=row.shift and all(f"{path}.bias" in tensors for path in (source, *consumers)),
                rows=rows.to(weight.device),
                columns=columns.to(weight.device),
            )
        )
    return found


def bind(
    name: str,
    tensors: Mapping[str, torch.Tensor],
    *,
    config: Any,
    quantised: set[str],
    run: Callable[[Mapping[str, torch.Tensor]], torch.Tensor],
) -> tuple[tuple[Bound, ...], str]:
    """Return the equivalences that hold in a layer, and a notice ("" for none) if some of the table's do not.

    run: parameters by full name -> the layer's output minus its input. Each row is tried with random s and delta on the
    float weights and dropped if that result changes by more than TOLERANCE.
    """
    known = supported("equivalences")
    if config.model_type not in known:
        return (
            (),
            f"{config.model_type} has no equivalent transformations, "
            f"only clipping is learned (known: {', '.join(known)})",
        )
    rows = candidates(name, tensors, config=config, quantised=quantised)
    generator = torch.Generator().manual_seed(0)
    expected = run(tensors)
    kept: list[Bound] = []
    dropped: list[Bound] = []
    for row in rows:
        trial = fold([row], [_random(row, tensors, generator)], tensors, dtypes={})
        gap = (run({**tensors, **trial}) - expected).abs().mean() / expected.abs().mean()
        (kept if gap <= TOLERANCE else dropped).append(row)
    if dropped:
        names = ", ".join(row.source for row in dropped)
        return tuple(
            kept
        ), f"the equivalent transformations of {names} do not hold for this {config.model_type} model and are skipped"
    return tuple(kept), ""


def start(row: Bound, tensors: Mapping[str, torch.Tensor]) -> Transform:
    """Return an equivalence before training: s = 1, delta = 0.

    SmoothQuant's start from max|x| and max|W| gained nothing (docs/log.md). unit is the typical size of the channel's
    activations: the norm's weight, or the norm of the linear layer's row.
    """
    weight = tensors[f"{row.source}.weight"]
    unit = weight.norm(dim=1)[row.rows] if row.linear else (weight + 1.0 if row.one_plus else weight).abs()
    return Transform(log_scale=torch.zeros_like(unit), shift=torch.zeros_like(unit) if row.shift else None, unit=unit)


def keep_in_range(transform: Transform) -> None:
    """Clamp s to 1/LARGEST_SCALE..LARGEST_SCALE after an optimiser step, in place."""
    with torch.no_grad():
        transform.log_scale.clamp_(-math.log(LARGEST_SCALE), math.log(LARGEST_SCALE))


def fold(
    rows: Sequence[Bound],
    transforms: Sequence[Transform],
    tensors: Mapping[str, torch.Tensor],
    *,
    dtypes: Mapping[str, torch.dtype],
) -> dict[str, torch.Tensor]:
    """Return the parameters that the transforms change, by full name (Eq. 4), differentiable in s and delta.

    tensors: the layer's float32 parameters. Norms and biases are rounded to their entry in ``dtypes`` (returned as
    float32, gradient straight through; names without an entry are not rounded), linear weights are not. s = 1 and delta
    = 0 return the same numbers bit for bit.
    """
    changed = dict(tensors)
    for row, transform in zip(rows, transforms, strict=True):
        scale, shift = transform.log_scale.exp(), None if transform.shift is None else transform.shift * transform.unit
        if row.linear:
            _divide_rows(row, scale, changed)
        else:
            scale = _divide_norm(row, scale, changed, dtypes)
        if shift is not None:
            shift = _shift_bias(row, scale, shift, changed, dtypes)
        scale_K = scale[row.columns]
        for consumer in row.consumers:
            weight = changed[f"{consumer}.weight"]
            if shift is not None:
                changed[f"{consumer}.bias"] = changed[f"{consumer}.bias"] + weight @ shift[row.columns]
            changed[f"{consumer}.weight"] = weight * scale_K
    return {
        name: tensor if tensor.ndim > 1 else _round(tensor, dtypes.get(name))
        for name, tensor in changed.items()
        if tensor is not tensors[name]
    }


def _divide_rows(row: Bound, scale: torch.Tensor, changed: dict[str, torch.Tensor]) -> None:
    weight = changed[f"{row.source}.weight"]
    scale_N = torch.ones_like(weight[:, 0]).index_copy(0, row.rows, scale)
    changed[f"{row.source}.weight"] = weight / scale_N[:, None]
    if f"{row.source}.bias" in changed:
        changed[f"{row.source}.bias"] = changed[f"{row.source}.bias"] / scale_N


def _divide_norm(
    row: Bound, scale: torch.Tensor, changed: dict[str, torch.Tensor], dtypes: Mapping[str, torch.dtype]
) -> torch.Tensor:
    """Divide a norm; return the effective s after rounding the norm."""
    weight, one = changed[f"{row.source}.weight"], 1.0 if row.one_plus else 0.0
    divided = weight / scale + (one / scale - one)
    rounded = _round(divided, dtypes.get(f"{row.source}.weight"))
    changed[f"{row.source}.weight"] = rounded
    before, after = (weight + one).detach(), (rounded + one).detach()
    real = torch.where((before != 0) & (after != 0), before / after, scale.detach())
    if f"{row.source}.bias" in changed:
        changed[f"{row.source}.bias"] = changed[f"{row.source}.bias"] / straight_through(real, scale)
    return straight_through(real, scale)


def _shift_bias(
    row: Bound,
    scale: torch.Tensor,
    shift: torch.Tensor,
    changed: dict[str, torch.Tensor],
    dtypes: Mapping[str, torch.dtype],
) -> torch.Tensor:
    """Shift a bias that is already divided by s; return the effective delta after rounding the bias."""
    name = f"{row.source}.bias"
    divided = changed[name][row.rows]
    rounded = _round(divided - shift / scale, dtypes.get(name))
    changed[name] = changed[name].index_copy(0, row.rows, rounded)
    return straight_through((divided - rounded) * scale, shift)


def _round(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    return tensor if dtype is None else straight_through(tensor.detach().to(dtype).float(), tensor)


def _random(row: Bound, tensors: Mapping[str, torch.Tensor], generator: torch.Generator) -> Transform:
    empty = start(row, tensors)
    log_scale, shift = torch.randn(2, len(empty.unit), generator=generator).to(empty.unit.device)
    return dataclasses.replace(empty, log_scale=0.5 * log_scale, shift=None if empty.shift is None else 0.5 * shift)
