"""Read one width of a weight from stored words that another library has loaded, and find the weights it stacks.

Libraries read a model's shards themselves and pass us ``weight_packed``, perhaps on a device. The small scales and
zero-points, and the per-width ones that stock loaders never read, come from the checkpoint.
"""

import difflib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from matquant.core.grid import decode
from matquant.core.nest import MASTER_BITS, labels_of, slice_positions
from matquant.core.spec import Plan
from matquant.core.tensor import NestedTensor
from matquant.format.read import Checkpoint
from matquant.system.errors import InputError

# Weights sliced at once. In float32 they fit the second-level cache: 5 times as fast (4096 x 4096, one core).
AT_ONCE = 2**18
OVERRIDES = ("quant_method", "bits", "plan", "kernels", "max_bits")  # the keys of our quantization_config
KERNELS = ("auto", "planes", "dense")
EXPERT_SHARDS = ("w1", "w2", "w3")  # vLLM's names of an expert's gate, down and up


def read_words(
    checkpoint: Checkpoint, path: str, words: torch.Tensor, bits: int, *, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Return the ``bits``-bit weight [N, K] at ``path``, on the device of its stored ``words``, int32 [N, ceil(K/4)].

    Equals ``checkpoint.nested(path).read(bits)`` rounded to ``dtype``, bit for bit.
    """
    nested, codes = read_codes(checkpoint, path, words)
    rows, columns = codes.shape
    scale, zero = (torch.from_numpy(part).to(words.device) for part in nested.affine(bits))
    weight = torch.empty(rows, columns, dtype=dtype, device=words.device)
    step = max(1, AT_ONCE // columns)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        position = slice_positions(codes[part], bits, rule=nested.rule, grid=nested.grid)
        weight[part] = decode(position, scale[part], zero[part])
    return weight


def read_codes(checkpoint: Checkpoint, path: str, words: torch.Tensor) -> tuple[NestedTensor, torch.Tensor]:
    """Return the nested weight at ``path`` (numpy), and its codes, uint8 [N, K], from its stored ``words``."""
    nested = checkpoint.nested(path, mapped=True)  # its codes are a view of the file that is never read
    rows, columns = nested.codes.shape
    assert len(words) == rows, f"{path} has {rows} rows, given {len(words)}"
    if checkpoint.spec.stored(path) == MASTER_BITS:
        return nested, labels_of(words.view(torch.uint8)[:, :columns], grid=nested.grid)
    return nested, torch.from_numpy(nested.codes).to(words.device)  # words of a smaller checkpoint hold fewer bits


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


def read_kernels(config: Mapping[str, Any]) -> tuple[str, int]:
    """Return the "kernels" of our quantization_config, one of KERNELS, and "max_bits", the widest width in memory."""
    kernels, max_bits = config.get("kernels", KERNELS[0]), config.get("max_bits", MASTER_BITS)
    if kernels not in KERNELS:
        raise InputError(f"quantization_config has kernels={kernels!r}; use one of {', '.join(KERNELS)}")
    if type(max_bits) is not int or not 1 <= max_bits <= MASTER_BITS:
        raise InputError(f"quantization_config has max_bits={max_bits!r}; use a width, 1 to 8")
    return kernels, max_bits


def check_widest(bits: Mapping[str, int], *, max_bits: int) -> None:
    """Raise InputError for a width above ``max_bits``, of which memory has no more bits."""
    path = next((path for path, width in bits.items() if width > max_bits), None)
    if path is not None:
        raise InputError(
            f"{path} is to have {bits[path]} bits, and max_bits={max_bits} are in memory; use a larger max_bits"
        )


def stacked_paths(prefix: str, packed: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the paths stacked, in order, in the module ``prefix`` of a library that fuses linear layers.

    packed: last name of a fused module -> names of its parts, such as {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}.
    """
    parent, _, name = prefix.rpartition(".")
    return [f"{parent}.{part}" if parent else part for part in packed.get(name, [name])]


def expert_paths(prefix: str, names: Sequence[str | None], count: int) -> dict[tuple[int, str], str]:
    """Return the path of each matrix of the ``count`` experts in vLLM's module ``prefix``: (expert, shard) -> path.

    names: the checkpoint's names of gate, down and up, None for a matrix that the experts lack.
    """
    named = [(shard, name) for shard, name in zip(EXPERT_SHARDS, names, strict=True) if name is not None]
    return {(expert, shard): f"{prefix}.{expert}.{name}" for expert in range(count) for shard, name in named}


def place_in_turn(dense: torch.Tensor, into: torch.Tensor, *, shard: str, rank: int) -> None:
    """Copy a rank's part of an expert's matrix [N, K] to where gpt-oss has it in vLLM.

    into: of gate and up ("w1", "w3") their rows in turn, [2 I, H]; of down ("w2") [H, I]. The last rank may have fewer
    than I inner features.
    """
    if shard == "w2":
        size = into.shape[1]
        part = dense[:, rank * size : (rank + 1) * size]
        into[:, : part.shape[1]] = part
    else:
        size = into.shape[0] // 2
        part = dense[rank * size : (rank + 1) * size]
        into[0 if shard == "w1" else 1 :: 2][: len(part)] = part


def check_loaded(missing: Collection[str], module: str) -> None:
    """Raise InputError if weights of a ``module`` never arrived, which vLLM checks only for float models."""
    if missing:
        raise InputError(
            f"vLLM built a {module} for {min(missing)} but never loaded it; serve a slice: matquant export --to dense"
        )
