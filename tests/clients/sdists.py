"""Tests of other servers from sdists of PyPI: unpacked once, and those of a list run with a plugin that starts ours."""

import json
import os
import re
import shutil
import sys
import tarfile
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

from clients.conftest import CACHE, HERE, run_command
from environments import make_environment

INDEX = os.environ.get("PIP_INDEX_URL", "https://pypi.org/simple")
JSON = "application/vnd.pypi.simple.v1+json"


def unpacked(name: str, requirement: str, *, within: str, parts: Sequence[str]) -> Path:
    """The folder with ``parts`` of an sdist's folder ``within``; pip would build the package to look into it."""
    folder = CACHE / f"serve-{name}" / "sources"
    package, version = requirement.split("==")
    if not all((folder / part).exists() for part in parts):
        request = urllib.request.Request(f"{INDEX}/{package}/", headers={"accept": JSON})
        with urllib.request.urlopen(request) as response:
            files = json.load(response)["files"]
        (address,) = (entry["url"] for entry in files if entry["filename"].endswith(f"-{version}.tar.gz"))
        archive = CACHE / f"serve-{name}" / "sdist.tar.gz"
        archive.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(address) as response, archive.open("wb") as file:
            shutil.copyfileobj(response, file)
        with tarfile.open(archive) as sources:
            for member in sources:
                path = re.sub(rf"^[^/]*/{within}", "", member.name)
                if any(path == part or path.startswith(f"{part}/") for part in parts):
                    member.name = path
                    sources.extract(member, folder, filter="data")
        archive.unlink()
    return folder


def listed(name: str) -> list[str]:
    """The tests that must pass."""
    lines = (HERE / f"{name}_passes.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def assert_listed_tests_pass(
    name: str,
    checkpoint: Path,
    *,
    folder: Path,
    options: Sequence[str] = (),
    variables: Mapping[str, str] | None = None,
) -> None:
    """Run the tests of NAME_passes.txt in ``folder`` with NAME_plugin.py and the packages of NAME.txt."""
    python = make_environment(CACHE / f"serve-{name}", (HERE / f"{name}.txt").read_text().split())
    names = listed(name)
    where = {
        "MATQUANT": str(Path(sys.executable).with_name("matquant")),
        "MATQUANT_MODEL": str(checkpoint),
        "PYTHONPATH": os.pathsep.join([str(HERE), str(folder)]),
        **(variables or {}),
    }
    command = [python, "-m", "pytest", "-p", f"{name}_plugin", "-p", "no:cacheprovider", "-q", "-rfE", *options]
    found = run_command([*command, *names], folder=folder, variables=where)
    assert f"{len(names)} passed" in found, found[-3000:]
