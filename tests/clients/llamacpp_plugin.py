"""A plugin of pytest for llama.cpp's tests of servers: the server that they start is ``matquant serve``.

The tests are run as they are. ``ServerProcess.start`` starts our server with the options that a test sets and we have:
context, key, name, template, longest answer. A server is kept for tests with the same options. The name is the one that
the test asks for, and routes without /v1 are ours with it. Variables: MATQUANT (the command), MATQUANT_MODEL (a
directory of a checkpoint of stories260K), MATQUANT_TEMPLATES (the folder of llama.cpp's templates).
"""

import inspect
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
import utils  # the suite's

ROUTES = ("/chat/completions", "/models")  # llama.cpp's short forms of OpenAI's
READY = re.compile(r"at http://[\d.]+:(\d+)/v1")
TEMPLATES = {"llama3": "meta-llama-Llama-3.1-8B-Instruct"}
servers: dict[tuple[str, ...], tuple[subprocess.Popen[str], int]] = {}
asked: dict[str, str] = {}


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Note the name under which a test wants its model, and whether it wants an empty cache."""
    found = re.search(r'model="([^"]+)"', inspect.getsource(getattr(item, "function")))  # noqa: B009
    asked["name"] = found[1] if found else ""
    asked["cache"] = item.name if "cached" in item.name else ""


def directory(server: Any) -> Path:
    """The checkpoint, with the template that a test sets."""
    model = Path(os.environ["MATQUANT_MODEL"])
    text = None
    if server.chat_template_file:
        text = (Path(os.environ["MATQUANT_TEMPLATES"]) / Path(server.chat_template_file).name).read_text()
    elif server.chat_template in TEMPLATES:
        text = (Path(os.environ["MATQUANT_TEMPLATES"]) / f"{TEMPLATES[server.chat_template]}.jinja").read_text()
    elif server.chat_template not in (None, "chatml"):
        pytest.skip(f"template {server.chat_template!r} is built into llama.cpp")
    if text is None:
        return model
    copy = Path(tempfile.mkdtemp()) / "model"
    shutil.copytree(model, copy)
    (copy / "chat_template.jinja").write_text(text)
    subprocess.run([os.environ["MATQUANT"], "verify", "--seal", copy], check=True, capture_output=True)
    return copy


def start(server: Any, timeout_seconds: float = 60) -> None:
    """Start our server, or take the one that runs with the same options."""
    if server.model_hf_repo != "ggml-org/test-model-stories260K":
        pytest.skip(f"needs {server.model_hf_repo}")
    name = asked["name"] or (server.model_alias or "tinyllama-2").split(",")[0]
    context = server.n_ctx // (server.n_slots or 1)
    answer = server.n_predict if (server.n_predict or -1) > 0 else context
    options = ["--name", name, "--context", str(context), "--answer-tokens", str(answer)]
    options += ["--api-key", server.api_key] if server.api_key else []
    key = (*options, server.chat_template or "", server.chat_template_file or "", asked["cache"])
    if key not in servers:
        command = [os.environ["MATQUANT"], "serve", directory(server), "--port", "0", "--threads", "1", *options]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        lines = [process.stderr.readline()]
        while lines[-1] and not READY.search(lines[-1]):
            lines.append(process.stderr.readline())
        found = READY.search(lines[-1])
        assert found, "".join(lines)
        servers[key] = process, int(found[1])
    server.server_port = servers[key][1]


def make_url(server: Any, path: str, host: str | None = None) -> str:
    """Our address of a route."""
    return f"http://127.0.0.1:{server.server_port}{'/v1' + path if path in ROUTES else path}"


def pytest_configure(config: pytest.Config) -> None:
    utils.ServerProcess.start = start
    utils.ServerProcess.stop = lambda server: None
    utils.ServerProcess.make_url = make_url
    utils.ServerPreset.load_all = staticmethod(lambda: None)


def pytest_unconfigure(config: pytest.Config) -> None:
    for process, _ in servers.values():
        process.kill()
        process.wait()
