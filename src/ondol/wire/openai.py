"""OpenAI's requests as values: what the client sent, checked, with what it needs and how long it can be.

Every field that we know is checked for type and range, and refused with its name, what was found and
what is allowed.  Fields that we do not know stay in the body for an upstream that may know them.
Format: OpenAI API reference, chat completions, completions, embeddings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import msgspec

from ondol.core.catalog import Limits
from ondol.core.inference import Capability, InferenceRequest, Task
from ondol.errors import InvalidRequest, TooLarge

MESSAGE_TOKENS: Final = 16
"""Allowance a message for role and separators; chat templates in use add 3 to 10."""
ROLE_CHARACTERS_MAX: Final = 9
"""The longest roles are `assistant` and `developer`; so the allowance a message covers any."""
IMAGE_TOKENS_MAX: Final = 6_144
AUDIO_BYTES_PER_TOKEN: Final = 256
BYTES_PER_TOKEN: Final = 4
METADATA_PAIRS_MAX: Final = 16
TOOLS_MAX: Final = 128

Check = Callable[[str, Any], None]


def _wrong(field: str, found: Any, allowed: str) -> InvalidRequest:
    shown = type(found).__name__ if isinstance(found, (dict, list, str)) else repr(found)
    return InvalidRequest(f"'{field}': found {shown}, expected {allowed}", param=field)


def _number(low: float, high: float) -> Check:
    def check(field: str, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise _wrong(field, value, f"a number from {low:g} to {high:g}")

    return check


def _integer(low: int, high: int) -> Check:
    def check(field: str, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise _wrong(field, value, f"an integer from {low} to {high}")

    return check


def _kind(expected: type, text: str) -> Check:
    def check(field: str, value: Any) -> None:
        if not isinstance(value, expected):
            raise _wrong(field, value, text)

    return check


def _choice(*allowed: str) -> Check:
    def check(field: str, value: Any) -> None:
        if value not in allowed:
            raise _wrong(field, value, "one of " + ", ".join(allowed))

    return check


def _stop(field: str, value: Any) -> None:
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list) or len(items) > 4 or not all(isinstance(i, str) for i in items):
        raise _wrong(field, value, "a string or up to 4 strings")


def _stream_options(field: str, value: Any) -> None:
    if not isinstance(value, dict) or not isinstance(value.get("include_usage", False), bool):
        raise _wrong(field, value, 'an object such as {"include_usage": true}')


def _metadata(field: str, value: Any) -> None:
    if not isinstance(value, dict) or len(value) > METADATA_PAIRS_MAX:
        raise _wrong(field, value, f"an object of up to {METADATA_PAIRS_MAX} string pairs")
    for key, item in value.items():
        if not isinstance(item, str) or len(key) > 64 or len(item) > 512:
            raise _wrong(f"{field}.{key[:64]}", item, "a string of up to 512 characters, key up to 64")


def _logit_bias(field: str, value: Any) -> None:
    if not isinstance(value, dict) or not all(isinstance(v, (int, float)) for v in value.values()):
        raise _wrong(field, value, "an object of token ids to numbers")


def _tools(field: str, value: Any) -> None:
    if not isinstance(value, list) or len(value) > TOOLS_MAX:
        raise _wrong(field, value, f"a list of up to {TOOLS_MAX} tools")
    for index, tool in enumerate(value):
        if not isinstance(tool, dict) or not isinstance(tool.get("type"), str):
            raise _wrong(f"{field}[{index}]", tool, 'an object with "type"')
        if tool["type"] == "function":
            function = tool.get("function")
            if not isinstance(function, dict) or not isinstance(function.get("name"), str):
                raise _wrong(f"{field}[{index}].function", function, 'an object with "name"')


def _tool_choice(field: str, value: Any) -> None:
    if value not in ("none", "auto", "required") and not isinstance(value, dict):
        raise _wrong(field, value, "none, auto, required, or an object that names a tool")


def _response_format(field: str, value: Any) -> None:
    if not isinstance(value, dict) or value.get("type") not in ("text", "json_object", "json_schema"):
        raise _wrong(field, value, 'an object whose "type" is text, json_object or json_schema')
    if value["type"] == "json_schema":
        schema = value.get("json_schema")
        if not isinstance(schema, dict) or not isinstance(schema.get("schema", {}), dict):
            raise _wrong(f"{field}.json_schema", schema, 'an object with "name" and "schema"')


def _whole(field: str, value: Any) -> None:
    if value is not False:
        raise _wrong(field, value, "false: embeddings come whole")


_TEXT = _kind(str, "a string")
_FLAG = _kind(bool, "true or false")
_PENALTY = _number(-2, 2)
_TOKENS = _integer(0, 10_000_000)
_READ: Final[dict[str, Check]] = {
    "n": _integer(1, 128),
    "best_of": _integer(1, 20),
    "stream": _FLAG,
    "stream_options": _stream_options,
    "max_tokens": _TOKENS,
    "max_completion_tokens": _TOKENS,
    "response_format": _response_format,
    "user": _TEXT,
    "metadata": _metadata,
}
"""What is read below whatever the task: checked also where OpenAI does not have the field."""
_SHARED: Final[dict[str, Check]] = _READ | {
    "temperature": _number(0, 2),
    "top_p": _number(0, 1),
    "stop": _stop,
    "seed": _integer(-(2**63), 2**63 - 1),
    "presence_penalty": _PENALTY,
    "frequency_penalty": _PENALTY,
    "logit_bias": _logit_bias,
}
_CHECKS: Final[dict[Task, dict[str, Check]]] = {
    Task.CHAT: _SHARED
    | {
        "logprobs": _FLAG,
        "top_logprobs": _integer(0, 20),
        "tools": _tools,
        "tool_choice": _tool_choice,
        "parallel_tool_calls": _FLAG,
        "reasoning_effort": _choice("none", "minimal", "low", "medium", "high", "xhigh", "max"),
        "functions": _kind(list, "a list"),
        "store": _FLAG,
    },
    Task.COMPLETION: _SHARED
    | {
        "logprobs": _integer(0, 5),
        "echo": _FLAG,
        "suffix": _TEXT,
    },
    Task.EMBEDDING: _READ
    | {
        "stream": _whole,
        "encoding_format": _choice("float", "base64"),
        "dimensions": _integer(1, 65_536),
    },
}


def parse_request(task: Task, raw: bytes, limits: Limits) -> InferenceRequest:
    """The request of a body.  The caller has checked its size and its JSON depth.

    Raises:
        InvalidRequest: not JSON, or a field has the wrong type or range; `param` names it.
        TooLarge: more messages, parts or inputs than the limits allow.
    """
    try:
        body = msgspec.json.decode(raw)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"the body is not valid JSON: {str(error)[:200]}") from error
    if type(body) is not dict:
        raise InvalidRequest(f"the body is {type(body).__name__}, expected a JSON object")
    route = body.get("model")
    if type(route) is not str or not route:
        raise _wrong("model", route, "the name of a route; GET /v1/models lists them")
    checks = _CHECKS[task]
    for field, value in body.items():
        check = checks.get(field)
        if check is not None and value is not None:
            check(field, value)
    if task is Task.CHAT:
        needs, tokens, tokens_max = _chat(body, limits)
        items = 1
    elif task is Task.COMPLETION:
        needs, tokens, tokens_max, items = _completion(body, limits)
    else:
        needs, tokens, tokens_max = _embedding(body, limits)
        items = 0
    stream = body.get("stream") is True
    options = body.get("stream_options")
    if options is not None and not stream:
        raise InvalidRequest("'stream_options' is only allowed when 'stream' is true", param="stream_options")
    metadata = body.get("metadata")
    choices = max(body.get("n") or 1, body.get("best_of") or 1)
    limit = body.get("max_completion_tokens")
    if limit is None:
        limit = body.get("max_tokens")
    return InferenceRequest(
        task=task,
        route=route,
        body=body,
        stream=stream,
        include_usage=options is not None and options.get("include_usage") is True,
        needs=needs,
        n=body.get("n") or 1,
        choices=choices,
        answers=items * choices,
        predicted_tokens_max=len(msgspec.json.encode(body["prediction"])) if body.get("prediction") else 0,
        max_output_tokens=limit or None,
        prompt_tokens=tokens,
        prompt_tokens_max=tokens_max,
        user=body.get("user"),
        tags=tuple(metadata.items()) if metadata else (),
    )


_NONE: Final[frozenset[Capability]] = frozenset()
_TELLING: Final = {
    "tools": Capability.TOOLS,
    "functions": Capability.TOOLS,
    "logit_bias": Capability.LOGIT_BIAS,
    "seed": Capability.SEED,
    "reasoning_effort": Capability.REASONING_EFFORT,
    "prediction": Capability.PREDICTION,
    "web_search_options": Capability.WEB_SEARCH,
    "audio": Capability.AUDIO_OUT,
    "logprobs": Capability.LOGPROBS,
    "top_logprobs": Capability.LOGPROBS,
    "echo": Capability.ECHO,
    "suffix": Capability.SUFFIX,
    "dimensions": Capability.DIMENSIONS,
}
"""Fields that, present and neither null, false nor empty, need a capability."""


def _needs(body: dict[str, Any]) -> set[Capability]:
    needs: set[Capability] = set()
    for field, capability in _TELLING.items():
        if field in body:
            value = body[field]
            if value is not None and value is not False and value != [] and value != {}:
                needs.add(capability)
    if (body.get("n") or 1) > 1 or (body.get("best_of") or 1) > 1:
        needs.add(Capability.CHOICES)
    choice = body.get("tool_choice")
    if choice == "required" or isinstance(choice, dict):
        needs.add(Capability.TOOL_CHOICE)
    form = body.get("response_format")
    if form is not None and form["type"] != "text":
        needs.add(Capability.JSON_SCHEMA if form["type"] == "json_schema" else Capability.JSON_OBJECT)
    return needs


def _size(text: str) -> int:
    """UTF-8 bytes of a text, cheaply where it is ASCII."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def _chat(body: dict[str, Any], limits: Limits) -> tuple[frozenset[Capability], int, int]:
    messages = body.get("messages")
    if type(messages) is not list or not messages:
        raise _wrong("messages", messages, "a list of at least one message")
    if len(messages) > limits.messages:
        raise TooLarge(f"'messages': found {len(messages)}, at most {limits.messages}", param="messages")
    needs = _needs(body)
    size = tokens_max = parts = 0
    for index, message in enumerate(messages):
        if type(message) is not dict or type(message.get("role")) is not str:
            raise _wrong(f"messages[{index}]", message, 'an object with "role" and "content"')
        content = message.get("content")
        if type(content) is str:
            size += _size(content)
        elif type(content) is list:
            parts += len(content)
            if parts > limits.content_parts:
                raise TooLarge(f"more than {limits.content_parts} content parts", param="messages")
            text_bytes, extra = _parts(f"messages[{index}].content", content, needs)
            size += text_bytes
            tokens_max += extra
        elif content is not None:
            raise _wrong(f"messages[{index}].content", content, "a string or a list of parts")
        if len(message) > 2 or content is None:
            for field, value in message.items():
                if field not in ("role", "content") and value is not None:
                    size += len(msgspec.json.encode(value))
        if len(message["role"]) > ROLE_CHARACTERS_MAX:
            raise _wrong(
                f"messages[{index}].role", message["role"], f"at most {ROLE_CHARACTERS_MAX} characters"
            )
    for field in ("tools", "functions", "response_format"):
        if body.get(field):
            size += len(msgspec.json.encode(body[field]))
    allowance = MESSAGE_TOKENS * len(messages)
    guess = size // BYTES_PER_TOKEN + 4 * len(messages) + tokens_max // 4
    return frozenset(needs) if needs else _NONE, guess, size + allowance + tokens_max


