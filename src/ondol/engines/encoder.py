"""The `encoder` engine: sentence embeddings in a child process that is started on first use.

It owns the child, the frames between the two (see `encoder_child`), and OpenAI's form of the answer.
Requests wait in the child's pipe; `waiting_max` bounds them, and bytes are bounded before any is sent.
"""

from __future__ import annotations

import asyncio
import base64
import struct
from collections.abc import AsyncIterator
from typing import Any, Final, Literal

import msgspec

from ondol.core.inference import Capability, Chunk, Completion, Task, Usage
from ondol.core.ports import Clock, EngineCall
from ondol.engines.child import Backoff, Child, Ready, State
from ondol.engines.encoder_child import FRAME_BYTES_MAX, LENGTH, Ask, Told
from ondol.errors import DeadlineExceeded, EngineRejected, EngineUnavailable
from ondol.units import NS_PER_S

INPUTS_MAX: Final = 2048
"""OpenAI's own bound on one request."""
INPUT_BYTES_MAX: Final = 32 * 1024
"""Of one text: about 8,000 English words' tokens, half a second of work and 100 MB in the child."""
TOTAL_BYTES_MAX: Final = 1024 * 1024
"""Of all texts of a request: some 10 s of work."""

_JSON = msgspec.json.Encoder()
_ASK = msgspec.msgpack.Encoder()
_TOLD = msgspec.msgpack.Decoder(Told)


