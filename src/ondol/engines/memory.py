"""The memory: embeds questions and finds the nearest ones seen before, in a child process started on first use.

It owns the child and the frames between the two (see `memory_child`).  It keeps vectors and keys; who asks keeps the
texts and answers.  What it held dies with the child: `epoch` counts the lives, so that the owner of the keys knows.
Where the child fails, or its vectors change their width, calls raise `EngineUnavailable` and `problem` says why.
"""

from __future__ import annotations

import asyncio
from typing import Final

import msgspec

from ondol.engines.child import Backoff, Child, Ready, State
from ondol.engines.memory_child import FRAME_BYTES_MAX, LENGTH, Ask, Told
from ondol.errors import DeadlineExceeded, EngineRejected, EngineUnavailable

TEXT_BYTES_MAX: Final = 32 * 1024
WAITING_MAX: Final = 64
"""Of the child, which does one thing at a time: 64 short questions are some 150 ms of work."""

_ASK = msgspec.msgpack.Encoder()
_TOLD = msgspec.msgpack.Decoder(Told)


class Nearest(msgspec.Struct, frozen=True, kw_only=True):
    """What a search found: (key, cosine), most similar first.  `number` names the question's vector for `add`."""

    number: int
    found: tuple[tuple[int, float], ...]
    encode_us: int
    search_us: int


