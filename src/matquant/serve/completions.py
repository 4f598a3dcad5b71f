"""POST /v1/completions: continue texts or token ids; with ``echo`` and ``logprobs`` score them."""

from typing import Any

from matquant.serve.errors import ApiError
from matquant.serve.fields import COMPLETION, missing, read_fields
from matquant.serve.jobs import COMPLETION as KIND
from matquant.serve.jobs import Job, checked_ids, make_job
from matquant.serve.service import Service

DEFAULT_TOKENS = 16  # as in OpenAI's API


def prepare(service: Service, body: Any) -> Job:
    """Return the job of a request's body. ApiError if it is wrong. Encodes text, which takes time."""
    values, ignored = read_fields(body, COMPLETION)
    prompt, max_tokens, logprobs = values["prompt"], values["max_tokens"], values["logprobs"]
    if prompt is None:
        raise missing("prompt", COMPLETION["prompt"].words)
    if values["best_of"] not in (None, values["n"]):
        raise ApiError("best_of is not supported unless it equals n; leave it out", param="best_of")
    if max_tokens == 0 and not (values["echo"] and logprobs is not None):
        raise ApiError("max_tokens=0 needs echo=true and logprobs; give at least 1", param="max_tokens")
    is_one = isinstance(prompt, str) or isinstance(prompt[0], int)
    texts = [prompt] if is_one else prompt
    prompts = [checked_ids(service, text, param="prompt", special=values["add_special_tokens"]) for text in texts]
    if not values["echo"]:
        echoes = [""] * len(texts)
    else:
        echoes = [
            text if isinstance(text, str) else service.vocabulary.decode(ids)
            for text, ids in zip(texts, prompts, strict=True)
        ]
    return make_job(
        service,
        values,
        kind=KIND,
        prompts=prompts,
        echoes=echoes,
        max_tokens=DEFAULT_TOKENS if max_tokens is None else max_tokens,
        logprobs=logprobs,
        ignored=ignored,
    )
