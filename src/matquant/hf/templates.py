"""Format a conversation with the model's chat template, as ``apply_chat_template`` of transformers 5 does.

This module does the work around jinja2: it chooses one of the model's templates, prepares its variables, and leaves the
last message open. matquant.hf.renderer renders within limits of time and memory.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from matquant.hf.renderer import render_template
from matquant.hf.vocabulary import Vocabulary
from matquant.system.errors import InputError

Message = Mapping[str, Any]  # {"role": "system", "user" or "assistant", "content": text} and further keys for templates

DEFAULT, WITH_TOOLS = "default", "tool_use"  # names of templates
REASONING = ("reasoning_content", "thinking", "reasoning")  # keys of an assistant's reasoning; templates read the first
END_MARK = "CONTINUE_FINAL_MESSAGE_TAG "


def render(
    vocabulary: Vocabulary,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool | str = False,
    chat_template: str | None = None,
    **variables: Any,
) -> str:
    """Return the text of a conversation, up to the assistant's turn.

    tools: JSON schemas. documents: such as {"title": ..., "text": ...}. continue_final_message: leave the last message
    open, instead of add_generation_prompt; a string names the field to continue. chat_template: a template's text, or
    the name of one of the model's. variables: further variables of the template, such as enable_thinking=False.
    InputError if there is no template, it rejects the conversation or it exceeds a limit.
    """
    source = _choose(vocabulary, chat_template, has_tools=tools is not None)
    for name, entries in (("tools", tools), ("documents", documents), ("messages", messages)):
        if entries is not None and not all(isinstance(entry, Mapping) for entry in entries):
            raise TypeError(f"{name} has an entry that is not a dict; give a list of dicts")
    if not messages:
        raise InputError("the conversation is empty; give at least one message")
    given = {**vocabulary.special, **variables, "tools": tools, "documents": documents}
    given["add_generation_prompt"] = add_generation_prompt and not continue_final_message
    try:
        conversation = [_with_reasoning(_plain(message)) for message in messages]
        if not continue_final_message:
            return render_template(source, {**_plain(given), "messages": conversation})
        field = continue_final_message if isinstance(continue_final_message, str) else "content"
        last = _mark_end(conversation[-1], field, source)
        text = render_template(source, {**_plain(given), "messages": conversation})
    except RecursionError:
        raise InputError(
            "the conversation is nested too deeply for a chat template; give plain lists and dicts"
        ) from None
    return _cut_at_end(text, last)


def _choose(vocabulary: Vocabulary, wanted: str | None, *, has_tools: bool) -> str:
    """Return the text of the template to use."""
    named = vocabulary.named_templates
    if wanted is not None:
        return named.get(wanted, wanted)
    if has_tools and WITH_TOOLS in named:
        return named[WITH_TOOLS]
    if vocabulary.chat_template is not None:
        return vocabulary.chat_template
    if named:
        raise InputError(f"none of the model's chat templates is the default; choose one of {', '.join(sorted(named))}")
    raise InputError(
        "the model has no chat template; use matquant generate, or add chat_template.jinja to its directory"
    )


def _plain(value: Any) -> Any:
    """Convert ``value`` to JSON types: other objects may have dangerous methods that the sandbox does not know."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return getattr(kind, f"__{kind.__name__}__")(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    if isinstance(value, tuple):
        return tuple(_plain(entry) for entry in value)
    if isinstance(value, np.generic):
        return _plain(value.item())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if callable(getattr(value, "model_dump", None)):  # pydantic's models
        return _plain(value.model_dump())
    return f"<{type(value).__name__}>"


def _with_reasoning(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return the message without None fields, and its reasoning under the keys that templates read."""
    found = {key: value for key, value in message.items() if value is not None}
    thoughts = next((found[key] for key in REASONING if key in found), None)
    return found if thoughts is None else {"thinking": thoughts, **found, "reasoning_content": thoughts}


# ------------------------------------------------------------------------------------------------- an open last message


def _mark_end(message: dict[str, Any], field: str, source: str) -> str:
    """Put END_MARK after the text of ``field``, in place; return the text."""
    text = message.get(field)
    if text is None:
        raise InputError(f"the last message has no {field!r} to continue; add some")
    fields = [name for name in REASONING if message.get(name) == text] if field in REASONING else [field]
    if not any(name in source for name in fields):
        raise InputError(f"the chat template does not read {field!r}; continue another field of the message")
    if isinstance(text, list | tuple):
        block = next((block for block in reversed(text) if "text" in block), None)
        if block is None:
            raise InputError("the last message has no text to continue; add some")
        text, block["text"] = block["text"], block["text"] + END_MARK
    else:
        message |= {name: message[name] + END_MARK for name in fields}
    return str(text)


def _cut_at_end(rendered: str, last: str) -> str:
    """Return the text up to END_MARK; if the template strips messages, so is the end of this one."""
    place = rendered.rfind(END_MARK.strip())
    if place < 0 or last.strip() not in rendered:
        raise InputError(
            "the chat template drops a part of the last message, so it cannot be continued; start a new message"
        )
    text = rendered[:place]
    return text if rendered.startswith(END_MARK, place) else text.rstrip()
