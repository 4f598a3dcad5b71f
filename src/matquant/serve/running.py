"""Run the generations of a job and answer with them: as one body, or as a stream of server-sent events.

The engine thread hands events to the event loop; here they become text. An answer whose client has gone is cancelled,
streamed or not: ``receive`` is awaited beside the work.
"""

import asyncio
import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from matquant.serve.answers import Answer, Chunks, mean_bits, served_tokens, usage, whole, width_header, width_name
from matquant.serve.errors import ApiError, busy
from matquant.serve.jobs import Job
from matquant.serve.models import AUTO
from matquant.serve.service import Service
from matquant.serve.tools import CallReader, Delta
from matquant.serve.work import Deliver, Event, Handle, Refused
from matquant.serve.writing import Counts, Piece, Writer
from matquant.system.errors import InputError

PING_S = 15.0  # between comments that keep an idle stream open
GONE = 499  # status of an answer that nobody reads
STREAM_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}
DONE = b"data: [DONE]\n\n"


class Running:
    """The generations of a job. ``start`` it in the event loop, await ``step`` until ``ended``, and ``cancel`` it."""

    def __init__(self, service: Service, job: Job) -> None:
        self._service, self._job = service, job
        self._queue: asyncio.Queue[tuple[int, Sequence[Event]]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._handles: list[Handle] = []
        self._times: list[float | None] = [None] * len(job.generations)  # of the first token, and of the last one
        self._last = [0.0] * len(job.generations)
        self._began: list[tuple[float, float] | None] = [None] * len(job.generations)  # seconds in the queue, of prompt
        self.writers = [
            Writer(service.vocabulary, generation, stop=job.stop, include_stop=job.include_stop, special=job.special)
            for generation in job.generations
        ]
        self.closed: set[int] = set()  # answers that ``end`` ended
        self.readers = [None if job.calling is None else CallReader(job.calling.form) for _ in job.generations]

    @property
    def counts(self) -> list[Counts]:
        """Return what was counted of each generation."""
        return [writer.counts for writer in self.writers]

    @property
    def ended(self) -> bool:
        """Return whether every answer has ended."""
        return all(writer.finish is not None for writer in self.writers)

    def start(self) -> None:
        """Submit the generations. ApiError if they are not admitted."""
        service = self._service
        try:
            if service.is_draining:
                raise Refused("the server is stopping", retry_after_s=5)
            for index, generation in enumerate(self._job.generations):
                self._handles.append(service.batcher.submit(generation, self._deliver(index)))
        except Refused as refused:
            self.cancel()
            ends = service.is_draining or bool(service.batcher.stats().get("failed"))
            service.metrics.rejected(refused.limit)
            raise busy(refused.reason, refused.retry_after_s, ends=ends) from None
        except InputError as error:  # it can never run, such as when its keys and values exceed the memory for them
            self.cancel()
            raise ApiError(str(error), param="max_tokens") from None
        service.metrics.observe("n", self._job.n)
        service.metrics.observe("max_tokens", self._job.generations[0].max_tokens)

    def _deliver(self, index: int) -> Deliver:
        def deliver(events: Sequence[Event]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has closed: nobody waits for the answer
                self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, events))

        return deliver

    async def step(self) -> tuple[int, list[Piece]]:
        """Wait for events of a generation; return its index and the new pieces of its answer. ApiError if it failed."""
        index, events = await self._queue.get()
        pieces = [self._take(index, event) for event in events]
        return index, [piece for piece in pieces if piece != Piece()]

    def _take(self, index: int, event: Event) -> Piece:
        writer, choice = self.writers[index], self._job.choice
        if writer.finish is not None:
            return Piece()
        if event.queue_s is not None and event.prompt_s is not None:
            self._began[index] = event.queue_s, event.prompt_s
        piece = writer.push(event, label="" if choice.label == AUTO else choice.label)
        if event.token is not None:
            self._timed(index)
        if piece.finish is None:
            return piece
        if event.finish is None:
            self._handles[index].cancel()
        self._ended(index)
        if piece.finish == "error":
            raise ApiError(f"the answer failed: {event.reason or 'no reason given'}", status=500)
        return piece

    def end(self, index: int) -> None:
        """End an answer that is complete before its generation is, such as after the one call that was allowed."""
        self.closed.add(index)
        if self.writers[index].finish is None:
            self.writers[index].finish = "stop"
            self._handles[index].cancel()
            self._ended(index)

    def _timed(self, index: int) -> None:
        now, metrics = time.monotonic(), self._service.metrics
        if self._times[index] is None:
            self._times[index] = now
            metrics.observe("first_token", now - self._job.began)
        else:
            metrics.observe("between_tokens", now - self._last[index])
        self._last[index] = now

    def _ended(self, index: int) -> None:
        """Count an answer that has ended."""
        counts, metrics, first = self.writers[index].counts, self._service.metrics, self._times[index]
        served = served_tokens([counts])
        if index % self._job.n == 0:
            metrics.prompt(len(self._job.generations[index].ids), counts.cached_tokens)
        metrics.answer(
            served, finish=self.writers[index].finish or "abort", bits_per_weight=mean_bits(self._service, served)
        )
        metrics.observe("preempted", 0)
        metrics.observe("whole", time.monotonic() - self._job.began)
        if first is not None and counts.tokens > 1:
            metrics.observe("per_token", (self._last[index] - first) / (counts.tokens - 1))
        if (began := self._began[index]) is not None:
            queue_s, prompt_s = began
            decode_s = 0.0 if first is None else self._last[index] - first
            spent = {"queue": queue_s, "prefill": prompt_s, "decode": decode_s, "inference": prompt_s + decode_s}
            for key, seconds in spent.items():
                metrics.observe(key, seconds)

    def deltas(self, index: int, piece: Piece) -> list[Delta]:
        """Return a piece as deltas: text, or parts of tool calls."""
        reader = self.readers[index]
        if reader is None:
            return [Delta(text=piece.text)] if piece.text else []
        if index in self.closed:
            return []
        found = reader.push(piece.text)
        if piece.finish is not None:
            found += reader.finish()
        elif self._job.calling is not None and not self._job.calling.parallel and reader.complete:
            self.end(index)
        return found

    def calls(self, index: int) -> int:
        """Return how many calls an answer has so far."""
        reader = self.readers[index]
        return 0 if reader is None else reader.count

    def cancel(self) -> None:
        """Cancel what has not ended."""
        for index, handle in enumerate(self._handles):
            if self.writers[index].finish is None:
                self.writers[index].finish = "abort"
                handle.cancel()
                self._ended(index)


