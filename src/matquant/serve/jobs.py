"""From the fields of a request to the generations that answer it."""

import dataclasses
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from matquant.engine.sampling import Sampling
from matquant.serve.errors import ApiError
from matquant.serve.fields import STREAM_OPTIONS, read_fields
from matquant.serve.models import Choice, choose
from matquant.serve.service import Service
from matquant.serve.structured import Grammar, grammar_of
from matquant.serve.tools import Calling
from matquant.serve.work import Generation
from matquant.system.errors import InputError

CHAT, COMPLETION = "chat", "completion"
MOST_SEED = 2**63 - 1
SAMPLED = ("top_k", "top_p", "min_p")  # they have an effect only if tokens are sampled
NO_EFFECT = {"top_k": (0, -1), "top_p": (1,), "min_p": (0,)}
MOST_GENERATIONS = 256  # of one request: prompts times n


@dataclass(frozen=True, kw_only=True)
class Job:
    """A checked request. generations: n for each prompt, in order. echoes: the text before each answer, or ""."""

    kind: str
    id: str
    created: int
    choice: Choice
    generations: Sequence[Generation]
    echoes: Sequence[str]
    n: int
    logprobs: int | None
    stop: Sequence[str] = ()
    include_stop: bool = False
    special: bool = False
    calling: Calling | None = None
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    ignored: Sequence[str] = ()
    began: float = field(default_factory=time.monotonic)


def make_job(
    service: Service,
    values: Mapping[str, Any],
    *,
    kind: str,
    prompts: Sequence[Sequence[int]],
    echoes: Sequence[str],
    max_tokens: int | None,
    logprobs: int | None,
    calling: Calling | None = None,
    called: Grammar | None = None,
    ignored: Sequence[str] = (),
) -> Job:
    """Return the job of a request. max_tokens: None for the server's default. called: the constraint of tools."""
    choice, n = choose(service.models, values), values["n"]
    most = min(MOST_GENERATIONS, service.batcher.capacity)
    if len(prompts) * n > most:
        raise ApiError(
            f"{len(prompts)} prompts with n={n} are more than {most} answers; ask for fewer",
            param="n" if n > 1 else "prompt",
        )
    constraint = called or _constraint(service, values)
    if constraint is not None and values["min_tokens"]:
        raise ApiError("min_tokens is not supported together with a constraint on the text", param="min_tokens")
    common = {
        **_common(service, values, choice),
        "logprobs": logprobs,
        "prompt_logprobs": kind == COMPLETION and values["echo"] and logprobs is not None,
    }
    sampling = _sampling(service, values)
    generations = [
        Generation(
            ids=ids,
            max_tokens=_room(service, ids, max_tokens, kind=kind),
            sampling=dataclasses.replace(sampling, seed=(sampling.seed + number) & MOST_SEED),
            constraint=None if constraint is None else constraint.copy(),
            **common,
        )
        for ids in prompts
        for number in range(n)
    ]
    options = _stream_options(values)
    return Job(
        kind=kind,
        id=f"{'chatcmpl' if kind == CHAT else 'cmpl'}-{secrets.token_hex(12)}",
        created=int(time.time()),
        choice=choice,
        generations=generations,
        echoes=[echo for echo in echoes for _ in range(n)],
        n=n,
        logprobs=logprobs,
        stop=[values["stop"]] if isinstance(values["stop"], str) else values["stop"] or [],
        include_stop=values["include_stop_str_in_output"],
        special=not values["skip_special_tokens"] or _needs_special(service, calling),
        calling=calling,
        stream=values["stream"],
        include_usage=options["include_usage"],
        continuous_usage=options["include_usage"] and options["continuous_usage_stats"],
        ignored=[*ignored, *options["unknown"]],
    )


