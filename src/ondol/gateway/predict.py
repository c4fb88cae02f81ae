"""How long an endpoint will take, learnt from what was seen.

For each endpoint are kept: a base and a slope (per 1,000 prompt tokens) of the time to the first token, the time of
one output token, the lengths of answers by the length of the prompt (`lengths`), and the share of attempts that failed.

    first token  = base + slope x prompt_tokens / 1000
    total        = wait + first token + token time x expected output tokens
    wait         = queue_depth / parallel x mean time of one request

Each observation y moves its figure by  weight x (y - estimate), where

    weight = min(1/2, max(1/(n+2), 1 - exp(-age/30 s), 0.05))

with n observations before and `age` since the last one: the prior counts as one observation, later ones
count at least a twentieth, and after a pause the new one counts half.  y is first clipped to [1/8, 8]
times the estimate, so that one stalled request cannot spoil it.  Base and slope move together along
(1, x), x = prompt_tokens / 1000, so that the line passes nearer to the point seen (normalised least mean
squares).  Failures teach nothing here: they are the breaker's.

Exploration is by optimism: `optimistic_ms` is the total times 1 - 0.3/sqrt(1+n), so that an endpoint that
few have tried looks up to 30 % better than its prior; and an estimate that is worse than its prior
drifts back to it, by half in ten minutes without observations, so that an endpoint that was slow once
is tried again.

Around these means stand bounds: how far first tokens and totals strayed from what was expected of them (`spread`),
so that `bounds` can say what holds nine times of ten, and `patience` after how long a silent endpoint is no longer
worth waiting for.  What was seen less than ten times is bounded by a factor of eight, which is to say hardly at all.

The invariant: every figure stays finite and not negative.
"""

from __future__ import annotations

from math import exp, sqrt
from typing import Final

import msgspec

from ondol.core.fields import Tier
from ondol.gateway.lengths import BIN_SEEN_MIN, Lengths
from ondol.gateway.spread import Spread
from ondol.units import NS_PER_MS, NS_PER_S

_CLIP: Final = 8.0
_WEIGHT_MIN: Final = 0.05
_WEIGHT_MAX: Final = 0.5
_MEMORY_NS: Final = 30 * NS_PER_S
_DRIFT_NS: Final = 600 * NS_PER_S
_OPTIMISM: Final = 0.3
_FAILURE_MEMORY: Final = 50.0
_UNKNOWN: Final = 8.0
_FLOOR_MS: Final = 0.001
"""Below a microsecond nothing is told apart; it keeps the clip's ratio finite."""
_PATIENCE_SEEN_MIN: Final = 10
_BAND: Final = 0.9
_PATIENCE_P: Final = 0.99
_PATIENCE_MARGIN_MS: Final = 200.0
"""Beyond the learnt 99th percentile: an answer that is only just late shall not be paid twice."""
_PATIENCE_DOUBLES_NS: Final = 300 * NS_PER_S
_PATIENCE_DOUBLINGS_MAX: Final = 3.0


class Prior(msgspec.Struct, frozen=True, kw_only=True):
    """What is believed of an endpoint before it has answered; times in milliseconds.

    `output_share` is the share of the allowed output tokens that answers use: a quarter, until seen.
    """

    first_token_ms: float
    prompt_ms_per_1k: float
    token_ms: float
    output_share: float = 0.25


_TIER_PRIORS: Final[dict[Tier, Prior]] = {
    # A small quantised model on two cores reads 350 tokens/s and writes 100 (measured with SmolLM2-135M);
    # accelerators of a point of presence or a cloud are taken as ten and thirty times faster at reading.
    "device": Prior(first_token_ms=40, prompt_ms_per_1k=3000, token_ms=15),
    "edge": Prior(first_token_ms=30, prompt_ms_per_1k=2900, token_ms=10),
    "pop": Prior(first_token_ms=60, prompt_ms_per_1k=300, token_ms=12),
    "cloud": Prior(first_token_ms=150, prompt_ms_per_1k=100, token_ms=12),
}


def prior(tier: Tier, rtt_ms: float) -> Prior:
    """The prior of a site's tier, one round trip away."""
    base = _TIER_PRIORS[tier]
    return msgspec.structs.replace(base, first_token_ms=base.first_token_ms + rtt_ms)


