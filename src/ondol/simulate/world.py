"""The loop: requests come in, engines work, answers go out, in virtual time.

Arrivals are taken from the trace in order; what happens in between waits in a heap.  An engine has one event in it
that counts, the next one; when that moves, a new one is pushed and the old one is known by its version as stale.
Two runs of the same workload and policy are equal to the last bit.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from heapq import heappop, heappush
from math import inf
from typing import Final

from ondol.gateway.cache import Entry, ExactCache
from ondol.simulate.fleet import Option
from ondol.simulate.policies import Policy
from ondol.simulate.service import Engine, engine_of
from ondol.simulate.workload import Workload
from ondol.units import NS_PER_MS, NS_PER_S

REFUSED: Final = -1
CACHED: Final = -2
CACHE_BYTES: Final = 256 * 1024 * 1024
"""The default of a site's `limits.cache_bytes`."""
_CALL_EVERY: Final = 2_000

Progress = Callable[[int], None]


class Run:
    """What came of one run, by request: times in milliseconds at the door.

    `option` is the number of the option taken, or REFUSED or CACHED.  `first` and `end` are infinite where refused.
    `cached` counts prompt tokens that a prefix cache held.  `hits` of `looked` blocks were held.  `busy_ms` is how long
    each place worked.
    """

    def __init__(self, size: int) -> None:
        """Nothing has happened yet."""
        self.option = array("l", [REFUSED]) * size
        self.first = [inf] * size
        self.end = [inf] * size
        self.cached = [0] * size
        self.hits = self.looked = 0
        self.busy_ms: list[float] = []


def run(workload: Workload, policy: Policy, progress: Progress | None = None) -> Run:
    """Play a workload under a policy.  `progress` is called with how many requests have come in."""
    return _World(workload, policy).play(progress)


class _World:
    """One run; owned by `run`."""

    def __init__(self, workload: Workload, policy: Policy) -> None:
        self.workload, self.policy = workload, policy
        self.result = Run(len(workload))
        self.engines = [
            engine_of(place.service, place.slots, workload.trace, self.result.first, self.result.cached)
            for place in workload.fleet.places
        ]
        self.heap: list[tuple[float, int, int, int]] = []
        self.taken: list[Option | None] = [None] * len(workload)
        self.caches: dict[str, ExactCache] = {}

    def play(self, progress: Progress | None) -> Run:
        heap, choose, engines = self.heap, self.policy.choose, self.engines
        prompts, option_of, taken = self.workload.trace.prompts, self.result.option, self.taken
        contents = self.workload.trace.contents
        for request, now in enumerate(self.workload.times):
            while heap and heap[0][0] <= now:
                self._event(*heappop(heap))
            if contents is not None and contents[request] is not None and self._hit(request, now):
                continue
            option = choose(request, now, engines)
            if option is None:
                continue
            option_of[request] = option.number
            taken[request] = option
            engine = engines[option.place]
            engine.in_flight += 1
            way = option.rtt_ms / 2 + prompts[request] * option.ms_per_token
            if way > 0:
                heappush(heap, (now + way, 0, option.place, request))
            elif engine.arrive(request, now):
                self._push(engine, option.place)
            if progress is not None and request % _CALL_EVERY == 0:
                progress(request)
        while heap:
            self._event(*heappop(heap))
        return self._done(progress)

    def _event(self, now: float, version: int, place: int, request: int) -> None:
        engine = self.engines[place]
        if request >= 0:
            if engine.arrive(request, now):
                self._push(engine, place)
            return
        if version != engine.version:
            return
        done = engine.step_to(now)
        if engine.fresh >= 0:
            option = self.taken[engine.fresh]
            assert option is not None
            self.policy.began(engine.fresh, option, now)
        for one in done:
            self._answered(one, now, engine)
        self._push(engine, place)

    def _push(self, engine: Engine, place: int) -> None:
        engine.version += 1
        when = engine.next_event()
        if when != inf:
            heappush(self.heap, (when, engine.version, place, -1))

    def _answered(self, request: int, now: float, engine: Engine) -> None:
        option = self.taken[request]
        assert option is not None
        self.taken[request] = None
        engine.in_flight -= 1
        back = option.rtt_ms / 2
        result = self.result
        result.first[request] += back
        result.end[request] = now + back
        self.policy.answered(request, option, now + back, result.first[request])
        if self.workload.trace.contents is not None:
            self._keep(request, now + back)

    def _hit(self, request: int, now: float) -> bool:
        """Whether the exact cache of the door's site answers."""
        door = self.workload.doors[request]
        if door.route.cache is None:
            return False
        cache = self.caches.setdefault(door.site.name, ExactCache(CACHE_BYTES))
        if cache.get(self._key(request), int(now * NS_PER_MS)) is None:
            return False
        self.result.option[request] = CACHED
        self.result.first[request] = self.result.end[request] = now
        return True

    def _keep(self, request: int, now: float) -> None:
        door, contents = self.workload.doors[request], self.workload.trace.contents
        policy = door.route.cache
        if policy is None or contents is None or contents[request] is None:
            return
        if self.workload.classes[request] == "restricted":
            return
        size = int(self.workload.trace.outputs[request] * self.workload.fleet.setting.bytes_per_token)
        entry = Entry(tenant="default", generation="", body=bytes(size))
        cache = self.caches.setdefault(door.site.name, ExactCache(CACHE_BYTES))
        cache.put(self._key(request), entry, int(policy.ttl_s * NS_PER_S), int(now * NS_PER_MS))

    def _key(self, request: int) -> bytes:
        contents = self.workload.trace.contents
        assert contents is not None
        return f"{self.workload.doors[request].route.name}\0{contents[request]}".encode()

    def _done(self, progress: Progress | None) -> Run:
        for engine in self.engines:
            self.result.hits += engine.blocks.hits
            self.result.looked += engine.blocks.looked
            self.result.busy_ms.append(engine.busy)
        if progress is not None:
            progress(len(self.workload))
        return self.result
