"""Bit planes of a nested weight in the order that GPU kernels load them. Plain torch, on any device.

The top bits of the codes [N, K] are five planes of 2, 1, 1, 2 and 2 bits in one buffer, most significant first, so a
width reads a prefix of the buffer. N is padded to a multiple of ROWS, K to one of INPUTS, with codes 0:

    planes 0, 3, 4   [N / 64][K / 128][64][32] bytes    byte b of 128 inputs: inputs b, 32 + b, 64 + b, 96 + b,
                                                        at bits 7:6, 5:4, 3:2, 1:0
    planes 1, 2      [N / 64][K / 256][64][32] bytes    the same inputs of two blocks of 128, at the bits PLACES

The 32 bytes of a row are two loads of 16, and 64 rows x K inputs are one contiguous run. Inputs 32 i + b of a block
share a place, so a mask over the bytes is an operand of a matrix product with 32 consecutive inputs. The bits of planes
0, 1 and 2 meet in nibbles after one shift each (gpu_kernels.py). ``round`` and ``extra`` need a bit more than a width
has, so weights with these rules stay dense.

Shapes: N out features, K in features, G groups, A tables of scales and zero-points (of the 8-bit grid, and per width).
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import torch

from matquant.core.grid import decode
from matquant.core.nest import (
    MASTER_BITS,
    RESIDENT_BITS,
    UNIFORM,
    bin_centre,
    bits_read,
    integer_positions,
    slice_positions,
    why_no_kernels,
)
from matquant.core.tensor import Affine, NestedTensor
from matquant.system.errors import InputError

ROWS, BLOCK, INPUTS, PLACE_INPUTS = 64, 128, 256, 32
# Plane -> bit of the code, and the bits of a byte for both blocks of 128 inputs, by place of 32 inputs.
PLACES: Mapping[int, tuple[int, tuple[tuple[int, ...], tuple[int, ...]]]] = {
    1: (5, ((5, 4, 1, 0), (7, 6, 3, 2))),
    2: (4, ((4, 5, 0, 1), (6, 7, 2, 3))),
}
PAIRS: Mapping[int, int] = {0: 6, 3: 2, 4: 0}  # plane -> lowest bit of its pairs in the code
TABLE, STEP, CENTRE, FACTOR, INVERSE, MIDDLE = range(6)  # columns of ``widths``


@dataclass(frozen=True, kw_only=True)
class Resident:
    """A nested weight on a device: planes, and the scales and zero-points of every width."""

    planes: torch.Tensor  # uint8 [bytes], by ``pack``
    affine: torch.Tensor  # int32 [A, G, N'], zero-points in float16 below scales in bfloat16; or float32 [A, G, 2, N']
    widths: torch.Tensor  # float32 [9, 6]: by width, its table and how to use it (``width_rows``)
    bits: torch.Tensor  # int32 [1] or [N' / 64]: the width of all rows, or of each 64; kernels read it when they run
    rows: int  # N; N' is N padded
    columns: int  # K
    group: int  # inputs that share a scale; K for per-channel
    grid: str

    @property
    def bytes(self) -> int:
        """Return the bytes of memory on the device, padding included."""
        parts = (self.planes, self.affine, self.widths, self.bits)
        return sum(part.numel() * part.element_size() for part in parts)


def why_not(*, rule: str, grid: str, group: int, columns: int) -> str | None:
    """Return why planes cannot hold such a weight, as half a sentence; None if they can."""
    if rule != "prefix":
        return f"rule {rule!r} rounds, which needs a bit more than a width has; GPU planes are read by 'prefix'"
    if group != columns and group % PLACE_INPUTS:
        return f"GPU planes take groups of a multiple of {PLACE_INPUTS} inputs, found {group}"
    return why_no_kernels(grid)


def load_resident(tensor: NestedTensor, *, device: torch.device | str = "cpu", max_bits: int = MASTER_BITS) -> Resident:
    """Put a nested tensor (numpy or torch) on ``device``, at ``max_bits`` bits and switchable to any fewer.

    Raises InputError for a weight that planes cannot hold (``why_not``).
    """
    columns, groups = tensor.codes.shape[-1], tensor.scale.shape[-1]
    obstacle = why_not(rule=tensor.rule, grid=tensor.grid, group=columns // groups, columns=columns)
    if obstacle is not None:
        raise InputError(f"{obstacle}; use dense weights")
    codes = tensor.codes if isinstance(tensor.codes, torch.Tensor) else torch.from_numpy(np.array(tensor.codes))
    own = {bits: affine for bits, affine in sorted(tensor.slices.items()) if bits <= max_bits}
    pairs = [(tensor.scale, tensor.zero), *own.values()]
    return make_resident(codes.to(device), pairs, own=list(own), grid=tensor.grid, max_bits=max_bits)


def make_resident(
    codes_NK: torch.Tensor, pairs: list[Affine], *, own: Sequence[int], grid: str, max_bits: int, widths: int = 1
) -> Resident:
    """Put codes, uint8 [N, K], on their device as planes that are read at ``max_bits`` bits.

    pairs: scales and zero-points, each [N, G]: of the 8-bit grid, then of the widths ``own``. widths: how many widths
    there are, one for all rows or one for each 64. The caller has asked ``why_not``.
    """
    (rows, columns), device = codes_NK.shape, codes_NK.device
    return Resident(
        planes=pack(codes_NK, max_bits=max_bits),
        affine=pack_affines(pairs, device=device),
        widths=width_rows(own, grid=grid).to(device),
        bits=torch.full((widths,), max_bits, dtype=torch.int32, device=device),
        rows=rows,
        columns=columns,
        group=columns // pairs[0][0].shape[-1],
        grid=grid,
    )


def padded(rows: int, columns: int) -> tuple[int, int]:
    """Return N and K with padding."""
    return -(-rows // ROWS) * ROWS, -(-columns // INPUTS) * INPUTS


def pack(codes_NK: torch.Tensor, *, max_bits: int = MASTER_BITS) -> torch.Tensor:
    """Pack 8-bit codes into planes: uint8 [N, K] -> uint8 [N' K' / 8 * resident bits], on the device of the codes.

    max_bits: keep the planes that hold this many top bits. Raises InputError for other dtypes, shapes and widths.
    """
    if codes_NK.ndim != 2 or codes_NK.dtype != torch.uint8 or 0 in codes_NK.shape:
        raise InputError(f"planes need uint8 codes [N, K], found {codes_NK.dtype} {list(codes_NK.shape)}")
    rows, columns = codes_NK.shape
    all_rows, all_columns = padded(rows, columns)
    codes = torch.nn.functional.pad(codes_NK, (0, all_columns - columns, 0, all_rows - rows))
    codes = codes.view(all_rows // ROWS, ROWS, all_columns // INPUTS, 2, 4, PLACE_INPUTS)
    planes = []
    for plane in range(1 + RESIDENT_BITS.index(bits_read(max_bits, rule="prefix"))):
        if plane in PAIRS:
            parts = [(codes[..., place, :] >> PAIRS[plane] & 3) << (6 - 2 * place) for place in range(4)]
            bytes_ = functools.reduce(torch.bitwise_or, parts)  # [N / 64, 64, K / 256, 2, 32]
            planes.append(bytes_.flatten(2, 3).transpose(1, 2).reshape(-1))
            continue
        bit, places = PLACES[plane]
        parts = [
            (codes[..., half, place, :] >> bit & 1) << places[half][place] for half in range(2) for place in range(4)
        ]
        planes.append(functools.reduce(torch.bitwise_or, parts).transpose(1, 2).reshape(-1))
    return torch.cat(planes)


def unpack(planes: torch.Tensor, *, rows: int, columns: int) -> torch.Tensor:
    """Return the codes of planes, uint8 [rows, columns]; the bits of planes that are not resident are 0."""
    return unpack_rows(planes, None, rows=rows, columns=columns)


def unpack_rows(planes: torch.Tensor, ids: torch.Tensor | None, *, rows: int, columns: int) -> torch.Tensor:
    """Return the codes of some rows, uint8 [len(ids), columns]. ids: integers [...], flat; None: all rows."""
    all_rows, all_columns = padded(rows, columns)
    eighth = all_rows * all_columns // 8
    ids = torch.arange(rows, device=planes.device) if ids is None else ids
    codes = torch.zeros(len(ids), all_columns // INPUTS, 2, 4, PLACE_INPUTS, dtype=torch.uint8, device=planes.device)
    starts = (0, *RESIDENT_BITS)
    for plane in range(RESIDENT_BITS.index(planes.numel() // eighth) + 1):
        stream = planes[starts[plane] * eighth : starts[plane + 1] * eighth]
        found = stream.view(all_rows // ROWS, -1, ROWS, PLACE_INPUTS)[ids // ROWS, :, ids % ROWS]
        for half in range(2):
            for place in range(4):
                if plane in PAIRS:
                    value = (found.view(len(ids), -1, 2, PLACE_INPUTS)[:, :, half] >> (6 - 2 * place) & 3) << PAIRS[
                        plane
                    ]
                else:
                    bit, places = PLACES[plane]
                    value = (found >> places[half][place] & 1) << bit
                codes[:, :, half, place] |= value
    return codes.view(len(ids), all_columns)[:, :columns]


def pack_affines(affines: list[Affine], *, device: torch.device | str = "cpu") -> torch.Tensor:
    """Return scales and zero-points, each [N, G] (numpy or torch), as ``Resident.affine``.

    int32 if bfloat16 holds all scales and float16 all zero-points exactly, as in our checkpoints; else float32.
    """
    arrays = [[np.asarray(torch.as_tensor(part).cpu(), dtype=np.float32) for part in affine] for affine in affines]
    values = np.stack([np.stack([part.T for part in pair], axis=1) for pair in arrays])  # [A, G, 2, N]
    values = np.pad(values, [(0, 0), (0, 0), (0, 0), (0, -values.shape[-1] % ROWS)])
    scale, zero = values[:, :, 0].astype(ml_dtypes.bfloat16), values[:, :, 1].astype(np.float16)
    if (scale == values[:, :, 0]).all() and (zero == values[:, :, 1]).all():
        words = scale.view(np.uint16).astype(np.uint32) << 16 | zero.view(np.uint16)
        return torch.from_numpy(words.view(np.int32)).to(device)
    return torch.from_numpy(values).to(device)


def width_rows(own: Sequence[int], *, grid: str) -> torch.Tensor:
    """Return how each width uses stored scales and zero-points, float32 [9, 6], on the CPU.

    own: the widths of tables 1, 2, ...; other widths use TABLE 0, of the 8-bit grid. scale_r = scale * STEP and zero_r
    = (zero - CENTRE) / STEP. Kernels multiply by integers in int8, of which scale * FACTOR is the scale and (zero -
    CENTRE) * INVERSE - MIDDLE the zero-point. FACTOR is a power of two and INVERSE its reciprocal.
    """
    rows = [[0.0, 1.0, 0.0, 1.0, 1.0, 0.0]]  # width 0 does not exist
    for bits in range(1, MASTER_BITS + 1):
        step, centre = (1, 0.0) if bits in own else (2 ** (MASTER_BITS - bits), bin_centre(bits))
        table = 1 + own.index(bits) if bits in own else 0
        integers, unit, offset = integer_positions(bits, grid)
        if grid == UNIFORM:  # codes stay where they lie: in the upper bits of 2, 4 or 8
            unit, offset = 2.0 ** (bits - container(bits)), float(2 ** (bits - 1))
        elif bits > 4:  # integers up to 255 are less their middle
            offset += unit * ((int(integers.max()) + 1) // 2)
        rows.append([table, step, centre, step * unit, 1 / (step * unit), offset / unit])
    return torch.tensor(rows, dtype=torch.float32)


def container(bits: int) -> int:
    """Return the bits of a byte in which kernels put together a code of this width: 2, 4 or 8."""
    return 2 if bits <= 2 else 4 if bits <= 4 else 8


@functools.cache
def _positions(grid: str, device: torch.device) -> torch.Tensor:
    """Return the position of every 8-bit code at every width, float32 [9 * 256]."""
    codes = np.arange(2**MASTER_BITS, dtype=np.uint8)
    tables = [slice_positions(codes, bits, grid=grid) for bits in (1, *range(1, MASTER_BITS + 1))]
    return torch.from_numpy(np.concatenate(tables)).to(device)


def read(weight: Resident, ids: torch.Tensor | None = None) -> torch.Tensor:
    """Return the weight, float32 [N, K], or its rows ``ids`` (integers, flat), at the width that ``weight.bits`` holds.

    Equal to ``NestedTensor.read`` bit for bit. Nothing waits for the device; all planes in memory are read.
    """
    ids = torch.arange(weight.rows, device=weight.planes.device) if ids is None else ids
    bits = (weight.bits.expand(len(ids)) if weight.bits.numel() == 1 else weight.bits[ids // ROWS]).long()
    table, step, centre = weight.widths[bits][:, :FACTOR].unbind(1)
    values = weight.affine[table.long(), ..., ids]  # [ids, G] or [ids, G, 2]
    if values.dtype == torch.int32:
        halves = values.view(torch.int16).view(len(ids), -1, 2)  # little-endian: zero-point, scale
        zero, scale = halves[..., 0].view(torch.float16).float(), halves[..., 1].view(torch.bfloat16).float()
    else:
        scale, zero = values.unbind(-1)
    codes = unpack_rows(weight.planes, ids, rows=weight.rows, columns=weight.columns)
    position = _positions(weight.grid, codes.device)[bits[:, None] * 2**MASTER_BITS + codes]
    weights: torch.Tensor = decode(position, scale * step[:, None], (zero - centre[:, None]) / step[:, None])
    return weights


def round_activations(x_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return int8 codes [T, K'] and scales float32 [T, K' / 128] of x [T, K], K' the next multiple of 128.

    scale = max|x| / 127 and code = the nearest integer of x / scale, ties to even (docs/kernels.md).
    """
    x = torch.nn.functional.pad(x_TK.float(), (0, -x_TK.shape[1] % BLOCK)).view(len(x_TK), -1, BLOCK)
    largest = x.abs().amax(-1)
    nothing = largest < 2.0**-119  # the reciprocal would overflow float32
    inverse = torch.where(nothing, 0.0, 127.0 / largest)
    codes = (x * inverse[..., None]).round().clamp(-127, 127).to(torch.int8)
    return codes.flatten(1), torch.where(nothing, 0.0, largest / 127.0)


def rounded(x_TK: torch.Tensor) -> torch.Tensor:
    """Return x as ``round_activations`` gives it, float32 [T, K]."""
    codes, scale = round_activations(x_TK)
    return (codes.view(len(codes), -1, BLOCK) * scale[..., None]).flatten(1)[:, : x_TK.shape[1]]
