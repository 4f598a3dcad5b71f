"""OpenAI's package for JavaScript against the server."""

import shutil
import subprocess
from pathlib import Path

import pytest

from clients.conftest import CACHE, HERE, run_command
from server_process import Server

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]
PACKAGES = ("openai@7.59.0", "zod@4.6.7")


def make_node() -> Path:
    """The folder in which these packages of npm are installed, once."""
    folder = CACHE / "node"
    made = folder / "packages.txt"
    if not made.is_file() or made.read_text().split() != [*PACKAGES]:
        folder.mkdir(parents=True, exist_ok=True)
        install = ["npm", "install", "--no-save", "--no-audit", "--no-fund", "--prefix", folder, *PACKAGES]
        subprocess.run(install, check=True, capture_output=True)
        made.write_text("\n".join(PACKAGES))
    return folder


@pytest.mark.skipif(shutil.which("npm") is None, reason="needs Node.js and npm; install them (Debian: nodejs npm)")
def test_the_client_gets_what_it_asserts(server: Server) -> None:
    folder = make_node()
    script = shutil.copy(HERE / "openai_client.mjs", folder)  # packages are looked for beside the script
    run_command(["node", script, server.address])
