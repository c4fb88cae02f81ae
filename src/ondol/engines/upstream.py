"""Any OpenAI-compatible server as an engine: a vendor's API, vLLM, Ollama, llama.cpp's server, Triton.

Owns its keys and its connections; `exchange` owns what an answer means.  Invariant: a key that the
server limits or refuses is not used again before its time, and the next good one is tried at once.
"""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Final

import msgspec

from ondol.core.catalog import KeySource
from ondol.core.inference import Capability, Chunk, Completion
from ondol.core.ports import Clock, EngineCall
from ondol.engines.exchange import Exchange, UpstreamRefused
from ondol.engines.key_ring import Key, KeyRing
from ondol.errors import EngineUnavailable
from ondol.wire.openai_answers import upstream_body

TEXT_CAPABILITIES: Final = frozenset(
    {
        Capability.TOOLS,
        Capability.TOOL_CHOICE,
        Capability.JSON_OBJECT,
        Capability.JSON_SCHEMA,
        Capability.LOGPROBS,
        Capability.LOGIT_BIAS,
        Capability.CHOICES,
        Capability.SEED,
        Capability.REASONING_EFFORT,
        Capability.PREDICTION,
        Capability.ECHO,
        Capability.SUFFIX,
        Capability.DIMENSIONS,
    }
)
"""What an upstream is taken to do unless its deployment says otherwise: all that is text.  Pictures,
sound, files and web search differ too much between models to be assumed."""


class Dialect(msgspec.Struct, frozen=True, kw_only=True):
    """How a vendor's own protocol would come in: the body it wants for a call.

    OpenAI's answers need no translation; a dialect that does will bring its reader beside this field,
    and `Exchange` the seam for it.
    """

    encode: Callable[[EngineCall, str], bytes]


OPENAI: Final = Dialect(encode=upstream_body)


def openai_dialect(limit_field: str) -> Dialect:
    """OpenAI's protocol for servers that know only one name (`max_tokens`) of the output limit."""
    return Dialect(encode=lambda call, model: upstream_body(call, model, limit_field=limit_field))


class UpstreamEngine:
    """Implements `core.ports.Engine` over HTTP.  Lives on one event loop."""

    def __init__(
        self,
        *,
        url: str,
        model: str,
        clock: Clock,
        keys: Sequence[KeySource] = (),
        folder: Path | None = None,
        environ: Mapping[str, str] | None = None,
        capabilities: frozenset[Capability] | None = None,
        connect_timeout_s: float = 5.0,
        read_timeout_s: float = 60.0,
        dialect: Dialect = OPENAI,
    ) -> None:
        """Take the address up to `/v1`, and the name that the server knows the model by.

        Relative key files are taken from `folder`, environment variables from `environ` (the process's
        own by default).

        Raises:
            ConfigError: the address is no http or https URL.
        """
        self._model = model
        self._clock = clock
        self._dialect = dialect
        self._capabilities = TEXT_CAPABILITIES if capabilities is None else capabilities
        self._ring = KeyRing(
            keys,
            folder=folder or Path(),
            environ=os.environ if environ is None else environ,
            clock=clock,
        )
        self._ring.load()
        self._exchange = Exchange(
            url, connect_timeout_s=connect_timeout_s, read_timeout_s=read_timeout_s, clock=clock
        )

    @property
    def capabilities(self) -> frozenset[Capability]:
        """As declared, else all that is text."""
        return self._capabilities

    async def start(self) -> None:
        """Read the keys again.  Nothing is sent: an upstream may cost money and need not be up yet."""
        self._ring.load()

    def problem(self) -> str | None:
        """None while a key is good, else why not and until when."""
        return self._ring.problem()

    async def complete(self, call: EngineCall) -> Completion:
        """The whole answer; of several keys as many are tried as the server limits or refuses."""
        body = self._dialect.encode(call, self._model)
        while True:
            key = self._ring.pick()
            try:
                completion = await self._exchange.complete(
                    call.request.task, body, key.headers(), call.deadline_ns
                )
            except UpstreamRefused as error:
                self._judge(key, error)
            else:
                self._ring.good(key)
                return completion

    async def stream(self, call: EngineCall) -> AsyncGenerator[Chunk, None]:
        """The chunks as they come.  A key is changed only before the first one."""
        body = self._dialect.encode(call, self._model)
        while True:
            key = self._ring.pick()
            try:
                async with aclosing(
                    self._exchange.stream(call.request.task, body, key.headers(), call.deadline_ns)
                ) as chunks:
                    async for chunk in chunks:
                        yield chunk
            except UpstreamRefused as error:
                self._judge(key, error)
            else:
                self._ring.good(key)
                return

    async def close(self) -> None:
        """Close every connection, with what runs on it."""
        await self._exchange.close()

    def _judge(self, key: Key, error: UpstreamRefused) -> None:
        """Return when another key should be tried now.

        Raises:
            EngineUnavailable: the refusal is not about the key, or no other key is good.
        """
        if error.status == 429:
            self._ring.limit(key, error.retry_after_s)
        elif error.status in {401, 403}:
            self._ring.refuse(key, error.status)
        else:
            raise error
        if not self._ring.has_good():
            wait_s = self._ring.wait_s()
            raise EngineUnavailable(
                f"{error.message}; {self._ring.problem()}", retry_after_s=wait_s
            ) from error
