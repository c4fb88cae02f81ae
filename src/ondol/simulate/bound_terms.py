"""What each request needs and costs at each place, at the least: the terms of the optimum's rules."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

from ondol.simulate.fleet import Limits, Option, usd_rates
from ondol.simulate.trace import BLOCK_TOKENS
from ondol.simulate.workload import Workload

Floats = np.ndarray[Any, np.dtype[np.float64]]


class Terms(msgspec.Struct, frozen=True):
    """By request and place: cost in USD (infinite where it may not go), milliseconds of reading and of work.

    `start` is when it can begin there, `first` and `last` when it must have its first and last token; `in_time` says
    that it can be within the limits there at all.
    """

    cost: Floats
    reading: Floats
    work: Floats
    start: Floats
    first: Floats
    last: Floats
    in_time: np.ndarray[Any, np.dtype[np.bool_]]


def terms_of(workload: Workload, limits: Limits) -> Terms:
    """What the rules are made of; O(requests x places)."""
    size, fleet = len(workload), workload.fleet
    shape = (size, len(fleet.places))
    cost, start = np.full(shape, np.inf), np.zeros(shape)
    reading, work = np.zeros(shape), np.zeros(shape)
    first, last = np.zeros(shape), np.zeros(shape)
    in_time = np.zeros(shape, dtype=bool)
    arrived, access = np.array(workload.times), np.array(workload.access_ms)
    prompts = np.array(workload.trace.prompts, dtype=float)
    outputs = np.array(workload.trace.outputs, dtype=float)
    seen = _seen_before(workload)
    groups: dict[int, list[int]] = {}
    for index, able in enumerate(workload.able):
        groups.setdefault(id(able), []).append(index)
    for members in groups.values():
        rows = np.array(members)
        for option in workload.able[members[0]]:
            place, service = fleet.places[option.place], fleet.places[option.place].service
            held = np.minimum(seen[rows], prompts[rows] - 1) if service.kv_blocks else np.zeros(len(rows))
            column = option.place
            cost[rows, column] = _cost(option, place.usd, prompts[rows], held, outputs[rows])
            reading[rows, column] = (
                service.overhead_ms + (prompts[rows] - held) * 1000 / service.prefill_tokens_per_s
            )
            writing = np.maximum(outputs[rows] - 1, 0) / service.tokens_per_ms(place.slots)
            work[rows, column] = writing + (1 - service.decode_while_prefill) * reading[rows, column]
            start[rows, column] = arrived[rows] + option.rtt_ms / 2 + prompts[rows] * option.ms_per_token
            first[rows, column] = arrived[rows] + limits.first_token_ms - access[rows] - option.rtt_ms / 2
            last[rows, column] = arrived[rows] + limits.total_ms - access[rows] - option.rtt_ms / 2
            ready = start[rows, column] + reading[rows, column]
            # Alone it writes a token a step, and no step is faster than that of one sequence.
            alone = ready + np.maximum(outputs[rows] - 1, 0) * service.step_ms
            in_time[rows, column] = (ready <= first[rows, column]) & (alone <= last[rows, column])
            if service.elastic:
                reading[rows, column] = work[rows, column] = 0.0
    free = _may_be_cached(workload)
    cost[free] = np.where(np.isfinite(cost[free]), 0.0, cost[free])
    reading[free] = work[free] = 0.0
    in_time[free] = np.isfinite(cost[free])
    return Terms(cost, reading, work, start, first, last, in_time & np.isfinite(cost))


def _cost(option: Option, usd: Any, prompts: Floats, held: Floats, outputs: Floats) -> Floats:
    if usd is None:
        return np.full(len(prompts), np.nan)
    request, given, cached, written = usd_rates(usd)
    moved = option.usd_per_token
    cheaper = min(given, cached)
    result: Floats = (
        request + (prompts - held) * given + held * cheaper + prompts * moved + outputs * (written + moved)
    )
    return result


def _may_be_cached(workload: Workload) -> np.ndarray[Any, Any]:
    """Which requests an exact cache could answer: asked before by the same route's door.  How long ago is left out."""
    seen: set[tuple[int, str]] = set()
    found = np.zeros(len(workload), dtype=bool)
    for index, content in enumerate(workload.trace.contents or ()):
        door = workload.doors[index]
        if content is None or door.route.cache is None:
            continue
        found[index] = (door.number, content) in seen
        seen.add((door.number, content))
    return found


def _seen_before(workload: Workload) -> Floats:
    """Tokens of each prompt in leading blocks that an earlier request had: no cache can hold more."""
    seen: set[int] = set()
    tokens = np.zeros(len(workload))
    for index, blocks in enumerate(workload.trace.prefixes or ()):
        if not blocks:
            continue
        leading = next((n for n, block in enumerate(blocks) if block not in seen), len(blocks))
        tokens[index] = leading * BLOCK_TOKENS
        seen.update(blocks)
    return tokens
