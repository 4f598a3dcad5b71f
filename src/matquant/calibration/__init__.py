"""Calibration text that ships with the package, for quantising a model without your own text.

Calibration measures the inputs of a layer, so the text should look like the model's later input: modern prose and
dialogue, some older prose, code, and many languages and scripts. ``text.xz`` holds 404 such documents, 404 kB in 150 kB
compressed: at least 109 sequences of 1,024 tokens with a vocabulary of 49,152. The documents are in a fixed random
order that spreads each kind evenly, so that any prefix of a few thousand tokens is mixed too.

Everything is in the public domain or written for this project; ``SOURCES.md`` beside this file lists each part with its
licence. ``xz -dc text.xz`` gives the plain text, documents separated by ``<|endoftext|>``.

Limits: it covers no domain in depth. For a model that serves one domain, calibrate with text of that domain. The text
is too short to train on, and much of it is famous, so never measure perplexity on it.
"""

import lzma
from pathlib import Path

from matquant.hf.text import split_documents

FILE = Path(__file__).with_name("text.xz")


def calibration_text() -> list[str]:
    """Return the documents of the packaged calibration text, in order, as ``read_documents`` returns a user's."""
    return split_documents(lzma.decompress(FILE.read_bytes()).decode("utf-8"))
