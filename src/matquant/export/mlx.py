"""MLX's affine integers: a directory that mlx_lm and LM Studio load.

A block of 128, 64 or 32 in features shares a scale and a bias, w = scales * u + biases, so every slice fits: u is the
code, of 1 to 6 or 8 bits, the lowest first in uint32 words along in features. Scales of larger groups are repeated.

Scales and biases are float32 unless --dtype is given. In float32 both are exact; they cost (64 / block) bits per
weight, and MLX then computes activations in float32 too, with a wider cache, whatever the model's dtype. In bfloat16 or
float16 they take half as much, and the biases of ``prefix`` slices, which are not multiples of their scale, are
rounded.

Source: mlx 0.32 (quantize, dequantize), mlx_lm 0.32 (utils.load_model, utils.save_config).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from matquant.core.dtypes import FLOATS
from matquant.core.packing import pack, words
from matquant.export import dense
from matquant.export.containers import MINIMUM, Container, Encoded, largest_block
from matquant.export.directory import write_directory
from matquant.export.job import Exporter, Job
from matquant.format.read import Checkpoint
from matquant.format.shards import Slot
from matquant.hf.families import Mlx, supported
from matquant.system.errors import InputError

WIDTHS = (1, 2, 3, 4, 5, 6, 8)
BLOCKS = (128, 64, 32)
FAMILIES = supported("mlx")
# longrope is missing: mlx_lm uses long_factor at every length, transformers uses short_factor up to the original
# training length.
ROPES = ("default", "linear", "llama3", "yarn", "dynamic")


def containers(checkpoint: Checkpoint, path: str) -> list[Container]:
    """Return all widths in the largest block that divides a group."""
    block = largest_block(BLOCKS, checkpoint.spec.group_size or checkpoint.shapes[path][1])
    return [
        Container(name=f"affine{bits}-g{block}", bits=bits, zero=MINIMUM, block=block, scale="F32") for bits in WIDTHS
    ]


def check(checkpoint: Checkpoint) -> list[str]:
    """Return notices; InputError if mlx_lm computes another model than transformers for every prompt."""
    config, family = checkpoint.config, checkpoint.config["model_type"]
    there = _family(config)
    for problem, holds in (_layer_differences(checkpoint) | _position_differences(config)).items():
        if holds:
            raise InputError(
                f"--to mlx does not support {problem}: mlx_lm's {family} computes something else; use --to dense, "
                "or --to compressed-tensors"
            )
    notes, window = [], config.get("sliding_window")
    if window and (there.always_windowed or "sliding_attention" in (config.get("layer_types") or ())):
        notes.append(f"mlx_lm has no sliding window for {family}: beyond {window} tokens it computes another model")
    if _rope(config).get("rope_type") == "dynamic":
        context = config.get("max_position_embeddings")
        notes.append(
            f"mlx_lm scales dynamic rotary positions by chunks of the prompt: beyond {context} tokens it computes "
            "another model"
        )
    return notes


def _family(config: Mapping[str, Any]) -> Mlx:
    """Return mlx_lm's description of the family of a config.json."""
    found: Mlx = FAMILIES[config["model_type"]]
    return found


def _layer_differences(checkpoint: Checkpoint) -> dict[str, bool]:
    """Return attention and feed-forward options that mlx_lm lacks -> whether the checkpoint uses them."""
    config, there = checkpoint.config, _family(checkpoint.config)
    gemma = there.gemma
    key, known = ("hidden_activation", ("gelu_pytorch_tanh",)) if gemma else ("hidden_act", ("silu", "swish"))
    activation = config.get(key) or known[0]
    biases = [name for name in checkpoint.plain_names() if name.endswith(".bias")]
    extra = [name for name in biases if not name.endswith(there.biases)]
    heads, width, head_dim = (int(config.get(key) or 0) for key in ("num_attention_heads", "hidden_size", "head_dim"))
    caps = [config.get(key, 1.0) for key in ("attn_logit_softcapping", "final_logit_softcapping")]
    return {
        f"the activation {activation!r}": activation not in known,
        f"biases such as {extra[0] if extra else ''}": bool(extra),
        f"head_dim {head_dim} with hidden_size {width} and {heads} heads": (
            not there.head_dim and head_dim > 0 and heads * head_dim != width
        ),
        "attention or logits without a soft cap": gemma and not all(caps),
        "an untied head": gemma and config.get("tie_word_embeddings") is False,
        "bidirectional attention": bool(config.get("use_bidirectional_attention")),
        "sliding windows": not there.windows and "sliding_attention" in (config.get("layer_types") or ()),
        "rope_traditional": bool(config.get("rope_traditional")),
    }


