"""Convert tokenizer.json to GGUF, so that llama.cpp splits text into the same tokens.

We support two of llama.cpp's algorithms. ``gpt2``: byte-level byte-pair encoding of words with a list of merges.
llama.cpp has code for splitting text into words, selected by a name, so tokenizer.json must contain one of the patterns
behind these names (PATTERNS). ``llama``: byte-pair encoding of whole texts as in SentencePiece, where two neighbours
may merge if they spell a token, the token with the highest score first. tokenizer.json has merges instead. The two
agree if every way to split a token in two is a merge and no two tokens' merges are interleaved, as in every tokenizer
converted from SentencePiece. Tokenizers that llama.cpp would run differently are rejected, or noted if the difference
is rare.

Source: llama-vocab.cpp of llama.cpp, and the tokenizers library.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from matquant.format.facts import GENERATION, read_json
from matquant.format.manifest import side_facts, side_file
from matquant.hf.llama_words import BYTE, CONTROL, DIGITS, GPT2, NORMAL, PATTERNS, SPACE, UNKNOWN, UNUSED, USER_DEFINED
from matquant.hf.vocabulary import Vocabulary, end_ids, read_vocabulary
from matquant.system.errors import InputError

INSTEAD = "use --to mlx or dense"
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
NO_MERGES = "no merges"  # llama.cpp needs at least one merge; these two parts are never adjacent
KINDS = ("bos", "eos", "unk", "pad")  # special tokens whose ids are written


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """A tokenizer as a GGUF file describes it."""

    model: str  # llama.cpp's algorithm; "no_vocab" if there is no tokenizer
    texts: Sequence[str] = field(default=(), repr=False)  # text of every row of the embedding
    types: Sequence[int] = field(default=(), repr=False)  # type of every row of the embedding
    scores: Sequence[float] = field(default=(), repr=False)  # for "llama" only
    merges: Sequence[str] = field(default=(), repr=False)  # for "gpt2" only
    pre: str = "default"  # llama.cpp's name for splitting text into words, for "gpt2" only
    special: Mapping[str, int] = field(default_factory=dict)  # such as {"bos": 1}
    adds_bos: bool = False  # whether a text gets a beginning-of-sequence token
    adds_eos: bool = False  # whether a text gets an end-of-sequence token
    adds_space: bool = False  # whether a text gets a space before it
    chat_template: str | None = None  # Jinja
    notices: tuple[str, ...] = ()  # differences in llama.cpp, for people


def read_tokens(directory: Path, config: Mapping[str, Any]) -> Tokens:
    """Read a checkpoint's tokenizer; InputError if llama.cpp has none that splits text in the same way."""
    file = side_file(directory, "tokenizer.json")
    if file is None:
        return Tokens(model="no_vocab", notices=("there is no tokenizer.json, so the file takes token ids, not text",))
    vocabulary, given = read_vocabulary(directory), read_json(file)
    model = given["model"]
    if model.get("type") != "BPE":
        raise InputError(f"{file} is a {model.get('type')} tokenizer, but GGUF export supports only BPE; {INSTEAD}")
    merges = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    texts, types = _texts(file, vocabulary, given, int(config["vocab_size"]))
    special = _special(vocabulary, config, side_facts(directory, "generation_config.json", GENERATION))
    adds_bos, adds_eos = _added(file, vocabulary, special)
    common = Tokens(
        model="gpt2",
        texts=texts,
        types=types,
        special=special,
        adds_bos=adds_bos,
        adds_eos=adds_eos,
        chat_template=vocabulary.chat_template,
    )
    if model.get("byte_fallback"):
        space = _adds_space(file, given)
        normal = {text: index for index, (text, kind) in enumerate(zip(texts, types, strict=True)) if kind == NORMAL}
        scores = _scores(file, normal, merges, len(texts))
        for index, kind in enumerate(types):
            if kind == USER_DEFINED:
                texts[index] = texts[index].replace(SPACE, " ")
        return replace(common, model="llama", scores=scores, adds_space=space)
    notices = _check_normalizer(file, given.get("normalizer"))
    pre = _pre(file, vocabulary, given)
    written = [" ".join(part.replace(" ", "Ġ") for part in merge) for merge in merges]
    return replace(common, pre=pre, merges=written or [NO_MERGES], notices=notices)


