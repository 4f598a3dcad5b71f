"""Conversations: the model's own chat template around the messages, one sequence that keeps what it has read.

Templates are jinja2 in a sandbox (they come with a checkpoint and are not trusted), with the names that transformers
gives them. The whole conversation is rendered for every reply; tokens that are in the cache already are not read again.
After a switch of width the earlier turns stay in the cache as the earlier width read them.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from matquant.errors import InputError
from matquant.runtime.engine import Completion, Engine, PlanLike
from matquant.runtime.vocabulary import Vocabulary

ROOM = 2**15  # tokens; memory for them is taken as the conversation grows

Message = Mapping[str, str]  # {"role": "system", "user" or "assistant", "content": text}


def render(vocabulary: Vocabulary, messages: Sequence[Message]) -> str:
    """The text of a conversation, up to where the assistant speaks. InputError if the template refuses."""
    if vocabulary.chat_template is None:
        raise InputError("the model has no chat template; use matquant generate, or put chat_template.jinja beside it")

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda pattern: datetime.datetime.now().strftime(pattern)
    try:
        template = environment.from_string(vocabulary.chat_template)
        return template.render(
            messages=[dict(message) for message in messages],
            add_generation_prompt=True,
            tools=None,
            documents=None,
            **vocabulary.special,
        )
    except (TemplateError, TypeError, ValueError, LookupError) as error:
        raise InputError(f"the model's chat template refuses this conversation ({error}); change it") from None


class Conversation:
    """Messages so far and the sequence that has read them. bits, plan and options may change between replies.

    context: tokens that the whole conversation may have; None: the model's context, ROOM at most.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        bits: int | None = None,
        plan: PlanLike = None,
        system: str = "",
        context: int | None = None,
        **options: Any,
    ) -> None:
        room = min(engine.context, ROOM) if context is None else context
        if type(room) is not int or not 0 < room <= engine.context:
            raise InputError(
                f"context={room!r}; give a number of tokens from 1 to {engine.context}, the model's context"
            )
        self.engine = engine
        self.bits = bits
        self.plan = plan
        self.options = options
        self.messages: list[Message] = [{"role": "system", "content": system}] if system else []
        self._session = engine.session(room)
        # What the template refuses, it should refuse now.
        render(engine.vocabulary, [*self.messages, {"role": "user", "content": "Hello"}])

    def ask(self, text: str) -> Completion:
        """The reply to ``text``, to be iterated over; then give what was shown of it to ``answered``."""
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = self.engine.vocabulary.plain(render(self.engine.vocabulary, messages))
        room = self._session.capacity
        if room < len(ids) <= self.engine.context:
            raise InputError(
                f"the conversation has {len(ids)} tokens and there is room for {room}; start a new one, "
                f"or give a larger --context (at most {self.engine.context})"
            )
        reply = self.engine.stream(ids, bits=self.bits, plan=self.plan, session=self._session, **self.options)
        self.messages = messages
        return reply

    def answered(self, text: str) -> None:
        """Record the assistant's reply."""
        self.messages = [*self.messages, {"role": "assistant", "content": text}]