def _parts(where: str, parts: list[Any], needs: set[Capability]) -> tuple[int, int]:
    """Text bytes of the parts, and the token allowance for what is not text."""
    size = extra = 0
    for index, part in enumerate(parts):
        kind = part.get("type") if type(part) is dict else None
        if kind in ("text", "refusal") and type(part.get(kind)) is str:
            size += _size(part[kind])
        elif kind == "image_url" and type(part.get("image_url")) is dict:
            url = part["image_url"].get("url")
            if type(url) is not str or not url.startswith(("data:image/", "https://", "http://")):
                raise _wrong(f"{where}[{index}].image_url.url", url, "a data:image/ or http(s) URL")
            needs.add(Capability.IMAGE)
            extra += IMAGE_TOKENS_MAX
        elif kind == "input_audio" and type(part.get("input_audio")) is dict:
            data = part["input_audio"].get("data")
            if type(data) is not str:
                raise _wrong(f"{where}[{index}].input_audio.data", data, "base64 text")
            needs.add(Capability.AUDIO)
            extra += len(data) // AUDIO_BYTES_PER_TOKEN + 1
        elif kind == "file" and type(part.get("file")) is dict:
            needs.add(Capability.FILE)
            extra += len(msgspec.json.encode(part["file"])) + MESSAGE_TOKENS
        else:
            raise _wrong(f"{where}[{index}]", part, "a part of type text, image_url, input_audio or file")
    return size, extra


