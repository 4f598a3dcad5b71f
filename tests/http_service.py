"""Help for tests of the server: a tiny checkpoint with a chat template, a service around it, requests and streams."""

import json
import shutil
from pathlib import Path
from typing import Any

from starlette.testclient import TestClient

import matquant
from conftest import quantize
from matquant.core.spec import Plan
from matquant.serve.metrics import Metrics
from matquant.serve.models import Models
from matquant.serve.service import Service
from one_by_one import OneByOne

STARTED: list[OneByOne] = []
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_engine(llama: Path, folder: Path, *, template: str = TEMPLATE, context: int = 64) -> matquant.Engine:
    """A tiny nested checkpoint of random weights and a byte tokenizer, opened."""
    model = shutil.copytree(llama, folder / "float")
    if template:
        (model / "chat_template.jinja").write_text(template)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": context}))
    directory = quantize(model, folder / "tiny", method="rtn", scope="linears")
    return matquant.Engine(directory, threads=1, check_hashes=False)


def stop_all() -> None:
    """End the threads of all batchers."""
    while STARTED:
        STARTED.pop().stop(0)


def make_service(engine: matquant.Engine, **options: Any) -> Service:
    path = next(iter(engine.model.weights))
    batcher = options.pop("batcher", None) or OneByOne(engine)
    STARTED.append(batcher)
    models = Models(
        name="tiny",
        max_bits=8,
        widths=[8, 4, 2],
        plans={"mixed": Plan(default=4, bits={path: 2})},
        bits_per_weight={"8": 8.5, "4": 4.5, "2": 2.5, "mixed": 4.2},
        tokens_per_s={"8": 10.0, "4": 20.0},
        context=engine.context,
        created=1,
    )
    return Service(
        engine=engine,
        batcher=batcher,
        models=models,
        metrics=Metrics(batcher, model_name="tiny"),
        context=engine.context,
        fingerprint="b-0-test",
        **options,
    )


def chat(client: TestClient, **fields: Any) -> Any:
    fields = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8, **fields}
    return client.post("/v1/chat/completions", json=fields)


def complete(client: TestClient, **fields: Any) -> Any:
    return client.post("/v1/completions", json={"prompt": "Once upon", "max_tokens": 8, **fields})


def events(response: Any) -> list[dict[str, Any]]:
    """The JSON of a stream's events; the last line is [DONE]."""
    lines = [line for line in response.text.split("\n\n") if line and not line.startswith(":")]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def assert_error(response: Any, status: int, param: str | None = None, words: str = "") -> None:
    """The response is an error of OpenAI's shape."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert sorted(error) == ["code", "message", "param", "type"]
    assert error["param"] == param, error
    assert words in error["message"]
