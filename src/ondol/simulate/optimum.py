"""How cheap the load could have been, known beforehand: a bound that no policy can beat.

Each request i may go to the places e that may serve it, at a cost c[i,e] that is the least it can be there (as if the
prefix cache held every leading block that the trace has shown before).  At most `late_max` requests may miss the
limits; those pay their cheapest place and burden none.  Any other one must be within its limits, so at its place

- its prompt is read between its arrival and its deadline for the first token, and prompts are read one after another:
  reading[i,e] = overhead + tokens / prefill rate;
- all its work is done between its arrival and its deadline for the whole: work[i,e] = output / (most tokens
  a ms) + (1 - decode_while_prefill) x reading[i,e], since writing goes on at that pace while a prompt is read.

So for every span of time, what must be done within it is no longer than the span ("energetic reasoning", as in
scheduling with deadlines):

    sum over i with arrival >= t1 and deadline <= t2 of reading (or work)[i,e] x[i,e]  <=  t2 - t1

Every way to serve the trace within the limits keeps these rules, whatever it knows and whenever it decides, and they
say less than the truth (perfect batches, no waiting): so the least cost under them is a true lower bound.

- `windowed`: the rules as a mixed-integer programme for HiGHS, for some hundreds of requests.  `bound` is its dual
  bound, proven; `plan` its best assignment.
- `lagrangian`: for long traces the rules are priced instead of kept, with a price a place and span.  By weak duality
  every set of prices >= 0 gives a lower bound; the best of some hundred subgradient steps is taken.
"""

from __future__ import annotations

from typing import Any, Final

import highspy
import msgspec
import numpy as np

from ondol.errors import OndolError
from ondol.simulate.bound_terms import Floats, Terms, terms_of
from ondol.simulate.fleet import Limits, Option
from ondol.simulate.lagrangian import LATE_SHARE, lagrangian
from ondol.simulate.workload import Workload

WINDOW_MAX: Final = 300
"""Requests up to which the programme is solved; it grows with their square."""
GAP: Final = 0.005
_STARTS: Final = 40
_TIME_LIMIT_S: Final = 60.0


class NoOptimum(OndolError):
    """The solver found no answer."""

    code = "no_optimum"


class Optimum(msgspec.Struct, frozen=True):
    """The least cost in USD, proven; how it was found; and where there is one, the plan that reaches nearly that."""

    bound_usd: float
    method: str
    plan: list[Option | None] | None = None
    plan_usd: float | None = None


def optimum(workload: Workload, limits: Limits) -> Optimum | None:
    """The optimum of a workload, or None where a place has no price.

    Raises:
        NoOptimum: the solver failed.
    """
    terms = terms_of(workload, limits)
    if np.isnan(terms.cost).any():
        return None
    late_max = int(len(workload) * LATE_SHARE)
    if len(workload) <= WINDOW_MAX:
        return windowed(workload, terms, late_max)
    return Optimum(lagrangian(terms, limits, late_max), "lower bound (Lagrangian)")


