"""Two hubs as processes on one PostgreSQL server: sites join both, each dies by SIGKILL, and nothing is lost."""

from __future__ import annotations

import contextlib
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tests.hubs import FLEET, HUB, Hub, fleet_of, join, running_hub, start_site, until, write_site
from tests.postgres import Server, running_server
from tests.sites import Site, free_port

from ondol.adapters.site_identity import read_membership

SHARED = ("hub.key", "pepper.key", "ca.key", "ca.pem", "admin.key")
"""What docs/guide/hub.md says to copy."""
PAUSE_S = 0.03
BUDGET = """
---
kind: Budget
name: all-shops
scope: {tenant: default}
amount: "AMOUNT"
currency: USD
period: month
timezone: Asia/Seoul
"""
ROLLOUT = """
---
kind: Rollout
name: careful
steps: ["1", "100%"]
bake_s: 4
judge: {min_requests: 10, max_wait_s: 30, inconclusive: continue}
"""
NEWER = FLEET.replace("engine: fake", "engine: fake\nfake: {output_tokens: 3}")


class Seen(NamedTuple):
    """What clients saw: how many answers, also refusals; their tokens; their cost in nano-units."""

    requests: int
    tokens: int
    nano: int


class Callers:
    """Two clients a site, who ask all the while; what they saw, exactly."""

    def __init__(self, sites: list[Site]) -> None:
        self.statuses: list[int] = []
        self._tokens: list[int] = []
        self._nano: list[int] = []
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(site,)) for site in sites * 2]

    def _ask(self, site: Site) -> None:
        number = 0
        while not self._over.wait(PAUSE_S):
            number += 1
            answer = site.chat(f"question {'and more ' * (number % 7)}", max_completion_tokens=64)
            self.statuses.append(answer.status)
            if answer.status == 200:
                self._tokens.append(answer.json()["usage"]["total_tokens"])
                self._nano.append(nano(answer.headers["x-ondol-cost"].partition(" ")[0]))

    def more(self, count: int = 30) -> None:
        """Wait for some more answers from now on."""
        until_now = len(self.statuses)
        until(lambda: len(self.statuses) >= until_now + count, f"{count} more answers")

    @property
    def seen(self) -> Seen:
        return Seen(len(self.statuses), sum(self._tokens), sum(self._nano))

    def __enter__(self) -> Callers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()


def nano(amount: str) -> int:
    whole = Decimal(amount).scaleb(9)
    assert whole == int(whole)
    return int(whole)


def counted(hub: Hub) -> Seen:
    """What a hub has, of all sites."""
    found = hub.client.get("usage")
    rows = found["rows"]
    records = sum(one["records"] for one in found["received"])
    assert records == sum(one["requests"] for one in rows)
    tokens = sum(one["input_tokens"] + one["output_tokens"] for one in rows)
    return Seen(records, tokens, sum(nano(one["cost"]) for one in rows))


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running_server() as running:
        yield running


_DATABASES = iter(range(1, 100))


@pytest.fixture
def dsn(server: Server) -> str:
    """A fresh database of the server."""
    psycopg = pytest.importorskip("psycopg", reason="needs the driver: pip install 'ondol[postgres]'")
    name = f"fleet{next(_DATABASES)}"
    with psycopg.connect(server.dsn, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return f"postgresql://ondol@/{name}?host={server.folder}&port=5432"


class Line:
    """What lies between one replica and the server: a socket of its own, which can be cut and mended."""

    def __init__(self, server: Server) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ondol-line-"))  # a socket's path is at most 107 bytes
        self._to = str(server.folder / ".s.PGSQL.5432")
        self._is_cut = False
        self._open: list[socket.socket] = []
        self._pumps: list[threading.Thread] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.folder / ".s.PGSQL.5432"))
        self._listener.listen()
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                if self._is_cut:
                    near.close()
                    continue
                far = socket.socket(socket.AF_UNIX)
                far.connect(self._to)
                self._open += [near, far]
                for one, other in ((near, far), (far, near)):
                    self._pumps.append(threading.Thread(target=_pump, args=(one, other), daemon=True))
                    self._pumps[-1].start()

    def cut(self) -> None:
        self._is_cut = True
        for one in self._open:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        self._is_cut = False

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._accepting.join()
        self.cut()
        for pump in self._pumps:
            pump.join()
        for one in (self._listener, *self._open):
            one.close()
        shutil.rmtree(self.folder)


@contextlib.contextmanager
def line_to(server: Server) -> Iterator[Line]:
    line = Line(server)
    try:
        yield line
    finally:
        line.close()


def _pump(near: socket.socket, far: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := near.recv(65536):
            far.sendall(data)
    for one in (near, far):
        with contextlib.suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def two_replicas(folder: Path, dsn: str, dsn_of_second: str = "") -> Iterator[tuple[Hub, Hub]]:
    """Set up as the guide says: start one, copy its keys, start the other.  Each names itself first."""
    ports = free_port(), free_port()
    urls = [f"https://127.0.0.1:{port}" for port in ports]
    more = "urls: [{}]\ndatabase: {}\nmodels: ../models"
    with running_hub(folder / "a", port=ports[0], more=more.format(", ".join(urls), dsn)) as first:
        (folder / "b" / "data").mkdir(parents=True)
        for name in SHARED:
            shutil.copy(folder / "a" / "data" / name, folder / "b" / "data" / name)
        second_more = more.format(", ".join(reversed(urls)), dsn_of_second or dsn)
        with running_hub(folder / "b", port=ports[1], more=second_more) as second:
            yield first, second


@contextlib.contextmanager
def shop(folder: Path, name: str, invited_by: Hub) -> Iterator[Site]:
    """A site that knows both replicas, and asks the one that invited it first."""
    port = write_site(folder / name, name)
    join(folder / name, invited_by.invite(name))
    urls = read_membership(folder / name / "data").hub_urls
    assert len(urls) == 2 and urls[0] == invited_by.url
    site = start_site(folder / name, port)
    try:
        yield site
    finally:
        if site.process.poll() is None:
            site.stop()


@contextlib.contextmanager
def two_shops(folder: Path, first: Hub, second: Hub) -> Iterator[list[Site]]:
    """One watches at the first replica, the other at the second."""
    with shop(folder, "shop-1", first) as one, shop(folder, "shop-2", second) as two:
        until(lambda: watches(first) == 1 and watches(second) == 1, "one watch at each replica")
        yield [one, two]


def watches(hub: Hub) -> int:
    found: int = hub.client.get("status")["watches"]
    return found


def all_run(sites: list[Site], generation: int) -> Callable[[], bool]:
    return lambda: all(fleet_of(site)["generation"] == generation for site in sites)


def within_budget(hub: Hub) -> dict[str, Any]:
    """The one budget, which must hold at any time."""
    (found,) = hub.client.get("budgets")["data"]
    shares = [nano(one["granted"]) for one in found["sites"]]
    assert sum(shares) == nano(found["granted"]) <= nano(found["amount"])
    assert nano(found["spent"]) <= nano(found["granted"])
    assert not found["over"]
    budget: dict[str, Any] = found
    return budget


def settle(sites: list[Site], hub: Hub, spent: int) -> None:
    """Sites that stop give back what they did not spend: then the leases say what clients saw, too."""
    for site in sites:
        site.stop()
    found = within_budget(hub)
    assert nano(found["granted"]) == nano(found["spent"]) == spent


@pytest.mark.timeout(240)
def test_each_replica_dies_in_its_turn_and_nothing_is_lost(tmp_path: Path, dsn: str) -> None:
    fleet = FLEET + BUDGET.replace("AMOUNT", "100")
    with two_replicas(tmp_path, dsn) as (first, second), two_shops(tmp_path, first, second) as sites:
        assert first.apply(tmp_path / "fleet", fleet)["generation"] == 1
        until(all_run(sites, 1), "the site that watches at the other replica hears of it too", limit_s=10)
        with Callers(sites) as callers:
            callers.more()
            assert second.apply(tmp_path / "fleet", fleet.replace("2.00", "3.00"))["generation"] == 2
            until(all_run(sites, 2), "and the other way round", limit_s=10)
            callers.more()
            first.kill()
            until(lambda: watches(second) == 2, "the first's site goes on through the second")
            before = counted(second)
            callers.more()
            until(lambda: counted(second).requests > before.requests + 20, "records flow through the second")
            within_budget(second)
            assert second.apply(tmp_path / "fleet", fleet.replace("2.00", "4.00"))["generation"] == 3
            until(all_run(sites, 3), "the one that is left steers both", limit_s=10)
            second.kill()
            callers.more(60)
            until(lambda: {fleet_of(site)["state"] for site in sites} == {"away"}, "no hub is there")
            first.restart()
            until(lambda: watches(first) == 2, "both go on through the first, which is back")
            callers.more()
            within_budget(first)
        second.restart()
        assert set(callers.statuses) == {200}, "no client saw anything of it"
        until(lambda: counted(first).requests >= callers.seen.requests, "all records are there")
        assert counted(first) == callers.seen
        assert counted(second) == callers.seen
        settle(sites, second, callers.seen.nano)


@pytest.mark.timeout(240)
def test_a_budget_is_spent_to_the_end_over_two_replicas_and_never_passed(tmp_path: Path, dsn: str) -> None:
    """Each site asks another replica for its part; one replica dies while both ask for the rest."""
    fleet = FLEET + BUDGET.replace("AMOUNT", "0.02")
    with two_replicas(tmp_path, dsn) as (first, second), two_shops(tmp_path, first, second) as sites:
        first.apply(tmp_path / "fleet", fleet)
        until(all_run(sites, 1), "both know the budget")
        with Callers(sites) as callers:
            until(lambda: callers.seen.nano > nano("0.004"), "a fifth is spent")
            within_budget(first)
            first.kill()
            until(lambda: watches(second) == 2, "both ask the second")
            until(lambda: callers.statuses[-40:].count(402) == 40, "nothing is left", limit_s=120)
        assert set(callers.statuses) == {200, 402}
        until(lambda: counted(second).requests >= callers.seen.requests, "all records are there")
        seen = callers.seen
        assert counted(second) == seen
        assert nano("0.015") < seen.nano <= nano("0.02")
        settle(sites, second, seen.nano)


@pytest.mark.timeout(240)
def test_a_rollout_goes_on_at_the_replica_that_is_left(tmp_path: Path, dsn: str) -> None:
    """Both replicas judge; each step is taken once, also where the one that began it is gone."""
    with two_replicas(tmp_path, dsn) as (first, second), two_shops(tmp_path, first, second) as sites:
        first.apply(tmp_path / "fleet", FLEET + ROLLOUT)
        until(all_run(sites, 1), "both run generation 1")

        def rollout() -> dict[str, Any]:
            found: dict[str, Any] = second.client.get("rollouts")["data"][0]
            return found

        with Callers(sites) as callers:
            callers.more()
            assert first.apply(tmp_path / "fleet", NEWER + ROLLOUT)["rollout"] == 2
            first.kill()
            until(lambda: rollout()["state"] == "done", "it is done without the first", limit_s=120)
            until(all_run(sites, 2), "both run generation 2")
        found = rollout()
        said = [event["what"] for event in found["events"]]
        assert found["id"] == 2
        assert [sum(one.startswith(f"step {n} begins") for one in said) for n in ("1/2", "2/2")] == [1, 1], (
            said
        )
        assert sum(one.startswith("done") for one in said) == 1, said
        assert set(callers.statuses) == {200}


@pytest.mark.timeout(240)
def test_a_replica_that_is_cut_off_its_database_loses_its_sites_to_the_other(
    tmp_path: Path, server: Server, dsn: str
) -> None:
    """Its process lives and its watches go on, so it must say itself that it cannot be relied on."""
    with (
        line_to(server) as line,
        two_replicas(tmp_path, dsn, dsn.replace(str(server.folder), str(line.folder))) as (first, second),
        two_shops(tmp_path, first, second) as sites,
    ):
        with Callers(sites) as callers:
            line.cut()
            until(lambda: watches(first) == 2, "both watch at the other", limit_s=60)
            assert first.apply(tmp_path / "fleet", FLEET)["generation"] == 1
            until(all_run(sites, 1), "the other steers both sites", limit_s=10)
            until(lambda: callers.statuses[-30:].count(200) == 30, "both answer")
            line.mend()
            second.wait()
            assert second.apply(tmp_path / "fleet", NEWER)["generation"] == 2
            until(all_run(sites, 2), "what is back steers, too", limit_s=10)
            callers.more()
        assert set(callers.statuses) == {200, 404}, "404 is from before the first generation"
        until(lambda: counted(second).nano == callers.seen.nano, "all records are there")
        assert counted(second) == counted(first)
        assert counted(second).tokens == callers.seen.tokens


def test_a_replica_with_keys_of_its_own_does_not_start(tmp_path: Path, dsn: str) -> None:
    with running_hub(tmp_path / "a", more=f"database: {dsn}") as first:
        first.invite("shop-1")
        other = tmp_path / "b"
        other.mkdir()
        (other / "hub.yaml").write_text(
            HUB.replace("{port}", str(free_port())).replace("{more}", f"database: {dsn}")
        )
        stranger = Hub(other, 1)
        try:
            assert stranger.process.wait(30) == 1
        finally:
            stranger.stop()
        assert "belongs to another hub: ca.pem is" in stranger.log
        assert "Traceback" not in stranger.log
        assert first.site("shop-1")["state"] == "never"
