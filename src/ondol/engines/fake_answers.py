"""Answers made from a hash of the request: pure, deterministic, in OpenAI's full form.

A token is a word with the blank before it.  Streamed and whole, the same request gives the same text.
"""

from __future__ import annotations

import hashlib
import math
import struct
from base64 import b64encode
from collections.abc import Iterator
from typing import Any, Final

import msgspec

from ondol.core.inference import InferenceRequest, Task
from ondol.engines.fake_schema import instance_of

_WORDS: Final = (
    ("warm", "stone", "floor", "fire", "room", "night", "snow", "tea", "river", "pine", "moon")
    + ("field", "paper", "lamp", "door", "wind", "salt", "rice", "bell", "roof", "path", "cloud")
    + ("stream", "hill", "coal", "ash", "smoke", "light", "wall", "spring")
)
_CREATED: Final = 1_767_225_600
"""2026-01-01 UTC: an answer must not depend on when it was asked for."""
_DIMENSIONS: Final = 64
_DIMENSIONS_MAX: Final = 8192
_MESSAGE_TOKENS: Final = 4
_IMAGE_TOKENS: Final = 85
_NOT_CONTENT: Final = frozenset(
    {
        "model",
        "stream",
        "stream_options",
        "user",
        "metadata",
        "max_tokens",
        "max_completion_tokens",
        "n",
        "logprobs",
        "top_logprobs",
    }
)
_ENCODER = msgspec.json.Encoder(order="sorted")


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """One choice: its tokens, or the arguments of its tool call in tokens, and why it ends."""

    pieces: tuple[str, ...]
    tool: str | None = None
    finish: str = "stop"


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What is answered, before it is whole JSON or chunks."""

    task: Task
    id: str
    model: str
    choices: tuple[Choice, ...]
    input_tokens: int
    output_tokens: int
    logprobs: bool

    def usage(self) -> dict[str, Any]:
        """OpenAI's `usage`."""
        return {
            "prompt_tokens": self.input_tokens,
            "completion_tokens": self.output_tokens,
            "total_tokens": self.input_tokens + self.output_tokens,
            "prompt_tokens_details": {"cached_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 0},
        }

    def frame(self, choices: list[dict[str, Any]], *, chunk: bool, **more: Any) -> bytes:
        """The JSON around choices."""
        kind = "text_completion"
        if self.task is Task.CHAT:
            kind = "chat.completion.chunk" if chunk else "chat.completion"
        return msgspec.json.encode(
            {
                "id": self.id,
                "object": kind,
                "created": _CREATED,
                "model": self.model,
                "choices": choices,
                **more,
            }
        )

    def usage_chunk(self) -> bytes:
        """The chunk that ends a stream: no choices, only usage."""
        return self.frame([], chunk=True, usage=self.usage())


def compose(
    request: InferenceRequest,
    model: str,
    *,
    max_output_tokens: int,
    text: str | None,
    output_tokens: int | None,
) -> Answer:
    """The answer to a chat or completion request; `text` is given back instead of seeded words.

    Raises:
        SchemaTooLarge: the request's JSON schema passes the bound.
    """
    body = request.body
    content = {name: value for name, value in body.items() if name not in _NOT_CONTENT}
    digest = hashlib.sha256(_ENCODER.encode(content)).digest()
    prompts = _prompts(body.get("prompt")) if request.task is Task.COMPLETION else [""]
    choices = []
    tokens = 0
    for number in range(len(prompts) * request.n):
        seed = hashlib.sha256(digest + number.to_bytes(4, "big")).digest()
        choice = _choice(request, seed, text, output_tokens, max_output_tokens)
        tokens += len(choice.pieces)
        if body.get("echo") is True:
            pieces = (prompts[number // request.n], *choice.pieces)
            choice = msgspec.structs.replace(choice, pieces=pieces)
        choices.append(choice)
    return Answer(
        task=request.task,
        id=("chatcmpl-" if request.task is Task.CHAT else "cmpl-") + digest.hex()[:24],
        model=model,
        choices=tuple(choices),
        input_tokens=_count(body.get("messages")) + sum(len(prompt.split()) for prompt in prompts),
        output_tokens=tokens,
        logprobs=body.get("logprobs") is True or type(body.get("logprobs")) is int,
    )


def whole_of(answer: Answer) -> bytes:
    """The answer as one JSON."""
    choices = []
    for index, choice in enumerate(answer.choices):
        text = "".join(choice.pieces)
        shown: dict[str, Any] = {"index": index}
        if answer.task is Task.COMPLETION:
            shown["text"] = text
        elif choice.tool is None:
            shown["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            call = {
                "id": f"call_{answer.id[-16:]}{index}",
                "type": "function",
                "function": {"name": choice.tool, "arguments": text},
            }
            shown["message"] = {"role": "assistant", "content": None, "refusal": None, "tool_calls": [call]}
        shown["logprobs"] = _logprobs(answer, choice.pieces, 0)
        shown["finish_reason"] = choice.finish
        choices.append(shown)
    return answer.frame(choices, chunk=False, usage=answer.usage())


def chunks_of(answer: Answer) -> Iterator[tuple[bytes, int, bool]]:
    """The answer as (JSON, choices with something new, whether one ends), choice after choice in turn."""
    longest = max(len(choice.pieces) for choice in answer.choices)
    offsets = [0] * len(answer.choices)
    for position in range(longest):
        for index, choice in enumerate(answer.choices):
            if position < len(choice.pieces):
                piece = choice.pieces[position]
                shown = _chunk_choice(answer, choice, index, position, offsets[index])
                offsets[index] += len(piece)
                yield answer.frame([shown], chunk=True), 1, False
    for index, choice in enumerate(answer.choices):
        last: dict[str, Any] = {"index": index, "finish_reason": choice.finish, "logprobs": None}
        if answer.task is Task.COMPLETION:
            last["text"] = ""
        else:
            last["delta"] = {}
        yield answer.frame([last], chunk=True), 0, True


def embed(body: dict[str, Any], model: str) -> tuple[bytes, int]:
    """The JSON of embeddings and its input tokens; equal texts have equal vectors of length one."""
    texts = _prompts(body.get("input"))
    asked = body.get("dimensions")
    dimensions = min(asked, _DIMENSIONS_MAX) if isinstance(asked, int) and asked > 0 else _DIMENSIONS
    data = []
    for index, text in enumerate(texts):
        vector: list[float] | str = _vector(text, dimensions)
        if body.get("encoding_format") == "base64":
            vector = b64encode(struct.pack(f"<{dimensions}f", *vector)).decode()
        data.append({"object": "embedding", "index": index, "embedding": vector})
    tokens = sum(max(len(text.split()), 1) for text in texts)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return msgspec.json.encode({"object": "list", "data": data, "model": model, "usage": usage}), tokens


def _choice(
    request: InferenceRequest, seed: bytes, text: str | None, output_tokens: int | None, limit: int
) -> Choice:
    tool = _forced_tool(request.body)
    if tool is not None:
        name, parameters = tool
        arguments = msgspec.json.encode(instance_of(parameters)).decode()
        return Choice(pieces=tuple(_pieces(arguments)), tool=name, finish="tool_calls")
    structured = _structured(request.body)
    if structured is not None:
        pieces = _pieces(structured)
    elif text is not None:
        pieces = _pieces(text)
    else:
        wanted = output_tokens or 12 + seed[0] % 12
        words = [_WORDS[(seed[at % len(seed)] + at // len(seed)) % len(_WORDS)] for at in range(wanted)]
        pieces = [words[0].capitalize(), *(f" {word}" for word in words[1:])]
        pieces[-1] += "."
    finish = "stop"
    stop = request.body.get("stop")
    stops = [stop] if isinstance(stop, str) else stop if isinstance(stop, list) else []
    if stops:
        whole = "".join(pieces)
        cuts = [
            at for at in (whole.find(word) for word in stops if isinstance(word, str) and word) if at >= 0
        ]
        if cuts:
            pieces = _pieces(whole[: min(cuts)])
    if len(pieces) > limit:
        pieces, finish = pieces[:limit], "length"
    return Choice(pieces=tuple(pieces), finish=finish)


def _forced_tool(body: dict[str, Any]) -> tuple[str, Any] | None:
    tools = [tool.get("function") for tool in _dicts(body.get("tools"))]
    functions = {tool["name"]: tool for tool in tools if isinstance(tool, dict) and "name" in tool}
    choice = body.get("tool_choice")
    if not functions or not (choice == "required" or isinstance(choice, dict)):
        return None
    name = next(iter(functions))
    if isinstance(choice, dict):
        wanted = choice.get("function")
        name = wanted.get("name", name) if isinstance(wanted, dict) else name
    return str(name), functions.get(name, {}).get("parameters", {})


def _structured(body: dict[str, Any]) -> str | None:
    wanted = body.get("response_format")
    if not isinstance(wanted, dict):
        return None
    if wanted.get("type") == "json_schema" and isinstance(wanted.get("json_schema"), dict):
        return msgspec.json.encode(instance_of(wanted["json_schema"].get("schema"))).decode()
    return '{"answer": "warm stone"}' if wanted.get("type") == "json_object" else None


def _chunk_choice(answer: Answer, choice: Choice, index: int, position: int, offset: int) -> dict[str, Any]:
    piece = choice.pieces[position]
    shown: dict[str, Any] = {"index": index, "finish_reason": None}
    shown["logprobs"] = _logprobs(answer, (piece,), offset)
    if answer.task is Task.COMPLETION:
        shown["text"] = piece
        return shown
    delta: dict[str, Any] = {} if position else {"role": "assistant"}
    if choice.tool is None:
        delta["content"] = piece
    else:
        call: dict[str, Any] = {"index": 0, "function": {"arguments": piece}}
        if not position:
            call |= {"id": f"call_{answer.id[-16:]}{index}", "type": "function"}
            call["function"]["name"] = choice.tool
        delta["tool_calls"] = [call]
    shown["delta"] = delta
    return shown


def _logprobs(answer: Answer, pieces: tuple[str, ...], offset: int) -> dict[str, Any] | None:
    if not answer.logprobs:
        return None
    if answer.task is Task.CHAT:
        content = [
            {"token": piece, "logprob": -0.5, "bytes": list(piece.encode()), "top_logprobs": []}
            for piece in pieces
        ]
        return {"content": content, "refusal": None}
    offsets = []
    for piece in pieces:
        offsets.append(offset)
        offset += len(piece)
    return {
        "tokens": list(pieces),
        "token_logprobs": [-0.5] * len(pieces),
        "top_logprobs": [{piece: -0.5} for piece in pieces],
        "text_offset": offsets,
    }


def _pieces(text: str) -> list[str]:
    """The text cut before every blank that follows something else; joined it is the text again."""
    pieces: list[str] = []
    start = 0
    for at in range(1, len(text)):
        if text[at] in " \n" and text[at - 1] not in " \n":
            pieces.append(text[start:at])
            start = at
    pieces.append(text[start:])
    return pieces


def _prompts(value: Any) -> list[str]:
    if isinstance(value, list) and value and all(isinstance(item, int) for item in value):
        return [" ".join(map(str, value))]
    if isinstance(value, list):
        return [" ".join(map(str, item)) if isinstance(item, list) else str(item) for item in value] or [""]
    return [value if isinstance(value, str) else ""]


def _count(messages: Any) -> int:
    tokens = 0
    for message in _dicts(messages):
        tokens += _MESSAGE_TOKENS
        content = message.get("content")
        if isinstance(content, str):
            tokens += len(content.split())
        for part in _dicts(content):
            text = part.get("text")
            tokens += len(text.split()) if isinstance(text, str) else _IMAGE_TOKENS
    return tokens


def _vector(text: str, dimensions: int) -> list[float]:
    stream = hashlib.shake_256(text.encode()).digest(2 * dimensions)
    raw = [value - 32767.5 for value in struct.unpack(f"<{dimensions}H", stream)]
    length = math.sqrt(sum(value * value for value in raw))
    return [value / length for value in raw]


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []
