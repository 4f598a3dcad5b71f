"""Virtual environments of other tools, one folder each, made once."""

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

TORCH = "torch==2.13.0"  # first and exactly: an unpinned one pulls gigabytes of CUDA


def make_environment(
    folder: Path, packages: Sequence[str], *, pip: Sequence[str] = (), environ: Mapping[str, str] | None = None
) -> Path:
    """The interpreter of a virtual environment with ``packages``, made if ``folder`` has none with just these.

    pip: further arguments of pip install. environ: variables it sees.
    """
    python, made = folder / "venv" / "bin" / "python", folder / "packages.txt"
    wanted = "\n".join([*pip, *packages]) + "\n"
    if made.is_file() and made.read_text() == wanted:
        return python
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder / "venv"], check=True)
    install: list[str | Path] = [python, "-m", "pip", "install", "--quiet", *pip]
    if TORCH in packages:
        subprocess.run([*install, TORCH], check=True)
    subprocess.run([*install, *packages], check=True, env={**os.environ, **(environ or {})})
    made.write_text(wanted)
    print(f"{folder.name}: ready after {time.perf_counter() - began:.0f} s", flush=True)
    return python
