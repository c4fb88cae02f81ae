"""A real hub and real sites in network namespaces, while lines, machines and disks break under load.

What must hold whatever breaks: a site answers, and after healing the hub has exactly what clients saw.  Times are
printed (`pytest -s`) and only bounded generously.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

import pytest
from tests.hubs import FLEET, Hub, PlacedSite, fleet_of, join, running_hub, start_site, until, write_site
from tests.netns import Net, Node, NoNetwork, has_rate_limits, network, run

from ondol.adapters.ledger_reader import records, verify

PORT = 8080
HUB_PORT = 8443
NANO = Decimal("1e-9")
REFUSALS = {"ledger_unavailable", "ledger_full"}


class Sums(NamedTuple):
    """What was used, exactly."""

    records: int
    tokens: int
    cost: Decimal


class Seen(NamedTuple):
    """What a client got."""

    status: int
    code: str
    request_id: str
    tokens: int
    cost: Decimal


class Fleet:
    """A hub and sites, each in a namespace of its own."""

    def __init__(self, net: Net, hub: Hub, folder: Path) -> None:
        self.net = net
        self.hub = hub
        self.folder = folder
        self.sites: dict[str, PlacedSite] = {}

    def add(self, name: str) -> PlacedSite:
        folder, place = self.folder / name, self.net[name]
        write_site(folder, name, port=PORT, place=place)
        join(folder, self.hub.invite(name), place=place)
        return self.start(name)

    def start(self, name: str) -> PlacedSite:
        site = start_site(self.folder / name, PORT, place=self.net[name])
        assert isinstance(site, PlacedSite)
        self.sites[name] = site
        return site

    def restart(self, name: str) -> PlacedSite:
        """A power cut of a site, and its next start."""
        self.sites[name].process.kill()
        self.sites[name].process.wait()
        return self.start(name)

    def booked(self, name: str) -> Sums:
        """What the hub has of a site."""
        found = self.hub.client.get("usage")
        rows = [one for one in found["rows"] if one["key"] == name]
        return Sums(
            sum(one["records"] for one in found["received"] if one["site"] == name),
            sum(one["input_tokens"] + one["output_tokens"] for one in rows),
            sum((Decimal(one["cost"]) for one in rows), Decimal(0)),
        )

    def arrives(self, name: str, expected: Sums, *, limit_s: float = 60.0) -> float:
        """Wait for the last record; then all of it must be what was expected.  The seconds that it took."""
        began = time.monotonic()
        until(
            lambda: self.booked(name).records >= expected.records,
            f"the hub has {expected.records} records of {name}",
            limit_s=limit_s,
        )
        took_s = time.monotonic() - began
        assert self.booked(name) == expected
        return took_s


@contextlib.contextmanager
def fleet(folder: Path, *names: str) -> Iterator[Fleet]:
    """Sites that run generation 1; all of it is gone at the end, also when the test fails."""
    try:
        net = Net("hub", *names)
    except NoNetwork as error:
        pytest.skip(str(error))
    with net, running_hub(folder / "hub", port=HUB_PORT, place=net["hub"]) as hub:
        made = Fleet(net, hub, folder)
        hub.apply(folder / "fleet", FLEET)
        for name in names:
            made.add(name)
        for name in names:
            until(lambda name=name: _runs(made.sites[name]), f"{name} runs generation 1")  # type: ignore[misc]
        yield made
        for site in made.sites.values():
            assert site.stop() == 0, site.log
            assert "Traceback" not in site.log, site.log
        assert "Traceback" not in hub.log, hub.log


def _runs(site: PlacedSite) -> bool:
    status = fleet_of(site)
    return bool(status["generation"] == 1 and status["state"] == "joined")


class Load:
    """Clients beside a site, each with one kept connection; they go on until the block ends.

    `seen` has every answer, `broken` every connection that broke, as a killed site's do.
    """

    def __init__(
        self, site: PlacedSite, *, clients: int = 2, pause_s: float = 0.02, most: int = 1 << 40
    ) -> None:
        self.seen: list[Seen] = []
        self.broken: list[str] = []
        self.answered_at = time.monotonic()
        """When the last request was answered with 200."""
        self._node, self._port, self._key = site.place, site.port, site.admin_key
        self._pause_s = pause_s
        self._left = most
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._client, args=(n,)) for n in range(clients)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self.join()

    def join(self) -> None:
        """Wait until every client is done."""
        for thread in self._threads:
            thread.join()

    def _may_ask(self) -> bool:
        with self._lock:
            self._left -= 1
            return self._left >= 0 and not self._stop.is_set()

    def _client(self, number: int) -> None:
        with self._node.inside():
            connection = http.client.HTTPConnection(self._node.address, self._port, timeout=30)
            with contextlib.closing(connection):
                asked = 0
                while self._may_ask():
                    asked += 1
                    try:
                        self.seen.append(
                            self._ask(connection, f"client {number} asks for the {asked}th time")
                        )
                    except (OSError, http.client.HTTPException) as error:
                        self.broken.append(f"{type(error).__name__}: {error}")
                        connection.close()
                        self._stop.wait(0.1)
                    self._stop.wait(self._pause_s)

    def _ask(self, connection: http.client.HTTPConnection, text: str) -> Seen:
        body = json.dumps({"model": "assistant", "messages": [{"role": "user", "content": text}]})
        headers = {"authorization": f"Bearer {self._key}", "content-type": "application/json"}
        connection.request("POST", "/v1/chat/completions", body=body, headers=headers)
        reply = connection.getresponse()
        found = json.loads(reply.read())
        if reply.status != 200:
            return Seen(reply.status, found["error"]["code"], "", 0, Decimal(0))
        amount, _, currency = reply.headers["x-ondol-cost"].partition(" ")
        assert currency == "USD"
        tokens = found["usage"]["total_tokens"]
        self.answered_at = time.monotonic()
        return Seen(200, "", reply.headers["x-ondol-request-id"], tokens, Decimal(amount))


def _all_answered(*loads: Load) -> Sums:
    """The sums of loads in which every request was answered."""
    assert not [one for load in loads for one in load.broken]
    seen = [one for load in loads for one in load.seen]
    assert seen
    assert {(one.status, one.code) for one in seen} == {(200, "")}
    return _sums(seen)


def _sums(seen: Sequence[Seen]) -> Sums:
    return Sums(len(seen), sum(one.tokens for one in seen), sum((one.cost for one in seen), Decimal(0)))


def _kept(site: PlacedSite) -> tuple[Sums, set[str]]:
    """The site's ledger: its sums, and the ids of its requests."""
    found = list(records(site.folder / "data" / "ledger.db"))
    ids = {one.request_id for one in found}
    assert len(ids) == len(found)
    tokens = sum(one.usage.input_tokens + one.usage.output_tokens for one in found)
    return Sums(len(found), tokens, sum(one.cost for one in found) * NANO), ids


