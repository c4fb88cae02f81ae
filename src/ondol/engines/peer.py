"""Another site of ours as an engine: the same protocol, and it says what its answer cost.

Owns what one site tells another (`x-ondol-*`) and what it believes of the reply.  Invariant: a request
never visits a site twice, and the peer accounts for it, once, in the name of the caller's team.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Final
from urllib.parse import quote

import msgspec

from ondol.core.catalog import KeySource
from ondol.core.inference import Capability, Chunk, Completion
from ondol.core.ports import Clock, EngineCall
from ondol.engines.exchange import Exchange, UpstreamRefused
from ondol.engines.key_ring import Key, KeyRing
from ondol.errors import DeadlineExceeded, EngineUnavailable
from ondol.units import NS_PER_MS
from ondol.wire.openai_answers import receipt_of, upstream_body

_RECEIPT_HEADERS: Final = {
    "site": "x-ondol-site",
    "request_id": "x-ondol-request-id",
    "model": "x-ondol-model",
    "deployment": "x-ondol-deployment",
    "cost": "x-ondol-cost",
    "energy_j": "x-ondol-energy-j",
    "carbon_g": "x-ondol-carbon-g",
    "cache": "x-ondol-cache",
}


class PeerEngine:
    """Implements `core.ports.Engine` over another site's gateway.  Lives on one event loop."""

    def __init__(
        self,
        *,
        url: str,
        site: str,
        own_site: str,
        route: str,
        clock: Clock,
        keys: Sequence[KeySource] = (),
        folder: Path | None = None,
        environ: Mapping[str, str] | None = None,
        capabilities: frozenset[Capability] | None = None,
        connect_timeout_s: float = 5.0,
        read_timeout_s: float = 60.0,
        authorization: Callable[[str], str] | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """Take the peer's address up to `/v1`, its site name, ours, and the route to ask for there.

        `keys` hold a key of kind `peer`, made at the peer.  Without any, a site of a fleet proves itself by
        `authorization`, which makes the header's value for a site's name.  Without declared `capabilities` the peer is
        taken to do everything: it refuses what no engine of its can, before any work is done.

        Raises:
            ConfigError: the address is no http or https URL.
        """
        self._site = site
        self._own_site = own_site
        self._route = route
        self._authorization = None if keys else authorization
        self._clock = clock
        self._capabilities = frozenset(Capability) if capabilities is None else capabilities
        self._ring = KeyRing(
            keys,
            folder=folder or Path(),
            environ=os.environ if environ is None else environ,
            clock=clock,
        )
        self._ring.load()
        self._exchange = Exchange(
            url,
            connect_timeout_s=connect_timeout_s,
            read_timeout_s=read_timeout_s,
            clock=clock,
            receipts=True,
            tls=tls,
        )

    @property
    def capabilities(self) -> frozenset[Capability]:
        """As declared, else everything."""
        return self._capabilities

    async def start(self) -> None:
        """Read the key again.  Nothing is sent: the peer may be away, which is no error here."""
        self._ring.load()

    def problem(self) -> str | None:
        """None while the key is good, else why not and until when."""
        return self._ring.problem()

    async def complete(self, call: EngineCall) -> Completion:
        """The whole answer, with the receipt from the reply's headers."""
        key, headers = self._address(call)
        body = upstream_body(call, self._route, keep_metadata=True)
        try:
            completion, reply = await self._exchange.complete_with_headers(
                call.request.task, body, headers, call.deadline_ns
            )
        except UpstreamRefused as error:
            self._judge(key, error)
            raise
        self._ring.good(key)
        receipt = receipt_of({name: reply.get(header) for name, header in _RECEIPT_HEADERS.items()})
        return completion if receipt is None else msgspec.structs.replace(completion, receipt=receipt)

    async def stream(self, call: EngineCall) -> AsyncGenerator[Chunk, None]:
        """The chunks as they come; the last one brings the receipt in its field `ondol`."""
        key, headers = self._address(call)
        body = upstream_body(call, self._route, keep_metadata=True)
        try:
            async with aclosing(
                self._exchange.stream(call.request.task, body, headers, call.deadline_ns)
            ) as chunks:
                async for chunk in chunks:
                    yield chunk
        except UpstreamRefused as error:
            self._judge(key, error)
            raise
        self._ring.good(key)

    async def close(self) -> None:
        """Close every connection, with what runs on it."""
        await self._exchange.close()

    def _address(self, call: EngineCall) -> tuple[Key, dict[str, str]]:
        """The key and headers of a call.

        Raises:
            EngineUnavailable: the request has been at the peer or here before, or no key is good.
            DeadlineExceeded: less than a millisecond is left.
        """
        hops = call.origin.hops if call.origin is not None else ()
        if self._own_site in hops or self._site in hops or self._site == self._own_site:
            raise EngineUnavailable(
                f"loop: the request has been at {', '.join(hops) or self._own_site} already and is not "
                f"sent to {self._site} from {self._own_site}; check the routes of both sites"
            )
        remaining_ms = (call.deadline_ns - self._clock.now_ns()) // NS_PER_MS
        if remaining_ms < 1:
            raise DeadlineExceeded(f"no time is left to ask {self._site}")
        key = self._ring.pick()
        headers = key.headers()
        if self._authorization is not None:
            headers["authorization"] = self._authorization(self._site)
        headers["x-ondol-origin"] = f"{self._own_site};{quote(call.request_id, safe='')};{call.attempt}"
        headers["x-ondol-hops"] = ",".join((*hops, self._own_site))
        headers["x-ondol-remaining-ms"] = str(remaining_ms)
        headers["x-ondol-data-class"] = call.data_class.value
        if call.trace:
            headers["traceparent"] = call.trace
        if call.objective:
            headers["x-ondol-objective"] = quote(call.objective, safe="")
        principal = call.principal
        headers["x-ondol-on-behalf"] = (
            f"tenant={quote(principal.tenant, safe='')};team={quote(principal.team, safe='')}"
        )
        return key, headers

    def _judge(self, key: Key, error: UpstreamRefused) -> None:
        # A 429 of a peer is one team's limit there, not the key's: others may still pass.  A 403 to a site that has
        # proved itself is one team's or one route's, too.
        if error.status == 401 or (error.status == 403 and self._authorization is None):
            self._ring.refuse(key, error.status)
