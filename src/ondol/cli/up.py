"""`ondol up`: a hub, an edge site and a stand-in cloud on this machine, until Ctrl-C."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from typing import Annotated, Any, Final, Literal

import msgspec
from cyclopts import Parameter
from cyclopts.validators import Number
from rich.console import Console

from ondol.adapters.lock import lock_directory
from ondol.adapters.site_identity import is_member
from ondol.cli import first_run
from ondol.cli.delay import Line
from ondol.cli.first_run import Keys, Ports
from ondol.cli.hub_client import HubClient
from ondol.cli.installation import (
    DEFAULT_DIR,
    HUB,
    SITES,
    CommandFailed,
    Dir,
    Layout,
    Running,
    RunningSite,
    Target,
    write_file,
)
from ondol.cli.sites import PartProcess
from ondol.cli.tour import Stage, ending, take
from ondol.cli.tour_hub import HubSwitch
from ondol.errors import DirectoryLocked

STOP_LIMIT_S: Final = 9.0
"""All parts together; the promise is 10 s."""
_SHARE_S: Final = 2.0
"""What of it is kept for each of cloud and hub, where the one before takes its time."""
ROUND_TRIP_S: Final = 0.080

_Port = Annotated[int, Parameter(validator=Number(gte=0, lte=65535))]


def up(
    *,
    directory: Dir = DEFAULT_DIR,
    port: _Port = 8080,
    tour: Annotated[bool, Parameter(help="Ask the questions of the tour first.")] = True,
    lang: Annotated[Literal["en", "ko"], Parameter(help="The language of the reasons.")] = "en",
) -> int:
    """Start a hub, an edge site and a stand-in cloud site on this machine; they run until Ctrl-C.

    Args:
        port: Where the edge listens on 127.0.0.1; 0 takes any free port.
    """
    layout = Layout(directory)
    try:
        with lock_directory(directory):
            # The lock is ours, so an up.json that is there was left by a run that was killed.
            layout.up_json.unlink(missing_ok=True)
            ports = _choose_ports(port)
            return asyncio.run(_Up(layout, ports, with_tour=tour, lang=lang).run())
    except DirectoryLocked as error:
        raise CommandFailed(_already(layout, error)) from error


def _already(layout: Layout, error: DirectoryLocked) -> str:
    try:
        running = layout.running()
    except CommandFailed:
        return f"`ondol up` starts or stops in this directory just now. {error.message}"
    return (
        f"`ondol up` runs in {layout.root} already: the edge is at {running.edge.url}. "
        "Use it, stop it with Ctrl-C where it runs, or start another with --dir and --port."
    )


def _choose_ports(edge: int) -> Ports:
    """The ports asked for, or free ones; only the edge's must be the one asked for.

    Raises:
        CommandFailed: the edge's port is taken.
    """
    if edge == 0:
        edge = _free_port()
    elif not _is_free(edge):
        raise CommandFailed(
            f"port {edge} of 127.0.0.1 is taken by another program. "
            f"Stop that program, or choose another port: ondol up --port {edge + 1 if edge < 65535 else 8080}"
        )
    taken = {edge}
    others: list[int] = []
    for wanted in (edge + 1, edge + 2, edge + 3, edge + 4):
        chosen = wanted if wanted <= 65535 and wanted not in taken and _is_free(wanted) else 0
        while chosen == 0 or chosen in taken:
            chosen = _free_port()
        taken.add(chosen)
        others.append(chosen)
    return Ports(edge=edge, cloud=others[0], line=others[1], hub=others[2], hub_line=others[3])


def _is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As the servers do: a port whose last connections still linger is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
            # SO_REUSEADDR lets two sockets bind one port as long as neither listens.
            probe.listen(1)
        except OSError:
            return False
    return True


def _free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


class _Screen(Console):
    """A console that falls silent when nobody reads it any more (`| head`); the sites stay up."""

    def on_broken_pipe(self) -> None:
        """Print nowhere from now on."""
        self.quiet = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


class _Up:
    """One run of `ondol up`; owns the hub, the two sites, the lines between them, and `up.json`."""

    def __init__(self, layout: Layout, ports: Ports, *, with_tour: bool, lang: Literal["en", "ko"]) -> None:
        self._layout = layout
        self._ports = ports
        self._with_tour = with_tour
        self._lang = lang
        self._screen = _Screen(highlight=False)
        self._keys: Keys | None = None
        self._line = Line(to_port=ports.cloud, delay_s=ROUND_TRIP_S / 2)
        self._hub_line = Line(to_port=ports.hub, delay_s=0.0)
        self._edge = self._part("edge", ports.edge)
        self._cloud = self._part("cloud", ports.cloud)
        self._hub = self._part(HUB, ports.hub)

    def _part(self, name: str, port: int) -> PartProcess:
        is_hub = name == HUB
        return PartProcess(
            name,
            kind="hub" if is_hub else "site",
            config=self._layout.config(name),
            log=self._layout.log(name),
            url=f"{'https' if is_hub else 'http'}://127.0.0.1:{port}",
            say=self._say,
        )

    def _say(self, text: str) -> None:
        self._screen.print(text, style="dim", markup=False)

    async def run(self) -> int:
        """Start, show, stay, stop.  The exit code: 0 also after Ctrl-C, which is how this ends."""
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(one, stop.set)
        work = loop.create_task(self._work())
        stopping = loop.create_task(stop.wait())
        try:
            await asyncio.wait({work, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                # It only ends by itself when it failed.
                await work
            return 0
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from group
        finally:
            for task in (work, stopping):
                task.cancel()
            await asyncio.gather(work, stopping, return_exceptions=True)
            await self._stop()

    async def _work(self) -> None:
        started_s = time.monotonic()
        keys = self._keys = await asyncio.to_thread(first_run.prepare, self._layout, self._ports, self._say)
        self._say("starting the hub, the edge and the stand-in cloud …")
        await self._line.open(self._ports.line)
        await self._hub_line.open(self._ports.hub_line)
        await self._hub.start()
        await self._enrol()
        await asyncio.gather(self._edge.start(), self._cloud.start())
        await asyncio.gather(self._edge.wait_ready(keys.admin_key), self._cloud.wait_ready())
        self._write_up_json()
        self._say(f"ready after {time.monotonic() - started_s:.1f} s")
        async with asyncio.TaskGroup() as tasks:
            for site in (self._hub, self._edge, self._cloud):
                tasks.create_task(site.watch(self._write_up_json))
            tasks.create_task(self._show(keys))

    async def _enrol(self) -> None:
        """Make the sites members; they need the hub for that once, and later only to be told what is new."""
        if all(is_member(self._layout.data(name)) for name in SITES):
            await asyncio.to_thread(first_run.enrol, self._layout, self._ports, None, self._say)
            return
        await self._hub.wait_until(self._hub_answers)
        await asyncio.to_thread(first_run.enrol, self._layout, self._ports, self._hub_client(), self._say)

    def _hub_client(self) -> HubClient:
        data = self._layout.data(HUB)
        return HubClient(self._hub.url, (data / "admin.key").read_text().strip(), data / "ca.pem")

    async def _hub_answers(self) -> bool:
        try:
            await asyncio.to_thread(lambda: self._hub_client().get("status"))
        except (CommandFailed, OSError):  # not up yet, or its files are not written yet
            return False
        return True

    async def _show(self, keys: Keys) -> None:
        target = Target(url=self._edge.url, key=keys.api_key)
        if self._with_tour:
            stage = Stage(
                screen=self._screen,
                target=target,
                lang=self._lang,
                stop_cloud=self._stop_cloud,
                start_cloud=self._start_cloud,
                hub=HubSwitch(cut=self._hub_line.close, join=self._join_hub, usage=self._hub_usage),
                admin=Target(url=self._edge.url, key=keys.admin_key),
            )
            try:
                await take(stage)
            except CommandFailed as error:
                # The sites may still be of use, and their logs say more than we can.
                self._screen.print(f"The tour could not go on: {error.message}", style="red", markup=False)
        ending(self._screen, target, self._layout.root)

    async def _join_hub(self) -> None:
        await self._hub_line.open(self._ports.hub_line)

    async def _hub_usage(self) -> dict[str, Any]:
        found: dict[str, Any] = await asyncio.to_thread(self._hub_client().get, "usage")
        return found

    async def _stop_cloud(self) -> None:
        await self._cloud.stop(STOP_LIMIT_S)

    async def _start_cloud(self) -> None:
        await self._cloud.start()
        await self._cloud.wait_ready()
        self._write_up_json()

    def _write_up_json(self) -> None:
        keys = self._keys
        if keys is None:
            return
        running = Running(
            edge=RunningSite(url=self._edge.url, pid=self._edge.pid),
            cloud=RunningSite(url=self._cloud.url, pid=self._cloud.pid),
            hub=RunningSite(url=self._hub.url, pid=self._hub.pid),
            api_key=keys.api_key,
            admin_key=keys.admin_key,
        )
        write_file(self._layout.up_json, msgspec.json.encode(running), mode=0o600)

    async def _stop(self) -> None:
        """Edge first: it may still need the cloud for what it has taken; the hub last, which takes the last records."""
        limit_s = time.monotonic() + STOP_LIMIT_S
        # The terminal may be gone, which must not keep the sites alive.
        with contextlib.suppress(OSError):
            self._say("stopping: the edge, the cloud, then the hub …")
        await self._edge.stop(STOP_LIMIT_S - 2 * _SHARE_S)
        await self._cloud.stop(max(0.5, limit_s - time.monotonic() - _SHARE_S))
        await self._hub.stop(max(0.5, limit_s - time.monotonic()))
        await self._line.close()
        await self._hub_line.close()
        self._layout.up_json.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self._say("stopped")
            sys.stdout.flush()
