"""POST /v1/chat/completions: the model's chat template around the messages, tools included."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from matquant.hf.templates import render
from matquant.serve.errors import ApiError
from matquant.serve.fields import CHAT, missing, read_fields
from matquant.serve.jobs import CHAT as KIND
from matquant.serve.jobs import Job, checked_ids, make_job
from matquant.serve.service import Service
from matquant.serve.structured import check_depth, grammar_of
from matquant.serve.tools import constraint, read_calling
from matquant.system.errors import InputError

ROLES = ("system", "user", "assistant", "tool", "developer")
RESERVED = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template")
LEGACY = {"function_call": "use tool_calls", "audio": "give its text"}  # parts of a message that are not read
TEXTS = ("text", "input_text", "output_text")  # types of a part that are text


def prepare(service: Service, body: Any) -> Job:
    """Return the job of a request's body. ApiError if it is wrong. Renders and encodes, which takes time."""
    values, ignored = read_fields(body, CHAT)
    if values["messages"] is None:
        raise missing("messages", CHAT["messages"].words)
    if values["top_logprobs"] and not values["logprobs"]:
        raise ApiError("top_logprobs needs logprobs=true", param="top_logprobs")
    limits = {key: values[key] for key in ("max_tokens", "max_completion_tokens") if values[key] is not None}
    if len(set(limits.values())) > 1:
        raise ApiError("max_tokens and max_completion_tokens differ; give one of them", param="max_tokens")
    calling = read_calling(values, service.tool_form)
    if calling is not None and grammar_of(values) is not None:
        raise ApiError(
            "response_format and structured_outputs are not supported together with tools; "
            "leave them out, or use tool_choice none",
            param="response_format",
        )
    text = conversation_text(service, values, tools=None if calling is None else values["tools"])
    ids = checked_ids(service, text, param="messages", special=values["add_special_tokens"])
    last = values["messages"][-1]
    echo = values["echo"] and last.get("role") == "assistant"
    return make_job(
        service,
        values,
        kind=KIND,
        prompts=[ids],
        echoes=[_content(last, len(values["messages"]) - 1) or "" if echo else ""],
        max_tokens=next(iter(limits.values()), None),
        logprobs=(values["top_logprobs"] or 0) if values["logprobs"] else None,
        calling=calling,
        called=None if calling is None else constraint(calling, service.grammars),
        ignored=ignored,
    )


def conversation_text(service: Service, values: Mapping[str, Any], *, tools: Sequence[Mapping[str, Any]] | None) -> str:
    """Return the conversation as the chat template writes it. ApiError if it is wrong, or the template rejects it."""
    if service.vocabulary.chat_template is None and not service.vocabulary.named_templates:
        raise ApiError("this model has no chat template; use /v1/completions", param="messages")
    messages = [_message(message, index) for index, message in enumerate(values["messages"])]
    variables = values["chat_template_kwargs"] or {}
    for name in variables:
        if name in RESERVED or not name.isidentifier():
            raise ApiError(
                f"chat_template_kwargs has {name!r}; give it as a field of the request", param="chat_template_kwargs"
            )
    for name in ("messages", "tools", "documents", "chat_template_kwargs"):
        check_depth(values.get(name), param=name)
    continues, adds = values["continue_final_message"], values["add_generation_prompt"]
    if continues and (adds or messages[-1]["role"] != "assistant"):
        raise ApiError(
            "continue_final_message needs a last message of the assistant, and no add_generation_prompt",
            param="continue_final_message",
        )
    try:
        return render(
            service.vocabulary,
            messages,
            tools=tools,
            documents=values.get("documents"),
            add_generation_prompt=not continues if adds is None else adds,
            continue_final_message=continues,
            **variables,
        )
    except (InputError, TypeError) as error:
        raise ApiError(str(error), param="messages") from None


def _message(message: Mapping[str, Any], index: int) -> dict[str, Any]:
    """Return a message as templates read it: text instead of parts, arguments of calls as objects."""
    role, where = message.get("role"), f"messages[{index}]"
    if role not in ROLES:
        raise ApiError(f"{where}.role={role!r} is not valid; give one of {', '.join(ROLES)}", param=f"{where}.role")
    found = {**message, "role": "system" if role == "developer" else role, "content": _content(message, index)}
    calls = message.get("tool_calls")
    if calls is not None:
        found["tool_calls"] = _calls(calls, f"{where}.tool_calls")
    if found["content"] is None and not calls:
        raise ApiError(f"{where} has no content; give a string or a list of text parts", param=f"{where}.content")
    for name in LEGACY:
        if message.get(name) is not None:
            raise ApiError(f"{where}.{name} is not supported; {LEGACY[name]}", param=f"{where}.{name}")
    if not all(isinstance(value, str) for value in (found.get("name") or "", found.get("tool_call_id") or "")):
        raise ApiError(f"{where} has a name or tool_call_id that is not a string; give a string", param=where)
    return found


def _content(message: Mapping[str, Any], index: int) -> str | None:
    """Return the text of a message; of a list of parts, their texts on lines."""
    content, where = message.get("content"), f"messages[{index}].content"
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ApiError(f"{where} is not text; give a string or a list of text parts", param=where)
    texts = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type", "text") if isinstance(part, dict) else None
        text = part.get("text") if isinstance(part, dict) else None
        if kind not in TEXTS or not isinstance(text, str):
            raise ApiError(f"{where} has a part of type {kind!r}; this model reads text only", param=where)
        texts.append(text)
    return "\n".join(texts)


def _calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Return the calls of an earlier answer with their arguments as objects, which templates write as JSON."""
    if not isinstance(calls, list):
        raise ApiError(f"{where} is not a list; give the calls of an answer", param=where)
    found = []
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ApiError(f'{where} has a call without "function": {{"name", "arguments"}}', param=where)
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except (ValueError, RecursionError):
                raise ApiError(
                    f"{where} has arguments that are not JSON; give those of the answer", param=where
                ) from None
        found.append({**call, "function": {**function, "arguments": arguments or {}}})
    return found
