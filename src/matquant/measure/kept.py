"""Keep a reference model's log-probabilities in a file, so that they are computed once for any number of widths.

A safetensors file with ``codes`` [T, V] uint16: how far each log-probability lies below the token's largest, in steps
of 2^-11 nats, and 65,535 for more than 32 nats (probability 0); with ``best`` [T] int32, the most probable token, and
``loss`` [T] float32, nats of the token that follows. Reading normalises again. Two bytes per token and vocabulary
entry: 8,192 tokens of a vocabulary of 49,152 take 805 MB. A code is off by at most 2^-12 nats; the errors have either
sign, and the KL divergence, their mean over the vocabulary, is off by less than 1e-6 nats (docs/evaluation.md).

The metadata name the model and the text, so that a file of others is rejected.

T tokens, V vocabulary, n tokens of a piece.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from matquant.format.tensor_file import read_tensor
from matquant.hf.sidefiles import local_directory
from matquant.hf.tensors import HEADER_BYTES
from matquant.hf.text import data_sha256
from matquant.measure.metrics import Truth
from matquant.measure.windows import Windows
from matquant.system.errors import InputError
from matquant.system.files import check_space, replace_when_done, sha256

STEP = 2.0**-11  # nats
LARGEST = 2**16 - 1
KIND = "log-probabilities of a reference model"
AGAIN = "delete it, or give --reference-logits another name"


class Writer:
    """Writes the log-probabilities of a reference, piece by piece."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._best: list[np.ndarray] = []
        self._losses: list[np.ndarray] = []

    def add(self, codes: np.ndarray, best: np.ndarray, losses: np.ndarray) -> None:
        """Append n tokens: codes [n, V] as ``encode`` returns them, the best token, the loss of the true one."""
        self._stream.write(np.ascontiguousarray(codes, dtype="<u2").data)
        self._best.append(best.astype("<i4"))
        self._losses.append(losses.astype("<f4"))

    def finish(self) -> None:
        """Write what follows the codes."""
        for parts in (self._best, self._losses):
            self._stream.write(np.concatenate(parts).data)


class Kept:
    """A finished file. log_perplexity: of the reference, nats per token."""

    def __init__(self, file: Path, *, tokens: int, vocab: int, start: int) -> None:
        self.file, self.tokens, self.vocab, self._start = file, tokens, vocab, start
        rest = start + 2 * tokens * vocab
        self._best = read_tensor(file, "<i4", start=rest, shape=(tokens,))
        losses = read_tensor(file, "<f4", start=rest + 4 * tokens, shape=(tokens,))
        self.log_perplexity = float(losses.sum(dtype=np.float64)) / tokens

    def read(self, first: int, count: int) -> Truth:
        """Return the reference's prediction of ``count`` tokens from predicted token ``first`` on."""
        start = self._start + 2 * first * self.vocab
        codes = read_tensor(self.file, "<u2", start=start, shape=(count, self.vocab))
        return Truth(log_probabilities=decode(codes), best=self._best[first : first + count])


def encode(logits_TV: np.ndarray) -> np.ndarray:
    """Return uint16 codes of float32 logits: steps below the largest of each row."""
    below = logits_TV.max(axis=1, keepdims=True) - logits_TV
    below *= 1 / STEP
    codes: np.ndarray = np.rint(np.minimum(below, LARGEST)).astype(np.uint16)
    return codes


def decode(codes_TV: np.ndarray) -> np.ndarray:
    """Return normalised log-probabilities, float32; -infinity for the largest code."""
    found = codes_TV.astype(np.float32)
    found *= -STEP
    found[codes_TV == LARGEST] = -np.inf
    found -= np.log(np.exp(found).sum(axis=1, dtype=np.float64)).astype(np.float32)[:, None]
    return found


def describe(windows: Windows, *, reference: str | None) -> dict[str, str]:
    """Return what a file must have been made of. reference: from ``identity``, None: any model."""
    facts = {
        "kind": KIND,
        "text": data_sha256(windows.stream[: windows.predicted + 1]),
        "context": str(windows.context),
        "stride": str(windows.stride),
    }
    return facts if reference is None else {**facts, "model": reference}


def identity(source: Path | str) -> str:
    """Return a text that names a float model: the sha256 of a directory's weights, or a hub id and its revision."""
    if not Path(source).is_dir():
        snapshot = local_directory(source)
        return f"{source} {snapshot.name if snapshot is not None else ''}"
    digest = hashlib.sha256()
    for file in sorted(Path(source).iterdir()):
        if file.suffix in (".safetensors", ".bin") or file.name == "config.json":
            digest.update(f"{file.name} {sha256(file)}\n".encode())
    return digest.hexdigest()


@contextlib.contextmanager
def writing(file: Path, facts: Mapping[str, str], *, tokens: int, vocab: int) -> Iterator[Writer]:
    """Yield a Writer; afterwards the file is in place. InputError if the disk has too little space."""
    codes, each = 2 * tokens * vocab, 4 * tokens
    header: dict[str, Any] = {
        "__metadata__": dict(facts),
        "codes": {"dtype": "U16", "shape": [tokens, vocab], "data_offsets": [0, codes]},
        "best": {"dtype": "I32", "shape": [tokens], "data_offsets": [codes, codes + each]},
        "loss": {"dtype": "F32", "shape": [tokens], "data_offsets": [codes + each, codes + 2 * each]},
    }
    text = json.dumps(header, sort_keys=True).encode()
    text += b" " * (-len(text) % 8)
    check_space(file, 8 + len(text) + codes + 2 * each)
    file.parent.mkdir(parents=True, exist_ok=True)
    with replace_when_done(file) as partial, partial.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        writer = Writer(stream)
        yield writer
        writer.finish()


def open_kept(file: Path, facts: Mapping[str, str], *, tokens: int, vocab: int) -> Kept:
    """Open a finished file; InputError if it was made of another model or text, or is damaged."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length)) if length <= HEADER_BYTES else {}
        found, shape = dict(header["__metadata__"]), header["codes"]["shape"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        found, shape = {}, []
    if found.get("kind") != KIND:
        raise InputError(f"--reference-logits {file} is not a file of reference logits; {AGAIN}")
    for name, value in facts.items():
        if found.get(name) != value:
            what = {"context": f"sequences of {found.get(name)}", "stride": f"stride {found.get(name)}"}
            other = what.get(name, f"another {name}")
            raise InputError(f"--reference-logits {file} was made with {other}; {AGAIN}")
    if shape != [tokens, vocab]:
        raise InputError(f"--reference-logits {file} has the shape {shape}, not {[tokens, vocab]}; {AGAIN}")
    if file.stat().st_size < 8 + length + 2 * tokens * vocab + 8 * tokens:
        raise InputError(f"--reference-logits {file} is cut short; {AGAIN}")
    return Kept(file, tokens=tokens, vocab=vocab, start=8 + length)
