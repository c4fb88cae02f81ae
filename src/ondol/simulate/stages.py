"""One site's gateway in virtual time: the gateway's own stages, and the state that its pipeline keeps for them.

This is the one place that calls the stages to place a request, so that what changes there changes here only.

An engine reads one prompt after the other, so the first token waits for every prompt that was sent there before and
has not given its own: their tokens, which this gateway knows, are counted with the request's own when the time to the
first token is predicted, and when it is learnt.

Decisions repeat, so they are remembered: by the case of the request (door, class, prompt to half an octave)
and by what stands at each option (tokens ahead, how many wait, and what is expected of it: a new version whenever an
expectation moved by more than a tenth).

A limit is kept by a margin per option: where answers come later than the limit more often than one in two hundred, the
margin grows and the option is left out earlier; otherwise it shrinks (stochastic approximation of a quantile;
Robbins, Monro, 1951).  An option that is left out wins back a tenth of the way every ten seconds.
"""

from __future__ import annotations

from math import exp, inf
from typing import Final

import msgspec

from ondol.core.inference import DataClass, Objective
from ondol.errors import OndolError
from ondol.gateway.predict import Prediction, Predictor, prior
from ondol.gateway.schedule import Candidate, Wish, schedule
from ondol.simulate.fleet import Door, FleetModel, Limits, Option, usd_rates
from ondol.simulate.workload import candidate
from ondol.units import NS_PER_MS

_MOVED: Final = 0.1
_LOOK_ALWAYS: Final = 32
_LOOK_EVERY: Final = 8
_LOOK_AGAIN_MS: Final = 10_000.0
_MEMO_MAX: Final = 200_000
_LATE_SHARE: Final = 0.005
"""Half of the hundredth that may be late: the margin swings around its aim."""
_MARGIN_STEP: Final = 0.15
_FORGET: Final = 0.9
_MARGIN_MIN: Final = 0.15
_MARGIN_MAX: Final = 1.0
"""The least and the most of a margin's logarithm: a sixth more, and 2.7 times."""
_PROBES: Final = (256, 4096)


class Placed(msgspec.Struct, frozen=True):
    """Where a request was sent and when, its prompt, and what was ahead of it: tokens to read, and how many waited."""

    option: Option
    at: float
    prompt: int
    ahead: int
    waiting: int


class Board:
    """What is left to read at one place: tokens of prompts that have not given their first token."""

    __slots__ = ("reading",)

    def __init__(self) -> None:
        """Nothing is."""
        self.reading = 0


Boards = dict[int, Board]
"""By place.  One for all gateways where the places tell them what they have to read, else one for each gateway."""


class _Stand:
    """One option as this gateway knows it.  `reading` counts tokens of prompts that have not given a first token."""

    __slots__ = (
        "answers", "blank", "board", "expected", "in_flight", "margin", "option", "place", "raised",
        "rates", "seen", "version",
    )  # fmt: skip

    def __init__(self, option: Option, fleet: FleetModel, board: Board) -> None:
        self.option = option
        self.place = fleet.places[option.place]
        self.blank = candidate(option, fleet)
        self.rates = None if self.place.usd is None else usd_rates(self.place.usd)
        self.in_flight = 0
        self.board = board
        self.seen = 0
        self.answers = 0
        self.margin = _MARGIN_MIN
        self.raised = 0.0
        self.version = 0
        self.expected: tuple[float, ...] = ()


