"""The probe: short texts and their token ids, to compare two readers of one tokenizer.

When a checkpoint is made, transformers and our reader (vocabulary.py) must give the same ids for the probe. Our
reader's ids are stored in matquant_tokens.json, and ``check_tokens`` compares again, without transformers. This detects
a later change of tokenizer.json or tokenizer_config.json, or of the tokenizers library.
"""

import contextlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from matquant.format.facts import read_json
from matquant.format.manifest import side_file
from matquant.format.side_files import TOKENS
from matquant.hf.vocabulary import Vocabulary, read_vocabulary
from matquant.system.errors import InputError

FORMAT = 1
TEXTS = (
    "",
    " ",
    "Hello world",
    " leading",
    "trailing ",
    "two  spaces   three",
    "\n\nlines\n of\r\ntext\t\ttabs\n",
    "0 12 345 6789 3.14 1,000,000 0x1F",
    "it's I'm DON'T we'll; (a) [b] {c} \"d\" e—f…",
    "def f(x):\n    return x[0] + 1  # note\n",
    "https://example.org/a?b=c&d=%20",
    "🙂 👍🏽 👨‍👩‍👧 🏳️‍🌈",
    "café e\u0301te\u0301 ﬁ ① ㎏ ｗｉｄｅ",
    "Привет, мир! Ελληνικά",
    "你好，世界。日本語のテキスト",
    "한국어 \u1112\u1161\u11ab",
    "नमस्ते दुनिया สวัสดี",
    "مرحبا بالعالم שלום",
    "a\u00a0b\u200bc\u3000d",
    "<s>a</s> <|endoftext|> <unk> [INST]",
    "▁a Ġb ĉ <0x0A>",
)
ADDED_PER_TEXT = 32
Record = dict[str, Any]


def probe_texts(added: Iterable[str]) -> list[str]:
    """Return the probe's texts for a tokenizer with these added tokens, each with and without a space before it."""
    tokens = list(added)
    chunks = [tokens[start : start + ADDED_PER_TEXT] for start in range(0, len(tokens), ADDED_PER_TEXT)]
    return [*TEXTS, *("".join(f"a{token} {token}b" for token in chunk) for chunk in chunks)]


def read_probe(
    texts: Sequence[str],
    *,
    bos: int | None,
    plain: Callable[[str], list[int]],
    prompt: Callable[[str], list[int]],
    decode: Callable[[list[int]], str],
) -> Record:
    """Run a tokenizer on the texts: ids without and with the tokens added to a prompt, and the decoded text.

    All three are None for a text that it cannot encode; some tokenizers have no token for unknown letters.
    """
    rows = []
    for text in texts:
        row: Record = {"text": text, "ids": None, "prompt": None, "decoded": None}
        with contextlib.suppress(Exception):  # tokenizers raises plain Exceptions
            ids, whole = list(plain(text)), list(prompt(text))
            row |= {"ids": ids, "prompt": whole, "decoded": decode(whole)}
        rows.append(row)
    return {"format": FORMAT, "bos": bos, "texts": rows}


def read_ours(vocabulary: Vocabulary, texts: Sequence[str]) -> Record:
    """Run the probe through our reader."""
    return read_probe(
        texts,
        bos=vocabulary.bos,
        plain=vocabulary.plain,
        prompt=vocabulary.prompt,
        decode=vocabulary.tokenizer.decode,
    )


def difference(expected: Record, found: Record) -> str | None:
    """Return the first difference between two records of the same texts in words, None if they are equal."""
    for one, other in zip(expected["texts"], found["texts"], strict=True):
        for key, kind in (("ids", "tokens"), ("prompt", "a prompt's tokens"), ("decoded", "decoded text")):
            if one[key] != other[key]:
                return f"{kind} of {_short(one['text'])}: {_short(other[key])} instead of {_short(one[key])}"
    if expected["bos"] != found["bos"]:
        return f"beginning-of-sequence token: {found['bos']} instead of {expected['bos']}"
    return None


def check_tokens(directory: Path) -> None:
    """Raise InputError if a checkpoint's tokenizer gives other tokens than when it was made; skip without a record."""
    file = side_file(directory, TOKENS)
    if file is None:
        return
    expected = read_json(file, remedy="copy it again")
    if expected.get("format") != FORMAT or not _is_record(expected):
        raise InputError(f"{file} is not a record of tokens that this matquant reads; copy it again")
    found = read_ours(read_vocabulary(directory), [row["text"] for row in expected["texts"]])
    differs = difference(expected, found)
    if differs is not None:
        raise InputError(
            f"{directory} has a different tokenizer than when it was made ({differs}); "
            "copy tokenizer.json and tokenizer_config.json again, or quantise again"
        )


def _is_record(values: Record) -> bool:
    rows, bos = values.get("texts"), values.get("bos")
    keys = {"text": str, "decoded": str | None, "ids": list | None, "prompt": list | None}
    return (
        (bos is None or type(bos) is int)
        and isinstance(rows, list)
        and all(isinstance(row, dict) and row.keys() == keys.keys() for row in rows)
        and all(isinstance(row[key], kind) for row in rows for key, kind in keys.items())
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
