"""Ondol as a contender, with the whole pipeline on.

An API key, limits on the key and on the team, a hard budget, a priced deployment beside an idle dearer one,
a durable ledger on the disk of the repository, metrics; a second route caches, a third one streams.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import msgspec

from benchmarks.contenders import HEALTH, ROOT, Contender, Upstreams, ready
from benchmarks.processes import Process, StartFailed, free_port
from benchmarks.target import Target

ROUTE, CACHED_ROUTE, STREAM_ROUTE = "bench", "bench-cached", "bench-stream"
TEAM = "load"
LIMIT_PER_MIN = 1_000_000_000
"""High enough never to refuse: what is measured is that the limit is kept count of."""

SITE_FILE = """\
kind: Gateway
name: local
site: bench-site
listen: 127.0.0.1:{port}
data: data
---
kind: Site
name: bench-site
tier: edge
region: kr-seoul
country: KR
grid_zone: KR
---
kind: Team
name: {team}
requests_per_min: {limit}
tokens_per_min: {limit}
---
kind: Budget
name: load-month
scope: {{team: {team}}}
amount: "1000000000"
currency: USD
period: month
hard: true
---
kind: Model
name: bench-model
task: chat
context_tokens: 131072
quality: 0.5
quality_source: none, the upstream gives one answer
---
kind: Price
name: bench-price
currency: USD
input_per_mtok: "0.15"
output_per_mtok: "0.60"
source: made up for the benchmark
date: "2026-11-01"
---
kind: Price
name: dear-price
currency: USD
input_per_mtok: "15.00"
output_per_mtok: "60.00"
source: made up for the benchmark
date: "2026-11-01"
---
kind: Deployment
name: bench-instant
site: bench-site
model: bench-model
engine: upstream
url: http://127.0.0.1:{instant}/v1
price: bench-price
parallel: 4096
---
kind: Deployment
name: bench-idle
site: bench-site
model: bench-model
engine: upstream
url: http://127.0.0.1:{idle}/v1
price: dear-price
parallel: 4096
---
kind: Deployment
name: bench-paced
site: bench-site
model: bench-model
engine: upstream
url: http://127.0.0.1:{paced}/v1
price: bench-price
parallel: 4096
---
kind: Route
name: {route}
deployments: [bench-instant, bench-idle]
objective: cheap
max_output_tokens: 256
---
kind: Route
name: {cached_route}
deployments: [bench-instant, bench-idle]
objective: cheap
max_output_tokens: 256
cache: {{ttl_s: 3600}}
---
kind: Route
name: {stream_route}
deployments: [bench-paced]
objective: cheap
max_output_tokens: 256
"""


def start_ondol(directory: Path, upstreams: Upstreams) -> Contender:
    """One gateway process, from `ondol run site`.

    Raises:
        StartFailed: it did not start, or does not answer.
    """
    command = [*program(), "run", "site", "--config"]
    return _start(directory / "ondol", upstreams, command)


def start_instrumented(directory: Path, upstreams: Upstreams, out: Path) -> Contender:
    """The same with stopwatches around its stages, which writes their sums to `out` when it ends.

    Raises:
        StartFailed: it did not start, or does not answer.
    """
    command = [sys.executable, "-m", "benchmarks.stages", "--out", str(out), "--config"]
    return _start(directory / "instrumented", upstreams, command)


def _start(home: Path, upstreams: Upstreams, command: list[str]) -> Contender:
    (home / "data").mkdir(parents=True)
    port = free_port()
    config = home / "site.yaml"
    config.write_text(
        SITE_FILE.format(
            port=port,
            team=TEAM,
            limit=LIMIT_PER_MIN,
            instant=upstreams.instant,
            idle=upstreams.idle,
            paced=upstreams.paced,
            route=ROUTE,
            cached_route=CACHED_ROUTE,
            stream_route=STREAM_ROUTE,
        )
    )
    headers = (("authorization", f"Bearer {issue_key(home / 'data')}"),)
    process = Process([*command, str(config)], log=home / "site.log", cwd=ROOT)
    chat = Target(port=port, model=ROUTE, headers=headers)
    return ready(
        Contender(
            name="ondol",
            process=process,
            chat=chat,
            cached=msgspec.structs.replace(chat, model=CACHED_ROUTE),
            stream=msgspec.structs.replace(chat, model=STREAM_ROUTE),
            health=msgspec.structs.replace(HEALTH, port=port),
        ),
        timeout_s=30.0,
    )


def program() -> list[str]:
    """The command of the environment that this runs in."""
    script = Path(sys.executable).with_name("ondol")
    return [str(script)] if script.exists() else [sys.executable, "-m", "ondol"]


def issue_key(data: Path) -> str:
    """A key with limits of its own, put into the site's key store before the gateway opens it."""
    try:
        from ondol.adapters.keystore import KeyRequest, SqliteKeyStore
    except ImportError as error:
        raise StartFailed(f"the gateway cannot be imported: {error}") from error
    store = SqliteKeyStore(data / "keys.db")
    try:
        wanted = KeyRequest(
            team=TEAM, name="benchmark", requests_per_min=LIMIT_PER_MIN, tokens_per_min=LIMIT_PER_MIN
        )
        _, text = store.issue(wanted, time.time_ns())
    finally:
        store.close()
    return text