def headers(job: Job) -> dict[str, str]:
    """Return the headers of every answer."""
    return {"x-request-id": job.id, **ignored_header(job.ignored)}


def ignored_header(names: Sequence[str]) -> dict[str, str]:
    """Return the header that names ignored fields, as far as a header can hold them."""
    shown = "".join(letter if " " <= letter <= "~" else "?" for letter in ", ".join(names))[:1000]
    return {"x-ignored-fields": shown} if names else {}


async def respond(service: Service, job: Job, receive: Receive) -> Response:
    """Return the answer of a job: of a stream, the response that will write it. ApiError if it is not admitted."""
    running = Running(service, job)
    running.start()
    if job.stream:
        return EventStream(service, job, running)
    work = asyncio.ensure_future(_collect(service, job, running))
    try:
        if await _first(work, receive):
            body = work.result()
            served = served_tokens(running.counts)
            return json_response(body, headers=headers(job) | {"x-matquant-width": width_header(served)})
        return Response(status_code=GONE)
    finally:
        work.cancel()
        running.cancel()


async def _first(work: "asyncio.Future[Any]", receive: Receive) -> bool:
    """Wait until the work is done (True) or the client has gone (False)."""
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait([work, gone], return_when=asyncio.FIRST_COMPLETED)
        return work.done()
    finally:
        gone.cancel()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _collect(service: Service, job: Job, running: Running) -> dict[str, Any]:
    """Return the body of an answer."""
    answers = [Answer() for _ in job.generations]
    while not running.ended:
        index, pieces = await running.step()
        answer = answers[index]
        for piece in pieces:
            answer.tokens += piece.tokens
            answer.prompt += piece.prompt
            answer.add(running.deltas(index, piece))
    for answer, writer in zip(answers, running.writers, strict=True):
        answer.finish, answer.matched = writer.finish or "stop", writer.matched
    return whole(service, job, answers, running.counts)


