"""A fleet as the simulator sees it: places that serve, doors where requests come in, and the ways between.

It is made from the fleet's own documents.  What these do not say (how fast an engine reads and writes, the ways
between sites) stands in a file `simulation.toml` beside them, every figure with its source; what stands nowhere is
assumed from the tier, and said so in `notes`.
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from typing import Annotated, Any, Final

import msgspec

from ondol.core.catalog import DeploymentDoc, ModelDoc, RouteDoc, SiteDoc
from ondol.core.energy import CpuPower, EnergyModel, carbon
from ondol.core.fleet import LOCAL_ENGINES, Fleet, resolve
from ondol.core.inference import Capability
from ondol.core.money import Price, converted
from ondol.errors import ConfigError
from ondol.gateway.predict import prior
from ondol.simulate.service import NotNegative, Rate, Service
from ondol.units import CURRENCY_SCALE, NG_PER_G, NS_PER_S, UJ_PER_J

PARALLEL_LOCAL: Final = 2
PARALLEL_REMOTE: Final = 64
_TIERS: Final = ("device", "edge", "pop", "cloud")
_SLOTS_OF: Final = {"device": 1, "edge": 4, "pop": 32, "cloud": 64}
_PROBE_TOKENS: Final = 1_000_000


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What every answer should keep to, as the caller sees it: the first token and the whole, in milliseconds."""

    first_token_ms: Rate = 5_000.0
    total_ms: Rate = 60_000.0