class Gateway:
    """The placing part of one site's gateway, learning as it goes.  Bounded by its options and `_MEMO_MAX`."""

    def __init__(
        self,
        fleet: FleetModel,
        limits: Limits,
        *,
        objective: Objective | None = None,
        boards: Boards | None = None,
    ) -> None:
        """Know nothing yet; `objective` replaces that of the routes, `boards` are shared with other gateways."""
        self._fleet = fleet
        self._boards: Boards = {} if boards is None else boards
        self._limits = limits
        self._objective = objective
        self._predictor = Predictor()
        self._stands: dict[int, _Stand] = {}
        self._memo: dict[tuple[int, ...], Option | None] = {}
        self._looked = 0.0
        self.decisions = self.remembered = 0

    def settle(self) -> None:
        """Forget what is in flight, as between two runs; what was learnt stays."""
        for stand in self._stands.values():
            stand.in_flight = stand.board.reading = 0
            stand.raised = 0.0
        self._looked = 0.0

    def choose(
        self,
        door: Door,
        able: tuple[Option, ...],
        data_class: DataClass,
        prompt: int,
        *,
        access_ms: float,
        now: float,
    ) -> Placed | None:
        """Where a request goes now (milliseconds); None where it is refused."""
        self.decisions += 1
        stands = [self._stand(option) for option in able]
        if now - self._looked > _LOOK_AGAIN_MS:
            self._look(now)
        key = (door.number, data_class.rank, _bucket(prompt), *[_state(stand) for stand in stands])
        try:
            found = self._memo[key]
            self.remembered += 1
        except KeyError:
            if len(self._memo) >= _MEMO_MAX:
                self._memo.clear()
            found = self._memo[key] = self._decide(
                door, stands, data_class, prompt, access_ms=access_ms, now=now
            )
        if found is None:
            return None
        stand = self._stands[found.number]
        placed = Placed(found, now, prompt, stand.board.reading, _waiting(stand))
        stand.in_flight += 1
        stand.board.reading += prompt
        return placed

    def began(self, placed: Placed) -> None:
        """A first token is out: its prompt is read."""
        self._stands[placed.option.number].board.reading -= placed.prompt

    def answered(
        self, placed: Placed, door: Door, *, now: float, first: float, output: int, access_ms: float
    ) -> None:
        """Count a request out and learn from it; times are those at this gateway, in milliseconds."""
        stand = self._stands[placed.option.number]
        stand.in_flight -= 1
        stand.answers += 1
        stand.seen += 1
        self._predictor.observe(
            placed.option.deployment, now_ns=int(now * NS_PER_MS), ttft_ns=int((first - placed.at) * NS_PER_MS),
            prompt_tokens=placed.prompt + placed.ahead,
            token_ns=int((now - first) / (output - 1) * NS_PER_MS) if output > 1 else None, tokens=output,
            tokens_max=max(door.route.max_output_tokens, output), queue_depth=placed.waiting,
        )  # fmt: skip
        self._keep(
            stand,
            placed,
            now=now,
            ttft_ms=first - placed.at + access_ms,
            total_ms=now - placed.at + access_ms,
        )
        if stand.seen < _LOOK_ALWAYS or stand.seen % _LOOK_EVERY == 0:
            self._expect(stand, now)

    def _stand(self, option: Option) -> _Stand:
        stand = self._stands.get(option.number)
        if stand is None:
            stand = self._stands[option.number] = _Stand(
                option, self._fleet, self._boards.setdefault(option.place, Board())
            )
            place = stand.place
            self._predictor.add(
                option.deployment, prior(place.site.tier, option.rtt_ms), parallel=place.parallel
            )
            self._expect(stand, 0.0)
        return stand

    def _look(self, now: float) -> None:
        self._looked = now
        for stand in self._stands.values():
            if stand.answers == 0:
                stand.margin = max(stand.margin * _FORGET, _MARGIN_MIN)
            stand.answers = 0
            self._expect(stand, now)

    def _expect(self, stand: _Stand, now: float) -> None:
        """A new version where what is expected moved."""
        now_ns, figures = int(now * NS_PER_MS), []
        for prompt in _PROBES:
            one = self._predictor.predict(
                stand.option.deployment,
                prompt_tokens=prompt,
                output_tokens_max=1000,
                queue_depth=1,
                now_ns=now_ns,
            )
            figures += [one.ttft_ms, one.optimistic_ms]
        figures.append(exp(stand.margin))
        old = stand.expected
        if not old or any(abs(new - was) > _MOVED * was for new, was in zip(figures, old, strict=True)):
            stand.expected = tuple(figures)
            stand.version += 1

    def _keep(self, stand: _Stand, placed: Placed, *, now: float, ttft_ms: float, total_ms: float) -> None:
        """Move the margin by whether the answer kept to the limits."""
        if ttft_ms <= self._limits.first_token_ms and total_ms <= self._limits.total_ms:
            stand.margin = max(stand.margin - _MARGIN_STEP * _LATE_SHARE, _MARGIN_MIN)
        elif placed.at >= stand.raised:
            # Those that were sent before the last step knew nothing of it: a burst is late once, not fifty times.
            stand.margin = min(stand.margin + _MARGIN_STEP, _MARGIN_MAX)
            stand.raised = now

    def _decide(
        self, door: Door, stands: list[_Stand], data_class: DataClass, prompt: int, *, access_ms: float, now: float
    ) -> Option | None:  # fmt: skip
        wish = Wish(
            task=stands[0].place.model.task, needs=frozenset(), tokens_max=prompt + door.route.max_output_tokens,
            prompt_tokens=prompt, objective=self._objective or door.route.objective, data_class=data_class,
            remaining_ms=self._limits.total_ms - access_ms,
        )  # fmt: skip
        expected = [self._predicted(stand, door, prompt, now) for stand in stands]
        # How long an answer is depends on what was asked: the place that has seen most says it for all.
        output = max(expected, key=lambda one: one.samples).output_tokens
        candidates = [
            self._candidate(stand, one, output, prompt=prompt, access_ms=access_ms, now=now)
            for stand, one in zip(stands, expected, strict=True)
        ]
        try:
            name = schedule(wish, candidates).order[0]
        except OndolError:
            late = msgspec.structs.replace(wish, remaining_ms=inf, objective=Objective.FAST)
            candidates = [msgspec.structs.replace(one, ttft_ms=0.0) for one in candidates]
            try:
                name = schedule(late, candidates).order[0]
            except OndolError:
                return None
        return next(stand.option for stand in stands if stand.option.deployment == name)

    def _predicted(self, stand: _Stand, door: Door, prompt: int, now: float) -> Prediction:
        return self._predictor.predict(
            stand.option.deployment, prompt_tokens=prompt + stand.board.reading,
            output_tokens_max=door.route.max_output_tokens, queue_depth=_waiting(stand), now_ns=int(now * NS_PER_MS),
        )  # fmt: skip

    def _candidate(
        self, stand: _Stand, expected: Prediction, output: float, *, prompt: int, access_ms: float, now: float
    ) -> Candidate:
        margin = exp(stand.margin)
        total_ms = expected.ttft_ms + expected.per_token_ms * output
        cost: float | None = None
        if stand.rates is not None:
            request, given, _, written = stand.rates
            moved = stand.option.usd_per_token
            cost = request + prompt * (given + moved) + output * (written + moved)
        is_new = stand.seen == 0 and stand.in_flight == 0
        in_time = is_new or (
            expected.ttft_ms * margin <= self._limits.first_token_ms - access_ms
            and total_ms * margin <= self._limits.total_ms - access_ms
        )
        return msgspec.structs.replace(
            stand.blank,
            in_flight=stand.in_flight,
            ttft_ms=expected.ttft_ms if in_time else inf,  # the stage drops what begins after the deadline
            total_ms=total_ms * expected.optimistic_ms / max(expected.total_ms, 1e-3),
            cost=cost,
            carbon_g=self._carbon(stand, output, total_ms, now),
        )

    def _carbon(self, stand: _Stand, output: float, total_ms: float, now: float) -> float | None:
        place = stand.place
        if place.hours is None:
            return None
        joules = None if place.joules_per_token is None else place.joules_per_token * output
        if joules is None and place.watts is not None:
            joules = place.watts * total_ms / 1000
        hour = int(now // 3_600_000) % len(place.hours)
        return None if joules is None else joules * place.hours[hour] / 3.6e6


def _waiting(stand: _Stand) -> int:
    return max(0, stand.in_flight - stand.place.parallel + 1)


def _state(stand: _Stand) -> int:
    """What a decision needs to know of an option, as one number."""
    waiting = stand.in_flight - stand.place.parallel + 1
    if waiting < 0:
        waiting = 0
    elif waiting > 8:
        waiting = 1023 if waiting > stand.place.queue else _bucket(waiting)
    return (stand.version * 1024 + waiting) * 1024 + _bucket(stand.board.reading)


def _bucket(number: int) -> int:
    """The half of an octave that a number is in; without a logarithm: bits of length, and the one below the top."""
    octave = number.bit_length()
    return octave * 2 + (number << 1 >> max(octave - 1, 0)) % 2
