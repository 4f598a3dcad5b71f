"""Read one width of a weight from stored words that another library has loaded, and find the weights it stacks.

Libraries read a model's shards themselves and pass us ``weight_packed``, perhaps on a device. The small scales and
zero-points, and the per-width ones that stock loaders never read, come from the checkpoint.
"""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from matquant.core.grid import decode
from matquant.core.nest import MASTER_BITS, labels_of, slice_positions
from matquant.core.spec import Plan
from matquant.format.read import Checkpoint
from matquant.system.errors import InputError

# Weights sliced at once. In float32 they fit the second-level cache: 5 times as fast (4096 x 4096, one core).
AT_ONCE = 2**18
OVERRIDES = ("quant_method", "bits", "plan")  # the keys of our quantization_config


def read_words(
    checkpoint: Checkpoint, path: str, words: torch.Tensor, bits: int, *, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Return the ``bits``-bit weight [N, K] at ``path``, on the device of its stored ``words``, int32 [N, ceil(K/4)].

    Equals ``checkpoint.nested(path).read(bits)`` rounded to ``dtype``, bit for bit.
    """
    nested = checkpoint.nested(path, mapped=True)  # its codes are a view of the file that is never read
    rows, columns = nested.codes.shape
    assert len(words) == rows, f"{path} has {rows} rows, given {len(words)}"
    if checkpoint.spec.stored(path) == MASTER_BITS:
        codes = labels_of(words.view(torch.uint8)[:, :columns], grid=nested.grid)
    else:  # words of a smaller checkpoint hold fewer bits
        codes = torch.from_numpy(nested.codes).to(words.device)
    scale, zero = (torch.from_numpy(part).to(words.device) for part in nested.affine(bits))
    weight = torch.empty(rows, columns, dtype=dtype, device=words.device)
    step = max(1, AT_ONCE // columns)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        position = slice_positions(codes[part], bits, rule=nested.rule, grid=nested.grid)
        weight[part] = decode(position, scale[part], zero[part])
    return weight


def read_overrides(config: Mapping[str, Any]) -> Plan:
    """Return the plan of {"bits": 4, "plan": {path: bits} or a file}; InputError for keys other than OVERRIDES."""
    for key in config:
        if key not in OVERRIDES:
            nearest = difflib.get_close_matches(key, OVERRIDES, n=1, cutoff=0.0)[0]
            raise InputError(
                f"quantization_config has the key {key!r}, which matquant does not know; nearest: {nearest!r}"
            )
    plan = config.get("plan")
    if not isinstance(plan, (dict, str, type(None))):
        raise InputError(f"quantization_config has plan={plan!r}; give {{path: bits}} or the name of a plan file")
    return Plan.over(config.get("bits", MASTER_BITS), plan)


def check_stacked(prefix: str, paths: Sequence[str], bits: Mapping[str, int]) -> None:
    """Raise InputError if the weights stacked in the module ``prefix`` have different widths."""
    widths = {path: bits[path] for path in paths if path in bits}
    if len(set(widths.values())) > 1:
        asked = ", ".join(f"{path.rpartition('.')[2]} at {width}" for path, width in widths.items())
        raise InputError(
            f"the plan has {asked} bits in {prefix}, which is one weight in vLLM; give them one width, such as "
            f"{max(widths.values())}, as matquant plan does without --no-fused"
        )


def stacked_paths(prefix: str, packed: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the paths stacked, in order, in the module ``prefix`` of a library that fuses linear layers.

    packed: last name of a fused module -> names of its parts, such as {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}.
    """
    parent, _, name = prefix.rpartition(".")
    return [f"{parent}.{part}" if parent else part for part in packed.get(name, [name])]
