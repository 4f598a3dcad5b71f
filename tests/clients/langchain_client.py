"""langchain-openai: ``python langchain_client.py ADDRESS`` asserts answers, streams, tools and structured output."""

import asyncio
import sys
from typing import Any

from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel, ConfigDict, Field

MODEL = "tiny:int4"


class Point(BaseModel):
    """A point with a name."""

    model_config = ConfigDict(extra="forbid")
    x: int = Field(ge=0, le=9)
    name: str = Field(max_length=5)


@tool
def weather(city: str) -> str:
    """Return the weather of a city."""
    return f"{city}: sun"


def answers(chat: ChatOpenAI) -> None:
    found = chat.invoke("Tell me about the dog.")
    assert isinstance(found.content, str)
    assert found.content
    assert found.response_metadata["model_name"] == MODEL
    assert found.usage_metadata is not None
    assert found.usage_metadata["output_tokens"] <= 16
    whole: Any = None
    for chunk in chat.stream("Tell me about the dog."):
        whole = chunk if whole is None else whole + chunk
    assert whole.content == found.content
    assert whole.usage_metadata["output_tokens"] == found.usage_metadata["output_tokens"]
    assert [answer.content for answer in chat.batch(["Tell me about the dog."] * 3)] == [found.content] * 3
    assert asyncio.run(chat.ainvoke("Tell me about the dog.")).content == found.content


def tools(chat: ChatOpenAI) -> None:
    question = HumanMessage("What is the weather in Rome?")
    called = chat.bind_tools([weather], tool_choice="weather").invoke([question])
    assert isinstance(called, AIMessage)
    assert [call["name"] for call in called.tool_calls] == ["weather"]
    assert isinstance(called.tool_calls[0]["args"]["city"], str)
    result = ToolMessage("sun", tool_call_id=called.tool_calls[0]["id"])
    assert isinstance(chat.bind_tools([weather]).invoke([question, called, result]), AIMessage)
    whole: Any = None
    for chunk in chat.bind_tools([weather], tool_choice="any").stream([question]):
        whole = chunk if whole is None else whole + chunk
    assert whole.tool_calls[0]["name"] == "weather"


def structured(chat: ChatOpenAI) -> None:
    for method in ("json_schema", "function_calling"):
        found = chat.with_structured_output(Point, method=method).invoke("A point.")
        assert isinstance(found, Point), method


def main() -> None:
    given: Any = {"base_url": f"{sys.argv[1]}/v1", "api_key": "any", "model": MODEL, "temperature": 0}
    answers(ChatOpenAI(**given, max_tokens=16, stream_usage=True))
    # a small model writes long names unless the schema ends them; blanks count too
    tools(ChatOpenAI(**given, max_tokens=200, frequency_penalty=2))
    structured(ChatOpenAI(**given, max_tokens=200))
    assert OpenAI(**given, max_tokens=8).invoke("The dog")


main()
