"""What every record needs to be made again."""

import datetime
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def append_record(file: Path, line: str) -> None:
    """Append a record to a file of records."""
    with file.open("a") as stream:
        stream.write(line + "\n")


def origin(*packages: str) -> dict[str, Any]:
    """The command, commit, date and machine of this run, and the versions of ``packages`` if there are any."""
    git = ["git", "rev-parse", "--short", "HEAD"]
    return {
        "command": " ".join(["python", Path(sys.argv[0]).resolve().relative_to(ROOT).as_posix(), *sys.argv[1:]]),
        "commit": subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip(),
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        **({"versions": {package: version(package) for package in packages}} if packages else {}),
    }
