"""Run a function in several processes that torch.distributed connects, forked from this one: they import nothing."""

import contextlib
import multiprocessing
import os
import socket
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from matquant.system import ranks

PATIENCE_S = 900


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def _child(function: Callable[[], Any], rank: int, count: int, port: int, answer: Connection) -> None:
    os.environ.update(zip(ranks.VARIABLES, map(str, (rank, count, rank, "127.0.0.1", port)), strict=True))
    torch.set_num_threads(1)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            answer.send((True, function()))
            os._exit(0)  # as after a signal: gloo's threads may outlive the interpreter's
        answer.send((True, None))
    except Exception as error:
        answer.send((False, (type(error).__name__, str(error), traceback.format_exc())))
    os._exit(0)


def run_all(function: Callable[[], Any], count: int) -> list[tuple[bool, Any]]:
    """Return (True, result) or (False, (type, message, traceback)) of ``function`` in each of ``count`` processes."""
    context, port = multiprocessing.get_context("fork"), free_port()
    started = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forking with threads: torch has one here
        for rank in range(count):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(function, rank, count, port, sender), daemon=True)
            process.start()
            sender.close()
            started.append((process, receiver))
    answers = []
    for process, receiver in started:
        try:
            answers.append(receiver.recv() if receiver.poll(PATIENCE_S) else (False, ("Timeout", "no answer", "")))
        except EOFError:
            answers.append((False, ("Killed", "no answer", "")))
        process.join(20)
        process.kill()
    return answers


def run(function: Callable[[], Any], count: int) -> list[Any]:
    """Return the results of ``function`` in ``count`` processes; an error of any is raised here."""
    answers = run_all(function, count)
    errors = [value for good, value in answers if not good]
    for kind, message, trace in sorted(errors, key=lambda error: error[0] == "LostProcessError"):
        raise AssertionError(f"{kind}: {message}\n{trace}")  # the cause first
    return [value for _, value in answers]
