"""The fake engine: the same request, the same answer, in the protocol's full form."""

from __future__ import annotations

import base64
import json
import struct
from typing import Any

import pytest

from ondol.adapters.clock import SystemClock
from ondol.core.catalog import FakeAnswers
from ondol.core.identity import Principal
from ondol.core.inference import Chunk, InferenceRequest, Task
from ondol.core.ports import EngineCall
from ondol.engines.fake import FakeEngine
from ondol.engines.fake_schema import SchemaTooLarge, instance_of
from ondol.errors import DeadlineExceeded, EngineFailed, EngineRejected, EngineUnavailable

pytestmark = pytest.mark.anyio

CLOCK = SystemClock()
ASK = [{"role": "user", "content": "how warm is it"}]


def call(
    task: Task = Task.CHAT, *, tokens: int = 100, stream: bool = False, time_s: float = 30, **body: Any
) -> EngineCall:
    if task is Task.CHAT:
        body = {"messages": ASK, **body}
    return EngineCall(
        request=InferenceRequest(task=task, route="r", body=body, n=body.get("n", 1), stream=stream),
        request_id="r",
        attempt=1,
        deadline_ns=CLOCK.now_ns() + int(time_s * 1e9),
        max_output_tokens=tokens,
        principal=Principal(key_id="k", tenant="default", team="t"),
    )


def fake(**answers: Any) -> FakeEngine:
    return FakeEngine(model="fake-1", clock=CLOCK, answers=FakeAnswers(**answers))


async def whole(engine: FakeEngine, asked: EngineCall) -> dict[str, Any]:
    decoded: dict[str, Any] = json.loads((await engine.complete(asked)).body)
    return decoded


async def test_the_same_request_has_the_same_answer_and_another_has_another() -> None:
    first = await whole(fake(), call(seed=1))
    assert first == await whole(fake(), call(seed=1, user="someone", metadata={"a": "b"}))
    other = await whole(fake(), call(seed=2))
    assert first["choices"][0]["message"] != other["choices"][0]["message"]


async def test_text_and_number_of_tokens_can_be_given() -> None:
    answer = await whole(fake(text="온돌은 따뜻하다"), call())
    assert answer["choices"][0]["message"]["content"] == "온돌은 따뜻하다"
    assert (await whole(fake(output_tokens=40), call()))["usage"]["completion_tokens"] == 40


async def test_usage_counts_words_and_messages() -> None:
    completion = await fake(text="one two three").complete(call())
    assert completion.usage is not None
    assert (completion.usage.input_tokens, completion.usage.output_tokens) == (4 + 4, 3)


async def test_the_limit_and_stop_words_cut() -> None:
    cut = (await whole(fake(text="one two three"), call(tokens=2)))["choices"][0]
    assert (cut["message"]["content"], cut["finish_reason"]) == ("one two", "length")
    stopped = (await whole(fake(text="one two three"), call(stop=[" three"])))["choices"][0]
    assert (stopped["message"]["content"], stopped["finish_reason"]) == ("one two", "stop")


SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 2}},
    "required": ["city", "days"],
}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
async def test_a_forced_tool_is_called_whole_and_streamed(choice: Any) -> None:
    asked = {"tools": TOOLS, "tool_choice": choice}
    found = (await whole(fake(), call(**asked)))["choices"][0]
    assert found["finish_reason"] == "tool_calls"
    (made,) = found["message"]["tool_calls"]
    assert made["function"]["name"] == "weather"
    assert json.loads(made["function"]["arguments"]) == {"city": "stone", "days": 2}
    pieces = []
    async for chunk in fake().stream(call(stream=True, **asked)):
        for piece in json.loads(chunk.data)["choices"]:
            for tool in piece["delta"].get("tool_calls", []):
                pieces.append(tool["function"]["arguments"])
    assert "".join(pieces) == made["function"]["arguments"]


async def test_a_tool_that_is_only_offered_is_not_called() -> None:
    found = (await whole(fake(), call(tools=TOOLS, tool_choice="auto")))["choices"][0]
    assert found["message"]["content"]


async def test_json_schema_is_met() -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    found = await whole(fake(), call(response_format=wanted))
    assert json.loads(found["choices"][0]["message"]["content"]) == {"city": "stone", "days": 2}