def windowed(workload: Workload, terms: Terms, late_max: int) -> Optimum:
    """The mixed-integer programme, to a gap of 0.5 %.

    Raises:
        NoOptimum: HiGHS found no plan in a minute.
    """
    size, places = terms.cost.shape
    pairs = [(i, e) for i in range(size) for e in range(places) if terms.in_time[i, e]]
    column = {pair: number for number, pair in enumerate(pairs)}
    cheapest = np.where(np.isfinite(terms.cost), terms.cost, np.inf).min(axis=1)
    scale = 1 / max(float(cheapest.mean()), 1e-12)  # costs of a hundred-thousandth would be within tolerances
    costs = [terms.cost[pair] * scale for pair in pairs] + [cheapest[i] * scale for i in range(size)]
    rows: list[tuple[float, float, list[int], list[float]]] = []
    for i in range(size):
        own = [column[i, e] for e in range(places) if terms.in_time[i, e]]
        rows.append((1.0, 1.0, [*own, len(pairs) + i], [1.0] * (len(own) + 1)))
    rows.append((0.0, float(late_max), [len(pairs) + i for i in range(size)], [1.0] * size))
    for e in range(places):
        start, can = terms.start[:, e], terms.in_time[:, e]
        for end, need in ((terms.first, terms.reading), (terms.last, terms.work)):
            for inside, weights in _spans(start, end[:, e], need[:, e], can):
                rows.append((-highspy.kHighsInf, 1.0, [column[i, e] for i in inside], weights))
    solver, values = _solved(costs, rows)
    info = solver.getInfo()
    if not np.isfinite(info.mip_dual_bound) or not len(values):
        raise NoOptimum(f"HiGHS: {solver.modelStatusToString(solver.getModelStatus())}; expected a plan")
    plan: list[Option | None] = []
    for i in range(size):
        chosen = max(range(places), key=lambda e: values[column[i, e]] if (i, e) in column else -1.0)
        if values[len(pairs) + i] > 0.5:
            chosen = int(np.argmin(terms.cost[i]))
        plan.append(next(option for option in workload.able[i] if option.place == chosen))
    bound = min(info.mip_dual_bound, info.objective_function_value) / scale
    return Optimum(bound, "optimum (MIP, 0.5 %)", plan, info.objective_function_value / scale)


def _spans(
    start: Floats, end: Floats, need: Floats, can: np.ndarray[Any, np.dtype[np.bool_]]
) -> list[tuple[list[int], list[float]]]:
    """Which requests fall into a span of one place, and the share of it that each needs; only what can be too much.

    Spans are taken from some arrivals to some deadlines: leaving rules out keeps the bound a bound.
    """
    able = np.flatnonzero(can)
    starts, ends = np.unique(start[able]), np.unique(end[able])
    found = []
    for t1 in starts[:: max(1, len(starts) // _STARTS)]:
        for t2 in ends[::-1][:: max(1, len(ends) // _STARTS)]:
            inside = able[(start[able] >= t1) & (end[able] <= t2)]
            if t2 > t1 and need[inside].sum() > t2 - t1:
                # Twice the span says "never" as well as a thousand times does, and keeps the numbers tame.
                found.append((inside.tolist(), np.minimum(need[inside] / (t2 - t1), 2.0).tolist()))
    return found


class _Quiet(highspy.Highs):
    """HiGHS that says nothing: the package prints its banner on stdout as soon as callbacks are enabled."""

    def enableCallbacks(self) -> None:  # noqa: N802  # HiGHS's name
        self.silent()
        super().enableCallbacks()  # type: ignore[no-untyped-call]  # highspy's own


def _solved(
    costs: list[float], rows: list[tuple[float, float, list[int], list[float]]]
) -> tuple[highspy.Highs, list[float]]:
    solver = _Quiet()  # type: ignore[no-untyped-call]  # highspy's own
    for option, value in (
        ("mip_rel_gap", GAP), ("time_limit", _TIME_LIMIT_S), ("random_seed", 0), ("threads", 1),
    ):  # fmt: skip
        solver.setOptionValue(option, value)
    count = len(costs)
    model = highspy.HighsLp()
    model.num_col_, model.num_row_ = count, len(rows)
    model.col_cost_ = np.array(costs)
    model.col_lower_, model.col_upper_ = np.zeros(count), np.ones(count)
    model.row_lower_ = np.array([row[0] for row in rows])
    model.row_upper_ = np.array([row[1] for row in rows])
    model.integrality_ = [highspy.HighsVarType.kInteger] * count
    model.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    model.a_matrix_.start_ = np.cumsum([0, *(len(row[2]) for row in rows)])
    model.a_matrix_.index_ = np.concatenate([row[2] for row in rows]).astype(np.int32)
    model.a_matrix_.value_ = np.concatenate([row[3] for row in rows])
    solver.passModel(model)
    solver.run()
    return solver, list(solver.getSolution().col_value)
