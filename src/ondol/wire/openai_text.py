"""The text of an answer in OpenAI's form, whole or streamed: what is compared, checked and learnt from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec


class Said(msgspec.Struct, frozen=True, kw_only=True):
    """What the first choice says.  `finish` is its finish reason; `logprobs` those of its tokens, where they came.

    `plain` is false where there is more than its text: tool calls, a refusal, audio.
    """

    text: str = ""
    finish: str = ""
    plain: bool = True
    logprobs: tuple[float, ...] = ()


def said_in(body: bytes) -> Said:
    """The first choice of a whole answer.  Raises msgspec.DecodeError where it is no JSON."""
    choice = _first(msgspec.json.decode(body))
    message = choice.get("message")
    if not isinstance(message, dict):
        return Said(text=_text(choice.get("text")), finish=_text(choice.get("finish_reason")))
    return Said(
        text=_text(message.get("content")), finish=_text(choice.get("finish_reason")), plain=_is_plain(message),
        logprobs=_logprobs(choice.get("logprobs")),
    )  # fmt: skip


def said_in_chunks(chunks: Iterable[bytes]) -> Said:
    """The first choice of a streamed answer.  Raises msgspec.DecodeError where a chunk is no JSON."""
    parts: list[str] = []
    logprobs: list[float] = []
    finish, plain = "", True
    for chunk in chunks:
        choice = _first(msgspec.json.decode(chunk))
        delta = choice.get("delta")
        if isinstance(delta, dict):
            parts.append(_text(delta.get("content")))
            plain = plain and _is_plain(delta)
        else:
            parts.append(_text(choice.get("text")))
        logprobs += _logprobs(choice.get("logprobs"))
        finish = _text(choice.get("finish_reason")) or finish
    return Said(text="".join(parts), finish=finish, plain=plain, logprobs=tuple(logprobs))


def _first(answer: Any) -> dict[str, Any]:
    choices = answer.get("choices") if isinstance(answer, dict) else None
    found = choices[0] if isinstance(choices, list) and choices else None
    return found if isinstance(found, dict) else {}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _is_plain(message: dict[str, Any]) -> bool:
    return not any(message.get(name) for name in ("tool_calls", "function_call", "refusal", "audio"))


def _logprobs(value: Any) -> tuple[float, ...]:
    content = value.get("content") if isinstance(value, dict) else None
    if not isinstance(content, list):
        return ()
    found = [one.get("logprob") for one in content if isinstance(one, dict)]
    return tuple([float(one) for one in found if isinstance(one, (int, float))])
