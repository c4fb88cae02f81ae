"""Real hubs and fleets for tests: `ondol run hub` in its own process, and sites that join it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from tests.sites import HEAD, Answer, Site, free_port

from ondol.cli.hub_client import HubClient
from ondol.cli.installation import CommandFailed

HUB = """
kind: Hub
name: test-fleet
listen: 127.0.0.1:{port}
data: data
names: [127.0.0.1, localhost]
{more}
"""

FLEET = """
kind: Model
name: helper
task: chat
---
kind: Price
name: list
input_per_mtok: "1.00"
output_per_mtok: "2.00"
source: made for a test
date: "2026-01-01"
---
kind: Deployment
name: helper-fake
sites: {names: [shop-*]}
model: helper
engine: fake
price: list
---
kind: Route
name: assistant
deployments: [helper-fake]
"""


class Place(Protocol):
    """Where something runs: this machine, or a node of `tests.netns`."""

    @property
    def address(self) -> str:
        """What it listens on."""
        ...

    @property
    def prefix(self) -> Sequence[str]:
        """What stands before a command that shall run there."""
        ...

    def start(self, command: Sequence[str], *, log: Path) -> subprocess.Popen[bytes]:
        """Start a process there; its output goes to the end of `log`."""
        ...

    def inside(self) -> AbstractContextManager[None]:
        """New sockets of this thread are there."""
        ...


class Here:
    """This machine's loopback."""

    address = "127.0.0.1"
    prefix: Sequence[str] = ()

    def start(self, command: Sequence[str], *, log: Path) -> subprocess.Popen[bytes]:
        with log.open("ab") as out:
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out)

    def inside(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()


HERE = Here()


class PlacedClient(HubClient):
    """Asks the hub from the place where it runs: what breaks between places does not break the asking."""

    def __init__(self, url: str, key: str, ca_file: Path, place: Place) -> None:
        super().__init__(url, key, ca_file)
        self._place = place

    def call(self, method: str, path: str, body: Any) -> Any:
        with self._place.inside():
            return super().call(method, path, body)


class PlacedSite(Site):
    """A site that is asked from its own place, as its tills do."""

    def __init__(self, folder: Path, port: int, process: subprocess.Popen[bytes], place: Place) -> None:
        super().__init__(folder, port, process)
        self.place = place
        self.url = f"http://{place.address}:{port}"

    def call(
        self, method: str, path: str, body: Any = None, *, key: str | None = "", **headers: str
    ) -> Answer:
        with self.place.inside():
            return super().call(method, path, body, key=key, **headers)


class Hub:
    """One running hub."""

    def __init__(self, folder: Path, port: int, place: Place = HERE) -> None:
        self.folder = folder
        self.port = port
        self.place = place
        self.url = f"https://{place.address}:{port}"
        self.process = self._spawn()

    def _spawn(self) -> subprocess.Popen[bytes]:
        return self.place.start(
            [sys.executable, "-m", "ondol", "run", "hub", "--config", str(self.folder / "hub.yaml")],
            log=self.folder / "hub.log",
        )

    @property
    def admin_key(self) -> str:
        return (self.folder / "data" / "admin.key").read_text().strip()

    @property
    def client(self) -> HubClient:
        return PlacedClient(self.url, self.admin_key, self.folder / "data" / "ca.pem", self.place)

    @property
    def log(self) -> str:
        return (self.folder / "hub.log").read_text()

    @property
    def environ(self) -> dict[str, str]:
        """For commands with `--hub`."""
        return {"ONDOL_HUB_KEY": self.admin_key, "ONDOL_HUB_CA": str(self.folder / "data" / "ca.pem")}

    def wait(self) -> None:
        until(lambda: self._answers(), f"the hub answers: {self.log}", process=self.process)

    def _answers(self) -> bool:
        try:
            self.client.get("status")
        except (CommandFailed, OSError):
            return False
        return True

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def restart(self) -> None:
        self.process = self._spawn()
        self.wait()

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.kill()

    def ondol(self, *words: str, ok: bool = True) -> subprocess.CompletedProcess[str]:
        """A command against this hub."""
        done = subprocess.run(
            [*self.place.prefix, sys.executable, "-m", "ondol", *words, "--hub", self.url], capture_output=True,
            text=True, timeout=60, check=False, env=os.environ | self.environ,
        )  # fmt: skip
        assert not ok or done.returncode == 0, done.stderr
        return done

    def invite(self, name: str, **fields: Any) -> str:
        doc = {
            "name": name,
            "tier": "edge",
            "region": "kr-seoul",
            "country": "KR",
            "grid_zone": "KR",
            **fields,
        }
        made = self.client.post("invites", {"invitations": [{"doc": doc}]})["data"]
        token: str = made[0]["token"]
        return token

    def site(self, name: str) -> dict[str, Any]:
        """How the hub sees a site."""
        found: dict[str, Any] = self.client.get(f"sites/{name}")
        return found

    def apply(self, folder: Path, text: str) -> dict[str, Any]:
        """Apply one file of documents."""
        folder.mkdir(exist_ok=True)
        (folder / "fleet.yaml").write_text(text)
        from ondol.config.fleet import as_data, load_fleet

        answer: dict[str, Any] = self.client.post("apply", {"documents": as_data(load_fleet(folder))})
        return answer


def until(
    holds: Callable[[], bool],
    what: str,
    *,
    limit_s: float = 40.0,
    process: subprocess.Popen[bytes] | None = None,
) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + limit_s
    while not holds():
        if process is not None and process.poll() is not None:
            raise AssertionError(f"ended with {process.returncode} before: {what}")
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {limit_s:g} s: {what}")
        time.sleep(0.05)


@contextlib.contextmanager
def running_hub(
    folder: Path, *, port: int | None = None, more: str = "", place: Place = HERE
) -> Iterator[Hub]:
    """A hub that is stopped at the end, also when the test fails."""
    port = port or free_port()
    folder.mkdir(parents=True, exist_ok=True)
    text = HUB.replace("127.0.0.1", place.address).replace("{port}", str(port)).replace("{more}", more)
    (folder / "hub.yaml").write_text(text)
    hub = Hub(folder, port, place)
    try:
        hub.wait()
        yield hub
    finally:
        hub.stop()


def write_site(folder: Path, name: str, *, port: int | None = None, place: Place = HERE) -> int:
    """The file of a site that has nothing of its own yet; its port."""
    port = port or free_port()
    folder.mkdir(parents=True, exist_ok=True)
    more = "" if place is HERE else f"insecure: true\nhosts: ['{place.address}:{port}']"
    text = HEAD.replace("127.0.0.1", place.address).replace("{site}", name).replace("{port}", str(port))
    text = text.replace("{gateway}", more)
    (folder / "site.yaml").write_text(text.rstrip().removesuffix("---"))
    return port


def join(
    folder: Path, token: str, *words: str, ok: bool = True, place: Place = HERE
) -> subprocess.CompletedProcess[str]:
    """`ondol join` for the site in a folder."""
    command = [sys.executable, "-m", "ondol", "join", token, "--config", str(folder / "site.yaml"), *words]
    done = subprocess.run(
        [*place.prefix, *command],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert not ok or done.returncode == 0, done.stderr
    return done


def start_site(folder: Path, port: int, *, place: Place = HERE) -> Site:
    """Start the site of a folder, and wait until it listens."""
    command = [sys.executable, "-m", "ondol", "run", "site", "--config", str(folder / "site.yaml")]
    process = place.start(command, log=folder / "site.log")
    site = PlacedSite(folder, port, process, place)

    def listens() -> bool:
        with contextlib.suppress(OSError):
            return site.call("GET", "/healthz", key=None).status == 200
        return False

    try:
        until(listens, "the site listens", process=process)
    except AssertionError as error:
        process.kill()
        process.wait()
        raise AssertionError(f"{error}: {site.log}") from None
    return site


def fleet_of(site: Site) -> dict[str, Any]:
    """How a site stands with its hub."""
    found: dict[str, Any] = site.call("GET", "/v1/ondol/status").json()["fleet"]
    return found


@contextlib.contextmanager
def member(
    hub: Hub, folder: Path, name: str, *, port: int | None = None, place: Place = HERE
) -> Iterator[Site]:
    """A site that has joined and runs."""
    port = write_site(folder, name, port=port, place=place)
    join(folder, hub.invite(name), place=place)
    site = start_site(folder, port, place=place)
    try:
        yield site
    finally:
        if site.process.poll() is None:
            site.stop()
