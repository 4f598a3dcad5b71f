"""Text to token ids and back, one token at a time, with the tokenizer.json beside a model. No transformers needed.

Beginning of sequence: what tokenizer.json's own post-processor adds, or tokenizer_config.json asks for with
``add_bos_token``; ``document`` always begins with it where the tokenizer has one, as matquant.text does in training and
evaluation. Ends of sequence are those of generation_config.json, else of config.json.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from matquant.errors import InputError
from matquant.manifest import seal_hint, side_file

UNFINISHED = "\ufffd"  # what decoders write for bytes that are no character (yet)
PATIENCE = 8  # tokens that may wait for one character: its four bytes, and as many that are no character


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """A tokenizer and what the files beside it say.

    bos: id of the beginning-of-sequence token, or None. special: such as {"bos_token": "<s>"}, for chat templates.
    """

    tokenizer: Any
    bos: int | None
    adds_bos: bool
    special: Mapping[str, str]
    chat_template: str | None

    def prompt(self, text: str) -> list[int]:
        """Ids of a prompt, as the model's tokenizer gives them."""
        ids: list[int] = self.tokenizer.encode(_whole(text)).ids
        if self.adds_bos and self.bos is not None and ids[:1] != [self.bos]:
            return [self.bos, *ids]
        return ids

    def document(self, text: str) -> list[int]:
        """Ids of a whole document, after the beginning-of-sequence token if there is one."""
        return [*([] if self.bos is None else [self.bos]), *self.plain(text)]

    def plain(self, text: str) -> list[int]:
        """Ids of a text with nothing added."""
        ids: list[int] = self.tokenizer.encode(_whole(text), add_special_tokens=False).ids
        return ids


def read_vocabulary(directory: Path) -> Vocabulary:
    """The vocabulary of a checkpoint; InputError if it has no tokenizer.json or that cannot be read."""
    file = side_file(directory, "tokenizer.json")
    if file is None:
        raise InputError(
            f"{directory} has no tokenizer.json, which text needs; put it there, or give token ids"
            + seal_hint(directory, "tokenizer.json")
        )
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing more precise
        raise InputError(f"{file} cannot be read ({error}); copy it again") from None
    tokenizer.no_truncation()  # what a training run left there is not ours
    tokenizer.no_padding()
    config = read_json(side_file(directory, "tokenizer_config.json"))
    special = {key: text for key, value in config.items() if key.endswith("_token") and (text := _content(value))}
    return Vocabulary(
        tokenizer=tokenizer,
        bos=tokenizer.token_to_id(special["bos_token"]) if "bos_token" in special else None,
        adds_bos=bool(config.get("add_bos_token")),
        special=special,
        chat_template=_chat_template(directory, config),
    )


def read_json(file: Path | None) -> dict[str, Any]:
    """The object in a JSON file, {} if there is no such file; InputError if it is something else."""
    if file is None:
        return {}
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is not JSON ({error}); copy it again") from None
    if not isinstance(values, dict):
        raise InputError(f"{file} is not a JSON object; copy it again")
    return values


def end_ids(config: Mapping[str, Any], generation: Mapping[str, Any]) -> frozenset[int]:
    """The token ids that end a sequence."""
    given = generation.get("eos_token_id", config.get("eos_token_id"))
    return frozenset(given if isinstance(given, list) else [] if given is None else [given])


def _whole(text: str) -> str:
    """``text`` itself; InputError if it has bytes that were no characters, as a terminal may pass them."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"the text is not UTF-8 (at character {error.start}); convert it") from None
    return text


def _content(value: Any) -> str | None:
    """The text of a special token, which is a string or a described one."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None


def _chat_template(directory: Path, config: Mapping[str, Any]) -> str | None:
    file = side_file(directory, "chat_template.jinja")
    if file is not None:
        return file.read_text(encoding="utf-8")
    given = config.get("chat_template")
    if isinstance(given, list):  # named templates
        given = {entry.get("name"): entry.get("template") for entry in given}.get("default")
    return given if isinstance(given, str) else None


class TextStream:
    """Tokens in, whole characters out, cut before the first of the stop texts.

    A tokenizer's token may end inside a character, and what it decodes to can depend on the token before it; so a
    window of tokens is decoded each time, and text is given out once its last character is whole. after: the ids that
    the first token follows.
    """

    def __init__(self, vocabulary: Vocabulary, *, after: Sequence[int] = (), stop: Sequence[str] = ()) -> None:
        if any(not text for text in stop):
            raise InputError("--stop '' is empty; give the text to stop at")
        self.stopped = False
        self._decode = vocabulary.tokenizer.decode
        self._stop = tuple(stop)
        self._ids = list(after)
        self._start = 0  # of the window
        self._given = len(self._ids)  # tokens whose text has been taken
        self._held = ""  # text that may be the beginning of a stop text

    def push(self, token: int) -> str:
        """The text that ``token`` completes, perhaps none. Nothing comes after a stop text (``stopped``)."""
        self._ids.append(token)
        before = self._decode(self._ids[self._start : self._given])
        now = self._decode(self._ids[self._start :])
        waiting = len(self._ids) - self._given
        if now.endswith(UNFINISHED) and waiting < PATIENCE:
            return ""
        self._start, self._given = self._given, len(self._ids)
        return self._release(now[len(before) :])

    def finish(self) -> str:
        """What was held back: a beginning of a stop text that never came. Half characters are dropped."""
        before = self._decode(self._ids[self._start : self._given])
        rest = self._decode(self._ids[self._start :])[len(before) :].rstrip(UNFINISHED)
        self._start = self._given = len(self._ids)
        text = self._release(rest)
        if not self.stopped:
            text, self._held = text + self._held, ""
        return text

    def _release(self, text: str) -> str:
        if self.stopped:
            return ""
        text = self._held + text
        found = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that ``stop`` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
