"""Convert text to token ids and back, one token at a time, with a model's tokenizer.json. Needs no transformers.

The beginning-of-sequence token is added if tokenizer.json's post-processor does so, or tokenizer_config.json has
``add_bos_token``; ``document`` always begins with it if the tokenizer has one, as hf/text.py does in training and
evaluation. A sequence ends at any token that generation_config.json, config.json or the tokenizer names as its end:
they often differ (base models with a chat template, fine-tuned ones with an old config.json).
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from matquant.format.facts import CHAT_TEMPLATE, TOKENIZER
from matquant.format.manifest import MANIFEST, seal_hint, side_facts, side_file
from matquant.hf.panics import check_merges, one_line
from matquant.system.errors import InputError
from matquant.system.files import read_text

UNFINISHED = "\ufffd"  # decoders' output for bytes that are not (yet) a character
PATIENCE = 8  # tokens held for one character: its four bytes, and as many that form no character


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """A tokenizer and the settings in the files beside it.

    bos, eos: ids of the tokens that begin and end a sequence, or None. special: such as {"bos_token": "<s>"}, for chat
    templates. chat_template: the default template. named_templates: all named ones, such as "tool_use" and "rag".
    """

    tokenizer: Any
    bos: int | None
    adds_bos: bool
    special: Mapping[str, str]
    chat_template: str | None
    eos: int | None = None
    named_templates: Mapping[str, str] = field(default_factory=dict)

    def reach(self, rows: int) -> int:
        """Return how many of the ids below ``rows`` there are up to the last token; InputError if there is none."""
        while rows and self.tokenizer.id_to_token(rows - 1) is None:
            rows -= 1
        if not rows:
            raise InputError("tokenizer.json has no token that the model knows; copy the model's own")
        return rows

    def prompt(self, text: str) -> list[int]:
        """Return the ids of a prompt, as the model's tokenizer gives them."""
        ids = self._encode(text, add_special_tokens=True)
        if self.adds_bos and self.bos is not None and ids[:1] != [self.bos]:
            return [self.bos, *ids]
        return ids

    def document(self, text: str) -> list[int]:
        """Return the ids of a whole document, after the beginning-of-sequence token if there is one."""
        return [*([] if self.bos is None else [self.bos]), *self.plain(text)]

    def plain(self, text: str) -> list[int]:
        """Return the ids of a text without added tokens."""
        return self._encode(text, add_special_tokens=False)

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Return the text of ids. special: with the text of special tokens."""
        with one_line("the tokenizer cannot decode these tokens", "copy tokenizer.json again"):
            text: str = self.tokenizer.decode(ids, skip_special_tokens=not special)
        return text

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        with one_line("the tokenizer cannot encode this text", "change the text, or copy tokenizer.json again"):
            ids: list[int] = self.tokenizer.encode(_whole(text), add_special_tokens=add_special_tokens).ids
        return ids


def read_vocabulary(directory: Path) -> Vocabulary:
    """Read the vocabulary of a checkpoint; InputError if its tokenizer.json is missing or unreadable."""
    file = side_file(directory, "tokenizer.json")
    if file is None:
        raise InputError(
            f"{directory} has no tokenizer.json, which text needs; add it, or give token ids"
            + seal_hint(directory, "tokenizer.json")
        )
    check_merges(file)
    with one_line(f"{file} cannot be read", "copy it again"):
        tokenizer = Tokenizer.from_str(read_text(file))
        tokenizer.no_truncation()  # ignore settings left by a training run
        tokenizer.no_padding()
        tokenizer.decode(tokenizer.encode("a b").ids)  # some damage shows only here
    config = side_facts(directory, "tokenizer_config.json", TOKENIZER)
    tokenizer.encode_special_tokens = bool(config.get("split_special_tokens"))
    special = _special(config, side_facts(directory, "special_tokens_map.json", {}))
    named = _chat_templates(directory, config)
    ids = {name: tokenizer.token_to_id(text) for name, text in special.items()}
    return Vocabulary(
        tokenizer=tokenizer,
        bos=ids.get("bos_token"),
        eos=ids.get("eos_token"),
        adds_bos=bool(config.get("add_bos_token")),
        special=special,
        chat_template=named.get("default"),
        named_templates=named,
    )


def end_ids(
    config: Mapping[str, Any], generation: Mapping[str, Any], vocabulary: Vocabulary | None = None
) -> frozenset[int]:
    """Return the token ids that end a sequence: all that generation_config.json, config.json and the tokenizer name."""
    text_config = config.get("text_config")
    sources = [generation, config, text_config if isinstance(text_config, dict) else {}]
    given = [source.get("eos_token_id") for source in sources] + [vocabulary.eos if vocabulary else None]
    ids = [token for value in given for token in (value if isinstance(value, list) else [value])]
    return frozenset(token for token in ids if type(token) is int)


def _whole(text: str) -> str:
    """Return ``text``; InputError if it contains undecodable bytes, which a terminal may pass."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"the text is not UTF-8 (at character {error.start}); convert it") from None
    return text


