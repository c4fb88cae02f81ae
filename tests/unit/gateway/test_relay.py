"""A streamed answer on its way: nothing lost, nothing doubled, and no end before the record is durable."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ondol.core.inference import Chunk, Receipt, Usage
from ondol.errors import EngineFailed, LedgerUnavailable, OndolError
from ondol.gateway import relay as module
from ondol.gateway.relay import Ending, Heard, Relay, error_event
from ondol.wire.sse import DONE, SseDecoder

pytestmark = pytest.mark.anyio

HEAD = {"id": "c1", "object": "chat.completion.chunk", "created": 5, "model": "m"}
END = b'{"site":"here"}'
USAGE = Usage(input_tokens=3, output_tokens=2)


def choice(text: str, *, index: int = 0, finish: str | None = None, **fields: Any) -> dict[str, Any]:
    one = {"index": index, "delta": {"content": text} if text else {}, "finish_reason": finish}
    return HEAD | {"choices": [one]} | fields


def chunk(fields: dict[str, Any], usage: Usage | None = None, receipt: Receipt | None = None) -> Chunk:
    choices = fields.get("choices") or []
    return Chunk(
        data=json.dumps(fields).encode(), pieces=sum(bool(one["delta"]) for one in choices),
        finish=any(one["finish_reason"] for one in choices), has_choices=bool(choices), usage=usage,
        model="m", receipt=receipt,
    )  # fmt: skip


def usage_chunk(**fields: Any) -> Chunk:
    counts = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    return chunk(HEAD | {"choices": [], "usage": counts} | fields, usage=USAGE)


A, B, STOP = choice("a"), choice("b"), choice("", finish="stop")


class Stream:
    """A relay over given chunks, with what it called and when."""

    def __init__(
        self, *chunks: Chunk, fail: OndolError | None = None, refuse: OndolError | None = None,
        include_usage: bool = False, collect: bool = False,
    ) -> None:  # fmt: skip
        self.endings: list[Ending] = []
        self.abandoned: list[Heard] = []
        self.refuse = refuse
        self.sent: list[bytes] = []
        self.sent_at_finish = -1
        rest = self._upstream(chunks[1:], fail)
        self.relay = Relay(
            first=chunks[0], chunks=rest, include_usage=include_usage, collect=collect,
            finish=self._finish, abandon=lambda heard, _: self.abandoned.append(heard),
        )  # fmt: skip

    @staticmethod
    async def _upstream(chunks: tuple[Chunk, ...], fail: OndolError | None) -> AsyncIterator[Chunk]:
        for one in chunks:
            yield one
        if fail is not None:
            raise fail

    async def _finish(self, ending: Ending) -> bytes:
        self.endings.append(ending)
        self.sent_at_finish = len(self.sent)
        if self.refuse is not None:
            raise self.refuse
        return END

    async def read(self) -> list[bytes]:
        """The payloads of all events, `[DONE]` too."""
        async for piece in self.relay:
            self.sent.append(piece)
        return SseDecoder().feed(b"".join(self.sent))


def loaded(payloads: list[bytes]) -> list[dict[str, Any]]:
    assert payloads[-1] == b"[DONE]"
    return [json.loads(one) for one in payloads[:-1]]


async def test_choices_come_through_and_the_last_says_where_from() -> None:
    stream = Stream(chunk(A), chunk(B), chunk(STOP), usage_chunk())
    assert loaded(await stream.read()) == [A, B, STOP | {"ondol": json.loads(END)}]
    [ending] = stream.endings
    assert ending == Ending(heard=Heard(usage=USAGE, model="m", pieces=2, chunks=4))


async def test_with_include_usage_the_usage_is_last() -> None:
    stream = Stream(chunk(A), chunk(STOP), usage_chunk(), include_usage=True)
    *rest, last = loaded(await stream.read())
    assert rest == [A, STOP]
    assert (last["choices"], last["usage"]["total_tokens"], last["ondol"]) == ([], 5, json.loads(END))


async def test_an_engine_without_a_usage_chunk_gets_one() -> None:
    stream = Stream(chunk(A), chunk(choice("", finish="stop"), usage=USAGE), include_usage=True)
    *rest, last = loaded(await stream.read())
    assert rest == [A, STOP]
    counts = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    assert last == HEAD | {"choices": [], "usage": counts, "ondol": json.loads(END)}
    told = loaded(await Stream(chunk(A), chunk(B), chunk(STOP), include_usage=True).read())
    assert told[-1]["usage"]["completion_tokens"] == 2


async def test_a_chunk_without_choices_that_has_no_usage_is_not_taken_for_it() -> None:
    verdict = chunk(HEAD | {"choices": [], "prompt_filter_results": []})
    stream = Stream(verdict, chunk(A), chunk(choice("", finish="stop"), usage=USAGE), include_usage=True)
    assert loaded(await stream.read())[-1]["usage"]["total_tokens"] == 5
    only = await Stream(verdict).read()
    assert json.loads(only[-1])["error"]["code"] == "engine_failed"


async def test_an_answer_without_a_finish_still_ends_in_form() -> None:
    told = loaded(await Stream(chunk(A), chunk(B)).read())
    assert told == [A, B, HEAD | {"choices": [], "ondol": json.loads(END)}]


async def test_several_choices_may_finish_one_after_the_other() -> None:
    sent = [
        choice("a"), choice("b", index=1), choice("", finish="stop"), choice("c", index=1),
        choice("", index=2, finish="length"), choice("", index=1, finish="stop"),
    ]  # fmt: skip
    told = loaded(await Stream(*map(chunk, sent), usage_chunk()).read())
    assert told == [*sent[:-1], sent[-1] | {"ondol": json.loads(END)}]


async def test_a_peers_own_field_is_replaced_not_doubled() -> None:
    receipt = Receipt(site="hub", request_id="r", model="m", deployment="d")
    last = usage_chunk(ondol={"site": "hub", "cost": "1 USD"})
    for include_usage in (True, False):
        stream = Stream(chunk(A), chunk(STOP, receipt=receipt), last, include_usage=include_usage)
        raw = (await stream.read())[-2]
        assert raw.count(b'"ondol"') == 1
        assert json.loads(raw)["ondol"] == json.loads(END)
        assert stream.endings[0].heard.receipt is receipt


TEXTS = st.lists(
    st.tuples(st.text(max_size=5), st.sampled_from([None, None, "stop"])), min_size=1, max_size=8
)


@settings(max_examples=50)
@given(TEXTS, st.booleans(), st.booleans(), st.booleans())
async def test_whatever_the_upstream_says_arrives_once_in_order_and_ends_after_the_commit(
    parts: list[tuple[str, str | None]], said: bool, include_usage: bool, collect: bool
) -> None:
    sent = [*[choice(text, index=i % 3, finish=end) for i, (text, end) in enumerate(parts)], STOP]
    chunks = [chunk(one) for one in sent] + ([usage_chunk()] if said else [])
    stream = Stream(*chunks, include_usage=include_usage, collect=collect)
    told = loaded(await stream.read())
    assert sum((one["choices"] for one in told), []) == sum((one["choices"] for one in sent), [])
    assert ["ondol" in one for one in told] == [False] * (len(told) - 1) + [True]
    assert ["usage" in one for one in told] == [False] * (len(told) - 1) + [include_usage]
    assert len(stream.endings) == 1
    # P1: what was out before the commit has neither the last finish nor [DONE].
    early = b"".join(stream.sent[: stream.sent_at_finish])
    assert DONE not in early
    assert stream.sent_at_finish == len(stream.sent) - 1
    finishes = sum(one["choices"][0]["finish_reason"] is not None for one in sent)
    out = [json.loads(payload)["choices"][0] for payload in SseDecoder().feed(early)]
    assert sum(one["finish_reason"] is not None for one in out) == finishes - 1
    if collect:
        kept = [json.loads(one) for one in stream.endings[0].collected or ()]
        assert kept == [{k: v for k, v in one.items() if k != "ondol"} for one in told]
    else:
        assert stream.endings[0].collected is None


async def test_a_broken_stream_ends_with_an_error_and_never_with_done() -> None:
    error = EngineFailed("the connection broke")
    stream = Stream(chunk(A), chunk(STOP), fail=error)
    first, held, last = await stream.read()
    assert (json.loads(first), json.loads(held)) == (A, STOP)
    assert json.loads(last)["error"] == {
        "message": "the connection broke", "type": "server_error", "param": None, "code": "engine_failed",
    }  # fmt: skip
    assert [one.error for one in stream.endings] == [error]
    assert stream.endings[0].heard.pieces == 1


@pytest.mark.parametrize("fail", [None, EngineFailed("broke")])
async def test_when_the_commit_fails_the_end_is_an_error(fail: OndolError | None) -> None:
    stream = Stream(chunk(A), chunk(STOP), fail=fail, refuse=LedgerUnavailable("the disk is full"))
    payloads = await stream.read()
    assert b"[DONE]" not in payloads
    assert json.loads(payloads[-1])["error"]["code"] == "ledger_unavailable"
    assert sum(b'"error"' in one for one in payloads) == 1
    stream.relay.close()
    assert stream.abandoned == []


async def test_an_empty_answer_is_a_failure() -> None:
    empty = Chunk(data=json.dumps(choice("")).encode(), model="m")
    stream = Stream(empty)
    payloads = await stream.read()
    assert b"[DONE]" not in payloads
    assert json.loads(payloads[-1])["error"]["code"] == "engine_failed"
    assert isinstance(stream.endings[0].error, EngineFailed)


async def test_closing_before_the_end_abandons_once() -> None:
    stream = Stream(chunk(A), chunk(B), chunk(STOP))
    await anext(stream.relay)
    stream.relay.close()
    stream.relay.close()
    assert [heard.pieces for heard in stream.abandoned] == [1]
    with pytest.raises(StopAsyncIteration):
        await anext(stream.relay)
    assert stream.endings == []


async def test_closing_before_the_first_chunk_abandons_too() -> None:
    stream = Stream(chunk(A), chunk(STOP))
    stream.relay.close()
    assert stream.abandoned == [Heard()]


@pytest.mark.parametrize("fail", [None, EngineFailed("broke")])
async def test_closing_after_the_end_does_nothing(fail: OndolError | None) -> None:
    stream = Stream(chunk(A), chunk(STOP), fail=fail)
    await stream.read()
    stream.relay.close()
    assert stream.abandoned == []
    assert len(stream.endings) == 1


async def test_an_answer_too_large_to_keep_still_goes_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "COLLECT_BYTES_MAX", 200)
    stream = Stream(chunk(choice("x" * 300)), chunk(STOP), collect=True)
    assert len(loaded(await stream.read())) == 2
    assert stream.endings[0].collected is None


def test_an_error_event_names_the_field() -> None:
    [payload] = SseDecoder().feed(error_event(OndolError("m", param="p")))
    assert json.loads(payload)["error"] == {
        "message": "m", "type": "server_error", "param": "p", "code": "internal_error",
    }  # fmt: skip


async def test_an_engine_that_crashes_in_the_middle_still_gives_the_stream_a_defined_end() -> None:
    async def crashing() -> AsyncIterator[Chunk]:
        yield Chunk(data=b'{"choices":[{"delta":{"content":"a"}}]}', pieces=1)
        raise ZeroDivisionError

    endings: list[Ending] = []

    async def finish(ending: Ending) -> bytes:
        endings.append(ending)
        return b"{}"

    chunks = crashing()
    relay = Relay(
        first=await anext(chunks), chunks=chunks, include_usage=False, collect=False, finish=finish,
        abandon=lambda heard, rest: None,
    )  # fmt: skip
    pieces = [piece async for piece in relay]
    assert b"engine_failed" in pieces[-1] and b"[DONE]" not in b"".join(pieces)
    assert isinstance(endings[0].error, EngineFailed)
