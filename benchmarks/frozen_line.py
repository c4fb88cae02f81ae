"""A relay that can stand still (it goes on holding its connections, and no byte comes through) or be cut."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from types import TracebackType
from typing import Self


class FrozenLine:
    """Relays to a port of 127.0.0.1 in a thread of its own, until `frozen` is set."""

    def __init__(self, to_port: int) -> None:
        self.frozen = False
        self.port = 0
        self._to_port = to_port
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(10)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def cut(self) -> None:
        """Reset what is open and refuse what comes; nothing happens to a line that is cut already."""
        asyncio.run_coroutine_threadsafe(self._cut(), self._loop).result(10)

    def mend(self) -> None:
        """Listen again on the same port."""
        self._server = asyncio.run_coroutine_threadsafe(self._listen(self.port), self._loop).result(10)

    async def _cut(self) -> None:
        self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()

    async def _end(self) -> None:
        self._server.close()
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _listen(self, port: int = 0) -> asyncio.Server:
        return await asyncio.start_server(self._accepted, "127.0.0.1", port)

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.CancelledError):  # the end; the server of Python 3.11 would log it
            await self._relay(reader, writer)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.frozen:
            await asyncio.sleep(3600)
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._to_port)
        pair = {writer, far_writer}
        self._writers |= pair
        try:
            await asyncio.gather(self._pipe(reader, far_writer), self._pipe(far_reader, writer))
        finally:
            self._writers -= pair

    async def _pipe(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(65536):
                if self.frozen:
                    await asyncio.sleep(3600)  # longer than any measurement
                sink.write(data)
                await sink.drain()
        except OSError:
            pass
        finally:
            sink.close()
