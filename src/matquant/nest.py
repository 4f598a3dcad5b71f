"""The definition of a nested weight: an 8-bit code, and how it is read at fewer bits.

A model is stored once, as 8-bit codes q in 0..255. Its r-bit model is made of the r-bit codes that a *rule* slices
out of them. With d = 2^(8-r):

    rule       r-bit code                        value on the 8-bit grid    source
    prefix     floor(q / d), the top r bits      code*d + (d-1)/2           ours: exactly nested, bin centres
    round      min(floor(q/d + 1/2), 2^r - 1)    code*d                     MatQuant Eq. 6
    extra      floor(q/d + 1/2)                  code*d                     MatQuant Eq. 8: 2^r + 1 values

Rounding is half up, as the paper's text asks ("the (r+1)th bit decides"); numpy.round and torch.round are half-to-even
and differ at q = d/2. ``round`` and ``extra`` need bit r+1 of the code, ``prefix`` reads exactly r bits.

The same lines run on numpy arrays and on torch tensors. Everything else in the project (training, files, kernels,
exporters) is tested equal to this file on all 256 codes.
"""

from typing import Any

from array_api_compat import array_namespace

from matquant.arguments import check_types
from matquant.errors import InputError, InputTypeError

RULES = ("prefix", "round", "extra")
MASTER_BITS = 8
OWN, CENTRE = "own", "centre"
ZEROS = (OWN, CENTRE)  # of slices with a scale of their own: a zero of their own, or the middle of their codes


def check_bits(bits: int) -> None:
    """Raise ValueError unless ``bits`` is an integer width 1..8."""
    if type(bits) is not int or not 1 <= bits <= MASTER_BITS:
        kind = InputError if type(bits) is int else InputTypeError
        raise kind(f"bits={bits!r} asked of an 8-bit code; use one of 1, 2, 3, 4, 5, 6, 7, 8")


def check_rule(rule: str) -> None:
    """Raise ValueError unless ``rule`` is one of RULES."""
    if rule not in RULES:
        raise InputError(f"rule={rule!r} is not a slicing rule; use one of {', '.join(RULES)}")


def slice_codes(codes: Any, bits: int, *, rule: str = "prefix") -> Any:
    """Slice 8-bit codes to ``bits`` bits.

    codes: numpy array or torch tensor of any integer dtype and shape, values 0..255.
    Returns r-bit codes of the same kind, dtype and shape: 0..2^r - 1, or 0..2^r under ``extra``. At 8 bits it is
    ``codes`` itself, not a copy.
    Raises ValueError for a width outside 1..8 or an unknown rule, TypeError for a dtype that cannot hold them.
    """
    check_bits(bits)
    check_rule(rule)
    check_types(codes=codes)
    xp = array_namespace(codes)
    if not xp.isdtype(codes.dtype, "integral") or xp.iinfo(codes.dtype).max < 2**MASTER_BITS - 1:
        raise TypeError(f"codes of dtype {codes.dtype} cannot be sliced; use uint8 codes 0..255")
    drop = MASTER_BITS - bits
    if drop == 0:
        return codes
    top = codes >> drop
    if rule == "prefix":
        return top
    rounded = top + ((codes >> (drop - 1)) & 1)  # q/d + 1/2 without leaving uint8
    if rule == "extra":
        return rounded
    return rounded - (rounded >> bits)  # the clamp: only 2^r has bit r set


def slice_values(codes: Any, bits: int, *, rule: str = "prefix") -> Any:
    """Positions on the 8-bit grid of the ``bits``-bit slice of 8-bit codes.

    codes as in ``slice_codes``; returns float32 of the same kind and shape. Same errors.
    """
    check_types(codes=codes)
    xp = array_namespace(codes)
    step = 2 ** (MASTER_BITS - bits) if type(bits) is int and 1 <= bits <= MASTER_BITS else 1
    position = xp.astype(slice_codes(codes, bits, rule=rule), xp.float32) * step
    return position + (step - 1) / 2 if rule == "prefix" else position


def slice_affine(scale: Any, zero: Any, bits: int, *, rule: str = "prefix") -> tuple[Any, Any]:
    """The scale and zero of the r-bit codes that stand for the same numbers as the 8-bit ``scale`` and ``zero``.

    Returns (scale_r, zero_r), both float, such that scale_r * (code_r - zero_r) = scale * (value_r - zero) for every
    code. Any shapes; arrays, tensors or floats.
    """
    check_bits(bits)
    check_rule(rule)
    step = 2 ** (MASTER_BITS - bits)
    centre = (step - 1) / 2 if rule == "prefix" else 0.0
    return scale * step, (zero - centre) / step
