"""Measure the losses of plans on calibration text, and cache them beside the checkpoint.

The loss of a plan is KL(p || q), nats per token: p is the next-token distribution of a reference (a float model, or the
checkpoint at 8 bits), q that of the checkpoint at the plan. Every measured loss, and every estimate of a group's loss
(planning/gradients.py), is stored in ``matquant_plans.json`` in the checkpoint's directory, under the sha256 of the
calibration tokens and of the checkpoint's manifest, and the reference. Another text or checkpoint is measured again;
another budget or search reuses the stored losses.

Only the decoder layers from the first difference to an earlier plan on are run: hidden states [B, T, H] are cached by
the widths of all layers before them, the last used ones up to CACHE_BYTES. Further memory: the dense float32 model, its
codes, and p, 4 bytes x tokens x vocabulary. B sequences, T tokens, H hidden features.
"""

import functools
import hashlib
import json
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch

from matquant.core.experts import expert_name
from matquant.core.nest import MASTER_BITS
from matquant.format.manifest import PLAN_CACHE
from matquant.format.read import Checkpoint, ends_of, manifest_sha256, open_checkpoint
from matquant.hf.source import check_source
from matquant.hf.text import cut_windows, data_sha256, token_stream
from matquant.hf_torch.config import check_context, vocabulary_size
from matquant.hf_torch.device import choose_device
from matquant.hf_torch.finite import check_result
from matquant.hf_torch.layers import decoder_layers
from matquant.hf_torch.layerwise import embed, finish
from matquant.hf_torch.loading import load_float, load_tokenizer
from matquant.hf_torch.nested_model import load
from matquant.planning import gradients
from matquant.planning.budget import Groups
from matquant.planning.experts import routing
from matquant.planning.request import check_losses
from matquant.system.errors import InputError
from matquant.system.files import json_text, sha256, write_atomically

SIDECAR = PLAN_CACHE
SIDECAR_FORMAT = 1
BATCH_TOKENS = 4096
CACHE_BYTES = 2**30
SAVE_EVERY_S = 2.0
SEQ_LEN = 512

Plain = Mapping[str, int]  # path -> bits, every path
Prefix = tuple[tuple[int, ...], ...]  # the widths of embedding and head, and of the first layers


