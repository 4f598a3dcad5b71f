"""Load a nested checkpoint for the native decode step: planes of the quantised weights, the rest as stored.

Quantised weights are packed once from the memory-mapped file into planes, which serve every width. Of the others,
matrices that each token reads whole (head, linear layers outside the scope) are copied into huge pages in the file's
dtype; an embedding that is not also the head stays memory-mapped. Norm weights are small and become float32.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import ml_dtypes
import numpy as np

from matquant import _native
from matquant.core.nest import bits_read
from matquant.core.planes import Weight, add_planes, hold, load_weight
from matquant.format.read import Checkpoint
from matquant.hf.architecture import EMBEDDING, Architecture, check_sizes, read_architecture
from matquant.hf.experts import router_path, split_biases
from matquant.system.errors import InputError

NORMS = ("input", "attention_out", "ffn", "ffn_out", "query", "key")
DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
HUGE_PAGE_BYTES = 2**21
HEAD, NORM = "lm_head", "model.norm"


@dataclass(frozen=True, kw_only=True)
class Model:
    """A loaded model. paths: the module path of each matrix, by native id. weights: the quantised matrices.

    least: path -> its least width unless a plan names it, for embedding and head. plain_bytes: of the other matrices
    that each token reads. looked_up: the path of which a token reads one row only, an embedding that is not the head.
    shares: path -> the share of tokens that read it if a router uses all experts alike, for the matrices of experts.
    """

    native: _native.Model
    architecture: Architecture
    paths: tuple[str, ...]
    weights: Mapping[str, Weight]
    least: Mapping[str, int]
    looked_up: str | None
    plain_bytes: int
    shares: Mapping[str, float]

    def bytes_per_token(self, widths: np.ndarray) -> int:
        """Return the bytes of weights that decoding one token reads at ``widths`` (one per path).

        Of experts it is the mean over all of them, times those that a token uses.
        """
        total: float = self.plain_bytes
        for path, bits in zip(self.paths, widths.tolist(), strict=True):
            if path in self.weights and path != self.looked_up:
                weight = self.weights[path]
                codes = weight.planes.rows * weight.planes.columns
                read = codes * bits_read(bits, rule=weight.rule) // 8 + weight.planes.native.affine_bytes(bits)
                total += read * self.shares.get(path, 1)
        return round(total)


def load_model(checkpoint: Checkpoint, *, max_bits: int, expert_bits: int | None = None) -> Model:
    """Build the native model; InputError if it does not support the checkpoint's family or one of its tensors.

    expert_bits: keep only the planes of experts that this width needs, and the scales of widths up to max_bits.
    """
    where = checkpoint.directory
    check_sizes(checkpoint.config, checkpoint.weight_shapes(), where=where)
    architecture = read_architecture(checkpoint.config, where=where)
    tensors = _plain_tensors(checkpoint)
    for layer in range(architecture.layers):
        if (routed := architecture.experts_at(layer)) is not None:
            split_biases(routed, layer, tensors)
    paths = _matrix_paths(architecture)
    looked_up = None if architecture.tied else EMBEDDING
    least = checkpoint.least
    _check_names(checkpoint, tensors, architecture, paths)
    native = _empty_model(architecture)
    weights = {}
    for path in filter(checkpoint.shapes.__contains__, paths):
        held = expert_bits if ".experts." in path else None
        most = max(max_bits, least.get(path, 1))
        weights[path] = load_weight(checkpoint.nested(path, mapped=True), max_bits=most, held_bits=held)
    try:
        _fill(native, architecture, paths, weights, tensors, where)
    except InputError:
        raise
    except (TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{where} does not fit its config.json ({reason}); write the checkpoint again") from None
    plain = [path for path in paths if path not in weights and path != looked_up]
    experts = architecture.experts
    shares = {path: experts.active / experts.count for path in paths if ".experts." in path} if experts else {}
    return Model(
        native=native,
        architecture=architecture,
        paths=paths,
        weights=weights,
        least=least,
        looked_up=looked_up,
        plain_bytes=round(sum(tensors[f"{path}.weight"].nbytes * shares.get(path, 1) for path in plain)),
        shares=shares,
    )


def _matrix_paths(architecture: Architecture) -> tuple[str, ...]:
    """Return the module path of each matrix, by native id."""
    ends = [EMBEDDING] if architecture.tied else [HEAD, EMBEDDING]
    layers = range(architecture.layers)
    return *(f"model.layers.{layer}.{name}" for layer in layers for name, _ in architecture.matrices(layer)), *ends


def _empty_model(architecture: Architecture) -> _native.Model:
    """Return a native model without layers."""
    native = _native.Model(
        hidden=architecture.hidden,
        heads=architecture.heads,
        kv_heads=architecture.kv_heads,
        head_dim=architecture.head_dim,
        vocab=architecture.vocab,
        norm_eps=architecture.norm_eps,
        attention_scale=architecture.attention_scale,
        embedding_scale=architecture.embedding_scale,
        attention_cap=architecture.attention_cap,
        logit_cap=architecture.logit_cap,
        gelu=architecture.gelu,
        gate_alpha=architecture.gate_alpha,
        gate_limit=architecture.gate_limit,
    )
    for frequencies, scale in zip(architecture.frequencies, architecture.rope_scales, strict=True):
        native.add_rope(frequencies, scale)
    return native


def widen(model: Model, checkpoint: Checkpoint, *, held_bits: int, max_bits: int) -> Model:
    """Return the model with the planes that widths up to ``max_bits`` need. Steps run while they are made.

    checkpoint: the model's. held_bits: the widest width that is in memory; it stays so after an error.
    """
    wider = {}
    try:
        for path, weight in model.weights.items():
            bits = max(max_bits, model.least.get(path, 1))
            wider[path] = add_planes(weight, checkpoint.nested(path, mapped=True), max_bits=bits)
    except BaseException:
        narrow(model, max_bits=held_bits)  # frees what was made
        raise
    return narrow(replace(model, weights=wider), max_bits=max_bits)


def narrow(model: Model, *, max_bits: int) -> Model:
    """Return the model with the planes that widths up to ``max_bits`` need, and free the others.

    Waits for the end of steps that run, and keeps new ones out for a moment.
    """
    held: dict[str, Weight] = {}

    def change() -> None:
        for path, weight in model.weights.items():
            held[path] = hold(weight, max_bits=max(max_bits, model.least.get(path, 1)))

    model.native.change_weights(change)
    return replace(model, weights=held)


def _fill(
    native: _native.Model,
    architecture: Architecture,
    paths: Sequence[str],
    weights: Mapping[str, Weight],
    tensors: Mapping[str, np.ndarray],
    where: Path,
) -> None:
    """Add the layers, the embedding, the last norm and the head to the native model."""

    def vector(name: str, offset: float = 0.0) -> np.ndarray:
        return np.ascontiguousarray(_tensor(name, tensors, where).astype(np.float32) + np.float32(offset))

    def norm(name: str) -> np.ndarray:
        return vector(f"{name}.weight", architecture.family.norm_offset)

    def matrix(path: str, *, resident: bool = True) -> _native.Matrix:
        bias = vector(f"{path}.bias") if f"{path}.bias" in tensors else None
        if path in weights:
            return _native.nested_matrix(weights[path], weights[path].pointer, bias)
        stored = _tensor(f"{path}.weight", tensors, where)
        data = stored if stored.dtype == np.float32 else stored.view(np.uint16)
        # Huge pages stream faster than a mapped file, and are worth a copy if every token reads the whole matrix.
        return _native.dense_matrix(data, stored.dtype.name, bias, resident and stored.nbytes >= HUGE_PAGE_BYTES)

    for layer in range(architecture.layers):
        prefix = f"model.layers.{layer}."
        names = [architecture.family.norms.get(place) for place in NORMS]
        experts = architecture.experts_at(layer)
        native.add_layer(
            [matrix(prefix + name) for name, _ in architecture.matrices(layer)],
            [None if name is None else norm(prefix + name) for name in names],
            architecture.windows[layer],
            architecture.ropes[layer],
            sinks=vector(prefix + architecture.family.sinks) if architecture.family.sinks else None,
            experts=experts.count if experts else 0,
            active=experts.active if experts else 0,
            renormalise=experts is not None and experts.renormalise,
            shared=experts is not None and experts.shared > 0,
        )
    embedding = None if architecture.tied else matrix(EMBEDDING, resident=False)
    native.set_ends(matrix(EMBEDDING if architecture.tied else HEAD), embedding, norm(NORM))


def _tensor(name: str, tensors: Mapping[str, np.ndarray], where: Path) -> np.ndarray:
    if name not in tensors:
        raise InputError(f"{where} lacks the tensor {name}; write the checkpoint again")
    return tensors[name]


def _check_names(
    checkpoint: Checkpoint, tensors: Mapping[str, np.ndarray], architecture: Architecture, paths: Sequence[str]
) -> None:
    """Raise InputError for a quantised router, or an unused tensor: the checkpoint is not of the family it claims."""
    prefixes = [f"model.layers.{layer}." for layer in range(architecture.layers)]
    norms = [f"{prefix}{name}" for prefix in prefixes for name in architecture.family.norms.values()]
    known = {f"{path}.weight" for path in (*paths, *norms, EMBEDDING, HEAD, NORM)} | {f"{path}.bias" for path in paths}
    known |= {f"{prefix}{architecture.family.sinks}" for prefix in prefixes if architecture.family.sinks}
    for layer in range(architecture.layers):
        experts = architecture.experts_at(layer)
        if experts is not None and (path := router_path(experts, layer)) in checkpoint.shapes:
            raise InputError(
                f"{checkpoint.directory} has a quantised router, {path}; routers stay float: quantise the model again"
            )
    unused = sorted(set(tensors) - known) + sorted(set(checkpoint.shapes) - set(paths))
    if unused:
        kind = checkpoint.config["model_type"]
        raise InputError(
            f"{checkpoint.directory} has {unused[0]}, which the engine's {kind} does not use; use matquant.load"
        )


def _plain_tensors(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """Return every tensor that is not part of a quantised weight, as a read-only view of its memory-mapped file."""
    tensors = {}
    for name in checkpoint.plain_names():
        stored = checkpoint.stored_dtype(name)
        if stored not in DTYPES:
            raise InputError(
                f"{name} of {checkpoint.directory} has dtype {stored}; "
                f"the engine reads {', '.join(DTYPES)}; store it as one of these"
            )
        tensors[name] = np.asarray(checkpoint.mapped(name, DTYPES[stored]))
    return tensors
