"""Constraints on the text of an answer: JSON, a schema, a regular expression, a choice or a grammar (llguidance).

Schemas and grammars come from requests, so their size and the work for a step are limited. Between the parts of JSON at
most BLANKS blanks may come: without the limit small models can write blanks until the answer's length ends.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import GbnfToLarkError, any_to_lark

from matquant.serve.errors import ApiError
from matquant.serve.fields import Field, read_fields, wrong

BLANKS = 8
OVERRIDES: Any = {"whitespace_pattern": rf"[\x20\x0A\x0D\x09]{{1,{BLANKS}}}"}
MOST_GRAMMAR = 100_000  # symbols
MOST_CHARACTERS = 200_000  # of a schema or grammar
DEEPEST = 64  # levels of a schema
KINDS = {
    "json": Field("a JSON schema, as an object or a string", lambda value: isinstance(value, (dict, str))),
    "json_object": Field("true", lambda value: value is True),
    "regex": Field("a regular expression", lambda value: isinstance(value, str)),
    "choice": Field(
        "a list of strings", lambda v: isinstance(v, list) and bool(v) and all(isinstance(c, str) for c in v)
    ),
    "grammar": Field("a grammar, in the form of Lark or GBNF", lambda value: isinstance(value, str)),
}


class Grammars:
    """Compile grammars for one tokenizer. Thread-safe."""

    def __init__(self, tokenizer_json: str, *, vocab: int, ends: Sequence[int]) -> None:
        self._tokenizer = LLTokenizer(tokenizer_json, n_vocab=vocab, eos_token=sorted(ends) or None)
        self._limits = LLParserLimits(max_grammar_size=MOST_GRAMMAR, verbose_errors=False)

    def compile(self, grammar: str, *, param: str) -> "Grammar":
        """Return the constraint of a grammar; ApiError with the compiler's words if it is wrong or too large."""
        check_length(grammar, param=param)
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=self._limits)
        if matcher.is_error():
            reason = matcher.get_error().strip().splitlines()[0][:300]
            raise ApiError(f"{param} cannot be used ({reason}); change it", param=param)
        return Grammar(matcher)

    def special(self, text: str) -> int | None:
        """Return the id of the special token ``text``, None if it is none."""
        ids = self._tokenizer.tokenize_str(text, parse_special=True)
        return ids[0] if len(ids) == 1 and self._tokenizer.is_special_token(ids[0]) else None


class Grammar:
    """A constraint: which tokens may come next. For one generation; ``copy`` it for another."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def copy(self) -> "Grammar":
        """Return the same constraint at the same place."""
        return Grammar(self._matcher.deep_copy())

    def mask(self, logits: np.ndarray) -> None:
        """Set the logits [vocab], float32, of tokens that may not come next to -inf, in place."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            raise ValueError(f"the grammar failed: {self._matcher.get_error()[:200]}")
        allowed = np.unpackbits(bits, bitorder="little")[: len(logits)].view(bool)
        logits[: len(allowed)][~allowed] = -np.inf
        logits[len(allowed) :] = -np.inf

    def accept(self, token: int) -> None:
        """Take a chosen token."""
        if not self._matcher.consume_token(token):
            raise ValueError(f"the grammar does not allow token {token}: {self._matcher.get_error()[:200]}")

    @property
    def ended(self) -> bool:
        """Return whether nothing more may come."""
        return bool(self._matcher.is_stopped())

    def allowed(self, tokens: Sequence[int]) -> int:
        """Return how many of the tokens may come next, one after another."""
        return int(self._matcher.validate_tokens(list(tokens)))

    def forced(self) -> list[int]:
        """Return the tokens that write the only text that may come next, as far as there is only one."""
        return list(self._matcher.compute_ff_tokens())


