"""A plugin of pytest for vLLM's tests of its server: the server that they start is ``matquant serve``.

The tests are run as they are. ``tests.utils.RemoteOpenAIServer`` is replaced by one that starts our server under the
name of the model that a test wants; modules of vLLM, which is not installed, by empty ones. Variables: MATQUANT (the
command), MATQUANT_MODEL (a directory of a checkpoint).
"""

import importlib.abc
import importlib.machinery
import json
import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import openai
import pytest
from tokenizers import Tokenizer

READY = re.compile(r"at (http://[\d.]+:\d+)/v1")
ABSENT = ("vllm", "transformers", "torch", "huggingface_hub", "fastapi", "tblib")


class Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Modules that have any name."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname.split(".")[0] in ABSENT:
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> Any:
        module = MagicMock(name=spec.name)
        module.__path__, module.__spec__ = [], spec
        return module

    def exec_module(self, module: Any) -> None:
        pass


class Words:
    """The tokenizer of the model, with the names that the tests use."""

    def __init__(self, address: str = "") -> None:
        self._tokenizer = Tokenizer.from_file(str(Path(os.environ["MATQUANT_MODEL"]) / "tokenizer.json"))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        return [self._tokenizer.id_to_token(token) for token in ids]

    def apply_chat_template(self, conversation: Any, **options: Any) -> str:
        """What the server's template writes, read back from the tokens that it makes of it."""
        body = {"messages": conversation, "add_special_tokens": False}
        body |= {
            key: options[key] for key in ("add_generation_prompt", "continue_final_message", "tools") if key in options
        }
        request = urllib.request.Request(f"{RUNNING[-1].address}/tokenize", json.dumps(body).encode())
        with urllib.request.urlopen(request) as response:
            return self.decode(json.load(response)["tokens"])


RUNNING: list["RemoteOpenAIServer"] = []


class RemoteOpenAIServer:
    """Our server in the place of vLLM's."""

    DUMMY_API_KEY = "token-abc123"
    show_hidden_metrics = False

    def __init__(self, model: str, args: Sequence[str], **options: Any) -> None:
        self._options = ["--name", model, "--tool-format", "hermes"]
        for name, value in pairwise(args):
            if name == "--max-model-len":
                self._options += ["--context", value]

    def __enter__(self) -> "RemoteOpenAIServer":
        command = [os.environ["MATQUANT"], "serve", os.environ["MATQUANT_MODEL"], "--port", "0", "--threads", "1"]
        self.proc = subprocess.Popen([*command, *self._options], stderr=subprocess.PIPE, text=True)
        lines = [self.proc.stderr.readline()]
        while lines[-1] and not READY.search(lines[-1]):
            lines.append(self.proc.stderr.readline())
        found = READY.search(lines[-1])
        assert found, "".join(lines)
        self.address = self.url_root = found[1]
        RUNNING.append(self)
        return self

    def __exit__(self, *error: Any) -> None:
        self.proc.kill()
        self.proc.wait()

    def url_for(self, *parts: str) -> str:
        return "/".join([self.address, *parts])

    def get_client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url_for("v1"), api_key=self.DUMMY_API_KEY, max_retries=0, **options)

    def get_async_client(self, **options: Any) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=self.url_for("v1"), api_key=self.DUMMY_API_KEY, max_retries=0, **options)


@pytest.fixture
def local_asset_server() -> None:
    """A server of pictures, for models that see."""


sys.meta_path.append(Absent())
sys.modules["tests.utils"] = MagicMock(RemoteOpenAIServer=RemoteOpenAIServer, ROCM_EXTRA_ARGS=[])
sys.modules["tests.conftest"] = MagicMock()
sys.modules["vllm.tokenizers"] = MagicMock(get_tokenizer=lambda **_: Words())
sys.modules["transformers"] = MagicMock(AutoTokenizer=MagicMock(from_pretrained=lambda *_, **__: Words()))

from tests.entrypoints.conftest import *  # noqa: E402, F403  (fixtures; the folder of the tests is on the path)
