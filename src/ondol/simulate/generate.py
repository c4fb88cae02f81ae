"""Traces made up from stated laws, seeded: what no recorded trace has, and small ones to try things with.

All are of exponential and lognormal laws, whose figures are arguments; the same seed gives the same trace.  ServeGen's
data are rates by client and window, not requests: `from_rates` draws requests from them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from math import exp, gamma, log
from random import Random
from typing import Annotated, Final, Literal

import msgspec

from ondol.errors import ConfigError
from ondol.simulate.trace import BLOCK_TOKENS, OUTPUT_MAX, PROMPT_MAX, Trace

Positive = Annotated[float, msgspec.Meta(gt=0)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
_CLASSES: Final = ("public", "internal", "confidential")


class Law(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a made-up load is like.  Lengths are lognormal with these medians and a spread (sigma of the logarithm).

    `burst` is how many requests come together on average (1: a Poisson process).  `turns` is the mean length of a
    conversation, `think_s` the mean pause in it; each turn's prompt holds all before it.  `repeats` is the share of
    requests that were asked before, `private` that of class confidential; `regions` are names parted by `+`.
    """

    requests: Annotated[int, msgspec.Meta(ge=1, le=5_000_000)] = 2_000
    rate: Positive = 4.0
    prompt: Positive = 400.0
    output: Positive = 120.0
    spread: Annotated[float, msgspec.Meta(ge=0, le=3)] = 0.8
    burst: Annotated[float, msgspec.Meta(ge=1)] = 1.0
    turns: Annotated[float, msgspec.Meta(ge=1)] = 1.0
    think_s: Positive = 20.0
    repeats: Share = 0.0
    private: Share = 0.0
    regions: str = ""


KINDS: Final[dict[str, Law]] = {
    "poisson": Law(),
    "bursty": Law(burst=8.0),
    "conversations": Law(turns=5.0, prompt=150.0),
}


def from_text(text: str, seed: int) -> Trace | None:
    """The trace of `KIND:name=value,…` (such as `bursty:requests=500,rate=2`); None where that is no such text.

    Raises:
        ConfigError: a name or a value is wrong.
    """
    kind, _, rest = text.partition(":")
    if kind not in KINDS or (not rest and ":" not in text):
        return None
    given: dict[str, str] = {}
    for part in filter(None, rest.split(",")):
        name, _, value = part.partition("=")
        given[name.strip()] = value.strip()
    fields = msgspec.structs.asdict(KINDS[kind]) | given
    try:
        law = msgspec.convert(fields, Law, strict=False)
    except msgspec.ValidationError as error:
        allowed = ", ".join(Law.__struct_fields__)
        raise ConfigError(f"{text}: {error}; allowed: {kind}:NAME=VALUE,… of {allowed}") from error
    return made(law, seed, name=kind)


def made(law: Law, seed: int, *, name: str = "generated") -> Trace:
    """A trace of a law; O(n log n)."""
    dice = Random(seed)  # noqa: S311  # a seeded load, no secret
    starts = _arrivals(law, dice)
    rows: list[tuple[float, int, int, int]] = []  # time, prompt, output, conversation
    conversation = 0
    while len(rows) < law.requests:
        time, held = next(starts), 0
        for _ in range(_count(law.turns, dice)):
            asked, answered = (
                _length(law.prompt, law, dice, PROMPT_MAX),
                _length(law.output, law, dice, OUTPUT_MAX),
            )
            rows.append((round(time, 3), min(held + asked, PROMPT_MAX), answered, conversation))
            held += asked + answered
            time += dice.expovariate(1 / law.think_s)
        conversation += 1
    rows.sort()
    rows = rows[: law.requests]
    trace = Trace(
        name=name,
        times=[row[0] for row in rows],
        prompts=[row[1] for row in rows],
        outputs=[row[2] for row in rows],
    )
    _decorate(trace, law, dice, [row[3] for row in rows])
    return trace


