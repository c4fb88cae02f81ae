"""A trace laid over a fleet: the door that each request comes in by, and the places that may ever serve it."""

from __future__ import annotations

from bisect import bisect_left
from zlib import crc32

import msgspec

from ondol.core.inference import DataClass, Objective
from ondol.errors import OndolError
from ondol.gateway.schedule import Candidate, Wish, schedule
from ondol.simulate.fleet import Door, FleetModel, Option
from ondol.simulate.trace import Trace, TraceError


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    """What a run is about; made once, used by every policy.

    By request: `times` in milliseconds at its door, `doors`, `classes`, `able` (the options that class, task and
    context allow, the same tuple for the same case), and `access_ms` (the way from the caller to the door and back).
    """

    trace: Trace
    fleet: FleetModel
    times: list[float]
    doors: list[Door]
    classes: list[DataClass]
    able: list[tuple[Option, ...]]
    access_ms: list[float]

    def __len__(self) -> int:
        """How many requests."""
        return len(self.times)


def lay(trace: Trace, fleet: FleetModel, *, seed: int = 0) -> Workload:
    """The workload of a trace on a fleet; `seed` spreads callers over several doors of one region.

    Raises:
        TraceError: a request has nowhere to go: the first one, and why.
    """
    finder = _Finder(trace, fleet, seed)
    found = [finder.door(index) for index in range(len(trace))]
    access = [way[0] + prompt * way[1] for (_, way), prompt in zip(found, trace.prompts, strict=True)]
    doors = [door for door, _ in found]
    classes = [finder.data_class(index, door) for index, door in enumerate(doors)]
    able = [finder.able(index, door, classes[index]) for index, door in enumerate(doors)]
    times = [time * 1000 for time in trace.times]
    return Workload(
        trace=trace, fleet=fleet, times=times, doors=doors, classes=classes, able=able, access_ms=access
    )


class _Finder:
    """Answers the same questions once; owned by `lay`."""

    def __init__(self, trace: Trace, fleet: FleetModel, seed: int) -> None:
        self.trace, self.fleet, self.seed = trace, fleet, seed
        self._ways: dict[str | None, tuple[tuple[str, ...], tuple[float, float]]] = {}
        self._able: dict[tuple[int, DataClass, int], tuple[Option, ...]] = {}
        self._contexts: dict[int, list[int]] = {}

    def door(self, index: int) -> tuple[Door, tuple[float, float]]:
        """The door of a request, and the way to it: milliseconds, and milliseconds a token of the prompt."""
        trace, fleet = self.trace, self.fleet
        region = None if trace.regions is None else trace.regions[index]
        sites, way = self._ways.get(region) or self._way(index, region)
        site = sites[0] if len(sites) == 1 else sites[self._spread(index) % len(sites)]
        route = None if trace.routes is None else trace.routes[index]
        door = fleet.door(site, route or fleet.default_route)
        if door is None:
            served = sorted({one.route.name for one in fleet.doors if one.site.name == site})
            raise self._nowhere(
                index, f"site {site} does not serve the route {route or fleet.default_route!r}; it serves: "
                f"{', '.join(served) or 'nothing'}",
            )  # fmt: skip
        return door, way

    def _spread(self, index: int) -> int:
        """Callers of a region with several sites spread over them; a conversation stays at one."""
        session = None if self.trace.sessions is None else self.trace.sessions[index]
        return crc32(f"{self.seed}/{index if session is None else session}".encode())

    def _way(self, index: int, region: str | None) -> tuple[tuple[str, ...], tuple[float, float]]:
        fleet = self.fleet
        sites = fleet.default_sites if region is None else fleet.sites_of(region)
        if not sites:
            known = sorted({*fleet.setting.regions, *(door.site.region for door in fleet.doors)})
            raise self._nowhere(
                index, f"no site is for the region {region!r}; the fleet has: {', '.join(known)}"
            )
        stated = None if region is None else fleet.setting.regions.get(region)
        way = (0.0, 0.0)
        if stated is not None:
            rate = stated.mbit_per_s
            per_token = 0.0 if rate is None else fleet.setting.bytes_per_token * 8 / (rate * 1000)
            way = (stated.rtt_ms, per_token)
        self._ways[region] = sites, way
        return sites, way

    def data_class(self, index: int, door: Door) -> DataClass:
        """The stricter of the route's class and the request's own; unlabelled is internal."""
        label = None if self.trace.classes is None else self.trace.classes[index]
        own = DataClass(label) if label is not None else DataClass.INTERNAL
        routes = door.route.data_class
        return own if routes is None or own.rank >= routes.rank else routes

    def able(self, index: int, door: Door, data_class: DataClass) -> tuple[Option, ...]:
        """The options that may ever serve a request.

        Raises:
            TraceError: there are none.
        """
        contexts = self._contexts.get(door.number)
        if contexts is None:
            places = [self.fleet.places[option.place] for option in door.options]
            contexts = sorted({place.context_tokens for place in places if place.context_tokens is not None})
            self._contexts[door.number] = contexts
        prompt = self.trace.prompts[index]
        key = (door.number, data_class, bisect_left(contexts, prompt))
        found = self._able.get(key)
        if found is None:
            found = self._able[key] = self._filtered(index, door, data_class, prompt)
        return found

    def _filtered(self, index: int, door: Door, data_class: DataClass, prompt: int) -> tuple[Option, ...]:
        places, kept, why = self.fleet.places, [], []
        wish = Wish(
            task=places[door.options[0].place].model.task, needs=frozenset(), tokens_max=prompt, prompt_tokens=prompt,
            objective=Objective(door.route.objective), data_class=data_class, remaining_ms=float("inf"),
        )  # fmt: skip
        for option in door.options:
            try:
                schedule(wish, [candidate(option, self.fleet)])
                kept.append(option)
            except OndolError as error:
                why.append(error.message.removeprefix("no endpoint is left: "))
        if not kept:
            raise self._nowhere(index, "; ".join(why))
        return tuple(kept)

    def _nowhere(self, index: int, why: str) -> TraceError:
        row = self.trace.row(index)
        return TraceError(
            f"{self.trace.name}: row {row} (time {self.trace.times[index]:g} s) has nowhere to go on this fleet: {why}"
        )


def candidate(option: Option, fleet: FleetModel) -> Candidate:
    """An option that is idle and of which nothing is expected yet, as `schedule` takes it."""
    place = fleet.places[option.place]
    return Candidate(
        name=option.deployment, site=place.site.name, local=option.local, task=place.model.task,
        capabilities=place.capabilities, context_tokens=place.context_tokens, parallel=place.parallel,
        queue=place.queue, in_flight=0, ttft_ms=0.0, total_ms=0.0, cost=None, carbon_g=None, quality=place.quality,
    )  # fmt: skip
