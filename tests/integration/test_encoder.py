"""The encoder engine on the real encoder, in its real process."""

from __future__ import annotations

import asyncio
import base64
import json
import math
import os
import signal
import struct
from collections.abc import AsyncIterator
from typing import Any

import pytest

from ondol.adapters.clock import SystemClock
from ondol.core.identity import Principal
from ondol.core.inference import InferenceRequest, Task
from ondol.core.ports import EngineCall
from ondol.engines.child import Backoff
from ondol.engines.encoder import INPUT_BYTES_MAX, TOTAL_BYTES_MAX, EncoderEngine
from ondol.errors import DeadlineExceeded, EngineRejected, EngineUnavailable
from ondol.units import NS_PER_S

pytestmark = pytest.mark.anyio

CLOCK = SystemClock()


def ask(body: dict[str, Any], *, task: Task = Task.EMBEDDING, seconds: float = 60.0) -> EngineCall:
    return EngineCall(
        request=InferenceRequest(task=task, route="embedding", body=body),
        request_id="r",
        attempt=1,
        deadline_ns=CLOCK.now_ns() + int(seconds * NS_PER_S),
        max_output_tokens=0,
        principal=Principal(key_id="k", tenant="default", team="t"),
    )


@pytest.fixture(scope="module")
async def encoder() -> AsyncIterator[EncoderEngine]:
    engine = EncoderEngine(name="use", clock=CLOCK, backoff=Backoff(first_s=0.01))
    await engine.start()
    yield engine
    await engine.close()


async def vectors(engine: EncoderEngine, *texts: str) -> list[list[float]]:
    answer = await engine.complete(ask({"input": list(texts)}))
    return [item["embedding"] for item in json.loads(answer.body)["data"]]


def cosine(a: list[float], b: list[float]) -> float:
    return math.sumprod(a, b) if hasattr(math, "sumprod") else sum(x * y for x, y in zip(a, b, strict=True))


async def test_it_loads_on_first_use_and_not_before() -> None:
    engine = EncoderEngine(name="use", clock=CLOCK)
    await engine.start()
    assert engine.problem() is None
    assert engine.child.starts == 0
    await engine.complete(ask({"input": "now"}))
    assert engine.child.starts == 1
    await engine.close()
    assert engine.child.pid is None
    assert engine.problem() is not None


async def test_paraphrases_are_nearer_than_unrelated_sentences_in_both_languages(
    encoder: EncoderEngine,
) -> None:
    refund, refund_ko, money_back, weather_ko = await vectors(
        encoder,
        "How do I get a refund for my order?",
        "주문한 것을 환불받으려면 어떻게 하나요?",
        "I want my money back for what I bought.",
        "내일 부산에는 비가 많이 옵니다.",
    )
    assert all(abs(cosine(row, row) - 1) < 1e-5 for row in (refund, refund_ko, money_back, weather_ko))
    assert cosine(refund, money_back) > cosine(refund, weather_ko) + 0.2
    assert cosine(refund, refund_ko) > cosine(refund, weather_ko) + 0.2
    assert cosine(refund_ko, money_back) > cosine(refund_ko, weather_ko) + 0.2


async def test_base64_holds_the_same_little_endian_floats(encoder: EncoderEngine) -> None:
    plain = json.loads((await encoder.complete(ask({"input": "안녕하세요"}))).body)["data"][0]["embedding"]
    answer = await encoder.complete(ask({"input": "안녕하세요", "encoding_format": "base64"}))
    packed = base64.b64decode(json.loads(answer.body)["data"][0]["embedding"])
    assert list(struct.unpack("<512f", packed)) == plain


