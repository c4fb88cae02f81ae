"""The text of answers, whole and streamed."""

from __future__ import annotations

import json
from typing import Any

from ondol.wire.openai_text import Said, said_in, said_in_chunks


def body(**choice: Any) -> bytes:
    return json.dumps({"choices": [{"index": 0, "finish_reason": "stop", **choice}]}).encode()


def test_a_whole_answer() -> None:
    found = said_in(body(message={"role": "assistant", "content": "hello"}))
    assert found == Said(text="hello", finish="stop")
    assert said_in(body(text="completed")) == Said(text="completed", finish="stop")


def test_what_is_more_than_text_is_not_plain() -> None:
    assert not said_in(body(message={"content": None, "tool_calls": [{"id": "a"}]})).plain
    assert not said_in(body(message={"content": "", "refusal": "no"})).plain
    assert said_in(body(message={"content": "x", "tool_calls": []})).plain


def test_log_probabilities_where_they_came() -> None:
    content = [{"token": "a", "logprob": -0.5}, {"token": "b", "logprob": 0}, {"token": "c"}]
    assert said_in(body(message={"content": "ab"}, logprobs={"content": content})).logprobs == (-0.5, 0.0)
    assert said_in(body(message={"content": "ab"}, logprobs=None)).logprobs == ()


def test_a_stream_is_put_together() -> None:
    deltas = [{"role": "assistant", "content": ""}, {"content": "hel"}, {"content": "lo"}, {}]
    chunks = [json.dumps({"choices": [{"delta": delta}]}).encode() for delta in deltas]
    chunks += [
        json.dumps({"choices": [{"delta": {}, "finish_reason": "length"}]}).encode(),
        b'{"choices":[]}',
    ]
    assert said_in_chunks(chunks) == Said(text="hello", finish="length")
    called = json.dumps({"choices": [{"delta": {"tool_calls": [{"index": 0}]}}]}).encode()
    assert not said_in_chunks([*chunks, called]).plain


def test_an_answer_without_choices_says_nothing() -> None:
    assert said_in(b'{"choices":[]}') == Said()
    assert said_in(b"[]") == Said()
    assert said_in_chunks([]) == Said()
