"""The fields of a request as a table: what each may be, in words and as a check, and its default.

A field that is null counts as not given. A field that no table lists is ignored, and named in the answer's header
``X-Ignored-Fields``. A field in UNSUPPORTED is rejected unless its value asks for nothing.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matquant.serve.errors import ApiError

MOST_ANSWERS = 128
MOST_STOPS, LONGEST_STOP = 64, 1000
MOST_BIASES = 1024
MOST_TOP_LOGPROBS = 20
SHOWN = 60


@dataclass(frozen=True)
class Field:
    """A field. words: its description, such as "a number from 0 to 2"; holds: whether a value is right."""

    words: str
    holds: Callable[[Any], bool]
    default: Any = None


def integer(low: float, high: float = math.inf, default: int | None = None) -> Field:
    words = f"an integer of at least {low}" if high == math.inf else f"an integer from {low} to {high}"
    return Field(words, lambda value: type(value) is int and low <= value <= high, default)


def number(low: float, high: float, words: str, default: float | None = None) -> Field:
    return Field(f"a number {words}", lambda value: _is_number(value) and low <= value <= high, default)


def flag(default: bool) -> Field:
    return Field("true or false", lambda value: type(value) is bool, default)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < math.inf  # also false for nan


def is_unicode(value: Any) -> bool:
    """Return whether all text in a JSON value can be encoded: JSON can write half a surrogate pair, which cannot."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_stop(value: Any) -> bool:
    texts = [value] if isinstance(value, str) else value
    return (
        isinstance(texts, list)
        and len(texts) <= MOST_STOPS
        and all(_is_text(text) and 0 < len(text) <= LONGEST_STOP for text in texts)
    )


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(token) is int and 0 <= token < 2**31 for token in value)


def _is_bias(value: Any) -> bool:
    return (_is_object(value) and len(value) <= MOST_BIASES) and all(
        key.isascii() and key.isdigit() and len(key) < 10 and _is_number(bias) and -100 <= bias <= 100
        for key, bias in value.items()
    )


def _is_prompt(value: Any) -> bool:
    if not isinstance(value, list) or not value:
        return _is_text(value)
    return _is_ids(value) or all(_is_text(entry) or (_is_ids(entry) and entry) for entry in value)


def _is_objects(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_object, value))


TEXT = Field("a string", _is_text)
OBJECT = Field("an object", _is_object)
ANYTHING = Field("any value", lambda value: True)
COUNT = integer(1)

COMMON: Mapping[str, Field] = {
    "model": TEXT,
    "bits": integer(1, 8),
    "plan": TEXT,
    "min_bits": integer(1, 8),
    "service_tier": Field("auto, default, priority or flex", lambda v: v in ("auto", "default", "priority", "flex")),
    "max_tokens": integer(0),
    "min_tokens": integer(0, default=0),
    "temperature": number(0, 100, "from 0 to 100"),
    "top_p": Field("a number above 0 and at most 1", lambda value: _is_number(value) and 0 < value <= 1),
    "top_k": integer(-1, 2**31),
    "min_p": number(0, 1, "from 0 to 1"),
    "seed": integer(-(2**63), 2**64),
    "repetition_penalty": Field(
        "a number above 0 and at most 100", lambda value: _is_number(value) and 0 < value <= 100, 1.0
    ),
    "presence_penalty": number(-2, 2, "from -2 to 2", 0.0),
    "frequency_penalty": number(-2, 2, "from -2 to 2", 0.0),
    "logit_bias": Field(f"at most {MOST_BIASES} token ids, each with a number from -100 to 100", _is_bias),
    "stop": Field(f"1 to {LONGEST_STOP} characters, or a list of at most {MOST_STOPS} such texts", _is_stop),
    "stop_token_ids": Field("a list of token ids", _is_ids),
    "include_stop_str_in_output": flag(False),
    "skip_special_tokens": flag(True),
    "ignore_eos": flag(False),
    "n": integer(1, MOST_ANSWERS, 1),
    "stream": flag(False),
    "stream_options": OBJECT,
    "response_format": OBJECT,
    "structured_outputs": OBJECT,
    "echo": flag(False),
    # of no effect on the answer
    **dict.fromkeys(("user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"), TEXT),
    "metadata": OBJECT,
}
CHAT: Mapping[str, Field] = {
    **COMMON,
    "messages": Field("a list of at least one message, each an object", lambda value: _is_objects(value) and value),
    "max_completion_tokens": COUNT,
    "max_tokens": COUNT,
    "logprobs": flag(False),
    "top_logprobs": integer(0, MOST_TOP_LOGPROBS),
    "tools": Field("a list of tools, each an object", _is_objects),
    "tool_choice": Field("none, auto, required, or an object that names a function", lambda v: type(v) in (str, dict)),
    "parallel_tool_calls": flag(True),
    "documents": Field("a list of documents, each an object", _is_objects),
    "add_generation_prompt": Field("true or false", lambda value: type(value) is bool),
    "continue_final_message": flag(False),
    "add_special_tokens": flag(False),
    "chat_template_kwargs": OBJECT,
}
COMPLETION: Mapping[str, Field] = {
    **COMMON,
    "prompt": Field("a string, a list of strings, a list of token ids, or a list of lists of them", _is_prompt),
    "logprobs": integer(0, MOST_TOP_LOGPROBS),
    "best_of": integer(1, MOST_ANSWERS),
    "add_special_tokens": flag(True),
}
TOKENIZE: Mapping[str, Field] = {
    "model": TEXT,
    "prompt": Field("a string", _is_text),
    "add_special_tokens": Field("true or false", lambda value: type(value) is bool),
    "return_token_strs": flag(False),
    **{key: CHAT[key] for key in ("messages", "tools", "add_generation_prompt", "continue_final_message")},
    "chat_template_kwargs": OBJECT,
}
DETOKENIZE: Mapping[str, Field] = {"model": TEXT, "tokens": Field("a list of token ids", _is_ids)}
STREAM_OPTIONS: Mapping[str, Field] = {
    "include_usage": flag(False),
    "continuous_usage_stats": flag(False),
    "include_obfuscation": Field("false", lambda value: value is False),
}