def _special(config: Mapping[str, Any], legacy: Mapping[str, Any]) -> dict[str, str]:
    """Return the special tokens by name. special_tokens_map.json takes precedence where transformers reads it."""
    merged = {**config, **({} if "added_tokens_decoder" in config else legacy)}
    extra = merged.get("extra_special_tokens")
    named = {name: value for name, value in merged.items() if name.endswith("_token")}
    named |= extra if isinstance(extra, dict) else {}
    return {name: text for name, value in named.items() if (text := _content(value))}


def _content(value: Any) -> str | None:
    """Return the text of a special token, given as a string or an object."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None


def _chat_templates(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Return the chat templates by name: files take precedence over tokenizer_config.json, as in transformers, then a
    processor's.

    The folder additional_chat_templates is read only for a float model: a manifest lists no folders.
    """
    folder = directory / "additional_chat_templates"
    inside = [] if (directory / MANIFEST).exists() else sorted(folder.glob("*.jinja"))
    files = {file.stem: file for file in inside}
    default = side_file(directory, "chat_template.jinja")
    if default is not None:
        files["default"] = default
    if files:
        return {name: _read_text(file) for name, file in files.items()}
    template = {"chat_template": CHAT_TEMPLATE.or_null()}
    given = config.get("chat_template") or side_facts(directory, "chat_template.json", template).get("chat_template")
    if isinstance(given, list):  # [{"name": ..., "template": ...}]
        given = {entry.get("name"): entry.get("template") for entry in given if isinstance(entry, dict)}
    if not isinstance(given, dict):
        given = {"default": given}
    return {name: text for name, text in given.items() if isinstance(name, str) and isinstance(text, str)}


def _read_text(file: Path) -> str:
    try:
        return read_text(file)
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8 ({error.reason} at byte {error.start}); convert it") from None


class TextStream:
    """Turn tokens into whole characters, and stop before the first stop text.

    A token may end inside a character, and its text can depend on the token before it. So a few tokens are decoded
    together each time, and text is returned once its last character is complete. after: the ids before the first token.
    special: include the text of special tokens.
    """

    def __init__(
        self, vocabulary: Vocabulary, *, after: Sequence[int] = (), stop: Sequence[str] = (), special: bool = False
    ) -> None:
        if any(not text for text in stop):
            raise InputError("--stop '' is empty; give a text to stop at")
        self.stopped = False
        self._decode = functools.partial(vocabulary.decode, special=special)
        self._stop = tuple(stop)
        self._ids = list(after)
        self._start = 0  # first of the tokens that are decoded together
        self._given = len(self._ids)  # tokens whose text has been returned
        self._held = ""  # text that may be the start of a stop text

    def push(self, token: int) -> str:
        """Return the text that ``token`` completes, perhaps none. Nothing comes after a stop text (``stopped``)."""
        self._ids.append(token)
        before = self._decode(self._ids[self._start : self._given])
        now = self._decode(self._ids[self._start :])
        waiting = len(self._ids) - self._given
        if now.endswith(UNFINISHED) and waiting < PATIENCE:
            return ""
        self._start, self._given = self._given, len(self._ids)
        return self._release(now[len(before) :])

    def finish(self) -> str:
        """Return the text held back as a possible start of a stop text. Half characters are dropped."""
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
    """Return the length of the longest suffix of ``text`` that ``stop`` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
