"""Who says where a request goes: ours, and what others do, on the same fleet.

All keep to what is forbidden (class, task, context): a policy whose place may not take a request refuses it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, Protocol

from ondol.core.inference import Objective
from ondol.simulate.fleet import Limits, Option
from ondol.simulate.service import Engine
from ondol.simulate.stages import Boards, Gateway, Placed
from ondol.simulate.workload import Workload


class Policy(Protocol):
    """Chooses, and is told what came of it.  `engines` are those of the places, as of now."""

    def choose(self, request: int, now: float, engines: Sequence[Engine], /) -> Option | None:
        """Where a request goes; None where it is refused."""
        ...

    def began(self, request: int, option: Option, now: float, /) -> None:
        """The first token of an answer is out."""
        ...

    def answered(self, request: int, option: Option, now: float, first: float, /) -> None:
        """An answer is complete, its first token was at `first`; both as seen at the door."""
        ...


class _Simple:
    """A policy that learns nothing."""

    def __init__(self, workload: Workload) -> None:
        self._able = workload.able
        self._places = workload.fleet.places

    def began(self, _request: int, _option: Option, _now: float, /) -> None:
        """Nothing is learnt."""

    def answered(self, _request: int, _option: Option, _now: float, _first: float, /) -> None:
        """Nothing is learnt."""

    def _has_room(self, option: Option, engines: Sequence[Engine]) -> bool:
        place = self._places[option.place]
        return engines[option.place].in_flight < place.parallel + place.queue

    def _least_busy(self, options: Sequence[Option], engines: Sequence[Engine]) -> Option | None:
        best, least = None, 0.0
        for option in options:
            load = engines[option.place].in_flight / self._places[option.place].slots
            if (best is None or load < least) and self._has_room(option, engines):
                best, least = option, load
        return best


class AllCloud(_Simple):
    """Everything to the cloud; among several places of it, to the least busy."""

    def choose(self, request: int, _now: float, engines: Sequence[Engine], /) -> Option | None:
        """The least busy place of tier cloud, None where there is none for this request."""
        found = [option for option in self._able[request] if self._places[option.place].site.tier == "cloud"]
        return self._least_busy(found, engines)


class AllEdge(_Simple):
    """Everything near: on the site that was asked, else on another one that is no cloud."""

    def choose(self, request: int, _now: float, engines: Sequence[Engine], /) -> Option | None:
        """The least busy place of the site itself, else of another device or edge."""
        here = [option for option in self._able[request] if option.local]
        near = [o for o in self._able[request] if self._places[o.place].site.tier in ("device", "edge")]
        return self._least_busy(here or near, engines)


class RoundRobin(_Simple):
    """Each door's places in turn."""

    def __init__(self, workload: Workload) -> None:
        """Start with the first place of each door."""
        super().__init__(workload)
        self._doors = workload.doors
        self._turn: dict[int, int] = {}

    def choose(self, request: int, _now: float, engines: Sequence[Engine], /) -> Option | None:
        """The next place that has room."""
        able, door = self._able[request], self._doors[request].number
        turn = self._turn.get(door, 0)
        for step in range(len(able)):
            option = able[(turn + step) % len(able)]
            if self._has_room(option, engines):
                self._turn[door] = turn + step + 1
                return option
        return None


class LeastBusy(_Simple):
    """The place with the fewest requests for its slots, known without delay."""

    def choose(self, request: int, _now: float, engines: Sequence[Engine], /) -> Option | None:
        """The least busy of all that may serve it."""
        return self._least_busy(self._able[request], engines)


class Fixed(_Simple):
    """A plan made beforehand: an option a request, None refuses."""

    def __init__(self, workload: Workload, plan: Sequence[Option | None]) -> None:
        """Follow the plan."""
        super().__init__(workload)
        self._plan = plan

    def choose(self, request: int, _now: float, _engines: Sequence[Engine], /) -> Option | None:
        """What the plan says."""
        return self._plan[request]


class Ours:
    """The gateways of the sites, each with what it has seen itself."""

    def __init__(
        self, workload: Workload, limits: Limits, *, objective: Objective | None = None,
        gateways: dict[str, Gateway] | None = None, boards: Boards | None = None,
    ) -> None:  # fmt: skip
        """Begin with gateways that know nothing, or with those of an earlier run."""
        self._workload = workload
        self._limits = limits
        self._objective = objective
        self._boards = boards
        self.gateways = {} if gateways is None else gateways
        for gateway in self.gateways.values():
            gateway.settle()
        self._started: dict[int, Placed] = {}

    def choose(self, request: int, now: float, _engines: Sequence[Engine], /) -> Option | None:
        """What the gateway of the request's door decides."""
        work = self._workload
        door = work.doors[request]
        gateway = self.gateways.get(door.site.name)
        if gateway is None:
            gateway = self.gateways[door.site.name] = Gateway(
                work.fleet, self._limits, objective=self._objective, boards=self._boards
            )
        placed = gateway.choose(
            door, work.able[request], work.classes[request], work.trace.prompts[request],
            access_ms=work.access_ms[request], now=now,
        )  # fmt: skip
        if placed is None:
            return None
        self._started[request] = placed
        return placed.option

    def began(self, request: int, _option: Option, _now: float, /) -> None:
        """Tell the gateway of the request's door."""
        self.gateways[self._workload.doors[request].site.name].began(self._started[request])

    def answered(self, request: int, _option: Option, now: float, first: float, /) -> None:
        """Tell the gateway of the request's door."""
        work = self._workload
        door = work.doors[request]
        self.gateways[door.site.name].answered(
            self._started.pop(request), door, now=now, first=first, output=work.trace.outputs[request],
            access_ms=work.access_ms[request],
        )  # fmt: skip


def _ours(workload: Workload, limits: Limits) -> Policy:
    return Ours(workload, limits)


POLICIES: Final[dict[str, Callable[[Workload, Limits], Policy]]] = {
    "all-cloud": lambda workload, _: AllCloud(workload),
    "all-edge": lambda workload, _: AllEdge(workload),
    "round-robin": lambda workload, _: RoundRobin(workload),
    "least-busy": lambda workload, _: LeastBusy(workload),
    "ours": _ours,
}
"""The policies that can be asked for by name; the optimum is `optimum.py`'s."""