def _texts(field: str, value: Any, most: int) -> tuple[int, int]:
    """Bytes (or tokens, for token arrays) and the number of a prompt's or an input's items."""
    if type(value) is str:
        if not value:
            raise _wrong(field, value, "a text that is not empty")
        return _size(value), 1
    if type(value) is not list or not value:
        raise _wrong(field, value, "a string, a list of strings, or token ids")
    if len(value) > most and type(value[0]) is not int:
        raise TooLarge(f"'{field}': found {len(value)} items, at most {most}", param=field)
    if all(type(item) is str for item in value):
        return sum(map(_size, value)), len(value)
    if all(type(item) is int and item >= 0 for item in value):
        return len(value), 1
    if all(type(item) is list and all(type(i) is int and i >= 0 for i in item) for item in value):
        return sum(map(len, value)), len(value)
    raise _wrong(field, value, "strings only, or token ids only")


def _completion(body: dict[str, Any], limits: Limits) -> tuple[frozenset[Capability], int, int, int]:
    size, items = _texts("prompt", body.get("prompt"), limits.embedding_inputs)
    size += _size(body.get("suffix") or "")
    needs = _needs(body)
    return frozenset(needs), size // BYTES_PER_TOKEN + 4 * items, size + MESSAGE_TOKENS * items, items


def _embedding(body: dict[str, Any], limits: Limits) -> tuple[frozenset[Capability], int, int]:
    size, items = _texts("input", body.get("input"), limits.embedding_inputs)
    needs = _needs(body)
    return frozenset(needs), size // BYTES_PER_TOKEN + 2 * items, size + MESSAGE_TOKENS * items