def _takes(holds: Callable[[], bool], what: str, *, limit_s: float = 60.0) -> float:
    """Seconds until it holds."""
    began = time.monotonic()
    until(holds, what, limit_s=limit_s)
    return time.monotonic() - began


def _away(site: PlacedSite) -> bool:
    return bool(fleet_of(site)["state"] == "away")


def _all_notice(*sites: PlacedSite) -> list[float]:
    """Seconds until each of them is away, from now on."""
    began = time.monotonic()
    found: dict[int, float] = {}

    def looked() -> bool:
        for number, site in enumerate(sites):
            if number not in found and _away(site):
                found[number] = time.monotonic() - began
        return len(found) == len(sites)

    until(looked, "every site notices that its line is dead")
    return [found[number] for number in range(len(sites))]


def _says(**figures: float) -> None:
    print("; ".join(f"{name.replace('_', ' ')}: {value:.2f}" for name, value in figures.items()))


LONG = (pytest.mark.long, pytest.mark.timeout(900))


# ---- the lines


@pytest.mark.parametrize("downs_s", [(1.0, 3.0), pytest.param((1.0, 20.0, 5.0, 40.0, 0.3, 60.0), marks=LONG)])
def test_a_line_that_goes_down_and_comes_back_costs_no_answer_and_no_record(
    tmp_path: Path, downs_s: tuple[float, ...]
) -> None:
    with fleet(tmp_path, "shop-1") as made:
        shop = made.sites["shop-1"]
        with Load(shop) as load:
            for down_s in downs_s:
                made.net.link("shop-1", up=False)
                answered = len(load.seen) + 10
                until(lambda of=answered: len(load.seen) >= of, "it answers meanwhile")  # type: ignore[misc]
                time.sleep(down_s)
                assert made.booked("shop-1").records < answered
                made.net.link("shop-1", up=True)
                time.sleep(1.0)
        made.arrives("shop-1", _all_answered(load))