async def test_an_endless_schema_is_rejected() -> None:
    node = {"type": "object", "required": ["next"], "properties": {"next": {"$ref": "#"}}}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": node}}
    with pytest.raises(EngineRejected, match="16 levels"):
        await fake().complete(call(response_format=wanted))


async def test_logprobs_have_their_shape() -> None:
    chat = await whole(fake(text="a b"), call(logprobs=True))
    assert [item["token"] for item in chat["choices"][0]["logprobs"]["content"]] == ["a", " b"]
    plain = await whole(fake(text="a b"), call(Task.COMPLETION, prompt="x", logprobs=1))
    assert plain["choices"][0]["logprobs"]["text_offset"] == [0, 1]


async def test_completions_of_several_prompts_with_echo() -> None:
    answer = await whole(fake(text="z"), call(Task.COMPLETION, prompt=["x ", "y "], echo=True, n=2))
    assert [choice["text"] for choice in answer["choices"]] == ["x z", "x z", "y z", "y z"]
    assert answer["usage"]["completion_tokens"] == 4


async def test_embeddings_in_both_formats() -> None:
    plain = await whole(fake(), call(Task.EMBEDDING, input=["a", "b", "a"], dimensions=8))
    first, second, third = (item["embedding"] for item in plain["data"])
    assert first == third != second
    assert sum(value * value for value in first) == pytest.approx(1)
    packed = await whole(fake(), call(Task.EMBEDDING, input="a", dimensions=8, encoding_format="base64"))
    assert struct.unpack("<8f", base64.b64decode(packed["data"][0]["embedding"])) == pytest.approx(first)


async def test_failures_as_told() -> None:
    with pytest.raises(EngineUnavailable):
        await fake(fail="before").complete(call())
    with pytest.raises(EngineRejected):
        await fake(fail="reject").complete(call())
    got: list[Chunk] = []
    with pytest.raises(EngineFailed):
        async for chunk in fake(fail="after").stream(call(stream=True)):
            got.append(chunk)
    assert len(got) == 1
    engine = fake(fail="before", fail_every=3)
    outcomes = []
    for _ in range(6):
        try:
            await engine.complete(call())
            outcomes.append(True)
        except EngineUnavailable:
            outcomes.append(False)
    assert outcomes == [True, True, False, True, True, False]


async def test_pacing_ends_at_the_deadline() -> None:
    engine = fake(first_token_ms=1, token_ms=50, output_tokens=100)
    with pytest.raises(DeadlineExceeded):
        await engine.complete(call(time_s=0.05))
    got: list[Chunk] = []
    with pytest.raises(DeadlineExceeded):
        async for chunk in engine.stream(call(stream=True, time_s=0.1)):
            got.append(chunk)
    assert got


@pytest.mark.parametrize(
    ("schema", "instance"),
    [
        ({"type": "string", "maxLength": 3}, "sto"),
        ({"type": "string", "minLength": 8}, "stonexxx"),
        ({"type": "string", "format": "date"}, "2026-01-01"),
        ({"type": "integer", "exclusiveMinimum": 2}, 3),
        ({"type": "integer", "minimum": 7, "multipleOf": 5}, 10),
        ({"type": "number", "maximum": -1}, -1),
        ({"type": "array", "items": {"type": "boolean"}, "minItems": 2}, [True, True]),
        ({"type": ["null", "string"]}, None),
        ({"enum": ["b", "a"]}, "b"),
        ({"const": 5}, 5),
        ({"anyOf": [{"type": "null"}, {"type": "string"}]}, None),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"type": "boolean"}}}, True),
        (
            {"allOf": [{"required": ["a"]}, {"required": ["b"], "properties": {"b": {"const": 1}}}]},
            {"a": {}, "b": 1},
        ),
        (True, {}),
    ],
)
async def test_the_smallest_instance(schema: Any, instance: Any) -> None:
    assert instance_of(schema) == instance


@pytest.mark.parametrize(
    "schema",
    [{"type": "array", "minItems": 5000}, {"type": "string", "minLength": 10**9}, {"$ref": "#"}],
)
async def test_a_schema_past_its_bound(schema: Any) -> None:
    with pytest.raises(SchemaTooLarge):
        instance_of(schema)
