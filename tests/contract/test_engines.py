"""The contract of `core.ports.Engine`, which every engine keeps."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from tests.contract.conftest import Subject

from ondol.core.inference import Capability, Chunk, Task
from ondol.core.money import Money
from ondol.errors import DeadlineExceeded, EngineError, EngineUnavailable

pytestmark = pytest.mark.anyio


async def collect(subject: Subject, **options: Any) -> list[Chunk]:
    return [chunk async for chunk in subject.engine.stream(subject.call(stream=True, **options))]


def text_of(chunks: list[Chunk]) -> str:
    texts = []
    for chunk in chunks:
        for choice in json.loads(chunk.data)["choices"]:
            texts.append(choice["delta"].get("content") or "")
    return "".join(texts)


async def test_a_whole_answer_is_openai_json_with_usage(subject: Subject) -> None:
    completion = await subject.engine.complete(subject.call())
    answer = json.loads(completion.body)
    assert completion.usage is not None
    assert completion.usage.input_tokens > 0
    assert answer["usage"]["prompt_tokens"] == completion.usage.input_tokens
    if subject.task is Task.EMBEDDING:
        assert len(answer["data"][0]["embedding"]) > 10
        return
    assert completion.usage.output_tokens > 0
    (choice,) = answer["choices"]
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"]
    assert choice["finish_reason"] in {"stop", "length"}


async def test_the_token_limit_holds(subject: Subject) -> None:
    if subject.task is Task.EMBEDDING:
        pytest.skip("embeddings have no output tokens")
    completion = await subject.engine.complete(subject.call(tokens=3))
    assert completion.usage is not None
    assert completion.usage.output_tokens <= 3
    assert json.loads(completion.body)["choices"][0]["finish_reason"] == "length"


async def test_a_stream_gives_the_answer_in_chunks_and_ends_with_finish_and_usage(subject: Subject) -> None:
    if subject.task is Task.EMBEDDING:
        pytest.skip("embeddings are not streamed")
    body: dict[str, Any] = {"temperature": 0, "seed": 1}
    chunks = await collect(subject, **body)
    whole = json.loads((await subject.engine.complete(subject.call(**body))).body)
    assert text_of(chunks) == whole["choices"][0]["message"]["content"]
    assert [chunk.finish for chunk in chunks if chunk.has_choices][-1]
    assert sum(chunk.pieces for chunk in chunks) > 1
    usage = [chunk.usage for chunk in chunks if chunk.usage is not None]
    assert usage
    assert usage[-1].output_tokens == whole["usage"]["completion_tokens"]
    for chunk in chunks:
        assert json.loads(chunk.data)["object"] == "chat.completion.chunk"


async def test_several_choices_where_declared(subject: Subject) -> None:
    if Capability.CHOICES not in subject.engine.capabilities or subject.task is Task.EMBEDDING:
        pytest.skip("not declared")
    answer = json.loads((await subject.engine.complete(subject.call(n=2))).body)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]


async def test_no_problem_while_it_answers(subject: Subject) -> None:
    await subject.engine.complete(subject.call())
    assert subject.engine.problem() is None


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "stream"])
async def test_a_deadline_gone_by_is_said(subject: Subject, streamed: bool) -> None:
    if streamed and subject.task is Task.EMBEDDING:
        pytest.skip("embeddings are not streamed")
    with pytest.raises(DeadlineExceeded):
        if streamed:
            await collect(subject, seconds=-1)
        else:
            await subject.engine.complete(subject.call(seconds=-1))


async def test_cancelling_frees_the_engine(subject: Subject) -> None:
    task = asyncio.ensure_future(subject.engine.complete(subject.call(tokens=400)))
    for _ in range(3):
        await asyncio.sleep(0)  # the request is on its way, and no engine answers that soon
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await subject.engine.complete(subject.call())).body


async def test_closing_a_stream_frees_the_engine(subject: Subject) -> None:
    if subject.task is Task.EMBEDDING:
        pytest.skip("embeddings are not streamed")
    stream = subject.engine.stream(subject.call(stream=True, tokens=400))
    await anext(stream)
    await stream.aclose()  # type: ignore[attr-defined]  # each is an async generator
    if subject.server is not None:
        await asyncio.wait_for(subject.server.hung_up.wait(), 5)
    assert (await subject.engine.complete(subject.call())).body


async def test_requests_at_once_do_not_mix(subject: Subject) -> None:
    calls = [subject.call(tokens=4) for _ in range(4)]
    answers = await asyncio.gather(*(subject.engine.complete(call) for call in calls))
    assert len(answers) == 4
    assert all(answer.usage is not None for answer in answers)


async def test_close_ends_it_and_may_be_repeated(own_subject: Subject) -> None:
    engine = own_subject.engine
    await engine.complete(own_subject.call())
    await engine.close()
    await engine.close()
    with pytest.raises(EngineUnavailable):
        await engine.complete(own_subject.call())


async def test_close_ends_what_runs(own_subject: Subject) -> None:
    if own_subject.task is Task.EMBEDDING:
        pytest.skip("embeddings are not streamed")
    stream = own_subject.engine.stream(own_subject.call(stream=True, tokens=400))
    await anext(stream)
    await own_subject.engine.close()
    with pytest.raises(EngineError):
        async for _ in stream:
            continue


async def test_a_peer_is_told_who_asks_and_says_what_it_cost(subject: Subject) -> None:
    if subject.name != "peer":
        pytest.skip("only a peer")
    assert subject.server is not None
    completion = await subject.engine.complete(subject.call(metadata={"lesson": "7"}))
    asked = subject.server.asked[-1]
    told = {name: value for name, value in asked.headers.items() if name.startswith("x-ondol-")}
    assert 59_000 < int(told.pop("x-ondol-remaining-ms")) <= 60_000
    assert told == {
        "x-ondol-origin": "edge-1;req-7;2",
        "x-ondol-hops": "device-1,edge-1",
        "x-ondol-data-class": "internal",
        "x-ondol-objective": "fast",
        "x-ondol-on-behalf": "tenant=default;team=store%20team",
    }
    assert (asked.body["model"], asked.body["metadata"]) == ("assistant", {"lesson": "7"})
    receipts = [completion.receipt, (await collect(subject))[-1].receipt]
    for receipt in receipts:
        assert receipt is not None
        assert (receipt.site, receipt.request_id, receipt.deployment) == (
            "cloud-1",
            "req-peer-1",
            "helper-there",
        )
        assert receipt.cost == Money(12_400, "USD")
        assert (receipt.energy_uj, receipt.carbon_ng, receipt.cache) == (1_500_000, 200_000, "miss")
