"""A completion: text around a decoder's ids, with its end, its limits and its clocks."""

import time
from collections.abc import Iterator, Sequence

from matquant.engine.decoder import Decoder
from matquant.hf.vocabulary import TextStream
from matquant.system.errors import InUseError


class Completion:
    """Text being generated: iterate over its pieces, once. Afterwards ``reason`` is "stop" or "length".

    ids: the ids of the prompt and the new tokens. prompt_tokens, tokens: counts. prompt_s, decode_s: seconds.
    steps: steps at the requested width after the prompt. drafted, accepted: tokens of speculation.
    """

    def __init__(
        self, prompt: Sequence[int], *, decoder: Decoder, text: TextStream, ends: frozenset[int], max_tokens: int
    ) -> None:
        self.ids = list(prompt)
        self.prompt_tokens = len(prompt)
        self.tokens = 0
        self.prompt_s = self.decode_s = 0.0
        self.reason = "length"
        self._ended = False
        self._decoder = decoder
        self._pieces = self._run(decoder, text, ends, max_tokens)

    @property
    def steps(self) -> int:
        return self._decoder.steps

    @property
    def drafted(self) -> int:
        return self._decoder.drafted

    @property
    def accepted(self) -> int:
        return self._decoder.accepted

    def __iter__(self) -> Iterator[str]:
        if self._ended:
            raise InUseError("this completion has been read already; keep its pieces, or call stream again")
        return self._pieces

    def _run(self, decoder: Decoder, text: TextStream, ends: frozenset[int], max_tokens: int) -> Iterator[str]:
        began = time.perf_counter()
        decoder.start()
        self.prompt_s = time.perf_counter() - began
        began = time.perf_counter()
        for token in decoder:
            self.tokens += 1
            self.decode_s = time.perf_counter() - began
            if token in ends:
                self.reason = "stop"
                break
            self.ids.append(token)
            piece = text.push(token)
            if piece:
                yield piece
            if text.stopped:
                self.reason, self._ended = "stop", True
                return
            if self.tokens == max_tokens:
                break
        rest = text.finish()
        if text.stopped:
            self.reason = "stop"
        if rest:
            yield rest
        self._ended = True