@pytest.mark.parametrize(("clients", "rounds"), [(2, 1), (0, 1), pytest.param(2, 8, marks=LONG)])
def test_a_line_of_which_one_direction_is_dead_counts_as_dead(
    tmp_path: Path, clients: int, rounds: int
) -> None:
    with fleet(tmp_path, "shop-1", "shop-2") as made:
        one, two = made.sites["shop-1"], made.sites["shop-2"]
        with Load(one, clients=1, most=10) as before:
            before.join()
        made.arrives("shop-1", _all_answered(before))  # nothing is on its way when the cut begins
        with Load(one, clients=clients) as of_one, Load(two, clients=clients) as of_two:
            for _ in range(rounds):
                made.net.cut("shop-1", "hub")  # it hears the hub, and is not heard
                made.net.cut("hub", "shop-2")  # it is heard, and does not hear
                unheard_s, deaf_s = _all_notice(one, two)
                made.net.heal()
                back_s = _takes(lambda: _runs(one) and _runs(two), "both are back")
                _says(clients=clients, unheard_noticed_s=unheard_s, deaf_noticed_s=deaf_s, back_s=back_s)
        with Load(two, clients=1, most=10) as after:
            after.join()
        made.arrives("shop-1", _all_answered(before, of_one))
        made.arrives("shop-2", _all_answered(of_two, after))


@pytest.mark.parametrize("watched_s", [0.0, pytest.param(150.0, marks=LONG)])
def test_a_silent_line_is_noticed_at_both_ends(tmp_path: Path, watched_s: float) -> None:
    with fleet(tmp_path, "shop-1", "shop-2") as made:
        busy, idle, hub = made.sites["shop-1"], made.sites["shop-2"], made.hub

        def states() -> set[str]:
            return {hub.site("shop-1")["state"], hub.site("shop-2")["state"]}

        until(lambda: states() == {"current"}, "the hub sees that they are current")
        with Load(busy, clients=1, pause_s=0.1) as load:
            made.net.silence("shop-1", "hub")
            made.net.silence("shop-2", "hub")
            began = time.monotonic()
            busy_s, idle_s = _all_notice(busy, idle)
            until(lambda: states() == {"stale"}, "the hub shows them as stale", limit_s=60)
            stale_s = time.monotonic() - began
            while time.monotonic() - began < watched_s:
                assert states() == {"stale"}
                time.sleep(1.0)
            assert states() == {"stale"}
            assert hub.site("shop-1")["heard_s"] > 25
            made.net.heal()
            back_s = _takes(lambda: states() == {"current"}, "the hub sees them again")
        _says(busy_noticed_s=busy_s, idle_noticed_s=idle_s, hub_says_stale_s=stale_s, back_s=back_s)
        made.arrives("shop-1", _all_answered(load))


@pytest.mark.parametrize("backlog", [2000, pytest.param(20_000, marks=LONG)])
def test_a_backlog_drains_over_a_thin_line_and_is_exact(tmp_path: Path, backlog: int) -> None:
    with fleet(tmp_path, "shop-1") as made:
        shop = made.sites["shop-1"]
        made.net.link("shop-1", up=False)
        with Load(shop, clients=4, pause_s=0.0, most=backlog) as load:
            load.join()
        expected = _all_answered(load)
        assert expected.records == backlog
        assert made.booked("shop-1").records < backlog
        if has_rate_limits():
            made.net.limit("shop-1", 4_000)
        made.net.heal()
        took_s = made.arrives("shop-1", expected, limit_s=60 + backlog / 100)
        _says(records=backlog, drained_s=took_s)
        assert verify(shop.folder / "data" / "ledger.db").ok


# ---- the machines


@pytest.mark.parametrize("kills", [4, pytest.param(30, marks=LONG)])
def test_kills_at_random_lose_nothing_that_was_answered(tmp_path: Path, kills: int) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    victims = ["site", "hub"] + [rng.choice(["site", "hub"]) for _ in range(kills - 2)]
    rng.shuffle(victims)
    with fleet(tmp_path, "shop-1") as made:
        with Load(made.sites["shop-1"], clients=3, pause_s=0.005) as load:
            for victim in victims:
                time.sleep(rng.uniform(0.1, 1.0))
                if victim == "site":
                    made.restart("shop-1")
                else:
                    made.hub.kill()
                    time.sleep(rng.uniform(0.0, 0.5))
                    made.hub.restart()
        shop = made.sites["shop-1"]
        answered = [one for one in load.seen if one.status == 200]
        assert answered
        assert load.broken  # a killed site breaks connections: the load was there
        kept, ids = _kept(shop)
        assert {one.request_id for one in answered} <= ids
        made.arrives("shop-1", kept)
        assert kept.cost >= _sums(answered).cost
        assert verify(shop.folder / "data" / "ledger.db").ok
        _says(answered=len(answered), kept=kept.records, broken=len(load.broken))


