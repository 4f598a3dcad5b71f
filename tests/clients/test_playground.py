"""The playground in headless Chromium."""

import shutil
from pathlib import Path

import pytest

from clients.conftest import CACHE, HERE, run_command
from environments import make_environment
from server_process import Server

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]
PICTURES = 8


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium; install it (Debian: chromium)")
def test_a_person_sees_answers_widths_and_errors(server: Server, tmp_path: Path) -> None:
    python = make_environment(CACHE / "browser", (HERE / "browser.txt").read_text().split())
    run_command([python, HERE / "browser_client.py", server.address, str(shutil.which("chromium")), tmp_path])
    assert len(list(tmp_path.glob("*.png"))) == PICTURES
