"""Turn text files into one token stream, and that into batches that depend only on the seed and the step.

Documents are separated by ``<|endoftext|>`` (a file without it is one document), stripped, and each begins with the
tokenizer's beginning-of-sequence token where it has one. A batch is a pure function of (seed, step), which is what
makes a resumed run bit-identical.
"""

import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from matquant.hf.panics import one_line
from matquant.system.errors import InputError
from matquant.system.files import read_text

SEPARATOR = "<|endoftext|>"


def read_documents(files: Sequence[Path | str]) -> list[str]:
    """Read all documents of the files, in order; InputError for a missing or empty file."""
    documents: list[str] = []
    for file in map(Path, files):
        if not file.is_file():
            raise InputError(f"--text {file}: no such file; give a UTF-8 text file")
        try:
            text = read_text(file)
        except UnicodeDecodeError as error:
            raise InputError(f"--text {file} is not UTF-8 ({error.reason} at byte {error.start}); convert it") from None
        found = split_documents(text)
        if not found:
            raise InputError(f"--text {file} is empty; give a UTF-8 text file")
        documents += found
    return documents


def split_documents(text: str) -> list[str]:
    """Return the documents between separators, stripped, without empty ones."""
    return [document.strip() for document in text.split(SEPARATOR) if document.strip()]


def token_stream(documents: Sequence[str], tokenizer: Any, *, vocab_size: int | None = None) -> np.ndarray:
    """Return the documents as one int64 array of token ids, each document after a beginning-of-sequence token.

    vocab_size: number of rows of the embedding; None: not checked. InputError for an id outside it.
    """
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    # Many tokenizers warn about long texts; we cut them into sequences ourselves.
    with one_line("the tokenizer cannot read the text", "change the text, or copy tokenizer.json again"):
        encoded = tokenizer(list(documents), add_special_tokens=False, verbose=False)["input_ids"]
    stream = np.array([token for ids in encoded for token in (*start, *ids)], dtype=np.int64)
    if vocab_size is not None:
        check_ids(stream, vocab_size=vocab_size, text_of=tokenizer.convert_ids_to_tokens)
    return stream


def check_ids(
    ids: Sequence[int] | np.ndarray, *, vocab_size: int, text_of: Callable[[int], str | None] = lambda token: None
) -> None:
    """Raise InputError for the first id outside an embedding of ``vocab_size`` rows. text_of: the text of a token."""
    found = np.asarray(ids)
    outside = found[(found < 0) | (found >= vocab_size)] if found.size else found
    if outside.size:
        token = int(outside[0])
        text = text_of(token) if token >= 0 else None
        named = str(token) if text is None else f"{token} ({text!r})"
        raise InputError(
            f"token {named} is outside the vocabulary of {vocab_size}; use the model's own tokenizer, "
            "or resize the float model's embedding to fit it"
        )


def count_windows(tokens: int, length: int) -> int:
    """Return how many sequences ``cut_windows`` cuts from ``tokens`` tokens; InputError if there is none."""
    count = (tokens - 1) // length
    if count < 1:
        raise InputError(
            f"the text has {tokens} tokens, shorter than one sequence of {length} + 1; "
            "give more text or a smaller --seq-len"
        )
    return count


def cut_windows(stream: np.ndarray, length: int) -> np.ndarray:
    """Cut non-overlapping sequences [count, length + 1]: ``length`` inputs and, shifted by one, as many targets.

    The last token of a sequence is the first of the next one. InputError if the stream is shorter than one sequence.
    """
    count = count_windows(len(stream), length)
    starts = np.arange(count)[:, None] * length
    windows: np.ndarray = stream[starts + np.arange(length + 1)]
    return windows


def batch(windows: np.ndarray, step: int, *, size: int, seed: int) -> np.ndarray:
    """Return the sequences [size, length + 1] of step 0, 1, ...: epochs of seeded permutations, one after the other."""
    count = len(windows)
    rows = []
    for position in range(step * size, (step + 1) * size):
        epoch, place = divmod(position, count)
        rows.append(_permutation(count, seed, epoch)[place])
    chosen: np.ndarray = windows[rows]
    return chosen


def data_sha256(stream: np.ndarray) -> str:
    """Return the sha256 of the token stream as little-endian int64."""
    return hashlib.sha256(stream.astype("<i8").tobytes()).hexdigest()


@functools.lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)
