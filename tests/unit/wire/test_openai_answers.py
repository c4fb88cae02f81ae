"""What is asked of an engine, and what is read of its answer."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ondol.core.identity import Principal
from ondol.core.inference import InferenceRequest, Receipt, Task, Usage
from ondol.core.money import Money
from ondol.core.ports import EngineCall
from ondol.wire.openai_answers import (
    BadAnswer,
    read_chunk,
    read_completion,
    read_error,
    read_usage,
    receipt_of,
    upstream_body,
)


def asked(task: Task = Task.CHAT, *, stream: bool = False, **body: Any) -> EngineCall:
    return EngineCall(
        request=InferenceRequest(
            task=task, route="assistant", body={"model": "assistant", **body}, stream=stream
        ),
        request_id="r",
        attempt=1,
        deadline_ns=1,
        max_output_tokens=77,
        principal=Principal(key_id="k", tenant="default", team="t"),
    )


def sent(call: EngineCall, **options: Any) -> dict[str, Any]:
    decoded: dict[str, Any] = json.loads(upstream_body(call, "real-1", **options))
    return decoded


def test_body_has_the_engines_model_and_keeps_unknown_fields() -> None:
    call = asked(messages=[{"role": "user", "content": "안녕"}], top_k=40, temperature=0)
    assert sent(call) == {
        "model": "real-1",
        "messages": [{"role": "user", "content": "안녕"}],
        "top_k": 40,
        "temperature": 0,
        "max_completion_tokens": 77,
    }
    assert call.request.body["model"] == "assistant"  # the caller's own body is untouched


@pytest.mark.parametrize(
    ("task", "body", "limit_field", "expected"),
    [
        (Task.CHAT, {}, None, "max_completion_tokens"),
        (Task.CHAT, {"max_tokens": 5}, None, "max_tokens"),
        (Task.CHAT, {"max_completion_tokens": 5}, None, "max_completion_tokens"),
        (Task.CHAT, {"max_completion_tokens": 5, "max_tokens": 6}, None, "max_completion_tokens"),
        (Task.CHAT, {"max_completion_tokens": 5}, "max_tokens", "max_tokens"),
        (Task.COMPLETION, {}, None, "max_tokens"),
    ],
)
def test_the_limit_stands_in_one_field(
    task: Task, body: dict[str, Any], limit_field: str | None, expected: str
) -> None:
    found = sent(asked(task, **body), limit_field=limit_field)
    assert {name: found[name] for name in found if name.startswith("max_")} == {expected: 77}


def test_embeddings_have_no_limit() -> None:
    assert sent(asked(Task.EMBEDDING, input="a")) == {"model": "real-1", "input": "a"}


def test_a_stream_always_asks_for_usage() -> None:
    found = sent(asked(stream=True, stream_options={"include_usage": False, "other": 1}))
    assert found["stream"] is True
    assert found["stream_options"] == {"include_usage": True, "other": 1}


def test_an_unstreamed_request_has_no_stream_options() -> None:
    found = sent(asked(stream_options={"include_usage": True}))
    assert "stream_options" not in found


def test_what_is_the_gateways_own_does_not_leave() -> None:
    body: dict[str, Any] = {"metadata": {"lesson": "7"}, "ondol": {"x": 1}}
    assert {"metadata", "ondol"} & set(sent(asked(**body))) == set()
    assert sent(asked(**body), keep_metadata=True)["metadata"] == {"lesson": "7"}
    assert sent(asked(**body, store=True))["metadata"] == {"lesson": "7"}


WHOLE: dict[str, Any] = {
    "model": "gpt-x",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "안녕"}, "finish_reason": "stop"}],
    "usage": {
        "prompt_tokens": 10,
        "completion_tokens": 5,
        "total_tokens": 15,
        "prompt_tokens_details": {"cached_tokens": 4},
        "completion_tokens_details": {"reasoning_tokens": 2},
    },
}


def test_a_completion_is_read_and_passed_as_it_is() -> None:
    raw = json.dumps(WHOLE, ensure_ascii=False).encode()
    read = read_completion(Task.CHAT, raw)
    assert read.body is raw
    assert read.model == "gpt-x"
    assert read.usage == Usage(input_tokens=10, output_tokens=5, cached_tokens=4, reasoning_tokens=2)
    assert read.receipt is None


def test_embeddings_are_read() -> None:
    raw = b'{"data": [{"embedding": [0.1]}], "model": "e", "usage": {"prompt_tokens": 8, "total_tokens": 8}}'
    assert read_completion(Task.EMBEDDING, raw).usage == Usage(input_tokens=8)


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        (b'{"choices":[{"x":"\xff"}]}', "not valid UTF-8 at byte 18"),
        (b"", "not the JSON"),
        (b"[]", "not the JSON"),
        (b'{"choices":[{}]', "not the JSON"),
        (b'{"choices":[ ]}', "no `choices`"),
        (b'{"choices":null}', "no `choices`"),
        (b'{"data":[1]}', "no `choices`"),
        (b"{}", "no `choices`"),
        (b'{"error":{"message":"full","code":"busy"},"choices":[{}]}', "full"),
        (b'{"error":"full"}', "full"),
        (b'{"object":"error","message":"too long"}', "too long"),
    ],
)
def test_a_bad_completion(raw: bytes, sentence: str) -> None:
    with pytest.raises(BadAnswer, match=sentence):
        read_completion(Task.CHAT, raw)


@given(st.binary(max_size=200))
def test_any_bytes_give_a_value_or_bad_answer(raw: bytes) -> None:
    for read in (lambda: read_completion(Task.CHAT, raw), lambda: read_chunk(raw)):
        try:
            read()
        except BadAnswer:
            continue
    message, _, _ = read_error(500, raw)
    assert 0 < len(message) <= 501


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["choices", "usage", "error", "delta", "content", "prompt_tokens", "cost", "site"]
            ),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)
NAMES = st.sampled_from(["choices", "usage", "error", "model", "ondol", "object", "detail", "message"])


@given(st.dictionaries(NAMES, JSON, max_size=5))
def test_any_json_gives_a_value_or_bad_answer(value: dict[str, Any]) -> None:
    raw = json.dumps(value).encode()
    for read in (lambda: read_completion(Task.CHAT, raw), lambda: read_chunk(raw)):
        try:
            read()
        except BadAnswer as error:
            assert str(error)
    assert read_error(400, raw)[0]


@pytest.mark.parametrize(
    ("choices", "pieces", "finish"),
    [
        ([{"delta": {"content": "a"}}], 1, False),
        ([{"delta": {"content": ""}}], 0, False),
        ([{"delta": {"role": "assistant"}}], 0, False),
        ([{"delta": {"content": None, "tool_calls": [{"index": 0}]}}], 1, False),
        ([{"delta": {"reasoning_content": "hm"}}], 1, False),
        ([{"delta": {"refusal": "no"}}], 1, False),
        ([{"delta": {}, "finish_reason": "stop"}], 0, True),
        ([{"text": "a", "finish_reason": "length"}], 1, True),
        ([{"delta": {"content": "a"}}, {"delta": {"content": "b"}}], 2, False),
        ([{}], 0, False),
    ],
)
def test_a_chunk_counts_what_is_new(choices: list[Any], pieces: int, finish: bool) -> None:
    read = read_chunk(json.dumps({"choices": choices, "model": "m"}).encode())
    assert (read.pieces, read.finish, read.has_choices, read.model) == (pieces, finish, True, "m")


def test_the_usage_chunk() -> None:
    read = read_chunk(b'{"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":4}}')
    assert read.usage == Usage(input_tokens=3, output_tokens=4)
    assert not read.has_choices


def test_a_receipt_is_believed_from_a_peer_only() -> None:
    raw = b'{"choices":[],"ondol":{"site":"cloud","request_id":"q","model":"m","deployment":"d","cost":"0.0000124 USD"}}'
    assert read_chunk(raw, receipts=False).receipt is None
    assert read_chunk(raw).receipt == Receipt(
        site="cloud", request_id="q", model="m", deployment="d", cost=Money(12_400, "USD")
    )


@pytest.mark.parametrize(
    ("fields", "cost", "energy_uj", "carbon_ng"),
    [
        ({"cost": "unpriced", "energy_j": 1.5, "carbon_g": 0.0002}, None, 1_500_000, 200_000),
        (
            {"cost": "3 KRW", "energy_j": "1.5", "carbon_g": "0.0002"},
            Money(3_000_000, "KRW"),
            1_500_000,
            200_000,
        ),
        ({"cost": "-1 USD", "energy_j": -1, "carbon_g": "NaN"}, None, None, None),
        ({"cost": "1 XXX", "energy_j": True, "carbon_g": None}, None, None, None),
        ({"cost": "NaN USD", "energy_j": "1e400", "carbon_g": "x"}, None, None, None),
        ({"cost": 5, "energy_j": [], "carbon_g": {}}, None, None, None),
    ],
)
def test_a_receipt_keeps_only_what_makes_sense(
    fields: dict[str, Any], cost: Money | None, energy_uj: int | None, carbon_ng: int | None
) -> None:
    receipt = receipt_of({"site": "s", "request_id": "r", **fields})
    assert receipt is not None
    assert (receipt.cost, receipt.energy_uj, receipt.carbon_ng) == (cost, energy_uj, carbon_ng)


@pytest.mark.parametrize("fields", [None, "x", {}, {"site": "s"}, {"site": 1, "request_id": "r"}])
def test_no_receipt_without_a_reference(fields: Any) -> None:
    assert receipt_of(fields) is None


@pytest.mark.parametrize(
    ("value", "usage"),
    [
        (None, None),
        ("x", None),
        ({}, None),
        ({"prompt_tokens": -1, "completion_tokens": 1}, None),
        ({"prompt_tokens": True}, None),
        ({"prompt_tokens": 1.5}, None),
        ({"prompt_tokens": 10**30}, None),
        ({"prompt_tokens": 4, "total_tokens": 9}, Usage(input_tokens=4, output_tokens=5)),
        (
            {
                "prompt_tokens": 4,
                "completion_tokens": 2,
                "prompt_tokens_details": {"cached_tokens": 99},
                "completion_tokens_details": {"reasoning_tokens": 99},
            },
            Usage(input_tokens=4, output_tokens=2, cached_tokens=4, reasoning_tokens=2),
        ),
        (
            {"prompt_tokens": 4, "completion_tokens": 2, "prompt_tokens_details": None},
            Usage(input_tokens=4, output_tokens=2),
        ),
    ],
)
def test_usage_that_makes_sense(value: Any, usage: Usage | None) -> None:
    assert read_usage(value) == usage


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b'{"error":{"message":"bad","param":"n","code":"c"}}', ("bad", "n", "c")),
        (b'{"error":{"message":"bad","type":"t"}}', ("bad", None, "t")),
        (b'{"error":"bad"}', ("bad", None, None)),
        (b'{"detail":"bad"}', ("bad", None, None)),
        (b'{"object":"error","message":"bad","code":40303}', ("bad", None, None)),
        (b'{"message":"two\\nlines\\u0007"}', ("two lines", None, None)),
        (b"<html>", ("the engine answered with HTTP 422", None, None)),
        (b"\xff", ("the engine answered with HTTP 422", None, None)),
        (b"[]", ("the engine answered with HTTP 422", None, None)),
        (b'{"error":{}}', ("the engine answered with HTTP 422", None, None)),
    ],
)
def test_errors_in_every_form(raw: bytes, expected: tuple[str, str | None, str | None]) -> None:
    assert read_error(422, raw) == expected


def test_an_error_message_is_bounded() -> None:
    message, _, _ = read_error(400, json.dumps({"error": {"message": "x" * 100_000}}).encode())
    assert len(message) == 501