@pytest.mark.parametrize("cycles", [1, pytest.param(10, marks=LONG)])
def test_a_site_that_starts_without_a_line_runs_its_last_signed_state(tmp_path: Path, cycles: int) -> None:
    with fleet(tmp_path, "shop-1") as made:
        seen: list[Seen] = []
        made.net.link("shop-1", up=False)
        for _ in range(cycles):
            began = time.monotonic()
            shop = made.restart("shop-1")
            until(lambda s=shop: s.call("GET", "/readyz", key=None).status == 200, "it is ready")  # type: ignore[misc]
            ready_s = time.monotonic() - began
            assert fleet_of(shop)["generation"] == 1
            assert _away(shop)
            with Load(shop, most=20) as load:
                load.join()
            _all_answered(load)
            seen += load.seen
            _says(ready_s=ready_s)
        made.net.heal()
        back_s = _takes(lambda: _runs(made.sites["shop-1"]), "it is back")
        _says(back_s=back_s)
        made.arrives("shop-1", _sums(seen))


# ---- the disk


@contextlib.contextmanager
def _small_disk(at: Path, megabytes: int) -> Iterator[None]:
    """A file system of its own, which can be full without harm to anything else."""
    at.mkdir(parents=True)
    try:
        run("mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(at))
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        pytest.skip(f"a small disk needs a mount: {error}")
    try:
        yield
    finally:
        run("umount", "--lazy", str(at))


def _fill(path: Path) -> None:
    """Take every byte of the disk that is left."""
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))


@pytest.mark.parametrize("rounds", [1, pytest.param(6, marks=LONG)])
def test_a_full_disk_is_said_and_nothing_that_was_answered_is_lost(tmp_path: Path, rounds: int) -> None:
    with _small_disk(tmp_path / "shop-1" / "data", 32), fleet(tmp_path, "shop-1") as made:
        shop = made.sites["shop-1"]
        filler = shop.folder / "data" / "filler"
        seen: list[Seen] = []
        for number in range(rounds):
            with Load(shop, clients=3, pause_s=0.005) as load:
                time.sleep(0.5)
                _fill(filler)
                # What the database's files had already is used up first.
                until(lambda of=load: time.monotonic() - of.answered_at > 1.5, "all work is refused")  # type: ignore[misc]
            assert not load.broken
            assert {one.code for one in load.seen} - {""} <= REFUSALS
            with Load(shop, clients=1, most=10) as refused:
                refused.join()
            assert len(refused.seen) == 10
            assert {one.code for one in refused.seen} <= REFUSALS
            wanted = made.hub.apply(tmp_path / "fleet", FLEET.replace("2.00", f"{3 + number}.00"))[
                "generation"
            ]
            time.sleep(0.5)
            filler.unlink()
            well_s = _takes(lambda: shop.chat("well again?").status == 200, "it takes work again by itself")
            print(sorted({one.code for one in (*load.seen, *refused.seen)} - {""}))
            _says(well_again_s=well_s)
            with Load(shop, most=20) as after:
                after.join()
            _all_answered(after)
            until(
                lambda of=wanted: fleet_of(shop)["generation"] == of,  # type: ignore[misc]
                "it runs what came while the disk was full",
            )
            seen += [one for one in (*load.seen, *after.seen) if one.status == 200]
        kept, ids = _kept(shop)
        assert {one.request_id for one in seen} <= ids
        made.arrives("shop-1", kept)
        assert kept.cost >= _sums(seen).cost
        assert verify(shop.folder / "data" / "ledger.db").ok


# ---- the network of the tests itself


def _talk(net: Net, tmp_path: Path, source: str, target: str) -> bool:
    """Whether a connection from one node to another is made within a second."""
    program = f"import socket; socket.create_connection(({net[target].address!r}, 9), timeout=1).close()"
    process = net[source].start([sys.executable, "-c", program], log=tmp_path / "talk.log")
    return process.wait(20) == 0


def _listen(node: Node, tmp_path: Path) -> None:
    program = f"import socket, time; s = socket.create_server(({node.address!r}, 9)); time.sleep(600)"
    node.start([sys.executable, "-c", program], log=tmp_path / "listen.log")


def test_the_network_breaks_as_asked_and_leaves_nothing(tmp_path: Path) -> None:
    try:
        with network("one", "two") as net:
            for name in ("one", "two"):
                _listen(net[name], tmp_path)
            until(lambda: _talk(net, tmp_path, "one", "two"), "one reaches two")
            until(lambda: _talk(net, tmp_path, "two", "one"), "two reaches one")
            net.cut("one", "two")
            assert not _talk(net, tmp_path, "one", "two")
            net.heal()
            assert _talk(net, tmp_path, "one", "two")
            net.link("two", up=False)
            assert not _talk(net, tmp_path, "one", "two")
            net.heal()
            until(lambda: _talk(net, tmp_path, "one", "two"), "one reaches two again")
            names = list(net.made)
            assert names[0] in run("ip", "netns", "list")
            pids = [int(pid) for name in names for pid in run("ip", "netns", "pids", name).split()]
            assert len(pids) == 2
    except NoNetwork as error:
        pytest.skip(str(error))
    assert not set(names) & set(run("ip", "netns", "list").split())
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
