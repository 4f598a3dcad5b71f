"""Faults over real sockets: readers that are slow or leave, bodies and headers without end, SIGTERM under load."""

import asyncio
import json
import re
import signal
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import conftest
from load_client import Answer, ask, body, read, resident_bytes, together
from server_process import Server, running

pytestmark = pytest.mark.slow
MODEL = Path(__file__).resolve().parents[1] / "examples" / "reference" / "model"
TOKENS = 48
PATIENT_S = 60.0


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return conftest.quantize(MODEL, tmp_path_factory.mktemp("faults") / "tiny", method="rtn", scope="linears")


@pytest.fixture(scope="module")
def server(directory: Path) -> Iterator[Server]:
    with running(directory) as found:
        yield found


def requests(count: int, tokens: int = TOKENS, **fields: Any) -> list[dict[str, Any]]:
    """Requests with different prompts, at three widths."""
    return [body([5 + n, 6, 7], tokens, model=f"tiny:int{(8, 4, 2)[n % 3]}", **fields) for n in range(count)]


def connect(server: Server) -> socket.socket:
    found = socket.create_connection(("127.0.0.1", server.port), timeout=PATIENT_S)
    found.settimeout(PATIENT_S)
    return found


def post(fields: bytes, *more: bytes) -> bytes:
    """The bytes of a request."""
    lines = [b"POST /v1/completions HTTP/1.1", b"host: 127.0.0.1", b"content-type: application/json", *more]
    return b"\r\n".join(lines) + b"\r\n\r\n" + fields


def everything(connection: socket.socket) -> bytes:
    """What comes until the server closes."""
    found = b""
    with connection:
        while data := connection.recv(2**16):
            found += data
    return found


def assert_whole(answers: list[Answer], tokens: int = TOKENS) -> None:
    assert [(a.status, a.done, a.finish, a.tokens) for a in answers] == [(200, True, "length", tokens)] * len(answers)


def running_sequences(server: Server) -> float:
    found = re.search(r"^vllm:num_requests_running.* ([\d.]+)$", read(server.port, "/metrics")[1], flags=re.MULTILINE)
    assert found
    return float(found[1])


def assert_idle(server: Server) -> None:
    """Nothing runs any more, soon."""
    end = time.monotonic() + PATIENT_S
    while running_sequences(server) or '"server_load":0' not in read(server.port, "/load")[1]:
        assert time.monotonic() < end, "an answer goes on without its reader"
        time.sleep(0.05)


def test_slow_readers_hold_up_nobody_and_get_their_text(server: Server) -> None:
    (fields,) = requests(1, 200, logprobs=20, n=8)  # about 3 MB, which no buffer on the way holds
    data = json.dumps(fields).encode()
    slow = [connect(server) for _ in range(2)]
    for connection in slow:
        connection.sendall(post(data, b"connection: close", b"content-length: %d" % len(data)))
    assert_whole(asyncio.run(together(server.port, requests(8))))
    (alone,) = asyncio.run(together(server.port, requests(1, 200)))
    for connection in slow:
        lines = [line[6:] for line in everything(connection).splitlines() if line.startswith(b"data: ")]
        assert lines[-1] == b"[DONE]"
        choices = [choice for line in lines[:-1] for choice in json.loads(line)["choices"]]
        texts = ["".join(c["text"] for c in choices if c["index"] == index) for index in range(8)]
        assert texts == [alone.text] * 8  # greedy: all the same
    assert_idle(server)


@pytest.mark.parametrize("abrupt", [False, True])
def test_readers_that_leave_in_the_middle_leave_nothing(server: Server, abrupt: bool) -> None:
    data = json.dumps(requests(1, 400)[0]).encode()
    for _ in range(20):
        connection = connect(server)
        connection.sendall(post(data, b"content-length: %d" % len(data)))
        assert connection.recv(64).startswith(b"HTTP/1.1 200")
        if abrupt:  # a reset instead of an orderly end
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
    assert_idle(server)
    assert_whole(asyncio.run(together(server.port, requests(3))))


def test_bodies_without_end_are_not_kept(server: Server) -> None:
    declared = connect(server)
    declared.sendall(post(b"", b"content-length: 99999999999"))
    assert declared.recv(64).startswith(b"HTTP/1.1 413")
    declared.close()
    before = resident_bytes(server.process.pid)
    chunked = connect(server)
    chunked.sendall(post(b"", b"transfer-encoding: chunked"))
    piece = b"100000\r\n" + b" " * 2**20 + b"\r\n"
    sent, found = 0, b""
    try:
        while sent < 200 and not found:
            chunked.sendall(piece)
            sent += 1
            if sent > 8:
                found = chunked.recv(64)
    except OSError:  # it closed: the answer may have been lost with what was on its way
        pass
    chunked.close()
    assert found.startswith(b"HTTP/1.1 413") or sent < 200
    assert resident_bytes(server.process.pid) - before < 64 * 2**20
    assert_whole(asyncio.run(together(server.port, requests(3))))


def test_floods_of_headers_are_cut_off(server: Server) -> None:
    for line in (b"x-%d: " + b"a" * 100, b"x-%d: " + b"a" * 10**6):
        connection = connect(server)
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\n")
        found, sent = b"", 0
        try:
            while sent < 10**8 and not found:
                flood = b"".join(line % number + b"\r\n" for number in range(1000 if len(line) < 1000 else 1))
                connection.sendall(flood)
                sent += len(flood)
                connection.settimeout(0.05)
                try:
                    found = connection.recv(64)
                except TimeoutError:
                    connection.settimeout(PATIENT_S)
        except OSError:
            found = b"closed"
        connection.close()
        assert found.startswith((b"HTTP/1.1 4", b"closed")), found
    waiting = [connect(server) for _ in range(200)]  # that never finish their headers
    for connection in waiting:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\n")
    assert_whole(asyncio.run(together(server.port, requests(6))))
    for connection in waiting:
        connection.close()
    assert_idle(server)


@pytest.mark.parametrize(("drain", "ends"), [("60", {"length"}), ("0", {"length", "abort"})])
def test_every_stream_ends_properly_when_the_server_is_stopped_under_load(
    directory: Path, drain: str, ends: set[str]
) -> None:
    async def load(server: Server) -> list[Answer]:
        asked = [asyncio.ensure_future(ask(server.port, fields)) for fields in requests(12, 120)]
        while running_sequences(server) < 8:
            await asyncio.sleep(0.01)
        server.process.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.1)
        asked += [asyncio.ensure_future(ask(server.port, fields)) for fields in requests(2)]
        return list(await asyncio.gather(*asked, return_exceptions=True))  # type: ignore[arg-type]

    with running(directory, "--drain-seconds", drain, "--max-num-seqs", "8") as server:
        answers = asyncio.run(load(server))
        assert server.process.wait(PATIENT_S) == 0
    *before, first, second = answers
    assert {answer.finish for answer in before} <= ends
    assert all(answer.done for answer in before)
    assert all(isinstance(late, OSError) or late.status == 503 for late in (first, second))
