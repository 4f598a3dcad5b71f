"""OpenAI's package for Python: ``python openai_client.py ADDRESS`` asserts what its types, streams and errors give."""

import asyncio
import sys
import time
import urllib.request
from collections.abc import Callable
from typing import Any

import openai
from pydantic import BaseModel, ConfigDict, Field

MESSAGES: Any = [{"role": "user", "content": "Tell me about the dog."}]
MODEL = "tiny:int4"
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "add",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 9}},
            "required": ["x"],
            "additionalProperties": False,
        },
    },
}


class Point(BaseModel):
    model_config = ConfigDict(extra="forbid")
    x: int = Field(ge=0, le=9)
    name: str = Field(max_length=5)


def whole_answers(client: openai.OpenAI) -> None:
    assert next(model.id for model in client.models.list()) == "tiny"
    assert client.models.retrieve("tiny:int8").id == "tiny:int8"
    found = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=8, n=2, logprobs=True, top_logprobs=3, seed=1, temperature=1
    )
    assert len(found.choices) == 2
    assert found.model == MODEL
    assert found.usage is not None
    assert found.usage.completion_tokens <= 16
    for choice in found.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        assert "".join(token.token for token in choice.logprobs.content) == choice.message.content
    scored = client.completions.create(model=MODEL, prompt="The dog", max_tokens=1, echo=True, logprobs=1)
    assert scored.choices[0].text.startswith("The dog")
    assert scored.choices[0].logprobs is not None
    assert scored.choices[0].logprobs.token_logprobs is not None
    assert scored.choices[0].logprobs.token_logprobs[0] is None


def structured(client: openai.OpenAI) -> None:
    parsed = client.chat.completions.parse(model=MODEL, messages=MESSAGES, response_format=Point, max_tokens=100)
    assert isinstance(parsed.choices[0].message.parsed, Point)
    called = client.chat.completions.create(model=MODEL, messages=MESSAGES, tools=[TOOL], tool_choice="required", n=1)
    assert called.choices[0].finish_reason == "tool_calls"
    calls = called.choices[0].message.tool_calls or []
    history = [
        *MESSAGES,
        called.choices[0].message.model_dump(exclude_none=True),
        *({"role": "tool", "tool_call_id": call.id, "content": "3"} for call in calls),
    ]
    after = client.chat.completions.create(
        model=MODEL, messages=history, tools=[TOOL], tool_choice="none", max_tokens=4
    )
    assert after.choices[0].message.content


def streams(client: openai.OpenAI) -> None:
    asked: Any = {"model": MODEL, "messages": MESSAGES, "max_tokens": 24, "extra_body": {"ignore_eos": True}}
    alone = client.chat.completions.create(**asked).choices[0].message.content
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == alone
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 24
    one: Any = {"structured_outputs": {"choice": ["yes"]}}
    with client.chat.completions.stream(model=MODEL, messages=MESSAGES, extra_body=one) as stream:
        kinds = {event.type for event in stream}
        assert stream.get_final_completion().choices[0].message.content == "yes"
    assert {"chunk", "content.delta", "content.done"} <= kinds
    pieces = client.completions.create(model=MODEL, prompt="The dog", max_tokens=8, stream=True)
    assert "".join(chunk.choices[0].text for chunk in pieces)


def error_of(kind: type[openai.APIStatusError], ask: Callable[..., Any], **fields: Any) -> openai.APIStatusError:
    """The error that a request must raise."""
    try:
        ask(**fields)
    except kind as error:
        return error
    raise AssertionError(f"{fields} was answered")


def errors(client: openai.OpenAI) -> None:
    wrong: list[tuple[type[openai.APIStatusError], Any]] = [
        (openai.NotFoundError, {"model": "other"}),
        (openai.BadRequestError, {"model": MODEL, "temperature": -1}),
        (openai.BadRequestError, {"model": MODEL, "max_tokens": 10**6}),
    ]
    for kind, fields in wrong:
        assert error_of(kind, client.chat.completions.create, messages=MESSAGES, **fields).param is not None
    assert "text only" in error_of(openai.NotFoundError, client.embeddings.create, model=MODEL, input="x").message


def answers_being_written(address: str) -> int:
    with urllib.request.urlopen(f"{address}/load") as response:
        return int(response.read().split(b":")[1].strip(b" }"))


def leaving(client: openai.OpenAI, address: str) -> None:
    """A stream that is closed early leaves nothing behind."""
    asked: Any = {"model": MODEL, "messages": MESSAGES, "max_tokens": 400, "extra_body": {"ignore_eos": True}}
    stream = client.chat.completions.create(**asked, stream=True)
    next(iter(stream))
    assert answers_being_written(address) == 1
    stream.close()
    for _ in range(100):
        if answers_being_written(address) == 0:
            return
        time.sleep(0.05)
    raise AssertionError("the answer goes on without its client")


async def together(address: str) -> None:
    """24 requests of three widths at once get the texts that each gets alone."""
    models = ["tiny:int8", MODEL, "tiny:int2"]

    async def ask(number: int) -> str:
        found = await client.completions.create(
            model=models[number % 3], prompt=f"Once upon a time {number}", max_tokens=12 + number, temperature=0
        )
        return found.choices[0].text

    async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="any") as client:
        alone = [await ask(number) for number in range(24)]
        assert await asyncio.gather(*map(ask, range(24))) == alone


def main() -> None:
    address = sys.argv[1]
    with openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0) as client:
        whole_answers(client)
        structured(client)
        streams(client)
        errors(client)
        leaving(client, address)
    asyncio.run(together(address))


if __name__ == "__main__":
    main()
