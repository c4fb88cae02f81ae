"""From documents to running endpoints: the half of the composition root that knows the engines."""

from __future__ import annotations

import os
from collections.abc import Mapping
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from random import Random

import msgspec

from ondol.adapters.artifacts import ModelStore
from ondol.adapters.power import cpu_power
from ondol.core.catalog import Catalog, DeploymentDoc, ModelDoc
from ondol.core.energy import EnergyModel
from ondol.core.money import Price, converted
from ondol.core.ports import Clock, Engine
from ondol.engines.encoder import EncoderEngine
from ondol.engines.fake import FakeEngine
from ondol.engines.llamacpp import LlamaCppEngine
from ondol.engines.memory import MemoryEngine
from ondol.engines.peer import PeerEngine
from ondol.engines.pending import PendingEngine
from ondol.engines.upstream import UpstreamEngine
from ondol.errors import ConfigError
from ondol.gateway.books import Books, View
from ondol.gateway.breaker import Breaker
from ondol.gateway.endpoints import Endpoint, Power
from ondol.gateway.member import Member
from ondol.gateway.meter import Terms
from ondol.gateway.predict import Predictor, prior
from ondol.gateway.recall import Recall
from ondol.gateway.semantic import SemanticCache
from ondol.units import UJ_PER_J

PARALLEL_LOCAL = 2


class Assembly:
    """Builds views, and keeps the engines of deployments that a reload did not change."""

    def __init__(
        self, *, folder: Path, store: Path, clock: Clock, seed: int, member: Member | None = None
    ) -> None:  # fmt: skip
        """`folder` is where relative paths of the configuration start, `store` holds models by digest.

        A member of a fleet waits for models that are not here yet, and proves itself to other sites.
        """
        self._member = member
        self._folder = folder
        self._store = store
        self._clock = clock
        self._random = Random(seed)  # noqa: S311 - spreads probes in time, guards nothing
        self._predictor = Predictor()
        self._cpu = cpu_power()
        self.power = Power()

    def view(self, catalog: Catalog, before: View | None = None) -> tuple[View, list[Engine], list[Engine]]:
        """The view of a catalogue, the engines to start, and the old view's engines to close.

        Raises:
            ConfigError: a document cannot be made to run here.
        """
        endpoints: dict[str, Endpoint] = {}
        started: list[Engine] = []
        kept: set[int] = set()
        for doc in catalog.deployments.values():
            old = None if before is None else before.endpoints.get(doc.name)
            terms = self._terms(catalog, doc)
            same = old is not None and before is not None and _same(before.catalog, catalog, doc)
            if old is not None and same and not self._has_come(old.engine, catalog.models[doc.model]):
                kept.add(id(old.engine))
                endpoints[doc.name] = (
                    old if old.terms == terms else self._endpoint(catalog, terms, old.engine, old.breaker)
                )
                continue
            engine = self._engine(catalog, doc)
            started.append(engine)
            endpoints[doc.name] = self._endpoint(catalog, terms, engine, Breaker(self._random.random))
        self._predictor.keep_only(frozenset(endpoints))
        routes = {
            route.name: tuple(endpoints[name] for name in route.deployments)
            for route in catalog.routes.values()
        }
        gone = (
            []
            if before is None
            else [e.engine for e in before.endpoints.values() if id(e.engine) not in kept]
        )
        return View(catalog=catalog, endpoints=endpoints, routes=routes), started, gone

    def recall(self, books: Books, catalog: Catalog) -> Recall:
        """The semantic cache; its process is started once a route wants it."""
        return Recall(
            cache=SemanticCache(catalog.gateway.limits.semantic_bytes), memory=MemoryEngine(), clock=self._clock,
            dice=self._random.random, spawn=books.spawn,
        )  # fmt: skip

    def _endpoint(self, catalog: Catalog, terms: Terms, engine: Engine, breaker: Breaker) -> Endpoint:
        doc = terms.deployment
        model = catalog.models[doc.model]
        local_context = engine.context_tokens if isinstance(engine, LlamaCppEngine) else None
        endpoint = Endpoint(
            terms=terms, model=model, site=catalog.sites[doc.site], engine=engine, breaker=breaker,
            predictor=self._predictor, here=catalog.site.name, power=self.power,
            context_tokens=local_context or doc.context_tokens or model.context_tokens,
        )  # fmt: skip
        self._predictor.add(
            doc.name, prior(endpoint.site.tier, endpoint.site.rtt_ms), parallel=endpoint.parallel
        )
        return endpoint

    def _terms(self, catalog: Catalog, doc: DeploymentDoc) -> Terms:
        site, model = catalog.sites[doc.site], catalog.models[doc.model]
        local = doc.engine in ("llamacpp", "encoder")
        if local and doc.parallel is None:
            doc = msgspec.structs.replace(doc, parallel=PARALLEL_LOCAL)
        price = None if doc.price is None else _in_currency(catalog, catalog.prices[doc.price])
        energy = EnergyModel(
            local=local,
            pue=site.pue,
            cpu=(self._cpu if site.power is None else cpu_power(site.power)) if local else None,
            uj_per_token=None if doc.energy_j_per_token is None else round(doc.energy_j_per_token * UJ_PER_J),
            stated_source=doc.energy_source,
            parameters_b=model.parameters_b if doc.engine in ("upstream", "peer") else None,
        )
        return Terms(
            deployment=doc, site=site, model=doc.upstream_model or model.name, price=price, energy=energy,
            grid=catalog.grids.get(site.grid_zone), threads=_threads(doc) if local else 1,
        )  # fmt: skip

    def _has_come(self, engine: Engine, model: ModelDoc) -> bool:
        """Whether the model that an engine waits for is here now."""
        return isinstance(engine, PendingEngine) and self._is_here(model)

    def _is_here(self, model: ModelDoc) -> bool:
        if model.file is not None or model.digest is None:
            return True
        return ModelStore(self._store).find(model.digest) is not None

    def _engine(self, catalog: Catalog, doc: DeploymentDoc) -> Engine:
        model, member = catalog.models[doc.model], self._member
        can = None if doc.capabilities is None else frozenset(doc.capabilities)
        if doc.engine == "llamacpp" and member is not None and not self._is_here(model):
            digest = model.digest or ""
            return PendingEngine(lambda: member.models.say(digest), can or frozenset())
        match doc.engine:
            case "llamacpp":
                # No read timeout of its own: an answer in one piece is silent until it is whole, and the
                # request's deadline bounds it.
                return LlamaCppEngine(
                    name=doc.name, alias=model.name, model_path=self._model_file(model), clock=self._clock,
                    context_tokens=doc.context_tokens, parallel=doc.parallel or PARALLEL_LOCAL,
                    threads=_threads(doc), capabilities=can, connect_timeout_s=doc.connect_timeout_s,
                )  # fmt: skip
            case "encoder":
                return EncoderEngine(
                    name=model.name,
                    clock=self._clock,
                    threads=doc.threads or 1,
                    capabilities=can or frozenset(),
                )
            case "fake":
                return FakeEngine(
                    model=doc.upstream_model or model.name,
                    clock=self._clock,
                    answers=doc.fake,
                    capabilities=can,
                )
            case "upstream":
                return UpstreamEngine(
                    url=doc.url or "", model=doc.upstream_model or model.name, clock=self._clock, keys=doc.keys,
                    folder=self._folder, environ=os.environ, capabilities=can,
                    connect_timeout_s=doc.connect_timeout_s, read_timeout_s=doc.read_timeout_s,
                )  # fmt: skip
            case "peer":
                return PeerEngine(
                    url=doc.url or "", site=doc.site, own_site=catalog.site.name,
                    route=doc.upstream_model or model.name, clock=self._clock, keys=doc.keys, folder=self._folder,
                    environ=os.environ, capabilities=can, connect_timeout_s=doc.connect_timeout_s,
                    read_timeout_s=doc.read_timeout_s,
                    authorization=None if member is None else member.authorization,
                    tls=None if member is None else member.tls,
                )  # fmt: skip

    def _model_file(self, model: ModelDoc) -> Path:
        if model.file is not None:
            return self._folder / model.file
        return ModelStore(self._store).path_of(model.digest or model.name)


