"""Check a measurement of plans before torch is imported."""

from collections.abc import Sequence
from pathlib import Path

from matquant.calibration import calibration_text
from matquant.format.read import open_checkpoint
from matquant.hf.source import check_source
from matquant.hf.text import read_documents
from matquant.system.errors import InputError, check_positive


def check_losses(
    directory: Path | str,
    text: Sequence[Path],
    *,
    reference: Path | str | None,
    samples: int,
    seq_len: int | None,
    seed: int,
) -> list[str]:
    """Return the documents of ``text``, by default the package's calibration text.

    InputError if text, reference or checkpoint is unusable (hashes aside).
    """
    check_positive(samples=samples, seq_len=1 if seq_len is None else seq_len)
    if seed < 0:
        raise InputError(f"seed={seed} is not valid; use a number of at least 0")
    open_checkpoint(directory, check_hashes=False, check_sizes=True)
    if reference is not None:
        check_source(reference)
    return read_documents(text) if text else calibration_text()
