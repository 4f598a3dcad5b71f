"""Evaluate with the native engine: int8 activations, on a CPU, without torch.

The engine multiplies the codes with activations rounded to int8 (per token and 128 or 64 inputs) and keeps an fp16
cache, as in serving, so figures differ a little from torch's; docs/evaluation.md has by how much. Switching the width
costs nothing. Only the logits that count are computed, a step of tokens at a time.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np

from matquant.core.spec import Plan
from matquant.engine.engine import SCORE_VALUES, Engine
from matquant.engine.session import CHUNK, Session
from matquant.format.read import Checkpoint
from matquant.hf.architecture import read_architecture
from matquant.hf.text import check_ids
from matquant.hf.vocabulary import read_vocabulary
from matquant.measure.kept import Kept
from matquant.measure.metrics import Totals, add_logits
from matquant.measure.windows import Windows, steps
from matquant.system.errors import InputError
from matquant.system.progress import Count


class EngineModel:
    """A checkpoint in the native engine."""

    def __init__(self, directory: Path, *, device: str | None) -> None:
        self.engine = Engine(directory, check_hashes=False)  # the caller has just checked them
        self._harnessed: Any = None

    def measure(
        self, plans: Mapping[str, Plan], windows: Windows, *, kept: Kept | None, report: Count
    ) -> Iterator[tuple[str, dict[str, float]]]:
        """Yield (width, metrics) of each width in turn."""
        if windows.context > self.engine.context:
            raise InputError(
                f"seq_len={windows.context} is longer than the model's context of {self.engine.context} tokens; "
                f"use at most {self.engine.context}, or --engine torch"
            )
        session = self.engine.session(windows.context)
        logits = np.empty((step_tokens(self.engine), self.engine.model.architecture.vocab), dtype=np.float32)
        for name, told in steps(plans, report):
            widths, totals = self.engine.widths(plan=plans[name]), Totals()
            for sequence in range(windows.count):
                told(sequence, windows.count)
                _add_sequence(session, widths, windows, sequence, logits=logits, totals=totals, kept=kept)
                if not math.isfinite(totals.loss):
                    label = f"int{name}" if name.isdigit() else "the plan"
                    raise InputError(
                        f"{label} of {self.engine.path} has log-perplexity {totals.loss}; "
                        "--engine torch names the layer where NaN or infinity begins"
                    )
            told(windows.count, windows.count)
            yield name, totals.mean()

    def set_bits(self, plan: Plan | Mapping[str, int]) -> None:
        self._harnessed.set_widths(self.engine.widths(plan=plan))

    def wrap(self, harness: Any, *, batch_size: int) -> Any:
        """Return the model as the harness wants it; the engine reads one answer at a time."""
        self._harnessed = harness.wrap_engine(self.engine)
        return self._harnessed

    def checked(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()  # the harness's model checks its own logits


def _add_sequence(
    session: Session,
    widths: np.ndarray,
    windows: Windows,
    sequence: int,
    *,
    logits: np.ndarray,
    totals: Totals,
    kept: Kept | None,
) -> None:
    """Add the predictions of one sequence to the sums. logits: scratch, float32 [tokens of a step, vocabulary]."""
    row, first = windows.row(sequence).tolist(), windows.first(sequence)
    session.rewind(0)
    if first:
        session.extend(row[:first], widths)
    for start in range(first, windows.context, len(logits)):
        stop = min(start + len(logits), windows.context)
        found = session.extend(row[start:stop], widths, into=logits)
        truth = None if kept is None else kept.read(windows.place(sequence) + start - first, stop - start)
        add_logits(totals, found, np.array(row[start + 1 : stop + 1]), truth)


def step_tokens(engine: Engine) -> int:
    """Return how many tokens to read at once, so that their logits are few."""
    return max(1, min(CHUNK, SCORE_VALUES // engine.model.architecture.vocab))


def read_stream(directory: Path, checkpoint: Checkpoint, documents: Sequence[str]) -> np.ndarray:
    """Return the documents' tokens, int64; InputError for a token outside the embedding."""
    vocabulary = read_vocabulary(directory)
    stream = np.array([token for document in documents for token in vocabulary.document(document)], dtype=np.int64)
    check_ids(stream, vocab_size=vocabulary_rows(checkpoint), text_of=vocabulary.tokenizer.id_to_token)
    return stream


def default_context(checkpoint: Checkpoint) -> int:
    """Return the context of a checkpoint's model, in tokens."""
    return read_architecture(checkpoint.config, where=checkpoint.directory).context


def vocabulary_rows(checkpoint: Checkpoint) -> int:
    """Return how many logits a token has."""
    return read_architecture(checkpoint.config, where=checkpoint.directory).vocab


def check_device(device: str | None) -> None:
    """Raise InputError for anything but the CPU."""
    if device not in (None, "cpu"):
        raise InputError(f"--engine native runs on the CPU, not on {device!r}; drop --device, or use --engine torch")


open_model = EngineModel