def _threads(doc: DeploymentDoc) -> int:
    return doc.threads or max(1, (os.cpu_count() or 2) // 2)


def _same(old: Catalog, new: Catalog, doc: DeploymentDoc) -> bool:
    """Whether nothing that its engine was made from has changed."""
    return (
        old.deployments.get(doc.name) == doc
        and old.models.get(doc.model) == new.models[doc.model]
        and old.sites.get(doc.site) == new.sites[doc.site]
        and old.site.name == new.site.name
    )


def _in_currency(catalog: Catalog, price: Price) -> Price:
    """The price in the currency that the site accounts in."""
    currency = catalog.gateway.currency
    if price.currency == currency:
        return price
    exchange: Mapping[tuple[str, str], str] = catalog.exchange
    rate = exchange.get((price.currency, currency))
    if rate is not None:
        return converted(price, currency, Decimal(rate), f"{price.currency}/{currency}")
    other = exchange.get((currency, price.currency))
    if other is None:
        raise ConfigError(
            f"Price {price.id} is in {price.currency}, and this site accounts in {currency}; "
            f"add a Price document with exchange_from: {price.currency}, currency: {currency} and a rate"
        )
    inverse = 1 / Fraction(other)
    rounded = Decimal(inverse.numerator) / Decimal(inverse.denominator)
    return converted(price, currency, rounded, f"{price.currency}/{currency}")