class Region(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where callers are: the site whose door they use, and the way to it."""

    site: str
    rtt_ms: NotNegative = 0.0
    mbit_per_s: Rate | None = None
    source: str = ""


class Link(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The way between two sites, the same in both directions; `usd_per_gb` is paid for what goes either way."""

    a: str
    b: str
    rtt_ms: NotNegative
    mbit_per_s: Rate | None = None
    usd_per_gb: NotNegative = 0.0
    source: str


class Intensity(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A grid's carbon intensity by hour of the day (UTC, 24 figures) or of the trace (more), in g CO2e a kWh."""

    hours: Annotated[tuple[NotNegative, ...], msgspec.Meta(min_length=24, max_length=8784)]
    source: str


class Setting(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The content of `simulation.toml`.  `start_hour` is the hour of the day (UTC) at time 0 of a trace.

    `entries` are the sites at whose doors requests without a region come in, evenly spread.
    """

    entries: tuple[str, ...] = ()
    route: str | None = None
    start_hour: Annotated[int, msgspec.Meta(ge=0, le=23)] = 0
    bytes_per_token: Rate = 4.0
    limits: Limits = Limits()
    regions: dict[str, Region] = {}
    links: tuple[Link, ...] = ()
    services: dict[str, Service] = {}
    grids: dict[str, Intensity] = {}


class Known(msgspec.Struct, frozen=True, kw_only=True):
    """What is looked up outside of the documents: prices and rates of exchange, grids (g a kWh), processors."""

    prices: Mapping[str, Price]
    exchange: Mapping[tuple[str, str], str]
    grids: Mapping[str, float]
    cpus: Mapping[str, CpuPower] = {}


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """One engine that serves a deployment at a site.  `usd` is None where it has no price.

    `joules_per_token` counts output tokens; `watts` is drawn per request in service, for an engine whose energy is
    known by its processors.  `hours` are the grid's figures from the trace's start on, repeated.
    """

    name: str
    site: SiteDoc
    model: ModelDoc
    service: Service
    slots: int
    parallel: int
    queue: int
    context_tokens: int | None
    quality: float | None
    capabilities: frozenset[Capability]
    usd: Price | None
    joules_per_token: float | None
    watts: float | None
    hours: tuple[float, ...] | None


class Option(msgspec.Struct, frozen=True, kw_only=True):
    """One place as one site's gateway sees it: under the deployment's name, at the end of a way."""

    number: int
    place: int
    deployment: str
    local: bool
    rtt_ms: float
    ms_per_token: float
    usd_per_token: float


class Door(msgspec.Struct, frozen=True, kw_only=True):
    """A site's gateway for one route: where a request comes in, and what it can choose from."""

    number: int
    site: SiteDoc
    route: RouteDoc
    options: tuple[Option, ...]


class FleetModel(msgspec.Struct, frozen=True, kw_only=True):
    """All of it.  `options` are those of all doors, by number."""

    places: tuple[Place, ...]
    doors: tuple[Door, ...]
    options: tuple[Option, ...]
    by_name: dict[tuple[str, str], int]
    setting: Setting
    default_route: str
    default_sites: tuple[str, ...]
    notes: tuple[str, ...]

    def door(self, site: str, route: str) -> Door | None:
        """The door of a route at a site; None where the site does not serve it."""
        number = self.by_name.get((site, route))
        return None if number is None else self.doors[number]

    def sites_of(self, region: str) -> tuple[str, ...]:
        """The sites whose doors callers of a region use: as the setting says, else by the name of site or region."""
        stated = self.setting.regions.get(region)
        if stated is not None:
            return (stated.site,)
        sites = {door.site.name: door.site for door in self.doors}
        if region in sites:
            return (region,)
        return tuple([name for name, site in sites.items() if site.region == region])


def setting_of(data: Any, *, where: str) -> Setting:
    """The setting of decoded TOML.

    Raises:
        ConfigError: a key, a type or a value is wrong.
    """
    try:
        return msgspec.convert(data, Setting)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {error}") from error


def model_of(fleet: Fleet, known: Known, setting: Setting) -> FleetModel:
    """The model of a fleet's documents; O(sites x deployments).

    Raises:
        ConfigError: no site serves a route, or the setting names what the fleet has not got.
    """
    builder = _Builder(fleet, known, setting)
    builder.check()
    for name in sorted(fleet.sites):
        builder.site(name)
    return builder.done()


class _Builder:
    """Collects places, doors and options; owned by `model_of`."""

    def __init__(self, fleet: Fleet, known: Known, setting: Setting) -> None:
        self.fleet, self.known, self.setting = fleet, known, setting
        self.places: dict[tuple[str, str], int] = {}
        self.made: list[Place] = []
        self.doors: list[Door] = []
        self.options: list[Option] = []
        self.seen: dict[tuple[str, str], Option] = {}
        self.notes: dict[str, None] = {}
        self.links = {frozenset((link.a, link.b)): link for link in setting.links}

    def check(self) -> None:
        """Every name of the setting is that of something."""
        sites = self.fleet.sites
        named: list[tuple[str, str, Mapping[str, object]]] = [
            (f"links: {link.a} – {link.b}", one, sites)
            for link in self.setting.links
            for one in (link.a, link.b)
        ]
        named += [(f"regions.{name}.site", one.site, sites) for name, one in self.setting.regions.items()]
        named += [("entries", name, sites) for name in self.setting.entries]
        named += [("route", self.setting.route, self.fleet.routes)] if self.setting.route else []
        named += [("services", name, self.fleet.deployments) for name in self.setting.services]
        for where, name, allowed in named:
            if name not in allowed:
                raise ConfigError(
                    f"simulation.toml: {where}: found {name!r}; allowed: {', '.join(sorted(allowed)) or 'nothing'}"
                )

    def site(self, name: str) -> None:
        """The doors of one site."""
        site = self.fleet.sites[name]
        resolved = resolve(self.fleet, name).documents
        deployments = {doc.name: doc for kind, doc in resolved if isinstance(doc, DeploymentDoc)}
        for _, route in resolved:
            if not isinstance(route, RouteDoc):
                continue
            options = tuple([self._option(site, deployments[one]) for one in route.deployments])
            self.doors.append(Door(number=len(self.doors), site=site, route=route, options=options))

    def _option(self, site: SiteDoc, doc: DeploymentDoc) -> Option:
        option = self.seen.get((site.name, doc.name))
        if option is None:
            option = self.seen[site.name, doc.name] = self._way(site, doc)
            self.options.append(option)
        return option

    def _way(self, site: SiteDoc, doc: DeploymentDoc) -> Option:
        place = self._place(self._behind(doc))
        target = self.fleet.sites.get(doc.site, site)
        local = target.name == site.name
        link = None if local else self.links.get(frozenset((site.name, target.name)))
        if not local and link is None and self.links:
            self.notes[
                f"no link {site.name} – {target.name}: {target.name}'s own rtt_ms {target.rtt_ms:g} taken"
            ] = None
        rtt, rate = (0.0 if local else target.rtt_ms), None
        if link is not None:
            rtt, rate = link.rtt_ms, link.mbit_per_s
        size = self.setting.bytes_per_token
        return Option(
            number=len(self.options), place=place, deployment=doc.name, local=local, rtt_ms=rtt,
            ms_per_token=0.0 if rate is None else size * 8 / (rate * 1000),
            usd_per_token=0.0 if link is None else link.usd_per_gb * size / 1e9,
        )  # fmt: skip

    def _behind(self, doc: DeploymentDoc) -> DeploymentDoc:
        """What answers for a peer: that site's own deployment of the same model, where it has one."""
        if doc.engine != "peer" or doc.site not in self.fleet.sites:
            return doc
        for _, one in resolve(self.fleet, doc.site).documents:
            if isinstance(one, DeploymentDoc) and one.model == doc.model and one.engine != "peer":
                return one
        return doc

    def _place(self, doc: DeploymentDoc) -> int:
        key = (doc.site, doc.name)
        if key not in self.places:
            self.places[key] = len(self.made)
            self.made.append(self._made(doc))
        return self.places[key]

    def _made(self, doc: DeploymentDoc) -> Place:
        site, model = self.fleet.sites[doc.site], self.fleet.models[doc.model]
        service = self.setting.services.get(doc.name) or self._assumed(doc, site)
        local = doc.engine in LOCAL_ENGINES
        parallel = doc.parallel or (PARALLEL_LOCAL if local else 1024)
        slots = service.slots or doc.parallel or (PARALLEL_LOCAL if local else PARALLEL_REMOTE)
        capabilities = frozenset(Capability) if doc.capabilities is None else frozenset(doc.capabilities)
        joules, watts = self._power(doc, site, model)
        return Place(
            name=f"{doc.name}@{doc.site}", site=site, model=model, service=service, slots=slots, parallel=parallel,
            queue=doc.queue, context_tokens=doc.context_tokens or model.context_tokens,
            quality=doc.quality if doc.quality is not None else model.quality, capabilities=capabilities,
            usd=self._usd(doc), joules_per_token=joules, watts=watts, hours=self._hours(site.grid_zone),
        )  # fmt: skip

    def _assumed(self, doc: DeploymentDoc, site: SiteDoc) -> Service:
        self.notes[f"{doc.name}: no service figures; those assumed for tier {site.tier} are taken"] = None
        if doc.fake is not None:
            return Service(
                prefill_tokens_per_s=1e6, step_ms=max(doc.fake.token_ms, 0.01), overhead_ms=doc.fake.first_token_ms,
                source="the document's fake engine",
            )  # fmt: skip
        guess = prior(site.tier, 0.0)
        return Service(
            prefill_tokens_per_s=1e6 / guess.prompt_ms_per_1k, step_ms=guess.token_ms,
            step_ms_per_sequence=guess.token_ms / 2 if site.tier in ("device", "edge") else guess.token_ms / 64,
            decode_while_prefill=0.0 if site.tier in ("device", "edge") else 0.5, overhead_ms=guess.first_token_ms,
            slots=doc.parallel or _SLOTS_OF[site.tier], source=f"assumed for tier {site.tier}",
        )  # fmt: skip

    def _power(self, doc: DeploymentDoc, site: SiteDoc, model: ModelDoc) -> tuple[float | None, float | None]:
        """Joules an output token, or else watts a request in service; both None where nothing says."""
        local = doc.engine in ("llamacpp", "encoder")
        stated = None if doc.energy_j_per_token is None else round(doc.energy_j_per_token * UJ_PER_J)
        energy = EnergyModel(
            local=local, pue=site.pue, cpu=self.known.cpus.get(site.name), uj_per_token=stated,
            parameters_b=None if local else model.parameters_b,
        )  # fmt: skip
        threads = doc.threads or 1
        spent = energy.answer_energy(
            busy_ns=NS_PER_S, threads=threads, concurrency=1.0, output_tokens=_PROBE_TOKENS, input_tokens=0
        )
        if spent is None:
            return None, None
        if local and stated is None:
            return None, spent[0] / UJ_PER_J
        return spent[0] / UJ_PER_J / _PROBE_TOKENS, None

    def _hours(self, zone: str) -> tuple[float, ...] | None:
        stated, start = self.setting.grids.get(zone), self.setting.start_hour
        if stated is not None:
            return stated.hours[start:] + stated.hours[:start] if len(stated.hours) == 24 else stated.hours
        figure = self.known.grids.get(zone)
        if figure is None:
            self.notes[f"grid zone {zone}: no figures; carbon there is unknown"] = None
            return None
        return (figure,)

    def _usd(self, doc: DeploymentDoc) -> Price | None:
        price = None if doc.price is None else self.known.prices.get(doc.price)
        if price is None:
            self.notes[f"{doc.name}: no price; its cost is unknown"] = None
            return None
        if price.currency == "USD":
            return price
        rate = self.known.exchange.get((price.currency, "USD"))
        if rate is not None:
            return converted(price, "USD", Decimal(rate), f"{price.currency}/USD")
        back = self.known.exchange.get(("USD", price.currency))
        if back is None:
            self.notes[
                f"{doc.name}: priced in {price.currency}, and no Price document exchanges it to USD"
            ] = None
            return None
        return converted(price, "USD", 1 / Decimal(back), f"{price.currency}/USD")

    def done(self) -> FleetModel:
        if not self.doors:
            raise ConfigError(
                "no site of the fleet serves a route; expected a Route with deployments on some site"
            )
        route = self.setting.route or self.doors[0].route.name
        serving = [door.site for door in self.doors if door.route.name == route]
        serving.sort(key=lambda site: (_TIERS.index(site.tier), site.name))
        sites = self.setting.entries or tuple([site.name for site in serving[:1]])
        return FleetModel(
            places=tuple(self.made), doors=tuple(self.doors), options=tuple(self.options),
            by_name={(door.site.name, door.route.name): door.number for door in self.doors}, setting=self.setting,
            default_route=route, default_sites=sites, notes=tuple(self.notes),
        )  # fmt: skip


def grams(joules: float, grams_per_kwh: float) -> float:
    """Grams of CO2-equivalent of an energy at a grid's intensity."""
    return carbon(round(joules * UJ_PER_J), grams_per_kwh) / NG_PER_G


def usd_rates(price: Price) -> tuple[float, float, float, float]:
    """A request, an input token, a cached input token, an output token, in USD."""
    unit = 10.0 ** CURRENCY_SCALE[price.currency]
    cached = price.input if price.cached is None else price.cached
    return (
        price.request / unit,
        price.input / (1e6 * unit),
        cached / (1e6 * unit),
        price.output / (1e6 * unit),
    )