# Fields of OpenAI, vLLM or llama.cpp that are not supported -> the values that ask for nothing, and what to do instead.
UNSUPPORTED: Mapping[str, tuple[Sequence[Any], str]] = {
    "functions": ([[]], "use tools"),
    "function_call": (["none"], "use tool_choice"),
    "audio": ([], "answers are text only"),
    "modalities": ([["text"]], "answers are text only"),
    "prediction": ([], "leave it out"),
    "web_search_options": ([], "leave it out"),
    "store": ([False], "answers are not stored"),
    "reasoning_effort": (["none"], "use chat_template_kwargs if the model's template knows it"),
    "verbosity": (["medium"], "ask for it in the prompt"),
    "suffix": ([""], "models here do not fill in the middle"),
    "use_beam_search": ([False], "leave it out"),
    "length_penalty": ([1.0], "leave it out"),
    "prompt_logprobs": ([], "use echo and logprobs of /v1/completions"),
    "truncate_prompt_tokens": ([], "shorten the prompt"),
    "allowed_token_ids": ([], "use structured_outputs"),
    "bad_words": ([[]], "use logit_bias"),
    "chat_template": ([], "the model's own template is used; put another into its directory"),
    "guided_json": ([], 'use structured_outputs {"json": ...}'),
    "guided_regex": ([], 'use structured_outputs {"regex": ...}'),
    "guided_choice": ([], 'use structured_outputs {"choice": ...}'),
    "guided_grammar": ([], 'use structured_outputs {"grammar": ...}'),
    "grammar": ([""], 'use structured_outputs {"grammar": ...}'),
    "json_schema": ([{}], "use response_format"),
    "mirostat": ([0], "leave it out"),
    "typical_p": ([1.0], "leave it out"),
    "priority": ([0], "use service_tier"),
    "return_tokens_as_token_ids": ([False], "use /tokenize"),
    "return_token_ids": ([False], "use /tokenize"),
    "logits_processors": ([[]], "leave it out"),
    "spaces_between_special_tokens": ([True], "leave it out"),
    "prompt_embeds": ([], "give text or token ids"),
    "vllm_xargs": ([{}], "leave it out"),
}


def read_fields(body: Any, table: Mapping[str, Field], *, prefix: str = "") -> tuple[dict[str, Any], list[str]]:
    """Return the value of every field of ``table``, with defaults, and the names of unknown fields, sorted.

    ApiError for a body that is not an object, a wrong value, or a field that is not supported.
    """
    if not isinstance(body, dict):
        raise ApiError(f"{prefix.rstrip('.') or 'the body'} is not a JSON object; give one", param=prefix or None)
    values = {name: field.default for name, field in table.items()}
    ignored = []
    for name, value in body.items():
        if value is None:
            continue
        if name in table:
            if not table[name].holds(value):
                raise wrong(prefix + name, value, table[name].words)
            values[name] = value
        elif name in UNSUPPORTED:
            nothing, instead = UNSUPPORTED[name]
            if value not in nothing:
                raise ApiError(f"{prefix}{name} is not supported; {instead}", param=prefix + name)
        else:
            ignored.append(name)
    return values, sorted(ignored)


def wrong(param: str, value: Any, words: str) -> ApiError:
    """Return the error for a field whose value is not right."""
    shown = repr(value)
    shown = shown if len(shown) <= SHOWN else f"{shown[: SHOWN - 3]}..."
    return ApiError(f"{param}={shown} is not valid; give {words}", param=param)


def missing(param: str, words: str) -> ApiError:
    """Return the error for a field that must be given."""
    return ApiError(f"{param} is missing; give {words}", param=param)
