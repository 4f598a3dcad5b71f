"""One width of a weight whose stored words another library has in hand, and which weights that library stacks.

Libraries that load a model read its shards themselves and hand over ``weight_packed``, perhaps on a device; scales and
zeros, which are small, and those of single widths, which stock loaders never see, come from the checkpoint.
"""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from matquant.checkpoint import Checkpoint
from matquant.errors import InputError
from matquant.grid import decode
from matquant.nest import MASTER_BITS, slice_codes
from matquant.spec import Plan

OVERRIDES = ("quant_method", "bits", "plan")  # the keys of a quantization_config that asks for us


def read_words(checkpoint: Checkpoint, path: str, words: torch.Tensor, bits: int) -> torch.Tensor:
    """The ``bits``-bit weight [N, K] at ``path``, float32 on the device of its stored ``words``, int32 [N, ceil(K/4)].

    The same numbers as ``checkpoint.nested(path).read(bits)``, bit for bit.
    """
    nested = checkpoint.nested(path, mapped=True)  # its codes are a view of the file, which nobody reads
    rows, columns = nested.codes.shape
    assert len(words) == rows, f"{path} has {rows} rows, given {len(words)}"
    if checkpoint.spec.stored(path) == MASTER_BITS:
        codes = words.view(torch.uint8)[:, :columns]
    else:  # a smaller checkpoint, whose words hold fewer bits
        codes = torch.from_numpy(nested.codes).to(words.device)
    scale, zero = (torch.from_numpy(part).to(words.device) for part in nested.affine(bits))
    weight: torch.Tensor = decode(slice_codes(codes, bits, rule=nested.rule), scale, zero)
    return weight


def read_overrides(config: Mapping[str, Any]) -> Plan:
    """The plan that {"bits": 4, "plan": {path: bits} or a file} asks for; InputError for keys other than OVERRIDES."""
    for key in config:
        if key not in OVERRIDES:
            nearest = difflib.get_close_matches(key, OVERRIDES, n=1, cutoff=0.0)[0]
            raise InputError(f"quantization_config has the key {key!r}, matquant has none; nearest: {nearest!r}")
    plan = config.get("plan")
    if not isinstance(plan, (dict, str, type(None))):
        raise InputError(f"quantization_config has plan={plan!r}; give {{path: bits}} or the name of a plan file")
    return Plan.over(config.get("bits", MASTER_BITS), plan)


def stacked_paths(prefix: str, packed: Mapping[str, Sequence[str]]) -> list[str]:
    """The paths whose weights are stacked, in order, in the module ``prefix`` of a library that fuses linears.

    packed: the last name of a fused module -> those of its parts, such as {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}.
    """
    parent, _, name = prefix.rpartition(".")
    return [f"{parent}.{part}" if parent else part for part in packed.get(name, [name])]