class MemoryEngine:
    """The process that finds similar questions."""

    def __init__(
        self,
        *,
        name: str = "memory",
        threads: int = 1,
        entries_max: int = 100_000,
        exact_max: int = 8192,
        timeout_s: float = 1.0,
        load_timeout_s: float = 60.0,
        backoff: Backoff | None = None,
    ) -> None:
        """Keep the values; the first call starts the child, which takes about a second.

        `entries_max` bounds what it holds (1.5 KB each), `exact_max` is the size from which on a namespace is searched
        by a graph, `timeout_s` bounds a call to a child that is ready.
        """
        self._name = name
        self._timeout_s = timeout_s
        self._waiting: dict[int, asyncio.Future[Told]] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._number = 0
        self._width = 0
        self._off: str | None = None
        self.epoch = 0
        self.entries = 0
        self._child = Child(
            name=f"the memory {name}",
            module="ondol.engines.memory_child",
            config={"threads": threads, "entries_max": entries_max, "exact_max": exact_max},
            serve=self._serve,
            start_timeout_s=load_timeout_s,
            backoff=backoff,
        )

    @property
    def child(self) -> Child:
        """The process, for status and tests."""
        return self._child

    def start(self) -> None:
        """Start the child in the background, so that the first question need not wait; twice changes nothing."""
        self._child.start()

    def problem(self) -> str | None:
        """None when it answers at once, else why not: it starts, has failed, is off, or has too many waiting."""
        if self._off is not None:
            return self._off
        if self._child.state is State.READY and self._writer is None:
            return f"the memory {self._name} has just ended"
        if len(self._waiting) >= WAITING_MAX:
            return f"the memory {self._name} has {WAITING_MAX} requests waiting, which is its bound"
        return self._child.problem()

    async def ready(self) -> None:
        """Return when the child is ready; the caller bounds the time.

        Raises:
            EngineUnavailable: it did not start, or is closed.
        """
        self._child.start()
        await self._child.ready()

    async def search(self, namespace: bytes, text: str, k: int) -> Nearest:
        """The `k` nearest questions of a namespace.

        Raises:
            EngineUnavailable: it is not ready (it is started), off, or overloaded.
            EngineRejected: the text is empty or too long, or the encoder failed on it.
            DeadlineExceeded: it took longer than `timeout_s`.
        """
        told = await self._call(namespace=namespace, what="search", text=_checked(text), k=k)
        found = tuple(zip(told.keys, told.similarities, strict=True))
        return Nearest(number=told.number, found=found, encode_us=told.encode_us, search_us=told.search_us)

    async def add(self, namespace: bytes, key: int, text: str, *, vector_of: int = 0) -> tuple[int, ...]:
        """Keep a question under a new key; the keys given up for it.  Raises as `search`.

        `vector_of` is the `number` of its search: while that is remembered, nothing is encoded again.
        """
        told = await self._call(
            namespace=namespace, what="add", text=_checked(text), keys=(key,), vector_of=vector_of
        )
        return told.gone

    async def remove(self, keys: tuple[int, ...]) -> None:
        """Forget keys.  Raises as `search`."""
        await self._call(namespace=b"", what="remove", keys=keys)

    async def similarity(self, one: str, other: str) -> float:
        """The cosine of two texts, such as two answers.  Raises as `search`."""
        told = await self._call(namespace=b"", what="compare", text=_checked(one), other=_checked(other))
        return told.similarities[0]

    async def close(self) -> None:
        """End the child; calls that wait are unavailable."""
        await self._child.close()
        self._fail_all(f"the memory {self._name} is closed")

    async def _call(
        self,
        *,
        namespace: bytes,
        what: str,
        text: str = "",
        other: str = "",
        k: int = 0,
        keys: tuple[int, ...] = (),
        vector_of: int = 0,
    ) -> Told:
        self._child.start()
        problem = self.problem()
        writer = self._writer
        if problem is not None or writer is None:
            raise EngineUnavailable(problem or f"the memory {self._name} has just ended")
        self._number += 1
        number = self._number
        ask = Ask(
            number=number,
            what=what,
            namespace=namespace,
            text=text,
            other=other,
            k=k,
            keys=keys,
            vector_of=vector_of,
        )
        future: asyncio.Future[Told] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        try:
            async with asyncio.timeout(self._timeout_s):
                body = _ASK.encode(ask)
                writer.write(LENGTH.pack(len(body)) + body)
                await writer.drain()
                told = await future
        except TimeoutError as error:
            raise DeadlineExceeded(
                f"the memory {self._name} took longer than {self._timeout_s:g} s"
            ) from error
        except (OSError, RuntimeError) as error:  # uvloop's for a pipe whose end it has just seen
            raise EngineUnavailable(f"the memory {self._name} has just ended") from error
        finally:
            del self._waiting[number]
            if future.done() and not future.cancelled():
                # Marks it as seen, also where we left before we awaited it.
                future.exception()
        if told.error:
            raise EngineRejected(f"the memory {self._name}: {told.error}", param="messages")
        self.entries = told.entries
        return told

    async def _serve(self, ready: Ready, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        width = ready.get("width")
        if not isinstance(width, int) or width <= 0:
            raise ValueError("it did not say how wide its vectors are")
        if self._width and width != self._width:
            self._off = (
                f"the memory {self._name} is off: its encoder gave vectors of {self._width} numbers and gives {width}"
                " now; restart the gateway to begin anew"
            )
        self._width = self._width or width
        self.epoch += 1
        self.entries = 0
        self._writer = writer
        try:
            while True:
                (length,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
                if length > FRAME_BYTES_MAX:
                    raise ValueError("a frame is larger than its bound")
                self._hear(_TOLD.decode(await reader.readexactly(length)))
        finally:
            self._writer = None
            self._fail_all(f"the memory {self._name} ended while it computed; it is started again")

    def _hear(self, told: Told) -> None:
        if told.width and told.width != self._width:
            self._off = (
                f"the memory {self._name} is off: its encoder gave a vector of {told.width} numbers, expected"
                f" {self._width}; restart the gateway to begin anew"
            )
            self._fail_all(self._off)
        future = self._waiting.get(told.number)
        if future is not None and not future.done():
            future.set_result(told)

    def _fail_all(self, sentence: str) -> None:
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(EngineUnavailable(sentence))


def _checked(text: str) -> str:
    if not text:
        raise EngineRejected("found an empty text", param="messages")
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise EngineRejected("the text has half a surrogate pair", param="messages") from None
    if size > TEXT_BYTES_MAX:
        raise EngineRejected(
            f"found {size} bytes of text, expected at most {TEXT_BYTES_MAX}", param="messages"
        )
    return text