def _texts(file: Path, vocabulary: Vocabulary, given: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Return the text and type of each of ``size`` tokens; ids without a token are unused."""
    texts = [f"[PAD{index}]" for index in range(size)]
    types = [UNUSED] * size
    added = {entry["id"]: entry for entry in given.get("added_tokens", [])}
    for text, index in vocabulary.tokenizer.get_vocab(with_added_tokens=True).items():
        if index >= size:
            raise InputError(
                f"{file} has token {index} ({text!r}), but the embedding has {size} rows; copy the model's tokenizer"
            )
        texts[index], types[index] = text, NORMAL
        if BYTE_TOKEN.fullmatch(text) and given["model"].get("byte_fallback"):
            types[index] = BYTE
        elif index in added:
            types[index] = CONTROL if added[index]["special"] else USER_DEFINED
        if text == given["model"].get("unk_token"):
            types[index] = UNKNOWN
    return texts, types


def _special(vocabulary: Vocabulary, config: Mapping[str, Any], generation: Mapping[str, Any]) -> dict[str, int]:
    """Return special ids by kind: from the names in tokenizer_config.json, else from the ids in config.json."""
    found = {}
    for kind in KINDS:
        text = vocabulary.special.get(f"{kind}_token")
        index = vocabulary.tokenizer.token_to_id(text) if text is not None else config.get(f"{kind}_token_id")
        ends = sorted(end_ids(config, generation)) if kind == "eos" else []
        if isinstance(index, list) or (index is None and ends):
            index = ends[0] if ends else None
        if type(index) is int and 0 <= index < config["vocab_size"]:
            found[kind] = index
    return found


def _added(file: Path, vocabulary: Vocabulary, special: Mapping[str, int]) -> tuple[bool, bool]:
    """Return whether the tokenizer adds a token before every text, and after it."""
    ids = vocabulary.prompt("")
    first = bool(ids) and ids[0] == special.get("bos")
    last = len(ids) > first and ids[-1] == special.get("eos")
    if len(ids) != first + last:
        raise InputError(f"{file} adds the tokens {ids} to every text, but llama.cpp adds only bos and eos; {INSTEAD}")
    return first, last


# ---------------------------------------------------------------------------------------------------------------- gpt2


def _check_normalizer(file: Path, normalizer: Mapping[str, Any] | None) -> tuple[str, ...]:
    if normalizer is None:
        return ()
    if normalizer["type"] == "NFC":
        return ("llama.cpp does not normalise text (NFC) as the tokenizer does; normalise prompts yourself",)
    raise InputError(
        f"{file} normalises text ({normalizer['type']}), but llama.cpp's gpt2 tokenizer does not; {INSTEAD}"
    )


def _pre(file: Path, vocabulary: Vocabulary, given: Mapping[str, Any]) -> str:
    """Return llama.cpp's name for splitting text into words."""
    patterns = _patterns(given.get("pre_tokenizer") or {})
    whole = bool(given["model"].get("ignore_merges"))
    if (patterns, whole) in PATTERNS:
        return PATTERNS[patterns, whole]
    if (patterns, not whole) in PATTERNS:
        missed = _unmerged(vocabulary, given)
        if missed is None:
            return PATTERNS[patterns, not whole]
        raise InputError(
            f"{file} has ignore_merges={whole}, unlike llama.cpp's {PATTERNS[patterns, not whole]}, and merges do not "
            f"lead to the token {missed!r}; {INSTEAD}"
        )
    raise InputError(
        f"{file} splits text by {' then '.join(patterns) or 'nothing'}, which llama.cpp does not support; {INSTEAD}"
    )


def _patterns(pre_tokenizer: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the patterns of a pre-tokenizer in order, or its type if it has none that we know."""
    steps, found = pre_tokenizer.get("pretokenizers", [pre_tokenizer]), []
    for step in steps:
        if step.get("type") == "ByteLevel" and not step.get("add_prefix_space"):
            found += [GPT2] if step.get("use_regex", True) else []
        elif step.get("type") == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            found.append(str(step["pattern"].get("Regex", step["pattern"])))
        elif step.get("type") == "Digits" and step["individual_digits"]:
            found.append(DIGITS)
        else:
            found.append(json.dumps(step))
    return tuple(found)


def _unmerged(vocabulary: Vocabulary, given: Mapping[str, Any]) -> str | None:
    """Return a token that its text does not merge into, None if there is none."""
    merging = vocabulary.tokenizer.from_str(json.dumps({**given, "model": {**given["model"], "ignore_merges": False}}))
    special = {entry["content"] for entry in given.get("added_tokens", [])}
    texts = (text for text in given["model"]["vocab"] if text not in special)
    return next((text for text in texts if len(merging.model.tokenize(text)) != 1), None)


# --------------------------------------------------------------------------------------------------------------- llama


def _adds_space(file: Path, given: Mapping[str, Any]) -> bool:
    """Return whether a space is put before every text; InputError if the tokenizer changes text in another way."""
    normalizer, pre = given.get("normalizer") or {}, given.get("pre_tokenizer") or {}
    steps = normalizer.get("normalizers", [normalizer] if normalizer else [])
    kinds = [step["type"] for step in steps]
    replaced = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    if kinds in (["Replace"], ["Prepend", "Replace"]) and not pre and steps[-1] == replaced:
        return len(steps) == 2 and steps[0]["prepend"] == SPACE
    metaspace = pre.get("type") == "Metaspace" and pre.get("replacement") == SPACE and not pre.get("split", True)
    if metaspace and not steps:
        return bool(pre.get("prepend_scheme", "always") != "never")
    # Gemma replaces spaces first, so its pre-tokenizer finds none to split at
    if kinds == ["Replace"] and steps[0] == replaced and pre.get("pattern") == {"String": " "}:
        return False
    raise InputError(
        f"{file} changes text by {', '.join(kinds) or 'nothing'} and {pre.get('type', 'nothing')}, but "
        f"llama.cpp only replaces spaces by {SPACE}; {INSTEAD}"
    )


def _scores(file: Path, tokens: Mapping[str, int], merges: Sequence[tuple[str, ...]], size: int) -> list[float]:
    """Return scores that make SentencePiece merge in the order of ``merges``; InputError if there are none.

    tokens: ids of the ordinary tokens by text.
    """
    order: dict[str, int] = {}
    previous = None
    for left, right in merges:
        text = left + right
        if text != previous and text in order:
            raise InputError(
                f"{file} merges {text!r} both before and after other tokens, which scores cannot express; {INSTEAD}"
            )
        order.setdefault(text, len(order))
        previous = text
    known = set(merges)
    for text in tokens:
        for cut in range(1, len(text)):
            parts = text[:cut], text[cut:]
            if parts not in known and all(len(part) == 1 or part in tokens for part in parts):
                raise InputError(
                    f"{file} does not merge {parts[0]!r} and {parts[1]!r}, but llama.cpp would, "
                    f"because {text!r} is a token; {INSTEAD}"
                )
    scores = [0.0] * size
    for text, place in order.items():
        if text in tokens:  # other tokens are split off before merging
            scores[tokens[text]] = -float(place + 1)
    return scores
