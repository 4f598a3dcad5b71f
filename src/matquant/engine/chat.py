"""Conversations: the model's chat template around the messages, in one session that keeps its cache.

The whole conversation is rendered for every reply; tokens that are in the cache already are not read again.
After a switch of width, earlier turns stay in the cache as the earlier width computed them.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from matquant.engine.completion import Completion
from matquant.engine.engine import Engine, PlanLike
from matquant.hf.templates import Message, render
from matquant.system.errors import InputError

__all__ = ["Conversation", "Message", "render"]

ROOM = 2**15  # tokens; memory is taken as the conversation grows


class Conversation:
    """Messages so far and the sequence that has read them. bits, plan and options may change between replies.

    template: further variables of the chat template, such as {"tools": [...], "enable_thinking": False}.
    options: of ``Engine.stream``.
    context: maximum tokens of the whole conversation; None: the model's context, at most ROOM.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        bits: int | None = None,
        plan: PlanLike = None,
        system: str = "",
        template: Mapping[str, Any] = MappingProxyType({}),
        context: int | None = None,
        **options: Any,
    ) -> None:
        room = min(engine.context, ROOM) if context is None else context
        if type(room) is not int or not 0 < room <= engine.context:
            raise InputError(
                f"context={room!r} is not valid; use a number of tokens from 1 to {engine.context}, the model's context"
            )
        self.engine = engine
        self.bits = bits
        self.plan = plan
        self.template = template
        self.options = options
        self.messages: list[Message] = [{"role": "system", "content": system}] if system else []
        self._session = engine.session(room)
        # If the template rejects the system message or variables, report it now.
        self._render([*self.messages, {"role": "user", "content": "Hello"}])

    def ask(self, text: str) -> Completion:
        """Return the reply to ``text``: iterate over it, then pass the text that was shown to ``answered``."""
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = self.engine.vocabulary.plain(self._render(messages))
        room = self._session.capacity
        if room < len(ids) <= self.engine.context:
            raise InputError(
                f"the conversation has {len(ids)} tokens, more than the {room} it may have; start a new one, "
                f"or use a larger --context (at most {self.engine.context})"
            )
        reply = self.engine.stream(ids, bits=self.bits, plan=self.plan, session=self._session, **self.options)
        self.messages = messages
        return reply

    def answered(self, text: str) -> None:
        """Record the assistant's reply."""
        self.messages = [*self.messages, {"role": "assistant", "content": text}]

    def _render(self, messages: list[Message]) -> str:
        return render(self.engine.vocabulary, messages, **self.template)
