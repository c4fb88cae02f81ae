"""The fleet as data: the documents of a site's file, and the catalogue that they resolve to.

Each class is one `kind` of document.  `config` reads and checks them; nobody else makes them up.
Durations are seconds, sizes bytes, money is decimal text, so that a file reads as people write.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from ondol.core.fields import Decimals, EngineKind, Fraction, Name, Pattern, Positive, Seconds, Step, Tier
from ondol.core.inference import Capability, DataClass, Objective, Task
from ondol.core.money import Price
from ondol.core.route_terms import CachePolicy, Capture, Flex


class Document(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What all documents share: a name that is unique within its kind."""

    name: Name


class Selector(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which sites of a fleet: all that match some name of `names` and every label; `*` stands for anything.

    Labels match a site's own labels, and `region`, `country`, `tier` and `name` as if they were labels.
    Empty means every site.
    """

    names: tuple[Pattern, ...] = ()
    labels: dict[str, Pattern] = {}


class TenantDoc(Document, frozen=True, kw_only=True, tag_field="kind", tag="Tenant"):
    """The unit of isolation; `default` exists without being written."""


class TeamDoc(Document, frozen=True, kw_only=True, tag_field="kind", tag="Team"):
    """Who shares limits and costs, in a tenant."""

    tenant: Name = "default"
    requests_per_min: Positive | None = None
    tokens_per_min: Positive | None = None


class BudgetScope(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a budget covers: exactly one of these."""

    tenant: str | None = None
    team: str | None = None
    key: str | None = None
    tag: str | None = None


class BudgetDoc(Document, frozen=True, kw_only=True, tag_field="kind", tag="Budget"):
    """An amount a period.  A hard one refuses what it cannot pay, a soft one only says so.

    In a fleet the amount is for all sites together, and each holds a lease of it.  `offline` says what a site does
    whose lease is spent while the hub is away: refuse, or answer with what runs on the site itself.
    """

    scope: BudgetScope
    amount: Decimals
    currency: str = "USD"
    period: Literal["day", "week", "month"] = "month"
    timezone: str = "UTC"
    hard: bool = True
    offline: Literal["refuse", "local"] = "refuse"
    sites: Selector = Selector()


class Power(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the hardware draws, where it cannot be measured: watts a virtual CPU, idle and busy."""

    watts_min_per_cpu: Annotated[float, msgspec.Meta(ge=0)]
    watts_max_per_cpu: Annotated[float, msgspec.Meta(ge=0)]
    source: str


class Transfer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How models come to a site: bytes a second at most, between which hours of its day, from whom first.

    `hours` reads `22:00-06:00` in the time zone of the site's Gateway document.  `disk_bytes` bounds the model
    store: what no deployment wants is evicted, oldest use first.  `places` are asked before all `sources`: folders
    (absolute paths) or https addresses of an object store, filled by `ondol models publish --to`.
    """

    bytes_per_s: Positive | None = None
    hours: Annotated[str, msgspec.Meta(pattern=r"^\d\d:\d\d-\d\d:\d\d$")] | None = None
    disk_bytes: Positive | None = None
    sources: tuple[Literal["parent", "neighbours", "hub"], ...] = ("parent", "neighbours", "hub")
    places: tuple[str, ...] = ()


class SiteDoc(Document, frozen=True, kw_only=True, tag_field="kind", tag="Site"):
    """A place.  `simulated` marks a stand-in: its label shows wherever the site shows.

    `address` is where clients and other sites reach it.  `neighbours` may take over its callers when it is away,
    where they are in the same country and `takeover` allows.
    """

    tier: Tier
    region: str
    country: Annotated[str, msgspec.Meta(pattern=r"^[A-Z]{2}$")]
    grid_zone: str
    labels: dict[str, str] = {}
    power: Power | None = None
    pue: Annotated[float, msgspec.Meta(ge=1, le=5)] = 1.0
    rtt_ms: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    simulated: str | None = None
    address: str | None = None
    parent: Name | None = None
    neighbours: tuple[Name, ...] = ()
    takeover: bool = True
    transfer: Transfer = Transfer()


class ModelDoc(Document, frozen=True, kw_only=True, tag_field="kind", tag="Model"):
    """Weights, or a vendor's name for them.  `quality` is a prior in [0, 1], with its source."""

    task: Task = Task.CHAT
    family: str = ""
    format: Literal["gguf", "onnx", "remote", "builtin"] = "remote"
    context_tokens: Positive | None = None
    file: str | None = None
    digest: Annotated[str, msgspec.Meta(pattern=r"^sha256:[0-9a-f]{64}$")] | None = None
    licence: str = ""
    parameters_b: Annotated[float, msgspec.Meta(gt=0)] | None = None
    quality: Fraction | None = None
    quality_source: str = ""
    languages: tuple[str, ...] = ()


class KeySource(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a secret is: an environment variable or a file, never the text of the configuration."""

    env: str | None = None
    file: str | None = None


class FakeAnswers(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the `fake` engine behaves."""

    text: str | None = None
    first_token_ms: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    token_ms: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    output_tokens: Positive | None = None
    fail: Literal["before", "after", "reject"] | None = None
    fail_every: Positive | None = None


class DeploymentDoc(Document, frozen=True, kw_only=True, tag_field="kind", tag="Deployment"):
    """A model on a site with an engine.

    `parallel` requests run at once and `queue` more may wait; past that the endpoint is full.
    `trusted` says that an address outside this machine and its private networks does belong to the
    site named, which is otherwise refused: the address counts, not the label.

    `site` is where the answer is computed; a file of one site must say it.  In a fleet, `sites` selects the sites
    that get this deployment, and a local engine without `site` runs on each of them.  `per_site` replaces
    fields by site name, and `${site}`, `${region}` and `${labels.NAME}` in a text stand for the site's own.
    """

    site: Name = ""
    sites: Selector | None = None
    per_site: dict[str, dict[str, str | int | float | bool]] = {}
    model: Name
    engine: EngineKind
    url: str | None = None
    upstream_model: str | None = None
    keys: tuple[KeySource, ...] = ()
    trusted: bool = False
    capabilities: tuple[Capability, ...] | None = None
    parallel: Positive | None = None
    queue: Annotated[int, msgspec.Meta(ge=0)] = 256
    threads: Positive | None = None
    context_tokens: Positive | None = None
    price: Name | None = None
    quality: Fraction | None = None
    connect_timeout_s: Seconds = 5.0
    read_timeout_s: Seconds = 60.0
    energy_j_per_token: Annotated[float, msgspec.Meta(ge=0)] | None = None
    energy_source: str = ""
    fake: FakeAnswers | None = None


class RouteDoc(Document, frozen=True, kw_only=True, tag_field="kind", tag="Route"):
    """What clients send as `model`."""

    deployments: Annotated[tuple[Name, ...], msgspec.Meta(min_length=1)]
    objective: Objective = Objective.FAST
    cache: CachePolicy | None = None
    max_output_tokens: Positive = 1024
    timeout_s: Seconds = 120.0
    data_class: DataClass | None = None
    teams: tuple[str, ...] = ()
    capture: Capture | None = None
    flex: Flex = Flex()
    sites: Selector = Selector()


class PriceDoc(Document, frozen=True, kw_only=True, tag_field="kind", tag="Price"):
    """Rates a million tokens, by hand with source and date, or from the genai-prices package.

    `book: openai/gpt-4o-mini` takes provider and model from the package; then no rate may be given.
    `exchange_from` makes the document an exchange rate: one unit of it costs `rate` of `currency`.
    """

    currency: str = "USD"
    input_per_mtok: Decimals | None = None
    output_per_mtok: Decimals | None = None
    cached_per_mtok: Decimals | None = None
    reasoning_per_mtok: Decimals | None = None
    per_request: Decimals | None = None
    book: str | None = None
    exchange_from: str | None = None
    rate: Decimals | None = None
    source: str = ""
    date: str = ""


class Judge(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a rollout compares the new generation with the old one, both seen at the same time.

    `min_requests` on each side before there is a verdict; after `max_wait_s` without one it is inconclusive.
    `alpha` is the significance, `min_effect` the least probability of being worse (0.5 is no difference) that matters.
    """

    min_requests: Positive = 50
    max_wait_s: Seconds = 3600.0
    alpha: Annotated[float, msgspec.Meta(gt=0, lt=0.5)] = 0.01
    min_effect: Annotated[float, msgspec.Meta(gt=0.5, lt=1)] = 0.6
    error_rate_rise: Fraction = 0.02
    inconclusive: Literal["continue", "hold", "abort"] = "hold"


class RolloutDoc(Document, frozen=True, kw_only=True, tag_field="kind", tag="Rollout"):
    """How a generation comes to the sites: step by step, each watched for `bake_s` before the next.

    A step is a number of sites (`1`), or a share of them (`10%`); the last is all of them.  Without such a
    document every site gets a generation at once.
    """

    steps: Annotated[tuple[Step, ...], msgspec.Meta(min_length=1)] = ("1", "10%", "100%")
    bake_s: Seconds = 600.0
    judge: Judge = Judge()
    sites: Selector = Selector()


class HubAddress(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to reach the hub, where that is not as the token said: its address, or an HTTP proxy (CONNECT)."""

    url: str | None = None
    proxy: str | None = None


class Tls(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Certificate chain and key, as PEM files."""

    cert: str
    key: str


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Bounds on what enters and what is kept.

    `ledger_keep_days`: how long rows stay after the hub has them; longer than the time between its backups.
    """

    body_bytes: Positive = 20 * 1024 * 1024
    header_bytes: Positive = 32 * 1024
    header_count: Positive = 100
    json_depth: Positive = 64
    messages: Positive = 4096
    content_parts: Positive = 256
    embedding_inputs: Positive = 2048
    connections: Positive = 8192
    requests_per_address: Positive = 4096
    body_bytes_per_s: Positive = 1024
    body_grace_s: Seconds = 10.0
    cache_bytes: Annotated[int, msgspec.Meta(ge=0)] = 256 * 1024 * 1024
    semantic_bytes: Annotated[int, msgspec.Meta(ge=0)] = 64 * 1024 * 1024
    idempotency_bytes: Annotated[int, msgspec.Meta(ge=0)] = 64 * 1024 * 1024
    ledger_bytes: Positive = 16 * 1024**3
    ledger_keep_days: Positive = 14


class Cors(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which browser origins may call."""

    origins: tuple[str, ...] = ()
    max_age_s: Annotated[int, msgspec.Meta(ge=0)] = 600


class GatewayDoc(Document, frozen=True, kw_only=True, tag_field="kind", tag="Gateway"):
    """What is this machine's own business, and stays in the local file when a site joins a fleet."""

    site: Name | None = None
    listen: str = "127.0.0.1:8080"
    hosts: tuple[str, ...] = ()
    data: str = "."
    models: str = "models"
    tls: Tls | None = None
    insecure: bool = False
    limits: Limits = Limits()
    cors: Cors = Cors()
    timezone: str = "UTC"
    currency: str = "USD"
    log_requests: bool = False
    drain_s: Seconds = 8.0
    hub: HubAddress = HubAddress()


AnyDocument = (
    TenantDoc
    | TeamDoc
    | BudgetDoc
    | SiteDoc
    | ModelDoc
    | DeploymentDoc
    | RouteDoc
    | PriceDoc
    | RolloutDoc
    | GatewayDoc
)


class Grid(msgspec.Struct, frozen=True, kw_only=True):
    """Carbon intensity of a grid zone: grams of CO2-equivalent a kWh, with source and year."""

    zone: str
    grams_per_kwh: float
    year: int
    source: str


class Catalog(msgspec.Struct, frozen=True, kw_only=True):
    """One consistent, checked set of documents: every reference resolves.

    `prices` are those of the Price documents, by name.  `exchange` maps (from, to) to decimal text.
    `grids` holds every zone that a site of the catalogue names; a zone without figures is missing.
    `digest` is the SHA-256 of the file that it was read from, in hex.
    """

    site: SiteDoc
    gateway: GatewayDoc
    tenants: dict[str, TenantDoc]
    teams: dict[str, TeamDoc]
    budgets: dict[str, BudgetDoc]
    sites: dict[str, SiteDoc]
    models: dict[str, ModelDoc]
    deployments: dict[str, DeploymentDoc]
    routes: dict[str, RouteDoc]
    prices: dict[str, Price]
    exchange: dict[tuple[str, str], str]
    grids: dict[str, Grid]
    digest: str = ""
