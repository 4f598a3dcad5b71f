"""What all routes of a server share: the engine's facts, the batcher, and what was compiled for its tokenizer."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

from matquant.engine.engine import Engine
from matquant.hf.vocabulary import Vocabulary
from matquant.serve.errors import ApiError
from matquant.serve.metrics import Metrics
from matquant.serve.models import Models
from matquant.serve.structured import Grammars
from matquant.serve.tokens import token_reader
from matquant.serve.work import Batcher


@dataclass(kw_only=True)
class Service:
    """A running server. context: most tokens of a prompt and its answer. answer_tokens: most tokens of an answer to a
    request that does not say. tool_form: a key of tools.FORMS, or None.
    """

    engine: Engine
    batcher: Batcher
    models: Models
    metrics: Metrics
    context: int
    answer_tokens: int = 2048
    fingerprint: str
    tool_form: str | None = None
    is_draining: bool = False  # the server stops: nothing new is admitted
    active: int = field(default=0)  # answers being written

    @property
    def vocabulary(self) -> Vocabulary:
        return self.engine.vocabulary

    @functools.cached_property
    def token_bytes(self) -> Callable[[int], bytes]:
        """Return the bytes of a token."""
        return token_reader(self.vocabulary)

    @functools.cached_property
    def grammars(self) -> Grammars:
        """Return the compiler of grammars, made when a request first needs it."""
        try:
            return Grammars(
                self.vocabulary.tokenizer.to_str(),
                vocab=self.engine.model.architecture.vocab,
                ends=sorted(self.engine.ends),
            )
        except ValueError as error:
            raise ApiError(
                f"answers of this model cannot be constrained (its tokenizer: {error}); ask for text"
            ) from None