class EventStream(Response):
    """Write an answer as it comes. If the first thing that happens is an error, it is an ordinary error answer."""

    def __init__(self, service: Service, job: Job, running: Running) -> None:
        super().__init__()
        self._service, self._job, self._running = service, job, running
        self._chunks = Chunks(service, job)
        self._closed: set[int] = set()  # answers whose last chunk was written

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.ensure_future(self._write(scope, receive, send))
        try:
            if await _first(work, receive):
                work.result()
        finally:
            work.cancel()
            self._running.cancel()

    async def _write(self, scope: Scope, receive: Receive, send: Send) -> None:
        running = self._running
        try:
            step = await self._step()
        except ApiError as error:
            await error_response(error)(scope, receive, send)
            return
        await send(self._start(step))
        for index in range(len(running.writers)):
            await self._send(send, self._chunks.first(index))
        try:
            while True:
                await send(_body(b": ping\n\n" if step is None else self._events(*step)))
                if running.ended:
                    break
                step = await self._step()
            if self._job.include_usage:
                await self._send(send, self._chunks.summary(running.counts))
        except ApiError as error:
            await self._send(send, error.to_json())
        await send({"type": "http.response.body", "body": DONE, "more_body": False})

    async def _step(self) -> tuple[int, list[Piece]] | None:
        """Wait for the next pieces; None if nothing came for PING_S seconds."""
        try:
            return await asyncio.wait_for(self._running.step(), PING_S)
        except TimeoutError:
            return None

    def _start(self, step: tuple[int, list[Piece]] | None) -> Message:
        found = {**STREAM_HEADERS, **headers(self._job)}
        served = served_tokens(self._running.counts)
        if step is not None and served:
            found["x-matquant-width-start"] = width_name(next(iter(served)))
        raw = [(name.encode(), value.encode("latin-1")) for name, value in found.items()]
        return {"type": "http.response.start", "status": 200, "headers": raw}

    def _events(self, index: int, pieces: Sequence[Piece]) -> bytes:
        """Return the events for new pieces of an answer."""
        running, data = self._running, b""
        for piece in pieces:
            if index in self._closed:
                break
            deltas = running.deltas(index, piece)
            if piece.prompt and self._job.echoes[index]:
                deltas = [Delta(text=self._job.echoes[index]), *deltas]
            chunks = self._chunks.pieces(index, deltas, piece.tokens, prompt=piece.prompt)
            writer = running.writers[index]
            if piece.finish is not None or index in running.closed:
                self._closed.add(index)
                chunks.append(self._chunks.last(index, writer.finish or "stop", running.calls(index), writer.matched))
            for chunk in chunks:
                data += self._event(chunk)
        return data

    def _event(self, chunk: dict[str, Any]) -> bytes:
        counts = self._running.counts
        if chunk.get("choices"):
            served = counts[chunk["choices"][0]["index"]].served
            if self._job.choice.label == AUTO and served:
                chunk["model"] = f"{self._service.models.name}:{width_name(served[-1][0])}"
            if self._job.continuous_usage:
                chunk["usage"] = usage(self._job, counts)
            elif self._job.include_usage:
                chunk["usage"] = None
        return b"data: " + to_json(chunk) + b"\n\n"

    async def _send(self, send: Send, chunk: dict[str, Any] | None) -> None:
        if chunk is not None:
            await send(_body(self._event(chunk)))


def _body(data: bytes) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": True}


def to_json(value: Any) -> bytes:
    """Return compact JSON."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def json_response(value: Any, *, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return a response with a JSON body."""
    return Response(to_json(value), status_code=status, headers=headers, media_type="application/json")


def error_response(error: ApiError) -> Response:
    """Return an error as OpenAI's API gives it."""
    return json_response(error.to_json(), status=error.status, headers=error.headers)
