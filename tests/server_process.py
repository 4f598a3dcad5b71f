"""``matquant serve`` as a process, for tests that need a real server: its address, and its end."""

import contextlib
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

READY = re.compile(r"at (http://[\d.]+:\d+)/v1")


@dataclass(frozen=True)
class Server:
    """A running server. address: such as http://127.0.0.1:40000."""

    process: subprocess.Popen[str]
    address: str

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])


@contextlib.contextmanager
def running(directory: Path, *options: str) -> Iterator[Server]:
    """Start a server of a checkpoint on one thread and a free port; kill it at the end."""
    process = subprocess.Popen(
        [sys.executable, "-m", "matquant", "serve", str(directory), "--threads", "1", "--port", "0", *options],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stderr is not None
    try:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if found := READY.search(line):
                break
        else:
            raise AssertionError(f"the server did not start: {''.join(lines)}")
        rest = threading.Thread(target=process.stderr.read, daemon=True)  # a full pipe would stop the server
        rest.start()
        yield Server(process, found[1])
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
