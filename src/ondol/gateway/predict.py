"""How long an endpoint will take, learnt from what was seen.

For each endpoint four figures are kept: a base and a slope (per 1,000 prompt tokens) of the time to the
first token, the time of one output token, and the share of the allowed output that is used.

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

The invariant: every figure stays finite and not negative.
"""

from __future__ import annotations

from math import exp, sqrt
from typing import Final

import msgspec

from ondol.core.catalog import Tier
from ondol.units import NS_PER_MS, NS_PER_S

_CLIP: Final = 8.0
_WEIGHT_MIN: Final = 0.05
_WEIGHT_MAX: Final = 0.5
_MEMORY_NS: Final = 30 * NS_PER_S
_DRIFT_NS: Final = 600 * NS_PER_S
_OPTIMISM: Final = 0.3
_FLOOR_MS: Final = 0.001
"""Below a microsecond nothing is told apart; it keeps the clip's ratio finite."""


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
    `total_ms` for telling.  `samples` counts what it rests on; 0 means the prior alone.
    """

    ttft_ms: float
    per_token_ms: float
    total_ms: float
    optimistic_ms: float
    output_tokens: float
    samples: int


class Predictor:
    """The figures of all endpoints; owns them.  Bounded by the endpoints that were added."""

    def __init__(self) -> None:
        """Know no endpoint."""
        self._endpoints: dict[str, _Estimate] = {}

    def add(self, endpoint: str, prior: Prior, *, parallel: int = 1) -> None:
        """Know an endpoint that runs `parallel` requests at once; what was learnt of it stays."""
        known = self._endpoints.get(endpoint)
        if known is None:
            self._endpoints[endpoint] = _Estimate(prior, parallel)
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
        """Learn from one answer.

        `ttft_ns` runs from handing the request over to its first token (for an answer in one piece,
        to its end, less `tokens` x `token_ns` where those are known).  `queue_depth` is how many waited
        there at that moment: the wait expected for it is taken off.  `token_ns` is the mean time between
        tokens, None where there were fewer than two.  An endpoint that is not known is passed over: it
        was just removed.
        """
        one = self._endpoints.get(endpoint)
        if one is None:
            return
        weight = one.weight(now_ns)
        x = prompt_tokens / 1000
        guess = max(one.base_ms + one.slope_ms * x, _FLOOR_MS)
        seen = ttft_ns / NS_PER_MS - one.wait_ms(queue_depth)
        step = weight * (_clipped(seen, guess) - guess) / (1 + x * x)
        one.base_ms = max(one.base_ms + step, 0.0)
        one.slope_ms = max(one.slope_ms + step * x, 0.0)
        if token_ns is not None:
            one.token_ms += weight * (_clipped(token_ns / NS_PER_MS, one.token_ms) - one.token_ms)
        if tokens is not None and tokens_max:
            one.output_share += weight * (min(tokens / tokens_max, 1.0) - one.output_share)
        decode_ms = (tokens or 0) * one.token_ms
        one.service_ms += weight * (_clipped(max(seen, 0.0) + decode_ms, one.service_ms) - one.service_ms)
        one.samples += 1
        one.seen_ns = now_ns

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
        output = output_tokens_max * one.output_share
        ttft = first + one.wait_ms(queue_depth)
        total = ttft + token * output
        optimistic = total * (1 - _OPTIMISM / sqrt(1 + one.samples))
        return Prediction(ttft, token, total, optimistic, output, one.samples)


class _Estimate:
    __slots__ = (
        "base_ms",
        "output_share",
        "parallel",
        "prior",
        "samples",
        "seen_ns",
        "service_ms",
        "slope_ms",
        "token_ms",
    )

    def __init__(self, prior: Prior, parallel: int) -> None:
        self.prior = prior
        self.parallel = parallel
        self.base_ms = prior.first_token_ms
        self.slope_ms = prior.prompt_ms_per_1k
        self.token_ms = prior.token_ms
        self.output_share = prior.output_share
        # A request of 200 prompt tokens and 100 output tokens, until some have been seen.
        self.service_ms = prior.first_token_ms + prior.prompt_ms_per_1k / 5 + prior.token_ms * 100
        self.samples = 0
        self.seen_ns = 0

    def weight(self, now_ns: int) -> float:
        aged = 1 - exp(-max(now_ns - self.seen_ns, 0) / _MEMORY_NS) if self.samples else 0.0
        return min(_WEIGHT_MAX, max(1 / (self.samples + 2), aged, _WEIGHT_MIN))

    def wait_ms(self, queue_depth: int) -> float:
        return queue_depth * self.service_ms / self.parallel


def _clipped(seen: float, guess: float) -> float:
    guess = max(guess, _FLOOR_MS)
    return min(max(seen, guess / _CLIP), guess * _CLIP)
