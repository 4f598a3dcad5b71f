"""Text to token ids and back, one token at a time, with the tokenizer.json beside a model. No transformers needed.

Beginning of sequence: what tokenizer.json's own post-processor adds, or tokenizer_config.json asks for with
``add_bos_token``; ``document`` always begins with it where the tokenizer has one, as hf/text.py does in training
and evaluation. A sequence ends at any token that generation_config.json, config.json or the tokenizer names as its end:
they often differ (base models with a chat template, fine-tuned ones with an old config.json).
"""

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

UNFINISHED = "\ufffd"  # what decoders write for bytes that are no character (yet)
PATIENCE = 8  # tokens that may wait for one character: its four bytes, and as many that are no character


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """A tokenizer and what the files beside it say.

    bos, eos: ids of the tokens that begin and end a sequence, or None. special: such as {"bos_token": "<s>"}, for chat
    templates. chat_template: the default one. named_templates: all that have names, such as "tool_use" and "rag".
    """

    tokenizer: Any
    bos: int | None
    adds_bos: bool
    special: Mapping[str, str]
    chat_template: str | None
    eos: int | None = None
    named_templates: Mapping[str, str] = field(default_factory=dict)

    def prompt(self, text: str) -> list[int]:
        """Ids of a prompt, as the model's tokenizer gives them."""
        ids = self._encode(text, add_special_tokens=True)
        if self.adds_bos and self.bos is not None and ids[:1] != [self.bos]:
            return [self.bos, *ids]
        return ids

    def document(self, text: str) -> list[int]:
        """Ids of a whole document, after the beginning-of-sequence token if there is one."""
        return [*([] if self.bos is None else [self.bos]), *self.plain(text)]

    def plain(self, text: str) -> list[int]:
        """Ids of a text with nothing added."""
        return self._encode(text, add_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without special tokens."""
        with one_line("the tokenizer cannot write these tokens", "copy tokenizer.json again"):
            text: str = self.tokenizer.decode(ids)
        return text

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        with one_line("the tokenizer cannot read this text", "change the text, or copy tokenizer.json again"):
            ids: list[int] = self.tokenizer.encode(_whole(text), add_special_tokens=add_special_tokens).ids
        return ids


def read_vocabulary(directory: Path) -> Vocabulary:
    """The vocabulary of a checkpoint; InputError if it has no tokenizer.json or that cannot be read."""
    file = side_file(directory, "tokenizer.json")
    if file is None:
        raise InputError(
            f"{directory} has no tokenizer.json, which text needs; put it there, or give token ids"
            + seal_hint(directory, "tokenizer.json")
        )
    check_merges(file)
    with one_line(f"{file} cannot be read", "copy it again"):
        tokenizer = Tokenizer.from_str(read_text(file))
        tokenizer.no_truncation()  # what a training run left there is not ours
        tokenizer.no_padding()
        tokenizer.decode(tokenizer.encode("a b").ids)  # some damage shows only now
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
    """The token ids that end a sequence: all that generation_config.json, config.json and the tokenizer name."""
    text_config = config.get("text_config")
    sources = [generation, config, text_config if isinstance(text_config, dict) else {}]
    given = [source.get("eos_token_id") for source in sources] + [vocabulary.eos if vocabulary else None]
    ids = [token for value in given for token in (value if isinstance(value, list) else [value])]
    return frozenset(token for token in ids if type(token) is int)


def _whole(text: str) -> str:
    """``text`` itself; InputError if it has bytes that were no characters, as a terminal may pass them."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"the text is not UTF-8 (at character {error.start}); convert it") from None
    return text


def _special(config: Mapping[str, Any], legacy: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens by name. special_tokens_map.json has the last word where transformers reads it."""
    merged = {**config, **({} if "added_tokens_decoder" in config else legacy)}
    extra = merged.get("extra_special_tokens")
    named = {name: value for name, value in merged.items() if name.endswith("_token")}
    named |= extra if isinstance(extra, dict) else {}
    return {name: text for name, value in named.items() if (text := _content(value))}


def _content(value: Any) -> str | None:
    """The text of a special token, which is a string or a described one."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None


def _chat_templates(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The chat templates by name: files before tokenizer_config.json, as in transformers, and a processor's last.

    The folder additional_chat_templates is read beside a float model only: a manifest lists no folders.
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
    """Tokens in, whole characters out, cut before the first of the stop texts.

    A tokenizer's token may end inside a character, and what it decodes to can depend on the token before it; so a
    window of tokens is decoded each time, and text is given out once its last character is whole. after: the ids that
    the first token follows.
    """

    def __init__(self, vocabulary: Vocabulary, *, after: Sequence[int] = (), stop: Sequence[str] = ()) -> None:
        if any(not text for text in stop):
            raise InputError("--stop '' is empty; give the text to stop at")
        self.stopped = False
        self._decode = vocabulary.decode
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