class Losses:
    """The losses of plans of one checkpoint on one text; a context manager that saves them at its end.

    tokens: calibration text, int64 [samples, T + 1]; the last token of a row is only predicted. reference: a float
    model, or None for the checkpoint at 8 bits. device None: cuda if there is one. evaluations: number of plans
    measured, not looked up. notice: called once if the losses cannot be stored.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        tokens: np.ndarray,
        *,
        reference: Path | str | None = None,
        device: str | None = None,
        report: Callable[[int], None] = lambda evaluations: None,
        notice: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.checkpoint = checkpoint
        self.paths = tuple(self.checkpoint.shapes)
        self.tokens = tokens
        self.reference = reference
        self.device = choose_device(device)
        self.evaluations = 0
        self.expected = 0  # maximum number by the end of a search; 0: not known
        self.report = report
        self._notice = notice
        self._saved_s = time.monotonic()
        self._skipped = False
        self._file = checkpoint.directory / SIDECAR
        self._key = {
            "text_sha256": data_sha256(tokens),
            "context": tokens.shape[1] - 1,
            "checkpoint_sha256": manifest_sha256(checkpoint.directory),
            "reference": f"int{MASTER_BITS}" if reference is None else _fingerprint(reference),
        }
        try:
            self._sets = _read_sidecar(self._file, self._key["checkpoint_sha256"])
        except OSError as error:
            self._sets = []
            self._skip_file(error)
        found = next((known for known in self._sets if self._key.items() <= known.items()), None)
        if found is None:
            found = {**self._key, "measured": {}, "estimated": {}}
            self._sets.append(found)
        self._measured: dict[str, list[float]] = found["measured"]
        self._estimated: dict[str, float | None] = found.setdefault("estimated", {})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.save()

    def measure(self, bits: Plain) -> tuple[float, float]:
        """Return (KL, log-perplexity) of a plan, nats per token; measured unless known."""
        key = "".join(str(bits[path]) for path in self.paths)
        if key not in self._measured:
            self._measured[key] = list(self._forward.measure(bits))
            self.evaluations += 1
            self.report(self.evaluations)
            if time.monotonic() > self._saved_s + SAVE_EVERY_S:
                self.save()
        kl, log_perplexity = self._measured[key]
        return kl, log_perplexity

    def loss(self, bits: Plain) -> float:
        """Return the KL of a plan to the reference."""
        return self.measure(bits)[0]

    def known(self) -> list[tuple[float, dict[str, int]]]:
        """Return every plan measured so far, with its KL."""
        return [
            (values[0], dict(zip(self.paths, map(int, key), strict=True))) for key, values in self._measured.items()
        ]

    def estimates(self, groups: Groups, widths: Sequence[int]) -> np.ndarray:
        """Return estimated losses (planning/gradients.py), float64 [groups, widths]; NaN for groups without one."""
        keys = [[f"{bits} {' '.join(group)}" for bits in widths] for group in groups]
        if any(key not in self._estimated for row in keys for key in row):
            known = gradients.estimable(self.model, self.paths)
            several = [{expert_name(path) for path in group} for group in groups if len(group) > 1]
            experts = any(len(names) == 1 and None not in names for names in several)  # whole ones, not single matrices
            of = gradients.estimate(self.checkpoint, self.model, self.tokens, widths, paths=known, experts=experts)
            for group, row in zip(groups, keys, strict=True):
                estimated = of(group)
                found = [None] * len(widths) if estimated is None else estimated.tolist()
                self._estimated.update(zip(row, found, strict=True))
            self.save()
        return np.array([[self._estimated[key] for key in row] for row in keys], dtype=float)

    def routing(self) -> dict[str, float]:
        """Return the share of tokens that chooses each expert at 8 bits, by the expert's name."""
        self.model.set_bits(MASTER_BITS)
        ids = torch.from_numpy(self.tokens[:, :-1]).to(self.model.device)
        return routing(self.model, torch.split(ids, max(1, BATCH_TOKENS // ids.shape[1])))

    def save(self) -> None:
        """Store the known losses beside the checkpoint if possible: only a later search needs them."""
        self._saved_s = time.monotonic()
        if self.evaluations or self._estimated:
            record = {"format": SIDECAR_FORMAT, "paths": self.paths, "losses": self._sets}
            try:
                write_atomically(self._file, (json_text(record, indent=1, sort_keys=False) + "\n").encode())
            except (OSError, InputError) as error:
                self._skip_file(error)

    def _skip_file(self, error: Exception) -> None:
        if not self._skipped:
            self._notice(f"{self._file} cannot be written, so another search will measure again ({error})")
        self._skipped = True

    @functools.cached_property
    def model(self) -> Any:
        """Return the measured model, float32, loaded when first needed."""
        model = load(
            self.checkpoint.directory, dtype=torch.float32, device=self.device, kernels="none", check_hashes=False
        )
        check_context(model, self.tokens.shape[1] - 1)
        return model

    @functools.cached_property
    def _forward(self) -> "Forward":
        teacher = None if self.reference is None else load_float(self.reference, dtype=torch.float32).to(self.device)
        return Forward(self.model, self.tokens, teacher=teacher)


class Forward:
    """A model from ``matquant.load`` on fixed tokens [samples, T + 1], run from the first layer that changes."""

    def __init__(self, model: Any, tokens: np.ndarray, *, teacher: Any | None, cache_bytes: int = CACHE_BYTES) -> None:
        self.model, self.cache_bytes = model, cache_bytes
        ids = torch.from_numpy(tokens).to(model.device)
        size = max(1, BATCH_TOKENS // (ids.shape[1] - 1))
        self._inputs = list(torch.split(ids[:, :-1], size))
        self._targets = list(torch.split(ids[:, 1:], size))
        self._layers = decoder_layers(model)
        self._inside = [
            [path for path in model.bits_by_path if path.startswith(f"{name}.")] for name, _ in self._layers
        ]
        self._ends = ends_of(model.bits_by_path)
        with torch.inference_mode():
            start, self._calls = embed(model, self._inputs)
            # by the widths of a quantised embedding and head
            self._starts = {tuple(model.bits_by_path[path] for path in self._ends): start}
            self._states: OrderedDict[Prefix, list[torch.Tensor]] = OrderedDict()
            if teacher is None:
                model.set_bits(MASTER_BITS)
                logits = (finish(model, ids, states) for ids, states in self._outputs(model.bits_by_path))
            else:
                logits = (teacher(input_ids=ids, use_cache=False).logits for ids in self._inputs)
            self._p = [batch.float().softmax(-1) for batch in logits]
        for ids, p in zip(self._inputs, self._p, strict=True):
            check_result(
                float(p.sum()), model if teacher is None else teacher, ids, what="probabilities that add up to"
            )
        vocabulary = model.config.get_text_config().vocab_size
        if teacher is not None and self._p[0].shape[-1] != vocabulary:
            raise InputError(
                f"--reference {teacher.config.name_or_path} has a vocabulary of {self._p[0].shape[-1]}, the checkpoint "
                f"{vocabulary}; give the model that it was made from"
            )
        self._entropy = [-torch.special.xlogy(p, p).sum(-1) for p in self._p]

    def measure(self, bits: Plain) -> tuple[float, float]:
        """Return KL(p || q) and log-perplexity at a plan, mean nats per token."""
        kl, nll, count = 0.0, 0.0, 0
        with torch.inference_mode():
            self.model.set_bits(MASTER_BITS, plan=bits)
            for number, (ids, states) in enumerate(self._outputs(bits)):
                logits = finish(self.model, ids, states).float()
                total = logits.logsumexp(-1)
                expected = torch.linalg.vecdot(self._p[number], logits)
                chosen = logits.gather(-1, self._targets[number][..., None])[..., 0]
                kl += float((total - expected - self._entropy[number]).sum(dtype=torch.float64))
                nll += float((total - chosen).sum(dtype=torch.float64))
                count += ids.numel()
                check_result(kl + nll, self.model, ids, what="a loss of")
        return kl / count, nll / count

    def _outputs(self, bits: Plain) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return the ids and the last layer's output, batch by batch; the model must be at these bits."""
        ends = tuple(bits[path] for path in self._ends)
        widths = (ends, *(tuple(bits[path] for path in inside) for inside in self._inside))
        depth = next((n for n in range(len(widths) - 1, 1, -1) if widths[:n] in self._states), 1)
        if depth > 1:
            states = self._states[widths[:depth]]
            self._states.move_to_end(widths[:depth])
        else:
            if ends not in self._starts:
                self._starts[ends], _ = embed(self.model, self._inputs)
            states = self._starts[ends]
        for layer in range(depth, len(widths)):
            call, (_, module) = self._calls[layer - 1], self._layers[layer - 1]
            states = [call(module, batch) for batch in states]
            if layer + 1 < len(widths):
                self._states[widths[: layer + 1]] = states
        size = sum(batch.nbytes for batch in states)
        while len(self._states) > 1 and len(self._states) * size > self.cache_bytes:
            self._states.popitem(last=False)
        return list(zip(self._inputs, states, strict=True))


def open_losses(
    directory: Path | str,
    text: Sequence[Path],
    *,
    reference: Path | str | None = None,
    samples: int = 8,
    seq_len: int | None = None,
    seed: int = 0,
    device: str | None = None,
    report: Callable[[int], None] = lambda evaluations: None,
    notice: Callable[[str], None] = lambda text: None,
) -> Losses:
    """Return the losses of a checkpoint on at most ``samples`` sequences of ``text``, chosen by the seed.

    No text: the package's calibration text. seq_len None: the model's context, 512 at most. InputError for text,
    reference or checkpoint that cannot be read.
    """
    documents = check_losses(directory, text, reference=reference, samples=samples, seq_len=seq_len, seed=seed)
    checkpoint = open_checkpoint(directory)
    context = int(checkpoint.config.get("max_position_embeddings") or SEQ_LEN)
    vocab_size = vocabulary_size(checkpoint.config)
    stream = token_stream(documents, load_tokenizer(directory), vocab_size=vocab_size)
    windows = cut_windows(stream, seq_len or min(SEQ_LEN, context))
    chosen = windows[np.sort(np.random.default_rng(seed).permutation(len(windows))[:samples])]
    return Losses(checkpoint, chosen, reference=reference, device=device, report=report, notice=notice)


def _read_sidecar(file: Path, checkpoint_sha256: str) -> list[dict[str, Any]]:
    """Read the stored losses of this checkpoint; InputError if the file is damaged."""
    if not file.exists():
        return []
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        if record["format"] != SIDECAR_FORMAT:
            raise InputError(
                f"{file} is in format {record['format']!r}, this matquant reads {SIDECAR_FORMAT}; delete it"
            )
        sets = [known for known in record["losses"] if known["checkpoint_sha256"] == checkpoint_sha256]
        assert all(len(values) == 2 for known in sets for values in known["measured"].values())
        assert all(math.isfinite(value) for known in sets for pair in known["measured"].values() for value in pair)
        estimates = (value for known in sets for value in known.get("estimated", {}).values())
        assert all(value is None or math.isfinite(value) for value in estimates)
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file} holds no losses of plans ({type(error).__name__}); delete it") from None
    return sets


def _fingerprint(model: Path | str) -> str:
    """Return a hub id unchanged; for a file its sha256; for a directory that of its configuration and weights."""
    check_source(model)
    where = Path(model)
    if where.is_file():
        return sha256(where)
    if not where.is_dir():
        return str(model)
    files = sorted([where / "config.json", *where.glob("*.safetensors"), *where.glob("*.bin")])
    return hashlib.sha256("".join(sha256(file) for file in files).encode()).hexdigest()
