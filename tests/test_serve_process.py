"""``matquant serve`` as a process: it streams to the openai client, stops on SIGTERM, and rejects what cannot work."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from http_service import TEMPLATE, make_engine
from matquant.cli import main

SERVER = """
import sys
sys.modules.update(dict.fromkeys(("torch", "transformers"), None))  # importing them fails
from matquant.cli import serve
from matquant.serve import run
from one_by_one import OneByOne

def start(engine, **limits):
    batcher = OneByOne(engine)
    batcher.delay_s = 0.02
    return batcher

serve.run = type("Run", (), {"Settings": run.Settings, "serve": staticmethod(lambda s: run.serve(s, start=start))})
from matquant.__main__ import main
sys.argv = ["matquant", "serve", *sys.argv[1:]]
main()
"""


@pytest.fixture(scope="module")
def directory(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_engine(llama, tmp_path_factory.mktemp("served"), template=TEMPLATE, context=512).path


@pytest.fixture
def server(directory: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server on a free port, and its address."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", SERVER, str(directory), "--port", "0", "--drain-seconds", "20"],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stderr is not None
    found = None
    for line in process.stderr:
        if found := re.search(r"at (http://[\d.]+:\d+)/v1", line):
            break
    assert found is not None, "it did not start"
    yield process, found[1]
    process.kill()
    process.wait()
    process.stderr.close()


def test_a_stream_ends_properly_when_the_server_is_stopped(server: tuple[subprocess.Popen[str], str]) -> None:
    process, address = server
    with openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0) as client:
        assert [model.id for model in client.models.list()][:2] == ["tiny", "tiny:int8"]
        asked: dict[str, Any] = {"model": "tiny:int4", "messages": [{"role": "user", "content": "Hi"}], "seed": 1}
        asked |= {"max_tokens": 40, "extra_body": {"ignore_eos": True}, "temperature": 1}
        whole = client.chat.completions.create(**asked)
        assert whole.model_extra is not None
        assert whole.model_extra["matquant"]["served"] == [{"bits": 4, "tokens": 40}]
        text, statuses = "", []
        with client.chat.completions.create(**asked, stream=True) as stream:
            for number, chunk in enumerate(stream):
                text += chunk.choices[0].delta.content or ""
                if number == 5:
                    process.send_signal(signal.SIGTERM)
                    threading.Event().wait(0.1)
                    statuses += [health(address)]
                    with pytest.raises(openai.InternalServerError, match="stopping"):
                        client.chat.completions.create(**asked)
                finish = chunk.choices[0].finish_reason
        assert text == whole.choices[0].message.content
        assert finish == "length"
        assert statuses == [503]
    assert process.wait(60) == 0


def health(address: str) -> int:
    try:
        with urllib.request.urlopen(f"{address}/health") as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def test_errors_of_the_client_are_openais(server: tuple[subprocess.Popen[str], str]) -> None:
    process, address = server
    with openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0) as client:
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            client.completions.create(model="other", prompt="x")
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model="tiny", prompt="x", top_p=7)
        assert caught.value.param == "top_p"
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--widths", "8,4", "--max-bits", "4"], "--widths has 8, above --max-bits 4"),
        (["--plan", "FILE"], "is not NAME=FILE"),
        (["--plan", "int4=FILE"], "stands for another width"),
        (["--plan", "p=FILE"], "the plan names 'nothing'"),
        (["--context", "100000"], "--context 100000 is not valid"),
        (["--kv-bytes", "900000GB"], "of memory that are free"),
        (["--kv-bytes", "2"], "is not a size"),
        (["--port", "BUSY"], "cannot listen on 127.0.0.1 port"),
        (["--host", "no.such.host.invalid"], "is no address"),
        (["--host", "a" * 64], "is no address"),
        (["--host", "192.0.2.1"], "use another --host"),
        (["--port", "65536"], "--port 65536 is no port; use 0 (any free one) to 65535"),
        (["--name", "a:b"], "--name 'a:b' is not valid"),
        (["--tool-format", "xml"], "--tool-format 'xml' is not known"),
        (["--min-bits", "9"], "9"),
        (["--prefill-bits", "9"], "9"),
        (["--prefill-bits", "8", "--max-bits", "6"], "--prefill-bits 8 exceeds --max-bits 6; use 6 or less"),
        (["--speculate", "fast"], "speculate='fast' is not known; use 'auto', 'off' or a number of tokens to draft"),
    ],
)
def test_settings_that_cannot_work_end_with_one_line(
    options: list[str],
    words: str,
    directory: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text('{"default": 4, "bits": {"nothing": 2}}')
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        names = {"FILE": str(plan), "BUSY": str(busy.getsockname()[1])}
        given = [re.sub("FILE|BUSY", lambda found: names[found[0]], option) for option in options]
        port = [] if "--port" in given else ["--port", "0"]
        monkeypatch.setattr(sys, "argv", ["matquant", "serve", str(directory), "--no-check-hashes", *port, *given])
        with pytest.raises(SystemExit) as ended:
            main()
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("serve: ")]
    assert ended.value.code == 2
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert words in lines[0]


def test_a_directory_that_is_no_checkpoint_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["matquant", "serve", str(tmp_path), "--port", "0"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert str(tmp_path) in capsys.readouterr().err
