"""OpenAI's JSON towards an engine and back: what is asked, and what of the answer must be known.

An answer passes through as the bytes that came.  Only what metering and control flow need is decoded
(usage, error, model, whether choices carry something), and unknown fields cost nothing.  Invariant: a
reader either gives a value or raises `BadAnswer`; nothing of a bad answer is taken for a good one.
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from typing import Any, Final

import msgspec

from ondol.core.inference import Chunk, Completion, Receipt, Task, Usage
from ondol.core.money import Money, money
from ondol.core.ports import EngineCall
from ondol.units import CURRENCY_SCALE, NG_PER_G, UJ_PER_J

MESSAGE_CHARS: Final = 500
"""How much of an engine's own sentence is kept: enough to act on, too little to hold a prompt."""
_NAME_CHARS: Final = 256
_TOKENS_MAX: Final = 1 << 40
"""A count past this is nonsense, not usage."""


class BadAnswer(ValueError):
    """The engine answered something that is not an answer.

    `said` is true where the message is the engine's own; `status` is the HTTP status that an error
    inside a 200 names, where it names one.
    """

    def __init__(
        self,
        message: str,
        *,
        said: bool = False,
        param: str | None = None,
        code: str | None = None,
        status: int | None = None,
    ) -> None:
        """Keep the engine's sentence (bounded) and what it says the error is about."""
        super().__init__(message)
        self.message = message
        self.said = said
        self.param = param
        self.code = code
        self.status = status


class _Delta(msgspec.Struct):
    content: Any = None
    tool_calls: Any = None
    reasoning_content: Any = None
    reasoning: Any = None
    refusal: Any = None
    function_call: Any = None
    audio: Any = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    text: Any = None
    finish_reason: Any = None


class _Event(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: Any = None
    error: Any = None
    model: Any = None
    ondol: Any = None


class _Whole(msgspec.Struct):
    choices: msgspec.Raw = msgspec.Raw(b"")
    data: msgspec.Raw = msgspec.Raw(b"")
    usage: Any = None
    error: Any = None
    model: Any = None
    ondol: Any = None
    object: Any = None
    message: Any = None


_ENCODER = msgspec.json.Encoder()
_EVENT = msgspec.json.Decoder(_Event)
_WHOLE = msgspec.json.Decoder(_Whole)
_ANY = msgspec.json.Decoder()


def upstream_body(
    call: EngineCall, model: str, *, limit_field: str | None = None, keep_metadata: bool = False
) -> bytes:
    """The JSON that an OpenAI-compatible engine is sent.

    It is the caller's body with the engine's own name of the model, the admitted number of output
    tokens, and usage asked for where the answer is streamed.  `limit_field` (`max_tokens` or
    `max_completion_tokens`) is for engines that know only one of them; without it the caller's own
    choice stays.  `metadata` is our tags: it leaves only for a peer (`keep_metadata`), or where the
    caller asks a vendor to `store` the answer, which is what the vendor wants it for.
    """
    request = call.request
    body = dict(request.body)
    body["model"] = model
    body.pop("ondol", None)
    if not keep_metadata and body.get("store") is not True:
        body.pop("metadata", None)
    if request.task is not Task.EMBEDDING:
        used = "max_completion_tokens" if "max_tokens" not in body else "max_tokens"
        if request.task is Task.COMPLETION:
            used = "max_tokens"
        elif "max_completion_tokens" in body:
            used = "max_completion_tokens"
        body.pop("max_tokens", None)
        body.pop("max_completion_tokens", None)
        body[limit_field or used] = call.max_output_tokens
    if request.stream:
        body["stream"] = True
        options = body.get("stream_options")
        body["stream_options"] = {**(options if isinstance(options, dict) else {}), "include_usage": True}
    else:
        body.pop("stream", None)
        body.pop("stream_options", None)
    return _ENCODER.encode(body)


def read_completion(task: Task, raw: bytes, *, receipts: bool = True) -> Completion:
    """A whole answer.  `receipts` is false for engines that are not ours, which could forge one.

    Raises:
        BadAnswer: invalid UTF-8, not JSON, an error inside, or neither choices nor data.
    """
    _check_utf8(raw)
    try:
        whole = _WHOLE.decode(raw)
    except msgspec.DecodeError as error:
        raise BadAnswer(f"the answer is not the JSON of a {task}: {error}") from error
    if whole.error:
        raise _said(whole.error)
    wanted = whole.data if task is Task.EMBEDDING else whole.choices
    items = bytes(wanted)
    if not items.startswith(b"[") or items[1:].lstrip()[:1] in {b"]", b""}:
        if whole.object == "error":
            raise _said({"message": whole.message})
        name = "data" if task is Task.EMBEDDING else "choices"
        raise BadAnswer(f"the answer has no `{name}`; expected a list of at least one")
    return Completion(
        body=raw,
        usage=read_usage(whole.usage) if whole.usage is not None else None,
        model=_name(whole.model),
        receipt=receipt_of(whole.ondol) if receipts and whole.ondol is not None else None,
    )


def read_chunk(raw: bytes, *, receipts: bool = True) -> Chunk:
    """One event of a streamed answer.  `receipts` as for `read_completion`.

    Raises:
        BadAnswer: invalid UTF-8, not JSON, or an error inside.
    """
    _check_utf8(raw)
    try:
        event = _EVENT.decode(raw)
    except msgspec.DecodeError as error:
        raise BadAnswer(f"an event is not the JSON of a chunk: {error}") from error
    if event.error:
        raise _said(event.error)
    pieces = 0
    finish = False
    choices = event.choices
    if choices:
        for choice in choices:
            if choice.finish_reason:
                finish = True
            delta = choice.delta
            if choice.text or (delta is not None and (delta.content or _carries(delta))):
                pieces += 1
    return Chunk(
        data=raw,
        pieces=pieces,
        finish=finish,
        has_choices=bool(choices),
        usage=read_usage(event.usage) if event.usage is not None else None,
        model=_name(event.model),
        receipt=receipt_of(event.ondol) if receipts and event.ondol is not None else None,
    )


def read_error(status: int, raw: bytes) -> tuple[str, str | None, str | None]:
    """Message, field and code of an error answer, each bounded, whatever form the server gives it.

    OpenAI's form, `error` as text, FastAPI's `detail` and vLLM's flat object are known; anything else
    gives a sentence with the status alone.
    """
    try:
        value = _ANY.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError):
        value = None
    if isinstance(value, dict):
        inner = value.get("error") or value.get("detail") or value
        bad = _said(inner if isinstance(inner, dict | str) else value)
        if bad.message != _NO_MESSAGE:
            return bad.message, bad.param, bad.code
        return f"the engine answered with HTTP {status}", bad.param, bad.code
    return f"the engine answered with HTTP {status}", None, None


