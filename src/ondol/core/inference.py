"""What is asked and what is answered, whatever the protocol and the engine.

The canonical form of a request is OpenAI's JSON, decoded: other dialects are translated to it at the
border, and an engine that speaks another one translates from it.  Fields that we do not know stay in
`body`, so that an upstream that knows them gets them.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import msgspec

from ondol.core.money import Money


class Task(StrEnum):
    """The kind of work, one a protocol path."""

    CHAT = "chat"
    COMPLETION = "completion"
    EMBEDDING = "embedding"


class Capability(StrEnum):
    """What a request can need and an engine can declare, beyond its task."""

    TOOLS = "tools"
    TOOL_CHOICE = "tool_choice"
    JSON_OBJECT = "json_object"
    JSON_SCHEMA = "json_schema"
    LOGPROBS = "logprobs"
    LOGIT_BIAS = "logit_bias"
    CHOICES = "choices"
    SEED = "seed"
    IMAGE = "image"
    AUDIO = "audio"
    FILE = "file"
    AUDIO_OUT = "audio_out"
    REASONING_EFFORT = "reasoning_effort"
    WEB_SEARCH = "web_search"
    PREDICTION = "prediction"
    ECHO = "echo"
    SUFFIX = "suffix"
    DIMENSIONS = "dimensions"


class DataClass(StrEnum):
    """How sensitive the content is, mildest first.  Labels raise it, nothing lowers it."""

    PUBLIC = "public"
    INTERNAL = "internal"
    CONFIDENTIAL = "confidential"
    RESTRICTED = "restricted"

    @property
    def rank(self) -> int:
        """0 for public to 3 for restricted."""
        return _RANKS[self]


_RANKS = {name: rank for rank, name in enumerate(DataClass)}


class Objective(StrEnum):
    """What the caller wants most."""

    FAST = "fast"
    CHEAP = "cheap"
    GREEN = "green"
    BEST = "best"
    PRIVATE = "private"


class InferenceRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One request, protocol-neutral.

    `prompt_tokens_max` is an upper bound, not a guess: a byte-level tokenizer never makes more tokens
    than there are UTF-8 bytes, plus a fixed allowance a message and a part.  `prompt_tokens` is the
    best guess, for limits and predictions.  `choices` is how many are made a prompt (`n`, or `best_of`
    where that is more), `answers` how many are made in all (0 for embeddings, which write nothing), and
    `predicted_tokens_max` bounds a prediction, which is billed as output where the model rejects it.
    """

    task: Task
    route: str
    body: dict[str, Any]
    stream: bool = False
    include_usage: bool = False
    needs: frozenset[Capability] = frozenset()
    n: int = 1
    choices: int = 1
    answers: int = 1
    predicted_tokens_max: int = 0
    max_output_tokens: int | None = None
    prompt_tokens: int = 0
    prompt_tokens_max: int = 0
    user: str | None = None
    tags: tuple[tuple[str, str], ...] = ()


class Usage(msgspec.Struct, frozen=True, omit_defaults=True):
    """Tokens of one answer.  `cached` is a part of `input`, `reasoning` a part of `output`."""

    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    estimated: bool = False


class Receipt(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What another site of ours says of the answer it gave: it paid, so it accounts."""

    site: str
    request_id: str
    model: str
    deployment: str
    cost: Money | None = None
    energy_uj: int | None = None
    carbon_ng: int | None = None
    cache: str = "off"


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """A whole answer.  `body` is OpenAI's JSON, valid UTF-8, as it goes to the client."""

    body: bytes
    usage: Usage | None = None
    model: str | None = None
    receipt: Receipt | None = None


class Chunk(msgspec.Struct, frozen=True, kw_only=True):
    """One JSON event of a streamed answer, without `data: ` and without the blank line.

    `pieces` counts the choices that carry new text or tool calls, which stands in for output tokens
    when the engine never tells.  `finish` is true where a choice says its `finish_reason`.
    `has_choices` is false for the usage chunk that ends a stream.
    """

    data: bytes
    pieces: int = 0
    finish: bool = False
    has_choices: bool = True
    usage: Usage | None = None
    model: str | None = None
    receipt: Receipt | None = None