class Prediction(msgspec.Struct, frozen=True):
    """What is expected of one request at one endpoint.

    `ttft_ms` and `total_ms` include the wait in the queue.  `optimistic_ms` is for choosing (it explores),
    `total_ms` for telling.  `failure` is the chance that the attempt fails.  `samples` counts what it rests on; 0 means
    the prior alone.
    """

    ttft_ms: float
    per_token_ms: float
    total_ms: float
    optimistic_ms: float
    output_tokens: float
    samples: int
    failure: float = 0.0


class Bounds(msgspec.Struct, frozen=True, kw_only=True):
    """What holds with a chance of 90 % each: (low, high) of one request at one endpoint; times in milliseconds."""

    ttft_ms: tuple[float, float]
    total_ms: tuple[float, float]
    output_tokens: tuple[float, float]
    wait_ms: float


class Predictor:
    """The figures of all endpoints; owns them.  Bounded by the endpoints that were added."""

    def __init__(self) -> None:
        """Know no endpoint."""
        self._endpoints: dict[str, _Estimate] = {}
        self._lengths = Lengths()

    def add(self, endpoint: str, prior: Prior, *, parallel: int = 1) -> None:
        """Know an endpoint that runs `parallel` requests at once; what was learnt of it stays."""
        known = self._endpoints.get(endpoint)
        if known is None:
            self._endpoints[endpoint] = _Estimate(prior, parallel, self._lengths)
        else:
            known.prior, known.parallel = prior, parallel

    def keep_only(self, endpoints: frozenset[str]) -> None:
        """Forget all other endpoints."""
        for name in self._endpoints.keys() - endpoints:
            del self._endpoints[name]

    def observe(
        self,
        endpoint: str,
        *,
        now_ns: int,
        ttft_ns: int,
        prompt_tokens: int,
        token_ns: int | None = None,
        tokens: int | None = None,
        tokens_max: int | None = None,
        queue_depth: int = 0,
    ) -> None:
        """Learn from a streamed answer.

        `ttft_ns` runs from handing the request over to its first token.  `queue_depth` is how many waited there at that
        moment: the wait expected for it is taken off.  `token_ns` is the mean time between tokens, None where there
        were fewer than two.  An endpoint that is not known is passed over: it was just removed.
        """
        one = self._endpoints.get(endpoint)
        if one is None:
            return
        weight = one.weight(now_ns)
        x = prompt_tokens / 1000
        guess = max(one.base_ms + one.slope_ms * x, _FLOOR_MS)
        believed = guess + one.token_ms * one.output(prompt_tokens, tokens_max or 0)
        seen = ttft_ns / NS_PER_MS - one.wait_ms(queue_depth)
        step = weight * (_clipped(seen, guess) - guess) / (1 + x * x)
        one.base_ms = max(one.base_ms + step, 0.0)
        one.slope_ms = max(one.slope_ms + step * x, 0.0)
        if token_ns is not None:
            one.token_ms += weight * (_clipped(token_ns / NS_PER_MS, one.token_ms) - one.token_ms)
        taken = max(seen, 0.0) + (tokens or 0) * (one.token_ms if token_ns is None else token_ns / NS_PER_MS)
        one.firsts.add(max(seen, 0.0) / guess)
        one.learnt(taken, believed, weight, now_ns)
        if tokens is not None and tokens_max:
            one.lengths.add(prompt_tokens, tokens)
            self._lengths.add(prompt_tokens, tokens)

    def observe_whole(
        self, endpoint: str, *, now_ns: int, total_ns: int, prompt_tokens: int, tokens: int = 0, tokens_max: int = 0,
        queue_depth: int = 0,
    ) -> None:  # fmt: skip
        """Learn from an answer in one piece, of which only the end was seen (also embeddings, of no tokens).

        Base, slope and token time move together along (1, x, tokens / 10).  The rest is as for `observe`.
        """
        one = self._endpoints.get(endpoint)
        if one is None:
            return
        weight = one.weight(now_ns)
        x, t = prompt_tokens / 1000, tokens / 10
        first = one.base_ms + one.slope_ms * x
        guess = max(first + one.token_ms * tokens, _FLOOR_MS)
        believed = first + one.token_ms * one.output(prompt_tokens, tokens_max)
        seen = total_ns / NS_PER_MS - one.wait_ms(queue_depth)
        step = weight * (_clipped(seen, guess) - guess) / (1 + x * x + t * t)
        one.base_ms = max(one.base_ms + step, 0.0)
        one.slope_ms = max(one.slope_ms + step * x, 0.0)
        one.token_ms = max(one.token_ms + step * t / 10, 0.0)
        one.learnt(max(seen, 0.0), believed, weight, now_ns)
        if tokens_max:
            one.lengths.add(prompt_tokens, tokens)
            self._lengths.add(prompt_tokens, tokens)

    def left(self, endpoint: str, *, now_ns: int) -> None:
        """Note that a request was taken elsewhere when its patience ended."""
        one = self._endpoints.get(endpoint)
        if one is not None and one.left_ns is None:
            one.left_ns = now_ns

    def patience(
        self,
        endpoint: str,
        *,
        prompt_tokens: int,
        output_tokens_max: int,
        queue_depth: int,
        now_ns: int,
        whole: bool,
    ) -> float | None:
        """After how many milliseconds without a byte the request is better taken elsewhere.

        The learnt 99th percentile of the first token's time for such a prompt plus 200 ms; for an answer in one
        piece (`whole`) that of its end.  None where fewer than ten answers were seen.  While every request is
        taken elsewhere it doubles every five minutes, up to eight times: an endpoint that only became slower is found
        out by a probe, and one that is gone costs its probes little.

        Raises:
            KeyError: the endpoint was never added.
        """
        one = self._endpoints[endpoint]
        # Where nothing was streamed yet, first tokens are taken to stray as whole answers do.
        spread = one.totals if whole or len(one.firsts) < _PATIENCE_SEEN_MIN else one.firsts
        ratio = spread.quantile(_PATIENCE_P)
        if ratio is None or len(spread) < _PATIENCE_SEEN_MIN:
            return None
        x = prompt_tokens / 1000
        expected = one.base_ms + one.slope_ms * x
        if whole:
            expected += one.token_ms * one.output(prompt_tokens, output_tokens_max)
        away_ns = 0 if one.left_ns is None else now_ns - one.left_ns
        grown: float = 2.0 ** min(away_ns / _PATIENCE_DOUBLES_NS, _PATIENCE_DOUBLINGS_MAX)
        return (expected * ratio + one.wait_ms(queue_depth)) * grown + _PATIENCE_MARGIN_MS

    def predict(
        self, endpoint: str, *, prompt_tokens: int, output_tokens_max: int, queue_depth: int, now_ns: int
    ) -> Prediction:
        """What a request of this size is expected to take there now, with `queue_depth` waiting before it.

        `output_tokens_max` is what it may answer at most (0 for embeddings).

        Raises:
            KeyError: the endpoint was never added.
        """
        one = self._endpoints[endpoint]
        prior = one.prior
        x = prompt_tokens / 1000
        first = one.base_ms + one.slope_ms * x
        token = one.token_ms
        if one.samples:
            hope = 0.5 ** (max(now_ns - one.seen_ns, 0) / _DRIFT_NS)
            believed = prior.first_token_ms + prior.prompt_ms_per_1k * x
            if first > believed:
                first = believed + (first - believed) * hope
            if token > prior.token_ms:
                token = prior.token_ms + (token - prior.token_ms) * hope
        output = one.output(prompt_tokens, output_tokens_max)
        ttft = first + one.wait_ms(queue_depth)
        total = ttft + token * output
        optimistic = total * (1 - _OPTIMISM / sqrt(1 + one.samples))
        return Prediction(ttft, token, total, optimistic, output, one.samples, one.failure)

    def bounds(
        self, endpoint: str, *, prompt_tokens: int, output_tokens_max: int, queue_depth: int, now_ns: int
    ) -> Bounds:
        """What such a request stays within, nine times of ten.  70 µs: for telling, and where a deadline is near.

        Raises:
            KeyError: the endpoint was never added.
        """
        one = self._endpoints[endpoint]
        expected = self.predict(
            endpoint, prompt_tokens=prompt_tokens, output_tokens_max=output_tokens_max, queue_depth=queue_depth,
            now_ns=now_ns,
        )  # fmt: skip
        wait = one.wait_ms(queue_depth)
        first = _banded(one.firsts, expected.ttft_ms - wait)
        total = _banded(one.totals, expected.total_ms - wait)
        lengths = one.lengths.bounds(prompt_tokens)
        low, high = (0.0, float(output_tokens_max)) if lengths is None else (lengths.low, lengths.high)
        return Bounds(
            ttft_ms=(first[0] + wait, first[1] + wait), total_ms=(total[0] + wait, total[1] + wait),
            output_tokens=(min(low, output_tokens_max), min(high, output_tokens_max)), wait_ms=wait,
        )  # fmt: skip

    def outcome(self, endpoint: str, *, failed: bool) -> None:
        """Learn whether an attempt failed; the last fifty or so count."""
        one = self._endpoints.get(endpoint)
        if one is not None:
            one.failure += (float(failed) - one.failure) / _FAILURE_MEMORY