def _decorate(trace: Trace, law: Law, dice: Random, conversations: list[int]) -> None:
    """The optional columns that the law says something about."""
    size = len(trace)
    if law.turns > 1:
        trace.sessions = [f"c{number}" for number in conversations]
        trace.prefixes = [
            _blocks(number, tokens) for number, tokens in zip(conversations, trace.prompts, strict=True)
        ]
    if law.regions:
        names = law.regions.split("+")
        of = {number: dice.choice(names) for number in sorted(set(conversations))}
        trace.regions = [of[number] for number in conversations]
    if law.private > 0:
        trace.classes = ["confidential" if dice.random() < law.private else "internal" for _ in range(size)]
    if law.repeats > 0:
        _repeat(trace, law.repeats, dice)


def _repeat(trace: Trace, share: float, dice: Random) -> None:
    """Make a share of the requests the same as an earlier one, in all that says what was asked."""
    contents: list[str | None] = []
    for index in range(len(trace)):
        if index and dice.random() < share:
            first = dice.randrange(index)
            contents.append(contents[first])
            trace.prompts[index], trace.outputs[index] = trace.prompts[first], trace.outputs[first]
            if trace.prefixes is not None:
                trace.prefixes[index] = trace.prefixes[first]
        else:
            contents.append(f"q{index}")
    trace.contents = contents


def _blocks(conversation: int, tokens: int) -> tuple[int, ...]:
    """Ids of the whole blocks of a prompt; those of a conversation go on where they were."""
    return tuple([conversation * 100_000 + number for number in range(tokens // BLOCK_TOKENS)])


def _arrivals(law: Law, dice: Random) -> Iterator[float]:
    """Times of new conversations, in bunches of `burst` on average, at the law's rate of requests."""
    time = 0.0
    bunches = law.rate / law.turns / law.burst
    while True:
        time += dice.expovariate(bunches)
        within = time
        for _ in range(_count(law.burst, dice)):
            yield within
            within += dice.expovariate(20.0)


def _count(mean: float, dice: Random) -> int:
    """A geometric number with this mean, at least 1."""
    if mean <= 1:
        return 1
    return 1 + int(log(1 - dice.random()) / log(1 - 1 / mean))


def _length(median: float, law: Law, dice: Random, most: int) -> int:
    return min(max(1, round(median * exp(dice.gauss(0, law.spread)))), most)


class ClientRate(msgspec.Struct, frozen=True):
    """One client in one window: requests a second, and the law of the gaps between them with its two parameters."""

    client: str
    start_s: float
    rate: float
    pattern: Literal["Gamma", "Weibull"]
    shape: float
    scale: float


Lengths = Callable[[str, float, Random], tuple[int, int] | None]
"""Prompt and output tokens of a request of a client at a time; None where nothing is known of the client."""


def from_rates(
    rates: Iterable[ClientRate], lengths: Lengths, *, window_s: float, scale: float, seed: int, name: str
) -> Trace:
    """Requests drawn from rates by window: gaps of the stated law, made to keep the window's mean rate times `scale`.

    Each client and window is drawn by itself, from a seed of its own, so that leaving out one changes no other.
    """
    found: list[tuple[float, int, int]] = []
    for one in rates:
        dice = Random(f"{seed}/{one.client}/{one.start_s}")  # noqa: S311  # a seeded load, no secret
        mean_gap = 1 / (one.rate * scale)
        time = one.start_s + mean_gap * dice.random()
        while time < one.start_s + window_s:
            sizes = lengths(one.client, time, dice)
            if sizes is None:
                break
            found.append((time, *sizes))
            time += mean_gap * _gap(one, dice)
    if not found:
        raise ConfigError(f"{name}: the rates give no request; expected a larger scale or longer window")
    found.sort()
    first = found[0][0]
    return Trace(
        name=name, times=[row[0] - first for row in found], prompts=[row[1] for row in found],
        outputs=[row[2] for row in found],
    )  # fmt: skip


def _gap(one: ClientRate, dice: Random) -> float:
    """A gap of mean 1 of the client's law."""
    if one.pattern == "Gamma":
        return dice.gammavariate(one.shape, 1 / one.shape)
    return dice.weibullvariate(1.0, one.shape) / gamma(1 + 1 / one.shape)