def _position_differences(config: Mapping[str, Any]) -> dict[str, bool]:
    """Return rotary positions that mlx_lm computes differently -> whether config.json has them."""
    rope = _rope(config)
    kind = rope.get("rope_type", "default")
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    known = ("default",) if _family(config).gemma else ROPES
    # transformers uses the two mscales together or not at all, mlx_lm each with a default.
    mscales = [rope.get(key) for key in ("mscale", "mscale_all_dim")]
    yarn = rope.get("attention_factor") is not None or rope.get("truncate") is False
    return {
        f"rotary positions of type {kind!r}": kind not in known,
        f"partial_rotary_factor {partial}": partial not in (None, 1, 1.0),
        "yarn positions with attention_factor, truncate or one mscale": kind == "yarn"
        and (yarn or (any(mscales) and not all(mscales))),
    }


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return rope_parameters or rope_scaling of config.json with the key rope_type, without keys that have no value."""
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    found = {key: value for key, value in given.items() if value is not None}
    return {"rope_type": found.pop("type"), **found} if "type" in found else found


def slots(path: str, container: Container, shape: tuple[int, int], groups: int) -> tuple[Slot, ...]:
    """Return the tensors of one weight [N, K]: integers, and scales and biases [N, K / block]."""
    rows, columns = shape
    blocks = (rows, columns // container.block)
    return (
        Slot(f"{path}.weight", "U32", (rows, words(columns, container.bits))),
        Slot(f"{path}.scales", container.scale, blocks),
        Slot(f"{path}.biases", container.scale, blocks),
    )


def tensors(container: Container, encoded: Encoded) -> Sequence[np.ndarray]:
    """Return the arrays of ``slots``."""
    blocks = encoded.codes.shape[1] // container.block
    affine = [
        np.repeat(values.astype(FLOATS[container.scale]), blocks // values.shape[1], axis=1)
        for values in (encoded.fit.scale, encoded.fit.minimum())
    ]
    return [pack(encoded.codes, container.bits), *affine]


def config(job: Job) -> dict[str, Any]:
    """Return config.json with the most frequent container as "quantization", and the paths that have others."""
    kinds = job.held()
    model = {**positions(job.checkpoint.config), **dense.config(job)}
    if not kinds:
        return model
    usual = Counter(kinds.values()).most_common(1)[0][0]
    others = {path: _parameters(kind) for path, kind in kinds.items() if kind != usual}
    quantization = {**_parameters(usual), **others}
    return {**model, "quantization": quantization, "quantization_config": quantization}


def positions(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return rope_theta and rope_scaling as mlx_lm reads them; transformers 5 has both in rope_parameters.

    Values that transformers takes from elsewhere in config.json are written out, because mlx_lm's defaults differ.
    """
    found = _rope(config)
    theta = {"rope_theta": found.pop("rope_theta")} if "rope_theta" in found else {}
    if found.get("rope_type") == "yarn" and "max_position_embeddings" in config:
        found = {"original_max_position_embeddings": config["max_position_embeddings"], **found}
    return {**theta, "rope_scaling": found} if found.get("rope_type", "default") != "default" else theta


def _parameters(kind: Container) -> dict[str, Any]:
    return {"group_size": kind.block, "bits": kind.bits, "mode": "affine"}


EXPORTER = Exporter(
    engines="mlx_lm, LM Studio",
    run='pip install mlx-lm\nmlx_lm.generate --model DIR --prompt "Once upon a time"',
    families=tuple(FAMILIES),
    containers=containers,
    slots=slots,
    holds_ends=lambda checkpoint, plan: True,
    tensors=tensors,
    plain=dense.plain,
    typed=True,
    check=check,
    write=lambda job, folder, report: write_directory(job, folder, config(job), report),
)
