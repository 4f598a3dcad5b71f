"""The JSON of answers: whole ones and chunks of a stream, for chats and completions, with usage and widths served."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from matquant.serve.jobs import CHAT, Job
from matquant.serve.models import AUTO
from matquant.serve.service import Service
from matquant.serve.tokens import show
from matquant.serve.tools import Delta
from matquant.serve.work import Scored
from matquant.serve.writing import Counts

LEAST_LOGPROB = -9999.0  # JSON has no -inf
TokenBytes = Callable[[int], bytes]


@dataclass(kw_only=True)
class Answer:
    """One answer while it is collected."""

    text: str = ""
    tokens: list[Scored] = field(default_factory=list)
    prompt: list[Scored] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    finish: str = "stop"
    matched: str | int | None = None

    def add(self, deltas: Sequence[Delta]) -> None:
        """Append pieces of text and of calls."""
        for delta in deltas:
            self.text += delta.text
            if delta.id:
                self.calls.append(
                    {"id": delta.id, "type": "function", "function": {"name": delta.name, "arguments": ""}}
                )
            if delta.arguments:
                self.calls[-1]["function"]["arguments"] += delta.arguments


# ------------------------------------------------------------------------------------------------------------- widths


def served_tokens(counts: Sequence[Counts]) -> dict[str, int]:
    """Return tokens by label of a width, in the order in which the widths were first used."""
    total: dict[str, int] = {}
    for count in counts:
        for label, tokens in count.served:
            total[label] = total.get(label, 0) + tokens
    return total


def mean_bits(service: Service, served: Mapping[str, int]) -> float | None:
    """Return bits per weight, averaged over the tokens served; None if it is not known."""
    known = {label: service.models.bits_per_weight.get(label) for label in served}
    if not served or None in known.values():
        return None
    return sum(tokens * (known[label] or 0) for label, tokens in served.items()) / sum(served.values())


def width_name(label: str) -> str:
    """Return "int4" for "4"; a plan's name as it is."""
    return f"int{label}" if label.isdigit() else label


def model_name(service: Service, job: Job, served: Mapping[str, int]) -> str:
    """Return the name that served: of the width if it was one, else ``NAME:auto``."""
    label = job.choice.label if job.choice.label != AUTO or len(served) != 1 else next(iter(served))
    return f"{service.models.name}:{width_name(label)}"


def width_report(service: Service, job: Job, counts: Sequence[Counts]) -> dict[str, Any]:
    """Return the "matquant" object of an answer."""
    served = served_tokens(counts)
    bits = mean_bits(service, served)
    prompt = next((count.prompt_bits for count in counts if count.prompt_bits is not None), None)
    return {
        "requested": AUTO if job.choice.label == AUTO else width_name(job.choice.label),
        "served": [
            {"bits": int(label), "tokens": tokens} if label.isdigit() else {"plan": label, "tokens": tokens}
            for label, tokens in served.items()
        ],
        "bits_per_weight": None if bits is None else round(bits, 3),
        **({} if prompt is None else {"prompt_bits": prompt}),
        "reason": next((count.reason for count in reversed(counts) if count.reason), "")
        or ("auto" if job.choice.label == AUTO else "requested"),
    }


def width_header(served: Mapping[str, int]) -> str:
    """Return the value of X-Matquant-Width, such as "int8=40,int4=60"."""
    return ",".join(f"{width_name(label)}={tokens}" for label, tokens in served.items())


def usage(job: Job, counts: Sequence[Counts]) -> dict[str, Any]:
    """Return the "usage" object: each prompt counts once, whatever n is."""
    prompts = sum(len(generation.ids) for generation in job.generations[:: job.n])
    tokens = sum(count.tokens for count in counts)
    cached = sum(count.cached_tokens for count in counts[:: job.n])
    return {
        "prompt_tokens": prompts,
        "completion_tokens": tokens,
        "total_tokens": prompts + tokens,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {
            "accepted_prediction_tokens": sum(count.accepted for count in counts),
            "rejected_prediction_tokens": sum(count.rejected for count in counts),
        },
    }


