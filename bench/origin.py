"""What every record needs to be made again."""

import datetime
import os
import platform
import re
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


def arguments() -> list[str]:
    """The arguments of this command; of an absolute path only the last part, which means something elsewhere."""
    return [re.sub(r"(^|=)/\S*/", r"\1", argument) for argument in sys.argv[1:]]


def origin(*packages: str) -> dict[str, Any]:
    """The command, commit, date and machine of this run, and the versions of ``packages`` if there are any."""
    git = ["git", "rev-parse", "--short", "HEAD"]
    return {
        "command": " ".join(["python", Path(sys.argv[0]).resolve().relative_to(ROOT).as_posix(), *arguments()]),
        "commit": subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip(),
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        **({"versions": {package: version(package) for package in packages}} if packages else {}),
    }