def _stream_options(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of stream_options, and the names of "unknown" ones."""
    if values["stream_options"] is not None and not values["stream"]:
        raise ApiError("stream_options needs stream=true", param="stream_options")
    options, unknown = read_fields(values["stream_options"] or {}, STREAM_OPTIONS, prefix="stream_options.")
    return {**options, "unknown": [f"stream_options.{name}" for name in unknown]}


def _needs_special(service: Service, calling: Calling | None) -> bool:
    """Return whether calls begin with a special token, which text usually leaves out."""
    return calling is not None and service.grammars.special(calling.form.opens) is not None


def _constraint(service: Service, values: Mapping[str, Any]) -> Grammar | None:
    found = grammar_of(values)
    return None if found is None else service.grammars.compile(found[0], param=found[1])


def _common(service: Service, values: Mapping[str, Any], choice: Choice) -> dict[str, Any]:
    """Return the fields of a Generation that all answers share."""
    stops = values["stop_token_ids"] or []
    bias = {int(token): float(value) for token, value in (values["logit_bias"] or {}).items()}
    _check_tokens(service, stops, param="stop_token_ids")
    _check_tokens(service, bias, param="logit_bias")
    return {
        "plan": choice.plan,
        "least_bits": choice.least_bits,
        "priority": choice.priority,
        "min_tokens": values["min_tokens"],
        "repetition_penalty": float(values["repetition_penalty"]),
        "presence_penalty": float(values["presence_penalty"]),
        "frequency_penalty": float(values["frequency_penalty"]),
        "logit_bias": bias,
        "ends": frozenset(stops) | (frozenset() if values["ignore_eos"] else service.engine.ends),
    }


def _check_tokens(service: Service, tokens: Iterable[int], *, param: str) -> None:
    vocab = service.engine.model.architecture.vocab
    if (outside := next((token for token in tokens if token >= vocab), None)) is not None:
        raise ApiError(
            f"{param} has token {outside}, outside the vocabulary of {vocab}; use 0 to {vocab - 1}", param=param
        )


def _sampling(service: Service, values: Mapping[str, Any]) -> Sampling:
    """Return the sampling options: those given, else those of generation_config.json, else greedy.

    top_p, top_k and min_p have no effect on greedy decoding, so one of them without a temperature means temperature 1.
    """
    given = {name: values[name] for name in ("temperature", *SAMPLED)}
    if given["top_k"] == -1:
        given["top_k"] = 0
    seed = secrets.randbits(62) if values["seed"] is None else values["seed"] & MOST_SEED
    sampling = Sampling.of_model(service.engine.generation_config, **given, seed=seed)
    asks = any(values[name] is not None and values[name] not in NO_EFFECT[name] for name in SAMPLED)
    if asks and values["temperature"] is None and sampling.temperature == 0:
        return dataclasses.replace(sampling, temperature=1.0)
    return sampling


def _room(service: Service, ids: Sequence[int], max_tokens: int | None, *, kind: str) -> int:
    """Return the most new tokens after ``ids``. ApiError if they do not fit the context."""
    left, where = service.context - len(ids), "messages" if kind == CHAT else "prompt"
    if max_tokens is None:
        if left < 1:
            raise ApiError(
                f"{len(ids)} tokens of the {where} leave no room in the context of {service.context}; shorten it",
                param=where,
                code="context_length_exceeded",
            )
        return min(left, service.answer_tokens)
    if max_tokens > left:
        raise ApiError(
            f"{len(ids)} tokens of the {where} and max_tokens={max_tokens} exceed the context of {service.context}; "
            "reduce one of them",
            param="max_tokens" if left > 0 else where,
            code="context_length_exceeded",
        )
    return max_tokens


def checked_ids(service: Service, prompt: str | Sequence[int], *, param: str, special: bool) -> list[int]:
    """Return the ids of a prompt; ApiError if it is empty or has ids outside the vocabulary."""
    ids: Sequence[int] | str = prompt
    if not isinstance(prompt, str):
        _check_tokens(service, prompt, param=param)
    try:
        if isinstance(prompt, str) and prompt:
            ids = service.vocabulary.prompt(prompt) if special else service.vocabulary.plain(prompt)
        if len(ids) > service.context:
            raise ApiError(
                f"{len(ids)} tokens of the {param} exceed the context of {service.context}; shorten it",
                param=param,
                code="context_length_exceeded",
            )
        return service.engine.prompt_ids(ids)
    except InputError as error:
        raise ApiError(str(error), param=param) from None