class _Estimate:
    __slots__ = (
        "base_ms",
        "failure",
        "firsts",
        "left_ns",
        "lengths",
        "parallel",
        "pooled",
        "prior",
        "samples",
        "seen_ns",
        "service_ms",
        "slope_ms",
        "token_ms",
        "totals",
    )

    def __init__(self, prior: Prior, parallel: int, pooled: Lengths) -> None:
        self.prior = prior
        self.parallel = parallel
        self.base_ms = prior.first_token_ms
        self.slope_ms = prior.prompt_ms_per_1k
        self.token_ms = prior.token_ms
        self.lengths = Lengths()
        self.pooled = pooled
        self.failure = 0.0
        # A request of 200 prompt tokens and 100 output tokens, until some have been seen.
        self.service_ms = prior.first_token_ms + prior.prompt_ms_per_1k / 5 + prior.token_ms * 100
        self.samples = 0
        self.seen_ns = 0
        self.left_ns: int | None = None
        self.firsts = Spread()
        self.totals = Spread()

    def output(self, prompt_tokens: int, most: int) -> float:
        """Output tokens expected of at most `most`: the mean of answers to prompts alike; the prior counts as one.

        An endpoint that gave few borrows from all: else one long first answer makes it look slow, and it is never
        asked again.
        """
        prior = self.prior.output_share * most
        lengths = self.lengths if self.lengths.seen >= BIN_SEEN_MIN else self.pooled
        mean = lengths.mean(prompt_tokens)
        if mean is None:
            return prior
        seen = lengths.seen
        return min((mean * seen + prior) / (seen + 1), most)

    def learnt(self, taken_ms: float, believed_ms: float, weight: float, now_ns: int) -> None:
        """An answer took `taken_ms` from its start, and `believed_ms` had been expected."""
        self.left_ns = None
        self.totals.add(taken_ms / max(believed_ms, _FLOOR_MS))
        self.service_ms += weight * (_clipped(taken_ms, self.service_ms) - self.service_ms)
        self.samples += 1
        self.seen_ns = now_ns

    def weight(self, now_ns: int) -> float:
        aged = 1 - exp(-max(now_ns - self.seen_ns, 0) / _MEMORY_NS) if self.samples else 0.0
        return min(_WEIGHT_MAX, max(1 / (self.samples + 2), aged, _WEIGHT_MIN))

    def wait_ms(self, queue_depth: int) -> float:
        return queue_depth * self.service_ms / self.parallel


def _banded(spread: Spread, expected: float) -> tuple[float, float]:
    band = spread.band(_BAND) if len(spread) >= _PATIENCE_SEEN_MIN else None
    return (
        (expected / _UNKNOWN, expected * _UNKNOWN)
        if band is None
        else (expected * band[0], expected * band[1])
    )


def _clipped(seen: float, guess: float) -> float:
    guess = max(guess, _FLOOR_MS)
    return min(max(seen, guess / _CLIP), guess * _CLIP)
