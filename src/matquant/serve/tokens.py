"""The text and the bytes of single tokens, for log-probabilities: a token may be a part of a character."""

import functools
import json
from collections.abc import Callable
from typing import Any

from matquant.hf.llama_words import SPACE
from matquant.hf.vocabulary import Vocabulary


def token_reader(vocabulary: Vocabulary) -> Callable[[int], bytes]:
    """Return a function from a token id to its bytes, b"" for an id that the tokenizer does not have."""
    tokenizer = vocabulary.tokenizer
    added = {token: entry.content for token, entry in tokenizer.get_added_tokens_decoder().items()}
    is_bytes = "ByteLevel" in _decoder(tokenizer)
    letters = {letter: byte for byte, letter in enumerate(_letters())}

    @functools.lru_cache(maxsize=2**16)
    def read(token: int) -> bytes:
        if token in added:
            return str(added[token]).encode()
        text = tokenizer.id_to_token(token) or ""
        if is_bytes and all(letter in letters for letter in text):
            return bytes(letters[letter] for letter in text)
        if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            return bytes([int(text[3:5], 16)])
        return text.replace(SPACE, " ").encode()

    return read


def show(data: bytes) -> str:
    """Return the bytes as text, or escaped as OpenAI's API does if they are no whole characters."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _decoder(tokenizer: Any) -> str:
    """Return the names of the tokenizer's decoders."""
    if tokenizer.decoder is None:
        return ""
    return json.dumps(json.loads(tokenizer.decoder.__getstate__()))


def _letters() -> list[str]:
    """Return the letter that stands for each byte in byte-level vocabularies (GPT-2's table)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    moved = {byte: 256 + n for n, byte in enumerate(byte for byte in range(256) if byte not in set(plain))}
    return [chr(moved.get(byte, byte)) for byte in range(256)]
