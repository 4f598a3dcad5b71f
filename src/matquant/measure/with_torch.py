"""Evaluate with torch: dense weights, the model exactly as its codes define it, on a CPU or a GPU."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from matquant.core.spec import Plan
from matquant.format.read import Checkpoint
from matquant.hf.text import token_stream
from matquant.hf_torch.config import check_context, config_dtype, configured_context, parse_config, vocabulary_size
from matquant.hf_torch.device import choose_device
from matquant.hf_torch.finite import checked_logits
from matquant.hf_torch.loading import load_float, load_tokenizer
from matquant.hf_torch.nested_model import load
from matquant.measure.kept import Kept, Writer
from matquant.measure.likelihood import keep, measure
from matquant.measure.windows import Windows, steps
from matquant.system.progress import Count


class TorchModel:
    """A checkpoint loaded dense; its width is switched in place. dtype None: the checkpoint's."""

    def __init__(self, directory: Path, *, device: str | None, dtype: torch.dtype | None = None) -> None:
        self.directory = directory
        # the caller has just checked the hashes
        self.model = load(directory, device=choose_device(device), check_hashes=False, kernels="none", dtype=dtype)

    def measure(
        self, plans: Mapping[str, Plan], windows: Windows, *, kept: Kept | None, report: Count
    ) -> Iterator[tuple[str, dict[str, float]]]:
        """Yield (width, metrics) of each width in turn."""
        check_context(self.model, windows.context)
        for name, told in steps(plans, report):
            self.set_bits(plans[name])
            yield name, measure(self.model, windows, kept=kept, report=told)

    def set_bits(self, plan: Plan | Mapping[str, int]) -> None:
        self.model.set_bits(plan=plan)

    def wrap(self, harness: Any, *, batch_size: int) -> Any:
        """Return the model as the harness wants it."""
        return harness.wrap(self.model, load_tokenizer(self.directory), batch_size=batch_size)

    def checked(self) -> AbstractContextManager[None]:
        """Within this context logits that are not finite raise InputError naming the layer."""
        return checked_logits(self.model)


def read_stream(directory: Path, checkpoint: Checkpoint, documents: Sequence[str]) -> np.ndarray:
    """Return the documents' tokens, int64; InputError for a token outside the embedding."""
    return token_stream(documents, load_tokenizer(directory), vocab_size=vocabulary_size(checkpoint.config))


def default_context(checkpoint: Checkpoint) -> int:
    """Return the context of a checkpoint's model, in tokens."""
    return configured_context(parse_config(checkpoint.config))


def read_reference(
    source: Path | str,
    windows: Windows,
    *,
    checkpoint: Checkpoint,
    device: str | None,
    writer: Writer | None = None,
    report: Count,
) -> float:
    """Return the log-perplexity of a float model in the checkpoint's dtype; keep its log-probabilities if ``writer``.

    The model is freed at the end. InputError naming the layer where NaN or infinity begins.
    """
    report("loading the float model", 0, 0)
    model = load_float(source, dtype=config_dtype(checkpoint.config)).to(choose_device(device))
    check_context(model, windows.context)
    told = functools.partial(report, "the float model")
    if writer is None:
        return measure(model, windows, report=told)["ppl"]
    return keep(model, windows, writer, report=told)


def vocabulary_rows(checkpoint: Checkpoint) -> int:
    """Return how many logits a token has."""
    return vocabulary_size(checkpoint.config)


def check_device(device: str | None) -> None:
    """Raise InputError if the device is not available."""
    choose_device(device)


open_model = TorchModel
