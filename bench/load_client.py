"""A client that loads a server: streamed completions over plain sockets, which costs little beside the server's work.

An answer is streamed token by token, greedy, with ``ignore_eos``, so its length is known. Times are seconds of
``time.perf_counter``.
"""

import asyncio
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

LIMIT = 2**24  # bytes of a line
TICKS = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")


class BrokenOffError(Exception):
    """A stream ended with an error."""


@dataclass(kw_only=True)
class Answer:
    """What came back. times_s: of each piece of text. report: the "matquant" object of the last chunk."""

    status: int = 0
    sent_s: float = 0.0
    times_s: list[float] = field(default_factory=list)
    text: str = ""
    finish: str | None = None
    tokens: int = 0
    report: dict[str, Any] = field(default_factory=dict)
    done: bool = False  # the stream ended with [DONE]

    @property
    def first_s(self) -> float:
        """Seconds from the request to the first text."""
        return self.times_s[0] - self.sent_s

    @property
    def gaps_s(self) -> list[float]:
        """Seconds between pieces of text."""
        return [after - before for before, after in pairwise(self.times_s)]


def body(prompt: Sequence[int], tokens: int, **fields: Any) -> dict[str, Any]:
    """The body of a request that both servers read in the same way."""
    return {
        "prompt": list(prompt), "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True,
        "stream_options": {"include_usage": True}, **fields,
    }  # fmt: skip


async def ask(port: int, fields: dict[str, Any]) -> Answer:
    """Send a completion to a server of this machine, and read the answer to its end."""
    data = json.dumps(fields).encode()
    head = "POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\nconnection: close\r\n"
    answer = Answer(sent_s=time.perf_counter())
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=LIMIT)
    try:
        writer.write(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)
        answer.status = int((await reader.readline()).split()[1])
        while answer.status == 200 and (line := await reader.readline()):
            if line.startswith(b"data: "):
                take(answer, line[6:].strip())
    finally:
        writer.close()
    return answer


def take(answer: Answer, data: bytes) -> None:
    """Add an event of a stream."""
    if data == b"[DONE]":
        answer.done = True
        return
    now, event = time.perf_counter(), json.loads(data)
    if "error" in event:
        raise BrokenOffError(f"the server broke a stream off: {event['error']}")
    for choice in event.get("choices", ()):
        if choice.get("text"):
            answer.times_s.append(now)
            answer.text += choice["text"]
        answer.finish = choice.get("finish_reason") or answer.finish
    if event.get("usage"):
        answer.tokens = event["usage"]["completion_tokens"]
    answer.report = event.get("matquant", answer.report)


async def together(port: int, bodies: Sequence[dict[str, Any]]) -> list[Answer]:
    """Send all at once."""
    return await asyncio.gather(*(ask(port, fields) for fields in bodies))


def read(port: int, path: str) -> tuple[int, str]:
    """GET a route of a server of this machine: status and text; 0 while nobody listens."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}") as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()
    except OSError:
        return 0, ""


def cpu_s(process: int) -> float:
    """CPU seconds of a process, of all its threads."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def resident_bytes(process: int) -> int:
    """Memory of a process."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * PAGE