def grammar_of(values: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return the grammar that response_format or structured_outputs ask for, and the field; None for free text."""
    formatted, structured = values["response_format"], values["structured_outputs"]
    if structured is not None:
        found = _structured(structured)
        if found is not None and formatted is not None and formatted.get("type") != "text":
            raise ApiError(
                "structured_outputs and response_format exclude each other; use one", param="response_format"
            )
        return found
    if formatted is None:
        return None
    kind = formatted.get("type")
    known = {"type", {"json_schema": "json_schema", "json_object": "schema"}.get(str(kind), "type")}
    if unknown := sorted(set(formatted) - known):
        raise ApiError(
            f"response_format has {unknown[0]!r}, which is not supported; leave it out", param="response_format"
        )
    if kind == "text":
        return None
    if kind == "json_object":
        schema = formatted.get("schema", {"type": "object"})
        return json_grammar(_schema(schema, "response_format.schema"), param="response_format"), "response_format"
    if kind == "json_schema":
        wrapped = formatted.get("json_schema")
        schema = wrapped.get("schema") if isinstance(wrapped, dict) else None
        if not isinstance(schema, dict):
            raise wrong("response_format.json_schema", wrapped, 'an object {"name": ..., "schema": {...}}')
        return json_grammar(schema, param="response_format"), "response_format"
    raise wrong("response_format.type", kind, "text, json_object or json_schema")


def _structured(given: Mapping[str, Any]) -> tuple[str, str] | None:
    values, unknown = read_fields(given, KINDS, prefix="structured_outputs.")
    kinds = [kind for kind, value in values.items() if value is not None]
    if unknown or len(kinds) != 1:
        raise ApiError(
            f"structured_outputs has {', '.join([*kinds, *unknown]) or 'nothing'}; give one of {', '.join(KINDS)}",
            param="structured_outputs",
        )
    (kind,) = kinds
    value, param = values[kind], f"structured_outputs.{kind}"
    if kind == "json":
        return json_grammar(_schema(value, param), param=param), param
    if kind == "json_object":
        return json_grammar({"type": "object"}, param=param), param
    if kind == "regex":
        return LLMatcher.grammar_from_regex(value), param
    if kind == "choice":
        return LLMatcher.grammar_from_regex("|".join(map(_escaped, value))), param
    check_length(value, param=param)
    try:
        return any_to_lark(value), param
    except (GbnfToLarkError, ValueError, IndexError, KeyError, RecursionError) as error:
        raise ApiError(f"{param} cannot be read ({error}); use the form of Lark or GBNF", param=param) from None


def _schema(value: Any, param: str) -> dict[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = None
    if not isinstance(value, dict):
        raise ApiError(f"{param} is not the JSON of an object; give a JSON schema", param=param)
    return value


def _escaped(text: str) -> str:
    """Return a regular expression for exactly ``text``."""
    return "".join(letter if letter.isalnum() or ord(letter) > 127 else rf"\x{ord(letter):02x}" for letter in text)


def json_grammar(schema: Mapping[str, Any], *, param: str) -> str:
    """Return the grammar of a JSON schema, with bounded blanks."""
    check_depth(schema, param=param)
    try:
        return str(LLMatcher.grammar_from_json_schema(dict(schema), overrides=OVERRIDES))
    except (ValueError, TypeError) as error:
        raise ApiError(f"{param} cannot be used ({error}); change the schema", param=param) from None


def check_length(text: str, *, param: str) -> None:
    """ApiError for a grammar with more than MOST_CHARACTERS characters."""
    if len(text) > MOST_CHARACTERS:
        raise ApiError(
            f"{param} has {len(text):,} characters, but at most {MOST_CHARACTERS:,} are read; shorten it", param=param
        )


def check_depth(value: Any, *, param: str, left: int = DEEPEST) -> None:
    """ApiError for a schema with more than DEEPEST levels."""
    if left == 0:
        raise ApiError(f"{param} has more than {DEEPEST} levels; use $defs for a schema that repeats", param=param)
    inside = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    for entry in inside:
        check_depth(entry, param=param, left=left - 1)


def literal(text: str) -> str:
    """Return a literal of a Lark grammar."""
    return json.dumps(text)


def lark_json(schema: Mapping[str, Any], *, param: str) -> str:
    """Return a JSON schema as a part of a Lark grammar."""
    check_depth(schema, param=param)
    return "%json " + json.dumps({**schema, "x-guidance": OVERRIDES})


def is_name(text: Any) -> bool:
    """Return whether ``text`` can name a function, as OpenAI's API allows."""
    return isinstance(text, str) and re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", text) is not None