async def test_a_list_keeps_its_order_and_usage_counts_all_tokens(encoder: EncoderEngine) -> None:
    texts = [f"sentence number {index}" for index in range(100)]
    many = await encoder.complete(ask({"input": texts}))
    one = await encoder.complete(ask({"input": texts[77]}))
    data = json.loads(many.body)["data"]
    assert [item["index"] for item in data] == list(range(100))
    assert cosine(data[77]["embedding"], json.loads(one.body)["data"][0]["embedding"]) > 0.9999
    assert many.usage is not None
    assert one.usage is not None
    assert not many.usage.estimated
    assert one.usage.input_tokens >= 3
    assert many.usage.input_tokens > 90 * one.usage.input_tokens / 2
    assert json.loads(many.body)["usage"]["prompt_tokens"] == many.usage.input_tokens


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "found no input"),
        ({"input": []}, "found no input"),
        ({"input": ""}, "empty text"),
        ({"input": [1, 2, 3]}, "found int as input 0"),
        ({"input": [[1, 2]]}, "found list as input 0"),
        ({"input": "a" * (INPUT_BYTES_MAX + 1)}, "cut it into parts"),
        ({"input": ["a" * INPUT_BYTES_MAX] * (TOTAL_BYTES_MAX // INPUT_BYTES_MAX + 1)}, "several requests"),
        ({"input": ["a"] * 2049}, "at most 2048"),
        ({"input": "\ud800"}, "surrogate"),
        ({"input": "a", "dimensions": 16}, "512 dimensions"),
        ({"input": "a", "encoding_format": "hex"}, "float or base64"),
    ],
)
async def test_what_it_cannot_encode_is_refused_with_the_reason(
    encoder: EncoderEngine, body: dict[str, Any], words: str
) -> None:
    with pytest.raises(EngineRejected, match=words):
        await encoder.complete(ask(body))


async def test_other_tasks_and_streams_are_refused(encoder: EncoderEngine) -> None:
    with pytest.raises(EngineRejected, match="encoder"):
        await encoder.complete(ask({"messages": []}, task=Task.CHAT))
    with pytest.raises(EngineRejected, match="streamed"):
        await anext(encoder.stream(ask({"input": "a"})))


async def test_a_killed_child_fails_what_waits_and_then_answers_again(encoder: EncoderEngine) -> None:
    await encoder.complete(ask({"input": "warm"}))
    pid = encoder.child.pid
    assert pid is not None
    waiting = asyncio.create_task(encoder.complete(ask({"input": ["long " * 6000] * 30})))
    await asyncio.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(EngineUnavailable, match="started again"):
        await waiting
    async with asyncio.timeout(20):
        while encoder.problem() is not None:  # noqa: ASYNC110 - the engine has no such event
            await asyncio.sleep(0.01)
    answer = await encoder.complete(ask({"input": "again"}))
    assert len(json.loads(answer.body)["data"]) == 1
    assert encoder.child.pid != pid


async def test_a_request_out_of_time_is_withdrawn_and_the_next_is_answered(encoder: EncoderEngine) -> None:
    await encoder.complete(ask({"input": "warm"}))
    long = ["long " * 6000] * 33
    with pytest.raises(DeadlineExceeded):
        await encoder.complete(ask({"input": long}, seconds=0.2))
    cancelled = asyncio.create_task(encoder.complete(ask({"input": long})))
    await asyncio.sleep(0.1)
    cancelled.cancel()
    # Each long one is 15 s of work: within this deadline there is an answer only if both were dropped.
    answer = await encoder.complete(ask({"input": "next"}, seconds=10.0))
    assert answer.usage is not None
    with pytest.raises(asyncio.CancelledError):
        await cancelled


async def test_more_than_may_wait_is_unavailable_at_once() -> None:
    engine = EncoderEngine(name="use", clock=CLOCK, waiting_max=2)
    both = [asyncio.create_task(engine.complete(ask({"input": "a"}))) for _ in "ab"]
    await asyncio.sleep(0)
    with pytest.raises(EngineUnavailable, match="2 requests waiting"):
        await engine.complete(ask({"input": "a"}))
    await asyncio.gather(*both)
    assert engine.problem() is None
    await engine.close()