def read_usage(value: Any) -> Usage | None:
    """Token counts as OpenAI writes them; None where they are not there or make no sense.

    A part is never larger than its whole, so that a cost can never be negative.
    """
    if not isinstance(value, dict):
        return None
    prompt = _count(value.get("prompt_tokens"))
    if prompt is None:
        return None
    output = _count(value.get("completion_tokens"))
    if output is None:
        # Embeddings have no completion; elsewhere the total is the next best proof.
        output = max((_count(value.get("total_tokens")) or prompt) - prompt, 0)
    cached = _detail(value.get("prompt_tokens_details"), "cached_tokens")
    reasoning = _detail(value.get("completion_tokens_details"), "reasoning_tokens")
    return Usage(
        input_tokens=prompt,
        output_tokens=output,
        cached_tokens=min(cached, prompt),
        reasoning_tokens=min(reasoning, output),
    )


def receipt_of(fields: Any) -> Receipt | None:
    """What a peer says of its answer, from the field `ondol` or its reply headers (as text).

    None where site or request id are missing: such a receipt refers to nothing.
    """
    if not isinstance(fields, Mapping):
        return None
    site, request_id = _name(fields.get("site")), _name(fields.get("request_id"))
    if site is None or request_id is None:
        return None
    return Receipt(
        site=site,
        request_id=request_id,
        model=_name(fields.get("model")) or "",
        deployment=_name(fields.get("deployment")) or "",
        cost=_cost(fields.get("cost")),
        energy_uj=_scaled(fields.get("energy_j"), UJ_PER_J),
        carbon_ng=_scaled(fields.get("carbon_g"), NG_PER_G),
        cache=_name(fields.get("cache")) or "off",
    )


_NO_MESSAGE: Final = "the engine reports an error without a message"


def _carries(delta: _Delta) -> bool:
    return bool(
        delta.tool_calls
        or delta.reasoning_content
        or delta.reasoning
        or delta.refusal
        or delta.function_call
        or delta.audio
    )


def _said(error: Any) -> BadAnswer:
    """An engine's own error, made safe to show: one line, bounded."""
    if not isinstance(error, dict):
        return BadAnswer(_line(error) or _NO_MESSAGE, said=True)
    code = error.get("code")
    status = code if isinstance(code, int) and 400 <= code <= 599 else None
    if status is None and isinstance(code, str) and len(code) == 3 and code.isdecimal() and code[0] in "45":
        status = int(code)
    return BadAnswer(
        _line(error.get("message")) or _NO_MESSAGE,
        said=True,
        param=_line(error.get("param")) or None,
        code=_line(code) or _line(error.get("type")) or None,
        status=status,
    )


def _line(value: Any) -> str:
    if not isinstance(value, str):
        return ""
    text = " ".join(value[: 4 * MESSAGE_CHARS].split())
    text = "".join(char for char in text if char.isprintable())
    return text if len(text) <= MESSAGE_CHARS else text[:MESSAGE_CHARS] + "…"


def _check_utf8(raw: bytes) -> None:
    # msgspec checks only the strings that it decodes, and a client gets all of them.
    if raw.isascii():
        return
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        raise BadAnswer(f"the answer is not valid UTF-8 at byte {error.start}") from error


def _name(value: Any) -> str | None:
    return value[:_NAME_CHARS] if isinstance(value, str) and value else None


def _count(value: Any) -> int | None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < _TOKENS_MAX:
        return None
    return value


def _detail(value: Any, name: str) -> int:
    return (_count(value.get(name)) or 0) if isinstance(value, dict) else 0


def _cost(value: Any) -> Money | None:
    if not isinstance(value, str) or len(value) > 64:
        return None
    amount, _, currency = value.partition(" ")
    if currency not in CURRENCY_SCALE:
        return None
    try:
        number = Decimal(amount)
        return money(number, currency) if 0 <= number < 10**12 else None
    except (InvalidOperation, ValueError):
        return None


def _scaled(value: Any, scale: int) -> int | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str) or len(str(value)) > 64:
        return None
    try:
        number = Decimal(str(value))
        return int(number * scale) if 0 <= number < 10**9 else None
    except (InvalidOperation, ValueError):
        return None