# ---------------------------------------------------------------------------------------------------- log-probabilities


def _number(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, LEAST_LOGPROB)


def chat_logprobs(tokens: Sequence[Scored], count: int, read: TokenBytes) -> dict[str, Any]:
    """Return the "logprobs" object of a chat: ``content`` with the ``count`` most probable tokens of each place."""

    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        data = read(token)
        return {"token": show(data), "logprob": _number(logprob), "bytes": list(data)}

    return {
        "content": [
            {**entry(scored.token, scored.logprob), "top_logprobs": [entry(*pair) for pair in scored.top[:count]]}
            for scored in tokens
        ],
    }


def text_logprobs(tokens: Sequence[Scored], count: int, read: TokenBytes, *, offset: int = 0) -> dict[str, Any]:
    """Return the "logprobs" object of a completion. offset: characters of the answer before these tokens.

    The top tokens of a place include the most probable and the chosen one, with the same number for the same token; if
    ``count`` is 0, they are the chosen one only.
    """
    texts = [show(read(scored.token)) for scored in tokens]
    offsets = []
    for scored in tokens:
        offsets.append(offset)
        offset += len(read(scored.token).decode(errors="ignore"))
    return {
        "text_offset": offsets,
        "tokens": texts,
        "token_logprobs": [_number(scored.logprob) for scored in tokens],
        "top_logprobs": [_top(scored, text, count, read) for scored, text in zip(tokens, texts, strict=True)],
    }


def _top(scored: Scored, text: str, count: int, read: TokenBytes) -> dict[str, float | None] | None:
    if scored.logprob is None:
        return None
    top: dict[str, float | None] = {}
    for token, logprob in scored.top if count else ():
        top.setdefault(show(read(token)), _number(logprob))
    top.setdefault(text, _number(scored.logprob))
    return top


# ------------------------------------------------------------------------------------------------------ whole answers


def finish_reason(job: Job, finish: str, calls: int) -> str:
    """Return OpenAI's word for how an answer ended."""
    if calls and finish == "stop" and not (job.calling and job.calling.named):
        return "tool_calls"
    return finish


def whole(service: Service, job: Job, answers: Sequence[Answer], counts: Sequence[Counts]) -> dict[str, Any]:
    """Return the body of an answer."""
    make = _chat_choice if job.kind == CHAT else _text_choice
    return {
        "id": job.id,
        "object": "chat.completion" if job.kind == CHAT else "text_completion",
        "created": job.created,
        "model": model_name(service, job, served_tokens(counts)),
        "system_fingerprint": service.fingerprint,
        **({} if job.choice.tier is None else {"service_tier": job.choice.tier}),
        "choices": [make(service, job, index, answer) for index, answer in enumerate(answers)],
        "usage": usage(job, counts),
        "matquant": width_report(service, job, counts),
    }


def _chat_choice(service: Service, job: Job, index: int, answer: Answer) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": job.echoes[index] + answer.text}
    if answer.calls:
        message |= {"content": answer.text or None, "tool_calls": answer.calls}
    logprobs = None
    if job.logprobs is not None:
        logprobs = chat_logprobs(_without_end(job, index, answer.tokens), job.logprobs, service.token_bytes)
    return {
        "index": index,
        "message": message,
        "logprobs": logprobs,
        "finish_reason": finish_reason(job, answer.finish, len(answer.calls)),
        "stop_reason": answer.matched,
    }


def _without_end(job: Job, index: int, tokens: Sequence[Scored]) -> list[Scored]:
    """Return the tokens whose text is in the answer: not the one that ended it."""
    return [scored for scored in tokens if scored.token not in job.generations[index].ends]


