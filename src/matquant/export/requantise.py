"""Slices of the companded and float grids, fitted again to formats of their width.

Positions on these grids are not evenly spaced, so an integer format of r bits cannot hold an r-bit slice exactly. Here
the slice's weights w are rounded to scale * (u - zero), u in 0..2^r - 1, with the scale of every group fitted by least
squares: the best of CLIPS times the largest weight, then ROUNDS of fitting and rounding. This changes the weights, and
the loss is reported: the squared distance to the slice over the squared slice. 8-bit weights stay as they are, exact.

int4 of the float grid becomes MXFP4 instead: numbers of int4 in blocks of 32 whose scale is a power of two, the best of
the one that OCP's specification gives, its half and its double. In groups of 32 it is MXFP4 already, without a loss.

N out features, K in features, G groups.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from matquant.core.grid import BLOCK, SMALLEST_SCALE, decode, encode
from matquant.core.nest import FLOAT, MASTER_BITS, OWN, UNIFORM, middle, positions
from matquant.core.tensor import NestedTensor
from matquant.export.containers import MXFP4
from matquant.format.read import Checkpoint

CLIPS = (1.0, 0.9, 0.8, 0.7, 0.6)  # scales that are tried, relative to the one that reaches the largest weight
ROUNDS = 2  # of fitting the scale and rounding again


@dataclass(frozen=True, kw_only=True)
class Requantised(Checkpoint):
    """A checkpoint whose slices below 8 bits are evenly spaced; everything else is as in the checkpoint it views."""

    source: Checkpoint  # the checkpoint that it views
    plan: Mapping[str, int]  # path -> bits
    centred: bool  # mid-range zero-points (rule prefix), or the integer above mid-range (rule round)
    scales: dict[str, np.ndarray] = field(default_factory=dict, repr=False, compare=False)  # path -> fitted [N, G]

    def nested(self, path: str, *, mapped: bool = False) -> NestedTensor:
        """Return the weight at ``path`` with the slice of its planned width fitted again."""
        tensor, bits = self.source.nested(path, mapped=mapped), self.plan[path]
        if bits == MASTER_BITS:
            return tensor
        blocked = tensor.grid == FLOAT and bits == MXFP4.bits
        if blocked and tensor.codes.shape[1] % BLOCK:  # rows are no whole blocks
            return tensor
        if path not in self.scales:
            zero = _zero(bits, centred=self.centred)
            self.scales[path] = fit_blocks(tensor.read(4)) if blocked else fit_scale(tensor, bits, zero=zero)
        if blocked:
            return blocks(tensor, self.scales[path])
        return requantise(tensor, bits, self.scales[path], centred=self.centred)

    def loss(self) -> float:
        """Return the squared distance to the slices over the squared slices, all weights together."""
        distance = size = 0.0
        for path, bits in self.plan.items():
            slice_NK = self.source.nested(path, mapped=True).read(bits).astype(np.float64)
            distance_NK = self.nested(path, mapped=True).read(bits) - slice_NK
            distance += float(np.vdot(distance_NK, distance_NK))
            size += float(np.vdot(slice_NK, slice_NK))
        return distance / size if size else 0.0


def view(checkpoint: Checkpoint, plan: Mapping[str, int], *, centred: bool) -> Requantised:
    """Return ``checkpoint`` with the slices of ``plan`` fitted again, on the uniform grid."""
    fields = {field.name: getattr(checkpoint, field.name) for field in dataclasses.fields(checkpoint)}
    rule = "prefix" if centred else "round"
    fields["spec"] = dataclasses.replace(checkpoint.spec, rule=rule, grid=UNIFORM, zeros=OWN)
    return Requantised(**fields, source=checkpoint, plan=plan, centred=centred)


def requantise(tensor: NestedTensor, bits: int, scale_NG: np.ndarray, *, centred: bool) -> NestedTensor:
    """Return the ``bits``-bit slice on evenly spaced codes; only that width of the result is meant to be read."""
    zero_NG = np.full_like(scale_NG, _zero(bits, centred=centred))
    return NestedTensor(
        codes=encode(tensor.read(bits), scale_NG, zero_NG, bits=bits) << (MASTER_BITS - bits),
        scale=tensor.scale,
        zero=tensor.zero,
        rule="prefix" if centred else "round",
        slices={bits: (scale_NG, zero_NG)},
    )


def blocks(tensor: NestedTensor, scale_NB: np.ndarray) -> NestedTensor:
    """Return the 4-bit slice of the float grid as MXFP4 with the scales of ``fit_blocks``, on the float grid."""
    zero_NB = np.full_like(scale_NB, middle(4))
    codes = encode(np.asarray(tensor.read(4)), scale_NB, zero_NB, bits=4, grid=FLOAT) << (MASTER_BITS - 4)
    return dataclasses.replace(tensor, codes=codes, slices={4: (scale_NB, zero_NB)})


def fit_blocks(weight_NK: np.ndarray, tries: Sequence[int] = (0, -1, 1)) -> np.ndarray:
    """Return scales of MXFP4, float32 [N, K/32]: the best of 2^tries times OCP's scale in each block."""
    weight = np.asarray(weight_NK).reshape(len(weight_NK), -1, BLOCK)
    zero = np.full(weight.shape[:2], middle(4), dtype=np.float32)
    exponent = np.floor(np.log2(np.maximum(np.abs(weight).max(-1), SMALLEST_SCALE))) - 2
    best, least = np.zeros_like(zero), np.full(zero.shape, np.inf, dtype=np.float32)
    for more in tries:
        scale = np.exp2(exponent + more).astype(np.float32)
        found = encode(weight_NK, scale, zero, bits=4, grid=FLOAT)
        error = np.square(weight - decode(positions(found, 4, grid=FLOAT), scale, zero).reshape(weight.shape)).sum(-1)
        best, least = np.where(error < least, scale, best), np.minimum(error, least)
    return best


def fit_scale(tensor: NestedTensor, bits: int, *, zero: float) -> np.ndarray:
    """Return float32 scales [N, G] of evenly spaced codes for the ``bits``-bit slice, by least squares."""
    weight_NK = np.asarray(tensor.read(bits))
    zero_NG = np.full_like(tensor.scale, zero)
    grouped = (*tensor.scale.shape, -1)
    weight = weight_NK.reshape(grouped)
    largest = np.abs(weight).max(-1)
    reach = np.where(largest > 0, largest, np.float32(1)) / np.float32(max(zero, 2**bits - 1 - zero))
    best, least = reach, np.full(reach.shape, np.inf, dtype=np.float32)
    for clip in CLIPS:
        scale = reach * np.float32(clip)
        for _ in range(ROUNDS):
            centred = encode(weight_NK, scale, zero_NG, bits=bits).reshape(grouped) - zero_NG[..., None]
            norm = np.square(centred).sum(-1)
            fitted = (weight * centred).sum(-1) / np.where(norm > 0, norm, np.float32(1))
            scale = np.where((norm > 0) & (fitted > 0), fitted, scale)
        read_NK = decode(encode(weight_NK, scale, zero_NG, bits=bits), scale, zero_NG)
        error = np.square(weight - read_NK.reshape(grouped)).sum(-1)
        best, least = np.where(error < least, scale, best), np.minimum(error, least)
    return best.astype(np.float32)


def _zero(bits: int, *, centred: bool) -> float:
    return middle(bits) if centred else 2.0 ** (bits - 1)
