"""The official `openai` client against a real site: what works with OpenAI works here."""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletionChunk, ChatCompletionMessageParam, ChatCompletionToolParam
from tests.sites import FAKE, Site, running_site

pytestmark = pytest.mark.anyio

ROUTES = (
    FAKE
    + """
---
kind: Model
name: writer
task: completion
---
kind: Deployment
name: writer-fake
site: {site}
model: writer
engine: fake
price: list
---
kind: Route
name: writer
deployments: [writer-fake]
"""
)
WEATHER: ChatCompletionToolParam = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with running_site(tmp_path_factory.mktemp("openai"), ROUTES) as one:
        yield one


@pytest.fixture
def client(site: Site) -> Iterator[OpenAI]:
    with OpenAI(base_url=site.url + "/v1", api_key=site.admin_key, max_retries=0) as one:
        yield one


MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Say something."}]


def _ondol(chunk: ChatCompletionChunk) -> dict[str, Any]:
    """The field that is ours, which the client keeps as an extra one."""
    assert chunk.model_extra is not None
    found: dict[str, Any] = chunk.model_extra["ondol"]
    return found


def test_chat_has_content_and_usage(client: OpenAI) -> None:
    answer = client.chat.completions.create(model="assistant", messages=MESSAGES, max_completion_tokens=7)
    assert answer.choices[0].message.content and answer.usage
    assert 0 < answer.usage.completion_tokens <= 7
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_stream_says_what_the_whole_answer_says(client: OpenAI) -> None:
    whole = client.chat.completions.create(model="assistant", messages=MESSAGES, seed=1)
    stream = client.chat.completions.create(
        model="assistant", messages=MESSAGES, seed=1, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage and not chunks[-1].choices
    told = _ondol(chunks[-1])
    assert told["site"] == "store-1" and told["cost"].endswith(" USD") and told["reason"] == "only_choice"


def test_a_stream_without_usage_has_choices_in_every_chunk(client: OpenAI) -> None:
    stream = client.chat.completions.create(model="assistant", messages=MESSAGES, stream=True)
    chunks = list(stream)
    assert all(chunk.choices for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason == "stop" and _ondol(chunks[-1])["request_id"]


def test_tools_and_forced_choice(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="assistant", messages=MESSAGES, tools=[WEATHER],
        tool_choice={"type": "function", "function": {"name": "get_weather"}},
    )  # fmt: skip
    call = (answer.choices[0].message.tool_calls or [])[0]
    assert call.type == "function"
    assert call.function.name == "get_weather" and '"city"' in call.function.arguments


def test_json_schema_logprobs_and_n(client: OpenAI) -> None:
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    answer = client.chat.completions.create(
        model="assistant", messages=MESSAGES, n=2, logprobs=True, top_logprobs=2,
        response_format={"type": "json_schema", "json_schema": {"name": "t", "schema": dict[str, object](schema)}},
    )  # fmt: skip
    assert len(answer.choices) == 2
    first = answer.choices[0]
    assert '"ok"' in (first.message.content or "")
    assert first.logprobs is not None and first.logprobs.content


def test_completions(client: OpenAI) -> None:
    answer = client.completions.create(model="writer", prompt="Once", max_tokens=5)
    assert answer.choices[0].text and answer.usage is not None


def test_embeddings_as_floats_and_as_base64(client: OpenAI) -> None:
    texts = ["one", "둘"]
    floats = client.embeddings.create(model="embedding", input=texts, encoding_format="float")
    packed = client.embeddings.create(model="embedding", input=texts, encoding_format="base64")
    assert len(floats.data) == len(packed.data) == 2
    raw: Any = packed.data[1].embedding
    size = len(floats.data[1].embedding)
    numbers = struct.unpack(f"<{size}f", base64.b64decode(raw)) if isinstance(raw, str) else raw
    assert numbers == pytest.approx(floats.data[1].embedding, rel=1e-5)


def test_models_are_the_routes(client: OpenAI) -> None:
    assert {one.id for one in client.models.list()} == {"assistant", "embedding", "writer"}
    assert client.models.retrieve("assistant").id == "assistant"


def test_unknown_model_names_the_nearest(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="asistant", messages=MESSAGES)
    assert caught.value.code == "model_not_found" and "assistant" in str(caught.value)


def test_wrong_key_is_an_authentication_error(site: Site) -> None:
    with (
        OpenAI(base_url=site.url + "/v1", api_key="ondol_x", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.models.list()


def test_headers_explain_the_answer(client: OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(model="assistant", messages=MESSAGES)
    headers = raw.headers
    assert headers["x-ondol-site"] == "store-1" and headers["x-ondol-deployment"] == "helper-fake"
    assert headers["x-ondol-reason"] == "only_choice" and int(headers["x-ondol-overhead-us"]) > 0
    usage = raw.parse().usage
    assert usage is not None
    expected = (usage.prompt_tokens * 1 + usage.completion_tokens * 2) / 1e6
    assert float(headers["x-ondol-cost"].split()[0]) == pytest.approx(expected)


async def test_the_async_client_streams(site: Site) -> None:
    async with AsyncOpenAI(base_url=site.url + "/v1", api_key=site.admin_key, max_retries=0) as client:
        stream = await client.chat.completions.create(model="assistant", messages=MESSAGES, stream=True)
        text = ""
        async for chunk in stream:
            text += chunk.choices[0].delta.content or ""
    assert text
