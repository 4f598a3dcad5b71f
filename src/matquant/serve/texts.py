"""Tokens and text: /tokenize, /detokenize and /tokenizer_info, in vLLM's shapes, and the defaults of sampling."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from matquant.engine.sampling import Sampling
from matquant.serve.chat import conversation_text
from matquant.serve.fields import DETOKENIZE, TOKENIZE, missing, read_fields
from matquant.serve.jobs import checked_ids
from matquant.serve.models import label_of
from matquant.serve.service import Service

Found = tuple[dict[str, Any], Sequence[str]]


def tokenize(service: Service, body: Any) -> Found:
    """Return the ids of a prompt or of a conversation, and the names of unknown fields."""
    values, ignored = read_fields(body, TOKENIZE)
    label_of(service.models, values["model"])
    adds = values["add_special_tokens"]
    if values["messages"] is not None and values["prompt"] is None:
        text, special = conversation_text(service, values, tools=values["tools"]), adds is True
    elif values["prompt"] is not None:
        text, special = values["prompt"], adds is not False
    else:
        raise missing("prompt", "a string, or messages")
    ids = service.vocabulary.prompt(text) if special else service.vocabulary.plain(text)
    answer = {"count": len(ids), "max_model_len": service.context, "tokens": ids, "token_strs": None}
    if values["return_token_strs"]:
        answer["token_strs"] = [service.vocabulary.tokenizer.id_to_token(token) for token in ids]
    return answer, ignored


def detokenize(service: Service, body: Any) -> Found:
    """Return the text of ids, special tokens included, and the names of unknown fields."""
    values, ignored = read_fields(body, DETOKENIZE)
    label_of(service.models, values["model"])
    if values["tokens"] is None:
        raise missing("tokens", DETOKENIZE["tokens"].words)
    ids = checked_ids(service, values["tokens"], param="tokens", special=False) if values["tokens"] else []
    return {"prompt": service.vocabulary.decode(ids, special=True)}, ignored


def tokenizer_info(service: Service) -> dict[str, Any]:
    """Return what clients such as lm-evaluation-harness ask about the tokenizer."""
    vocabulary = service.vocabulary
    end = vocabulary.special.get("eos_token")
    if end is None and service.engine.ends:
        end = vocabulary.tokenizer.id_to_token(min(service.engine.ends))
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        **vocabulary.special,
        "eos_token": end,
        "add_bos_token": vocabulary.adds_bos,
        "chat_template": vocabulary.chat_template,
        "model_max_length": service.context,
        "vocab_size": service.engine.model.architecture.vocab,
    }


def defaults(service: Service) -> dict[str, Any]:
    """Return the sampling options that hold when a request gives none, and what else the playground shows."""
    sampling = dataclasses.asdict(Sampling.of_model(service.engine.generation_config))
    return {
        "model": service.models.name,
        "context": service.context,
        "sampling": {name: value for name, value in sampling.items() if name != "seed"},
        "has_chat_template": service.vocabulary.chat_template is not None,
        "tool_format": service.tool_form,
    }
