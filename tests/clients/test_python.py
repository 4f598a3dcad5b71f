"""OpenAI's package and langchain-openai against the server."""

import pytest

from clients.conftest import run_client
from server_process import Server

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1200)]


@pytest.mark.parametrize("script", ["openai_client.py", "langchain_client.py"])
def test_the_client_gets_what_it_asserts(script: str, server: Server) -> None:
    run_client(script, server.address)
