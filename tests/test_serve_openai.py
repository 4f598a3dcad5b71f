"""OpenAI's own client against the server, in process: its types read every answer, stream and error."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
from openai.types.chat import ChatCompletion
from pydantic import BaseModel, ConfigDict, Field
from starlette.testclient import TestClient

from clients.openai_client import TOOL
from http_service import TEMPLATE, make_engine, make_service, stop_all
from matquant.serve.app import make_app
from matquant.serve.limits import Limits
from one_by_one import OneByOne

MESSAGES: Any = [{"role": "user", "content": "Hi"}]


class Point(BaseModel):
    model_config = ConfigDict(extra="forbid")
    x: int = Field(ge=0, le=9)
    name: Literal["a", "b"]


@pytest.fixture(scope="module")
def client(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    template = TEMPLATE + "{% if tools %}<tool_call>{% endif %}"
    service = make_service(
        make_engine(llama, tmp_path_factory.mktemp("serve"), template=template, context=512), tool_form="hermes"
    )
    with TestClient(make_app(service, Limits())) as http:
        yield openai.OpenAI(base_url="http://testserver/v1", api_key="any", http_client=http, max_retries=0)
    stop_all()


def test_models_and_completions(client: openai.OpenAI) -> None:
    assert client.models.retrieve("tiny:int4").id == "tiny:int4"
    found = client.completions.create(model="tiny", prompt=["a", "b"], max_tokens=4, logprobs=2, echo=True)
    assert [choice.text[0] for choice in found.choices] == ["a", "b"]
    assert found.choices[0].logprobs is not None
    assert found.choices[0].logprobs.token_logprobs is not None
    assert len(found.choices[0].logprobs.token_logprobs) == 5


def test_chats_are_of_the_clients_types(client: openai.OpenAI) -> None:
    found = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=4, logprobs=True, top_logprobs=2, n=2, service_tier="flex"
    )
    ChatCompletion.model_validate(found.model_dump(), strict=False)
    assert found.service_tier == "flex"
    assert found.system_fingerprint == "b-0-test"
    raw = client.chat.completions.with_raw_response.create(model="tiny", messages=MESSAGES, max_tokens=2)
    assert raw.headers["x-matquant-width"] == "int8=2"


def test_answers_are_parsed_into_models(client: openai.OpenAI) -> None:
    found = client.chat.completions.parse(model="tiny", messages=MESSAGES, response_format=Point, seed=1, temperature=1)
    point = found.choices[0].message.parsed
    assert isinstance(point, Point)


def test_streams_are_put_together_by_the_client(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model="tiny", messages=MESSAGES, tools=[TOOL], tool_choice="required", parallel_tool_calls=False, seed=1
    ) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert "tool_calls.function.arguments.delta" in kinds
    (call,) = final.choices[0].message.tool_calls or []
    assert call.function.name == "add"
    assert final.choices[0].finish_reason == "tool_calls"
    yes: Any = {"structured_outputs": {"choice": ["yes"]}}
    with client.chat.completions.stream(model="tiny", messages=MESSAGES, logprobs=True, extra_body=yes) as stream:
        assert stream.get_final_completion().choices[0].logprobs is not None


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"model": "other"}, openai.NotFoundError),
        ({"temperature": -1}, openai.BadRequestError),
        ({"extra_body": {"bits": 99}}, openai.BadRequestError),
    ],
)
def test_errors_are_the_clients(
    client: openai.OpenAI, fields: dict[str, Any], error: type[openai.APIStatusError]
) -> None:
    with pytest.raises(error) as caught:
        client.chat.completions.create(**{"model": "tiny", "messages": MESSAGES, **fields})
    assert caught.value.param is not None
    assert caught.value.type in ("BadRequestError", "NotFoundError")


def test_a_full_server_says_when_to_come_back(llama: Path, tmp_path: Path) -> None:
    engine = make_engine(llama, tmp_path)
    service = make_service(engine, batcher=OneByOne(engine, most=0))
    with TestClient(make_app(service, Limits())) as http:
        client = openai.OpenAI(base_url="http://testserver/v1", api_key="any", http_client=http, max_retries=0)
        with pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(model="tiny", prompt="x")
    assert caught.value.response.headers["retry-after"] == "2"
    stop_all()
