"""The engine of a deployment whose model is not on this site yet: it answers nothing, and says how far it is."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

from ondol.core.inference import Capability, Chunk, Completion
from ondol.core.ports import EngineCall
from ondol.errors import EngineUnavailable


class PendingEngine:
    """Stands in until the model is here; a reload then makes the real engine.

    `say` gives the sentence of now: how much has come, or what it waits for.
    """

    def __init__(self, say: Callable[[], str], capabilities: frozenset[Capability] = frozenset()) -> None:
        self._say = say
        self._capabilities = capabilities

    @property
    def capabilities(self) -> frozenset[Capability]:
        """What the deployment states; the model itself cannot be asked yet."""
        return self._capabilities

    async def start(self) -> None:
        """Nothing is to be made ready here: `gateway.models` fetches."""

    def problem(self) -> str | None:
        """Why not yet; never None."""
        return self._say()

    async def complete(self, call: EngineCall) -> Completion:
        """As `core.ports.Engine`: always unavailable, so that another endpoint takes over."""
        del call
        raise EngineUnavailable(self._say())

    async def stream(self, call: EngineCall) -> AsyncIterator[Chunk]:
        """As `core.ports.Engine`: always unavailable, when it is asked for its first chunk."""
        for chunk in self._none(call):
            yield chunk

    def _none(self, call: EngineCall) -> tuple[Chunk, ...]:
        del call
        raise EngineUnavailable(self._say())

    async def close(self) -> None:
        """Nothing is held."""
