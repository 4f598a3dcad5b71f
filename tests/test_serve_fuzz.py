"""Random bodies are answered with 200 or a 4xx of OpenAI's shape, never with 500."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from http_service import make_engine, make_service, stop_all
from matquant.serve.app import make_app
from matquant.serve.fields import CHAT, COMPLETION, DETOKENIZE, TOKENIZE, UNSUPPORTED
from matquant.serve.limits import Limits

ROUTES = {"/v1/chat/completions": CHAT, "/v1/completions": COMPLETION, "/tokenize": TOKENIZE, "/detokenize": DETOKENIZE}
TEXTS = ["", "a", "auto", "none", "tiny", "tiny:int4", "user", "json_object", "é🐱", "\x00\n", "\ud800", "x" * 99]
NUMBERS = [0, 1, -1, 2, 3.5, 1e300, -0.0, 2**31, 2**63, 2**70, True, False, 255, 299, 300, float("nan")]
MESSAGES = [{"role": "user", "content": "Hi"}]
RIGHT: dict[str, Any] = {"max_tokens": 3, "prompt": "ab", "messages": MESSAGES, "tokens": [1]}
KEYS = ["type", "role", "content", "function", "name", "parameters", "json_schema", "schema", "text", "regex"]
KEYS += ["arguments", *TEXTS[:4]]


@pytest.fixture(scope="module")
def client(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    service = make_service(make_engine(llama, tmp_path_factory.mktemp("serve"), context=128), tool_form="hermes")
    with TestClient(make_app(service, Limits()), raise_server_exceptions=False) as client:
        yield client
    stop_all()


def value(generator: random.Random, depth: int = 3) -> Any:
    """Any JSON value."""
    kind = generator.randrange(6 if depth else 4)
    if kind == 4:
        return [value(generator, depth - 1) for _ in range(generator.randrange(4))]
    if kind == 5:
        return {generator.choice(KEYS): value(generator, depth - 1) for _ in range(generator.randrange(4))}
    return None if kind == 3 else generator.choice([NUMBERS, TEXTS, TEXTS][kind])


@pytest.mark.parametrize("bodies", [300, pytest.param(2000, marks=pytest.mark.slow)])
def test_random_bodies_never_fail(client: TestClient, bodies: int) -> None:
    generator = random.Random(bodies)
    statuses: dict[int, int] = {}
    for _ in range(bodies):
        route = generator.choice(list(ROUTES))
        table = ROUTES[route]
        body = {name: RIGHT[name] for name in RIGHT if name in table}
        names = [*table, *table, generator.choice(list(UNSUPPORTED)), "zebra"]
        for name in generator.sample(names, generator.randrange(4)):
            default = table[name].default if name in table else None
            body[name] = generator.choice([default, value(generator), value(generator), generator.choice(NUMBERS)])
        response = client.post(route, content=json.dumps(body))
        statuses[response.status_code] = statuses.get(response.status_code, 0) + 1
        assert response.status_code in (200, 400, 404), (route, body, response.text)
        if response.status_code != 200:
            error = response.json()["error"]
            assert sorted(error) == ["code", "message", "param", "type"]
            assert error["message"]
        elif '"error"' in response.text[:200]:
            pytest.fail(f"{route} {body}: {response.text}")
    assert statuses[200] > bodies / 10
    assert statuses[400] > bodies / 10
