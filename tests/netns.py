"""Real networks for tests: network namespaces around a router, whose lines break in every way that lines break.

Each node has a namespace of its own and a line to the router, so that what the router swallows is swallowed as on
the way through the internet: without a reset, and the node's own line stays up.  Nothing of it is in the machine's
own namespace, and every name has this process's id in it.  It needs root and `ip`; `network` says what is missing.

    with network("hub", "shop-1") as net:
        process = net["hub"].start(["some", "command"], log=path)    # runs there, ends with the network
        with net["shop-1"].inside(): ...                             # this thread's new sockets are there
        net.cut("shop-1", "hub"); net.heal()                         # packets vanish, one way
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

NAMESPACES = Path("/run/netns")
CLONE_NEWNET = 0x40000000
NODES_MAX = 250
END_S = 10.0
ROUTER = "router"
_COUNTER = itertools.count(1)
_LIBC = ctypes.CDLL(None, use_errno=True)


class NoNetwork(Exception):
    """This machine, or this user, cannot make network namespaces; the message says why."""


def missing() -> str | None:
    """What stands in the way of namespaces here, as far as that can be told without trying."""
    if os.geteuid() != 0:
        return "network namespaces need root; run the tests as root"
    if shutil.which("ip") is None:
        return "network namespaces need `ip`; install iproute2"
    return None


def has_rate_limits() -> bool:
    """Whether `tc` is there, which `Net.limit` needs."""
    return shutil.which("tc") is not None


class Node:
    """One machine of the network: a namespace with loopback, and a line to the router."""

    def __init__(self, net: Net, name: str, number: int) -> None:
        self.name = name
        self.namespace = net.prefix + name
        self.address = f"10.77.{number}.2"
        self.line = f"to{number}"
        """The router's end of its line; the node's own end is eth0."""
        self._processes: list[subprocess.Popen[bytes]] = []
        net.ip("netns", "add", self.namespace)
        net.made.append(self.namespace)
        self.ip("link", "set", "lo", "up")
        if name == ROUTER:
            self._write("/proc/sys/net/ipv4/ip_forward", "1")
            return
        router = net.prefix + ROUTER
        net.ip(
            "link", "add", self.line, "netns", router, "type", "veth", "peer", "name", "eth0", "netns", self.namespace
        )  # fmt: skip
        net.ip("-n", router, "addr", "add", f"10.77.{number}.1/24", "dev", self.line)
        net.ip("-n", router, "link", "set", self.line, "up")
        self.ip("addr", "add", f"{self.address}/24", "dev", "eth0")
        self.ip("link", "set", "eth0", "up")
        self.ip("route", "add", "default", "via", f"10.77.{number}.1")

    @property
    def prefix(self) -> list[str]:
        """What stands before a command that shall run here; the process keeps its id."""
        return ["ip", "netns", "exec", self.namespace]

    def ip(self, *words: str) -> str:
        """`ip` in this namespace."""
        return run("ip", "-n", self.namespace, *words)

    def start(self, command: Sequence[str], *, log: Path) -> subprocess.Popen[bytes]:
        """Start a process here; it is killed with the network if it is still there then."""
        with log.open("ab") as out:
            process = subprocess.Popen(
                [*self.prefix, *command], stdin=subprocess.DEVNULL, stdout=out, stderr=out
            )
        self._processes.append(process)
        return process

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """Sockets that this thread makes are here; other threads are not touched."""
        before = os.open(f"/proc/self/task/{threading.get_native_id()}/ns/net", os.O_RDONLY)
        try:
            there = os.open(NAMESPACES / self.namespace, os.O_RDONLY)
            try:
                _enter(there)
            finally:
                os.close(there)
            try:
                yield
            finally:
                _enter(before)
        finally:
            os.close(before)

    def end(self) -> None:
        """Kill what was started here and its children: all of it runs in this namespace, and nothing else does."""
        for process in self._processes:
            if process.poll() is None:
                process.kill()
        for pid in map(int, run("ip", "netns", "pids", self.namespace).split()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self._processes:
            process.wait(END_S)

    def _write(self, path: str, text: str) -> None:
        with self.inside():  # /proc/sys/net shows the namespace of the thread that reads it
            Path(path).write_text(text)


class Net:
    """A router and nodes around it.  Use `network`."""

    def __init__(self, *names: str) -> None:
        """Make the nodes.

        Raises:
            NoNetwork: this machine has no namespaces for us; what was made before that is gone again.
        """
        if why := missing():
            raise NoNetwork(why)
        assert len(names) <= NODES_MAX, "each node has a number of one byte"
        self.prefix = f"ondol-{os.getpid()}-{next(_COUNTER)}-"
        self.made: list[str] = []
        self._nodes: dict[str, Node] = {}
        self._cuts: set[tuple[str, str]] = set()
        try:
            for number, name in enumerate((ROUTER, *names)):
                self._nodes[name] = Node(self, name, number)
        except subprocess.CalledProcessError as error:
            self.close()
            raise NoNetwork(f"{' '.join(error.cmd)}: {error.stderr.strip()}") from error
        except BaseException:
            self.close()
            raise

    def __getitem__(self, name: str) -> Node:
        return self._nodes[name]

    def __enter__(self) -> Net:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def ip(self, *words: str) -> str:
        """`ip` in the machine's own namespace."""
        return run("ip", *words)

    # ---- ways to break

    def link(self, name: str, *, up: bool) -> None:
        """Pull or plug the node's cable at the router: it sees no carrier, others hear `unreachable`."""
        self._nodes[ROUTER].ip("link", "set", self._nodes[name].line, "up" if up else "down")

    def cut(self, source: str, target: str) -> None:
        """Packets from `source` to `target` vanish on the way; those of the other direction arrive."""
        if (source, target) not in self._cuts:
            self._nodes[ROUTER].ip("rule", "add", *self._between(source, target))
            self._cuts.add((source, target))

    def silence(self, one: str, other: str) -> None:
        """Packets between the two vanish both ways; nobody is told."""
        self.cut(one, other)
        self.cut(other, one)

    def heal(self) -> None:
        """Every cut ends, and every cable is plugged in.  Limits stay."""
        for source, target in sorted(self._cuts):
            self._nodes[ROUTER].ip("rule", "del", *self._between(source, target))
        self._cuts.clear()
        for name in self._nodes:
            if name != ROUTER:
                self.link(name, up=True)

    def limit(self, name: str, kbit_s: int | None) -> None:
        """A thin line: so many kbit/s in each direction, and a queue of 400 ms before packets are lost; None ends it."""
        node = self._nodes[name]
        for namespace, device in ((self.prefix + ROUTER, node.line), (node.namespace, "eth0")):
            words = ["tc", "-n", namespace, "qdisc", "replace" if kbit_s else "del", "dev", device, "root"]
            if kbit_s:
                words += ["tbf", "rate", f"{kbit_s}kbit", "burst", "16kb", "latency", "400ms"]
            run(*words)

    def _between(self, source: str, target: str) -> list[str]:
        return ["from", self._nodes[source].address, "to", self._nodes[target].address, "blackhole"]

    def close(self) -> None:
        """End every process of the nodes and delete their namespaces.  Idempotent."""
        for node in self._nodes.values():
            if node.namespace in self.made:
                node.end()
        self._nodes.clear()
        while self.made:
            run("ip", "netns", "del", self.made.pop())


@contextlib.contextmanager
def network(*names: str) -> Iterator[Net]:
    """A network that is gone at the end, with all that ran in it, also when the test fails.

    Raises:
        NoNetwork: this machine has no namespaces for us.
    """
    with Net(*names) as net:
        yield net


def run(*words: str) -> str:
    """A command's output.

    Raises:
        CalledProcessError: it failed; `stderr` says why.
    """
    return subprocess.run(words, check=True, capture_output=True, text=True, timeout=END_S).stdout


def _enter(namespace: int) -> None:
    """This thread goes into the namespace of that descriptor (`os.setns` is there from Python 3.12 on)."""
    if _LIBC.setns(namespace, CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"setns: {os.strerror(number)}")
