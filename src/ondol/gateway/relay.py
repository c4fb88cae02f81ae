"""One streamed answer on its way to the client.

Every chunk goes out as it comes, save the ones that end the answer: they wait until the record is
durable (P1).  A stream that breaks ends with an error event, never with a silent stop.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Final

import msgspec

from ondol.core.inference import Chunk, Receipt, Usage
from ondol.errors import EngineFailed, OndolError
from ondol.gateway.reply import with_closing
from ondol.wire.openai_replies import error_body
from ondol.wire.sse import DONE, encode

COLLECT_BYTES_MAX: Final = 4 * 1024 * 1024


class Heard(msgspec.Struct, kw_only=True):
    """What was heard of an answer so far."""

    usage: Usage | None = None
    model: str | None = None
    receipt: Receipt | None = None
    pieces: int = 0
    chunks: int = 0


class Ending(msgspec.Struct, frozen=True, kw_only=True):
    """How a stream ended: `error` is None when it is complete."""

    heard: Heard
    error: OndolError | None = None
    collected: tuple[bytes, ...] | None = None


class Relay:
    """An iterator over SSE bytes.

    `finish` meters and commits, and gives the field `ondol`; `abandon` meters in the background, for a
    client that has gone.
    """

    def __init__(
        self, *, first: Chunk, chunks: AsyncIterator[Chunk], include_usage: bool, collect: bool,
        finish: Callable[[Ending], Awaitable[bytes]], abandon: Callable[[Heard, AsyncIterator[Chunk]], None],
    ) -> None:  # fmt: skip
        """Take over `chunks` after its first chunk."""
        self._next: Chunk | None = first
        self._chunks = chunks
        self._include_usage = include_usage
        self._finish = finish
        self._abandon = abandon
        self._heard = Heard()
        self._held: bytes | None = None
        self._usage_chunk: bytes | None = None
        self._template = b"{}"
        self._collected: list[bytes] | None = [] if collect else None
        self._collected_bytes = 0
        self._ended = False

    def __aiter__(self) -> Relay:
        """Itself: it is read once."""
        return self

    async def __anext__(self) -> bytes:
        """The next bytes for the client."""
        if self._ended:
            raise StopAsyncIteration
        while True:
            chunk = self._next
            if chunk is None:
                try:
                    chunk = await anext(self._chunks)
                except StopAsyncIteration:
                    return await self._complete()
                except OndolError as error:
                    return await self._break(error)
                except Exception as error:  # a bug in an engine: the client still gets a defined end
                    failed = EngineFailed(f"the engine failed unexpectedly ({type(error).__name__})")
                    return await self._break(failed)
            self._next = None
            out = self._take(chunk)
            if out is not None:
                return out

    def _take(self, chunk: Chunk) -> bytes | None:
        """Note what a chunk says; the bytes to send now, or None where it must wait for the end."""
        heard = self._heard
        heard.chunks += 1
        heard.pieces += chunk.pieces
        if chunk.usage is not None:
            heard.usage = chunk.usage
        if chunk.model is not None and heard.model is None:
            heard.model = chunk.model
            self._template = chunk.data
        if chunk.receipt is not None:
            heard.receipt = chunk.receipt
        if not chunk.has_choices:
            # Some say other things in a chunk without choices, such as their filter's verdict on the prompt.
            if chunk.usage is not None:
                self._usage_chunk = chunk.data
            return None
        held, self._held = self._held, chunk.data if chunk.finish else None
        if chunk.finish:
            return None if held is None else self._out(held)
        if held is not None:
            return self._out(held) + self._out(chunk.data)
        return self._out(chunk.data)

    def _out(self, data: bytes) -> bytes:
        collected = self._collected
        if collected is not None:
            self._collected_bytes += len(data)
            if self._collected_bytes > COLLECT_BYTES_MAX:
                self._collected = None
            else:
                collected.append(data)
        return encode(data)

    async def _complete(self) -> bytes:
        """The end of a good answer: what was held, the field `ondol`, `[DONE]`; all after the commit."""
        if self._held is None and self._usage_chunk is None and self._heard.pieces == 0:
            return await self._break(EngineFailed("the engine's stream ended without an answer"))
        self._ended = True
        out = b""
        last = self._usage_chunk if self._include_usage else None
        if last is None and self._include_usage:
            last = self._skeleton(usage=True)
        if last is not None and self._held is not None:
            out = self._out(self._held)
        elif last is None:
            last = self._held if self._held is not None else self._skeleton(usage=False)
        if self._collected is not None:
            self._collected.append(last)
        collected = None if self._collected is None else tuple(self._collected)
        try:
            end = await self._finish(Ending(heard=self._heard, collected=collected))
        except OndolError as error:
            return error_event(error)
        return out + encode(with_closing(last, end)) + DONE

    async def _break(self, error: OndolError) -> bytes:
        """The end of a broken answer: what was held, then an error event."""
        self._ended = True
        out = b"" if self._held is None else encode(self._held)
        try:
            await self._finish(Ending(heard=self._heard, error=error))
        except OndolError as second:
            return out + error_event(second)
        return out + error_event(error)

    def _skeleton(self, *, usage: bool) -> bytes:
        """A last chunk for an engine that sends none: the first one's head, no choices, maybe usage."""
        fields = msgspec.json.decode(self._template)
        kept = {key: fields[key] for key in ("id", "object", "created", "model") if key in fields}
        kept["choices"] = []
        if usage:
            heard = self._heard.usage or Usage(output_tokens=self._heard.pieces)
            total = heard.input_tokens + heard.output_tokens
            kept["usage"] = {
                "prompt_tokens": heard.input_tokens,
                "completion_tokens": heard.output_tokens,
                "total_tokens": total,
            }
        return msgspec.json.encode(kept)

    def close(self) -> None:
        """Give up, where the client has gone: cancels the engine and meters; nothing after the end."""
        if not self._ended:
            self._ended = True
            self._abandon(self._heard, self._chunks)


def error_event(error: OndolError) -> bytes:
    """The event that ends a broken stream, in OpenAI's shape."""
    return encode(error_body(message=error.message, kind="server_error", code=error.code, param=error.param))
