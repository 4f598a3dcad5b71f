"""Translate the tokenizer of a GGUF file to tokenizer.json and the files beside it.

The inverse of export/tokens.py. Every name of llama.cpp for splitting text into words stands for its pattern
(llama_words.PATTERNS) and an unknown name is an error; transformers' reader of GGUF files takes GPT-2's pattern then.
``llama`` tokenizers have scores instead of merges: of all pairs of tokens that spell a token, that with the highest
score merges first.

Source: llama-vocab.cpp of llama.cpp, and the tokenizers library.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from matquant.hf.gguf_file import Header
from matquant.hf.llama_words import (
    ALIASES,
    BYTE,
    CONTROL,
    DIGITS,
    GPT2,
    NORMAL,
    PATTERNS,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
)
from matquant.system.errors import InputError
from matquant.system.files import json_bytes

INSTEAD = "give the model as a Hugging Face directory"
KINDS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # of special tokens -> llama.cpp's name
ENDS = ("eos", "eot", "eom")  # tokens that end a reply
NONE = ("no_vocab", "none")  # llama.cpp's names for a file without a tokenizer
SAMPLING = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}


def read_files(header: Header, vocab_size: int) -> dict[str, bytes]:
    """Return the tokenizer and generation files of a model by name; without a tokenizer only the latter.

    vocab_size: rows of the embedding. InputError for tokenizers that we cannot express exactly, and damaged ones.
    """
    files = {"generation_config.json": json_bytes(_generation(header))}
    model = _get(header, "model", "none")
    if model in NONE:
        return files
    if model not in ("gpt2", "llama"):
        raise InputError(f"{header.file} has a tokenizer of type {model!r}; gpt2 and llama are supported; {INSTEAD}")
    texts, types = _texts(header, vocab_size)
    for key in (f"{theirs}_token_id" for theirs in (*KINDS.values(), *ENDS)):
        index = _get(header, key, None)
        if index is not None and (type(index) is not int or not 0 <= index < len(texts)):
            raise InputError(f"{header.file} has tokenizer.ggml.{key} = {index!r}, and {len(texts)} tokens; {INSTEAD}")
    build = _byte_level if model == "gpt2" else _sentencepiece
    tokenizer = build(header, texts, types)
    tokenizer["added_tokens"] = [_added(index, texts[index], kind) for index, kind in enumerate(types) if _splits(kind)]
    tokenizer["post_processor"] = _post_processor(header, texts, sentencepiece=model == "llama")
    files["tokenizer.json"] = json_bytes({"version": "1.0", "truncation": None, "padding": None, **tokenizer})
    files["tokenizer_config.json"] = json_bytes(_config(header, texts))
    template = header.values.get("tokenizer.chat_template")
    if isinstance(template, str):
        files["chat_template.jinja"] = template.encode()
    return files


def _get(header: Header, key: str, default: Any) -> Any:
    return header.values.get(f"tokenizer.ggml.{key}", default)


def _texts(header: Header, vocab_size: int) -> tuple[list[str], list[int]]:
    """Return the text and the type of every token."""
    texts = _list(header, "tokens", str)
    types = _list(header, "token_type", int) or [NORMAL] * len(texts)
    if not texts or len(texts) > vocab_size or len(types) != len(texts):
        raise InputError(
            f"{header.file} has {len(texts)} tokens for {vocab_size} rows of the embedding, and {len(types)} types of "
            f"tokens; {INSTEAD}"
        )
    used = [text for text, kind in zip(texts, types, strict=True) if kind != UNUSED]
    if len(set(used)) != len(used):
        seen: set[str] = set()
        twice = next(text for text in used if text in seen or seen.add(text))  # type: ignore[func-returns-value]
        raise InputError(f"{header.file} has the token {twice!r} twice; {INSTEAD}")
    return texts, types


def _list(header: Header, key: str, kind: type) -> list[Any]:
    """Return a list of the metadata, empty if it is missing; InputError for other values in it."""
    found = _get(header, key, [])
    if not isinstance(found, list) or not all(isinstance(value, kind) for value in found):
        name = {str: "texts", int: "integers", float: "numbers"}[kind]
        raise InputError(f"{header.file} has tokenizer.ggml.{key} that are not {name}; {INSTEAD}")
    return found


def _splits(kind: int) -> bool:
    """Return whether tokens of this type are found in text before anything else."""
    return kind in (CONTROL, USER_DEFINED)


def _added(index: int, text: str, kind: int) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": text, **flags, "special": kind == CONTROL}


def _vocabulary(texts: Sequence[str], types: Sequence[int]) -> dict[str, int]:
    return {text: index for index, (text, kind) in enumerate(zip(texts, types, strict=True)) if kind != UNUSED}


# ---------------------------------------------------------------------------------------------------------------- gpt2


def _byte_level(header: Header, texts: list[str], types: list[int]) -> dict[str, Any]:
    """Return tokenizer.json of byte-level byte-pair encoding."""
    vocabulary = _vocabulary(texts, types)
    steps, whole = _pattern(header)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    parts: list[dict[str, Any]] = []
    for step in steps:
        if step == DIGITS:
            parts.append({"type": "Digits", "individual_digits": True})
        elif step != GPT2:
            parts.append({"type": "Split", "pattern": {"Regex": step}, "behavior": "Isolated", "invert": False})
    parts.append({**byte_level, "use_regex": steps[-1] == GPT2})
    pairs = [tuple(merge.split(" ", 1)) for merge in _list(header, "merges", str)]
    merges = [pair for pair in pairs if len(pair) == 2 and {*pair, "".join(pair)} <= vocabulary.keys()]
    return {
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": parts},
        "decoder": {**byte_level, "use_regex": True},
        "model": _bpe(vocabulary, merges, unknown=None, whole=whole),
    }


def _pattern(header: Header) -> tuple[tuple[str, ...], bool]:
    """Return the patterns that split text, and whether words that are tokens skip merging."""
    name = str(_get(header, "pre", "default"))
    known = {name: key for key, name in PATTERNS.items()}
    found = known.get(ALIASES.get(name, name))
    if found is None:
        raise InputError(
            f"{header.file} splits text into words by llama.cpp's {name!r}, which is not supported, only "
            f"{', '.join(known)}; {INSTEAD}"
        )
    return found


def _bpe(vocabulary: Mapping[str, int], merges: Sequence[Any], *, unknown: str | None, whole: bool) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unknown,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": unknown is not None,
        "byte_fallback": unknown is not None,
        "ignore_merges": whole,
        "vocab": dict(vocabulary),
        "merges": [list(pair) for pair in merges],
    }


# --------------------------------------------------------------------------------------------------------------- llama


def _sentencepiece(header: Header, texts: list[str], types: list[int]) -> dict[str, Any]:
    """Return tokenizer.json of byte-pair encoding with byte fallback, as SentencePiece runs it."""
    scores = _list(header, "scores", float)
    if len(scores) != len(texts):
        raise InputError(f"{header.file} has a tokenizer without a score for each of {len(texts)} tokens; {INSTEAD}")
    vocabulary = _vocabulary(texts, types)
    unknown = next((text for text, kind in zip(texts, types, strict=True) if kind == UNKNOWN), None)
    if unknown is None or BYTE not in types:
        raise InputError(f"{header.file} has a llama tokenizer without an unknown token, or without bytes; {INSTEAD}")
    space = bool(_get(header, "add_space_prefix", True))
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    steps = [{"type": "Prepend", "prepend": SPACE}, replace] if space else [replace]
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if space else []
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    merges = _merges(texts, types, scores)
    return {
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        "model": _bpe(vocabulary, merges, unknown=unknown, whole=False),
    }


def _merges(texts: list[str], types: list[int], scores: list[float]) -> list[tuple[str, str]]:
    """Return all pairs of ordinary tokens that spell one: by its score, its id, and the ids of the pair."""
    places = {text: index for index, text in enumerate(texts) if types[index] == NORMAL}
    found = []
    for text, index in places.items():
        for cut in range(1, len(text)):
            left, right = places.get(text[:cut]), places.get(text[cut:])
            if left is not None and right is not None:
                found.append((-scores[index], index, left, right))
    return [(texts[left], texts[right]) for _, _, left, right in sorted(found)]


# ------------------------------------------------------------------------------------------------------ special tokens


def _ids(header: Header) -> dict[str, int]:
    """Return ids of special tokens by kind."""
    found = {kind: _get(header, f"{theirs}_token_id", None) for kind, theirs in KINDS.items()}
    return {kind: index for kind, index in found.items() if type(index) is int}


def _post_processor(header: Header, texts: Sequence[str], *, sentencepiece: bool) -> dict[str, Any] | None:
    """Return what adds bos and eos to every text: as the file says, else llama.cpp's defaults; None if nothing does."""
    pre = str(_get(header, "pre", "default"))
    usual = sentencepiece or ALIASES.get(pre, pre) in ("llama-bpe", "tekken")
    adds = {"bos": bool(_get(header, "add_bos_token", usual)), "eos": bool(_get(header, "add_eos_token", False))}
    special = {kind: index for kind, index in _ids(header).items() if adds.get(kind)}
    if not special:
        return None
    token = {kind: {"SpecialToken": {"id": texts[index], "type_id": 0}} for kind, index in special.items()}

    def around(name: str) -> list[dict[str, Any]]:
        parts = [token.get("bos"), {"Sequence": {"id": name, "type_id": 0}}, token.get("eos")]
        return [part for part in parts if part is not None]

    known = {texts[index]: {"id": texts[index], "ids": [index], "tokens": [texts[index]]} for index in special.values()}
    return {
        "type": "TemplateProcessing",
        "single": around("A"),
        "pair": [*around("A"), *around("B")],
        "special_tokens": known,
    }


def _config(header: Header, texts: Sequence[str]) -> dict[str, Any]:
    """Return tokenizer_config.json, which makes transformers use tokenizer.json as it is."""
    context = header.values.get(f"{header.architecture}.context_length")
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
        **{f"{kind}_token": texts[index] for kind, index in _ids(header).items()},
    }


def _generation(header: Header) -> dict[str, Any]:
    """Return generation_config.json: the tokens that begin and end a reply, and the file's sampling settings."""
    ids = _ids(header)
    ends = list(dict.fromkeys(_get(header, f"{kind}_token_id", None) for kind in ENDS))
    ends = [index for index in ends if type(index) is int]
    found = {"bos_token_id": ids.get("bos"), "pad_token_id": ids.get("pad")}
    found["eos_token_id"] = ends[0] if len(ends) == 1 else (ends or None)  # type: ignore[assignment]
    given = {ours: header.values.get(f"general.sampling.{theirs}") for theirs, ours in SAMPLING.items()}
    sampling = {key: value for key, value in given.items() if value is not None}
    return {key: value for key, value in found.items() if value is not None} | (
        {"do_sample": True, **sampling} if sampling else {}
    )
