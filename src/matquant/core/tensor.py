"""One nested weight matrix: codes, their grid, and per-width scales and zero-points.

Shapes: N out features, K in features, G groups.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from array_api_compat import array_namespace

from matquant.core.grid import decode
from matquant.core.nest import MASTER_BITS, UNIFORM, slice_affine, slice_codes, slice_positions

Affine = tuple[Any, Any]  # scale [N, G] and zero [N, G], in units of the code they belong to


@dataclass(frozen=True, kw_only=True)
class NestedTensor:
    """A weight matrix stored once and read at any width.

    codes: uint8 [N, K]; scale, zero: float32 [N, G] of the 8-bit grid, w = scale * (position - zero). The position of a
    code is the code itself unless ``grid`` says otherwise (nest.py).
    slices: width -> (scale_r, zero_r) in units of the r-bit code, for widths with a per-width scale and zero-point.
    Arrays are all numpy or all torch.
    """

    codes: Any
    scale: Any
    zero: Any
    rule: str
    slices: Mapping[int, Affine] = field(default_factory=dict)
    grid: str = UNIFORM

    def affine(self, bits: int) -> Affine:
        """Return (scale_r, zero_r) of the ``bits``-bit slice: per-width, or as it follows from the 8-bit grid."""
        if bits in self.slices:
            return self.slices[bits]
        return slice_affine(self.scale, self.zero, bits, rule=self.rule, grid=self.grid)

    def read(self, bits: int = MASTER_BITS) -> Any:
        """Return the ``bits``-bit weights, float32 [N, K]: scale_r * (slice_positions(codes) - zero_r)."""
        return decode(self.positions(bits), *self.affine(bits))

    def positions(self, bits: int) -> Any:
        """Return positions of the ``bits``-bit slice, float32 [N, K], in units of the r-bit code."""
        return slice_positions(self.codes, bits, rule=self.rule, grid=self.grid)

    def overflow(self, bits: int) -> float:
        """Return the fraction of weights in the extra bucket 2^r of rule ``extra`` (0.0 for the other rules)."""
        xp = array_namespace(self.codes)
        over = slice_codes(self.codes, bits, rule=self.rule) >> bits
        return float(xp.mean(xp.astype(over, xp.float32))) if bits < MASTER_BITS else 0.0