def _text_choice(service: Service, job: Job, index: int, answer: Answer) -> dict[str, Any]:
    scored = [*answer.prompt, *answer.tokens]
    return {
        "index": index,
        "text": job.echoes[index] + answer.text,
        "logprobs": None if job.logprobs is None else text_logprobs(scored, job.logprobs, service.token_bytes),
        "finish_reason": finish_reason(job, answer.finish, 0),
        "stop_reason": answer.matched,
    }


# ------------------------------------------------------------------------------------------------------------- chunks


class Chunks:
    """Make the chunks of one stream."""

    def __init__(self, service: Service, job: Job) -> None:
        self._service, self._job = service, job
        self._offsets = [0] * len(job.generations)

    def first(self, index: int) -> dict[str, Any] | None:
        """Return the chunk before an answer: the role, or the echo."""
        echo = self._job.echoes[index]
        if self._job.kind == CHAT:
            return self._chunk(index, {"role": "assistant", "content": echo or None})
        return self._chunk(index, {"text": echo}) if echo and self._job.logprobs is None else None

    def pieces(
        self, index: int, deltas: Sequence[Delta], tokens: Sequence[Scored], *, prompt: Sequence[Scored] = ()
    ) -> list[dict[str, Any]]:
        """Return the chunks of a piece of an answer; its log-probabilities are in the first."""
        job, read = self._job, self._service.token_bytes
        logprobs = None
        if job.kind == CHAT:
            if job.logprobs is not None and (shown := _without_end(job, index, tokens)):
                logprobs = chat_logprobs(shown, job.logprobs, read)
            contents = [_delta(delta) for delta in deltas] or ([{"content": ""}] if logprobs else [])
        else:
            scored = [*prompt, *tokens]
            if job.logprobs is not None and scored:
                logprobs = text_logprobs(scored, job.logprobs, read, offset=self._offsets[index])
                self._offsets[index] += sum(len(read(s.token).decode(errors="ignore")) for s in scored)
            contents = [{"text": delta.text} for delta in deltas] or ([{"text": ""}] if logprobs else [])
        return [
            self._chunk(index, content, logprobs=logprobs if number == 0 else None)
            for number, content in enumerate(contents)
        ]

    def last(self, index: int, finish: str, calls: int, matched: str | int | None) -> dict[str, Any]:
        """Return the chunk that ends an answer."""
        content: dict[str, Any] = {} if self._job.kind == CHAT else {"text": ""}
        return self._chunk(index, content, finish=finish_reason(self._job, finish, calls), matched=matched)

    def summary(self, counts: Sequence[Counts]) -> dict[str, Any]:
        """Return the chunk after all answers, with usage and widths."""
        return self._head() | {
            "model": model_name(self._service, self._job, served_tokens(counts)),
            "choices": [],
            "usage": usage(self._job, counts),
            "matquant": width_report(self._service, self._job, counts),
        }

    def _head(self) -> dict[str, Any]:
        job = self._job
        return {
            "id": job.id,
            "object": "chat.completion.chunk" if job.kind == CHAT else "text_completion",
            "created": job.created,
            "model": model_name(self._service, job, {}),
            "system_fingerprint": self._service.fingerprint,
            **({} if job.choice.tier is None else {"service_tier": job.choice.tier}),
        }

    def _chunk(
        self,
        index: int,
        content: dict[str, Any],
        *,
        logprobs: dict[str, Any] | None = None,
        finish: str | None = None,
        matched: str | int | None = None,
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, "logprobs": logprobs, "finish_reason": finish}
        choice |= {"delta": content} if self._job.kind == CHAT else content
        if finish is not None:
            choice["stop_reason"] = matched
        return self._head() | {"choices": [choice]}


def _delta(delta: Delta) -> dict[str, Any]:
    """Return the delta of a chat chunk."""
    if delta.index is None:
        return {"content": delta.text}
    call: dict[str, Any] = {"index": delta.index, "function": {"arguments": delta.arguments}}
    if delta.id:
        call |= {"id": delta.id, "type": "function", "function": {"name": delta.name, "arguments": ""}}
    return {"tool_calls": [call]}