class EncoderEngine:
    """The multilingual sentence encoder that ships with Ondol; 512 numbers a text, of length 1."""

    def __init__(
        self,
        *,
        name: str,
        clock: Clock,
        threads: int = 1,
        waiting_max: int = 256,
        capabilities: frozenset[Capability] = frozenset(),
        backoff: Backoff | None = None,
    ) -> None:
        """Keep the values; the first request starts the child, which takes about a second.

        More than 1 or 2 `threads` make short texts slower, not faster.
        """
        self._name = name
        self._clock = clock
        self._waiting_max = waiting_max
        self._capabilities = capabilities
        self._waiting: dict[int, asyncio.Future[Told]] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._number = 0
        self._started = False
        self._child = Child(
            name=f"the encoder {name}",
            module="ondol.engines.encoder_child",
            config={"threads": threads},
            serve=self._serve,
            start_timeout_s=60.0,
            backoff=backoff,
        )

    @property
    def capabilities(self) -> frozenset[Capability]:
        """What it can do beyond its task: by itself nothing, not even `dimensions`."""
        return self._capabilities

    @property
    def child(self) -> Child:
        """The process, for status and tests."""
        return self._child

    async def start(self) -> None:
        """Nothing: it takes 150 MB, which a site that embeds nothing should not pay."""

    def problem(self) -> str | None:
        """None when it can take a request (also one that makes it load), else why not."""
        if len(self._waiting) >= self._waiting_max:
            return f"{self._name} has {self._waiting_max} requests waiting, which is its bound"
        match self._child.state:
            case State.STARTING:
                return None
            case State.READY:
                return None if self._writer is not None else f"{self._name} has just ended"
            case _:
                return self._child.problem()

    async def complete(self, call: EngineCall) -> Completion:
        """The embeddings, in OpenAI's form."""
        texts, form = _read_input(call)
        problem = self.problem()
        if problem is not None:
            raise EngineUnavailable(problem)
        self._number += 1
        number = self._number
        # Its place is taken before the first await, so that the bound holds.
        future: asyncio.Future[Told] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        try:
            remaining_s = (call.deadline_ns - self._clock.now_ns()) / NS_PER_S
            async with asyncio.timeout(max(remaining_s, 0.0)):
                told = await self._ask(number, texts, future)
        except TimeoutError as error:
            raise DeadlineExceeded(f"{self._name} was not done in time") from error
        finally:
            del self._waiting[number]
            if not future.done() or future.cancelled():
                self._withdraw(number)
            else:
                # Marks it as seen, also where we left before we awaited it.
                future.exception()
        if told.error:
            raise EngineRejected(f"{self._name}: {told.error}", param="input")
        return self._completion(told, len(texts), form)

    def stream(self, call: EngineCall) -> AsyncIterator[Chunk]:
        """Embeddings have no stream: the iterator raises EngineRejected."""
        return _no_stream(call)

    async def close(self) -> None:
        """End the child; requests that wait are unavailable."""
        await self._child.close()
        self._fail_all(f"{self._name} is closed")

    async def _ask(self, number: int, texts: list[str], future: asyncio.Future[Told]) -> Told:
        self._child.start()
        if self._child.state is not State.READY:
            await self._child.ready()
        writer = self._writer
        if writer is None:
            raise EngineUnavailable(f"{self._name} has just ended")
        try:
            writer.write(_frame(Ask(number, texts)))
            await writer.drain()
        except (OSError, RuntimeError) as error:  # uvloop's for a pipe whose end it has just seen
            raise EngineUnavailable(f"{self._name} has just ended") from error
        return await future

    def _withdraw(self, number: int) -> None:
        writer = self._writer
        if writer is not None and not writer.is_closing():
            writer.write(_frame(Ask(number)))

    async def _serve(self, _ready: Ready, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        try:
            while True:
                (length,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
                if length > FRAME_BYTES_MAX:
                    raise ValueError("a frame is larger than its bound")
                told = _TOLD.decode(await reader.readexactly(length))
                future = self._waiting.get(told.number)
                if future is not None and not future.done():
                    future.set_result(told)
        finally:
            self._writer = None
            self._fail_all(f"{self._name} ended while it computed; it is started again")

    def _fail_all(self, sentence: str) -> None:
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(EngineUnavailable(sentence))

    def _completion(self, told: Told, count: int, form: Literal["float", "base64"]) -> Completion:
        row_bytes = told.width * 4
        if told.width == 0 or len(told.vectors) != count * row_bytes:
            raise EngineUnavailable(f"{self._name} answered with {len(told.vectors)} bytes for {count} texts")
        numbers = struct.Struct(f"<{told.width}f")
        rows = [told.vectors[index * row_bytes : (index + 1) * row_bytes] for index in range(count)]
        body = {
            "object": "list",
            "model": self._name,
            "data": [
                {
                    "object": "embedding",
                    "index": index,
                    "embedding": base64.b64encode(row).decode() if form == "base64" else numbers.unpack(row),
                }
                for index, row in enumerate(rows)
            ],
            "usage": {"prompt_tokens": told.tokens, "total_tokens": told.tokens},
        }
        return Completion(body=_JSON.encode(body), usage=Usage(input_tokens=told.tokens), model=self._name)


def _frame(ask: Ask) -> bytes:
    body = _ASK.encode(ask)
    return LENGTH.pack(len(body)) + body


def _read_input(call: EngineCall) -> tuple[list[str], Literal["float", "base64"]]:
    """The texts and the form asked for.

    Raises:
        EngineRejected: another task, no text, token arrays, or a bound passed.
    """
    if call.request.task is not Task.EMBEDDING:
        raise EngineRejected("this is an encoder; it answers /v1/embeddings only", param="model")
    body = call.request.body
    form: Any = body.get("encoding_format")
    form = "float" if form is None else form
    if form not in ("float", "base64"):
        raise EngineRejected("expected float or base64 as encoding_format", param="encoding_format")
    if body.get("dimensions") is not None:
        raise EngineRejected("this encoder has 512 dimensions and cannot give others", param="dimensions")
    given = body.get("input")
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not texts:
        raise EngineRejected("found no input, expected a text or a list of texts", param="input")
    if len(texts) > INPUTS_MAX:
        raise EngineRejected(f"found {len(texts)} texts, expected at most {INPUTS_MAX}", param="input")
    total = 0
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise EngineRejected(
                f"found {type(text).__name__} as input {index}, expected text: the token numbers of another"
                " model mean nothing here",
                param="input",
            )
        if not text:
            raise EngineRejected(f"found an empty text as input {index}", param="input")
        try:
            size = len(text.encode())
        except UnicodeEncodeError:
            raise EngineRejected(f"input {index} has half a surrogate pair", param="input") from None
        if size > INPUT_BYTES_MAX:
            raise EngineRejected(
                f"found {size} bytes as input {index}, expected at most {INPUT_BYTES_MAX}; cut it into parts",
                param="input",
            )
        total += size
    if total > TOTAL_BYTES_MAX:
        raise EngineRejected(
            f"found {total} bytes of input, expected at most {TOTAL_BYTES_MAX}; send several requests",
            param="input",
        )
    return texts, form


async def _no_stream(call: EngineCall) -> AsyncIterator[Chunk]:
    yield await _refuse(call)


async def _refuse(_call: EngineCall) -> Chunk:
    raise EngineRejected("embeddings cannot be streamed; ask without `stream`", param="stream")
