"""Cut a token stream into the sequences of an evaluation: which tokens are read, and which are predicted.

Sequence i reads the tokens i*stride .. i*stride + context - 1 and predicts each one's successor. Each token of the
stream is predicted once: the first sequence predicts ``context`` tokens, every other one only its last ``stride``. So
the predictions of all sequences, in order, are those of the stream's tokens 1, 2, 3 and so on.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from matquant.system.errors import InputError
from matquant.system.progress import Count


@dataclass(frozen=True, kw_only=True)
class Windows:
    """The sequences of an evaluation."""

    stream: np.ndarray  # token ids, int64
    context: int  # tokens that a sequence reads
    stride: int  # tokens between the starts of two sequences

    @property
    def count(self) -> int:
        """Return the number of sequences. Tokens after the last whole one are left out."""
        return (len(self.stream) - 1 - self.context) // self.stride + 1

    @property
    def predicted(self) -> int:
        """Return the number of predicted tokens."""
        return self.context + (self.count - 1) * self.stride

    def row(self, index: int) -> np.ndarray:
        """Return the tokens of a sequence [context + 1]: the inputs, and the successor of the last one."""
        start = index * self.stride
        return self.stream[start : start + self.context + 1]

    def first(self, index: int) -> int:
        """Return the first position of a sequence whose prediction counts."""
        return 0 if index == 0 else self.context - self.stride

    def place(self, index: int) -> int:
        """Return which predicted token, from 0, belongs to the position ``first(index)``."""
        return index * self.stride + self.first(index)


def cut(stream: np.ndarray, *, context: int, stride: int | None = None) -> Windows:
    """Return the sequences of a stream; stride None: no overlap. InputError if there is not one whole sequence."""
    step = context if stride is None else stride
    if not 1 <= step <= context:
        raise InputError(f"stride={step} is outside 1..{context}, the sequence length; use a value inside")
    windows = Windows(stream=stream, context=context, stride=step)
    if windows.count < 1:
        raise InputError(
            f"the text has {len(stream)} tokens, shorter than one sequence of {context} + 1; "
            "give more text or a smaller --seq-len"
        )
    return windows


def steps(names: Iterable[str], report: Count) -> Iterator[tuple[str, Callable[[int, int], None]]]:
    """Yield each width or plan with a function that reports its sequences done, as a part of those of all."""
    whole = list(names)
    for before, name in enumerate(whole):
        label = f"int{name}" if name.isdigit() else name

        def told(done: int, total: int, label: str = label, before: int = before) -> None:
            report(label, done + before * total, total * len(whole))

        yield name, told
