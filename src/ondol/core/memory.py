"""The seam to what finds similar texts."""

from __future__ import annotations

from typing import Protocol


class Near(Protocol):
    """What `Memory.search` found: (key, cosine), most similar first; `number` names the question's vector."""

    @property
    def number(self) -> int:
        """For `Memory.add`, so that nothing is embedded twice."""
        ...

    @property
    def found(self) -> tuple[tuple[int, float], ...]:
        """At most as many as were asked for."""
        ...


class Memory(Protocol):
    """Finds similar texts of one namespace.  What it holds is lost when its process ends: then `epoch` rises.

    Every call raises an OndolError where it cannot answer in time; nothing waits for it longer than a second.
    """

    @property
    def epoch(self) -> int:
        """How often it has begun with nothing."""
        ...

    def problem(self) -> str | None:
        """None when it answers at once, else why not."""
        ...

    async def ready(self) -> None:
        """Start it, and return once it can answer; the caller bounds the time.

        Every other call starts it, too, and does not wait.
        """
        ...

    async def search(self, namespace: bytes, text: str, k: int) -> Near:
        """The `k` nearest texts of a namespace."""
        ...

    async def add(self, namespace: bytes, key: int, text: str, *, vector_of: int = 0) -> tuple[int, ...]:
        """Keep a text under a new key; the keys given up for it."""
        ...

    async def remove(self, keys: tuple[int, ...]) -> None:
        """Forget keys."""
        ...

    async def similarity(self, one: str, other: str) -> float:
        """The cosine of two texts."""
        ...

    async def close(self) -> None:
        """End it."""
        ...
