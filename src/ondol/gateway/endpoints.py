"""The endpoints of a site as they run: what is static about each, what is in flight, what was learnt.

The pipeline owns this state; stages see frozen `Candidate` snapshots of it.
"""

from __future__ import annotations

from ondol.core.catalog import ModelDoc, SiteDoc
from ondol.core.energy import MeasuredPower, carbon
from ondol.core.inference import InferenceRequest
from ondol.core.money import Money, Price
from ondol.core.ports import Engine
from ondol.core.usage import Attempt
from ondol.gateway.breaker import Breaker
from ondol.gateway.meter import Spent, Terms, attempt
from ondol.gateway.predict import Predictor
from ondol.gateway.schedule import Candidate
from ondol.units import CURRENCY_SCALE, NG_PER_G, NS_PER_MS, NS_PER_S

PARALLEL_UNSTATED = 1024
"""What an upstream is taken to run at once when its deployment does not say."""


class Power:
    """What the machine's own meter says, shared by the endpoints whose engines run on it.

    `busy_thread_ns` is the processor time of their answers since the last look; the composition root looks.
    """

    def __init__(self) -> None:
        """Know nothing, as on a machine without a meter."""
        self.measured = MeasuredPower()
        self.busy_thread_ns = 0

    def look(self, *, package_uj: int, window_ns: int, cpus: int) -> None:
        """Fold what the meter counted in a window of time."""
        self.measured = self.measured.after(
            package_uj=package_uj, window_ns=window_ns, busy_thread_ns=self.busy_thread_ns, cpus=cpus
        )
        self.busy_thread_ns = 0


class Endpoint:
    """One running instance of a deployment."""

    def __init__(
        self, *, terms: Terms, model: ModelDoc, site: SiteDoc, engine: Engine, breaker: Breaker,
        predictor: Predictor, here: str, context_tokens: int | None, power: Power,
    ) -> None:  # fmt: skip
        """Bind what does not change while this endpoint lives.  `predictor` knows it by name already."""
        doc = terms.deployment
        self.name = doc.name
        self.terms = terms
        self.model = model
        self.site = site
        self.engine = engine
        self.breaker = breaker
        self.predictor = predictor
        self.power = power
        self.local = site.name == here
        self.parallel = doc.parallel or PARALLEL_UNSTATED
        self.queue = doc.queue
        self.context_tokens = context_tokens
        self.quality = doc.quality if doc.quality is not None else model.quality
        self.in_flight = 0
        self._rates = None if terms.price is None else _rates(terms.price)

    def worst(self, request: InferenceRequest, max_output_tokens: int) -> Money | None:
        """The most that this request can cost here; None when the endpoint has no price."""
        price = self.terms.price
        if price is None:
            return None
        return price.worst(
            # An engine that has no `n` of its own is asked, and reads the prompt, once a choice.
            input_tokens=request.prompt_tokens_max * request.choices,
            output_tokens=max_output_tokens * request.answers + request.predicted_tokens_max,
        )

    def candidate(
        self,
        request: InferenceRequest,
        max_output_tokens: int,
        now_ns: int,
        *,
        affordable: bool,
        spared: int = 0,
    ) -> Candidate:
        """The snapshot that `schedule` decides on, with expectations for this request.

        `spared` tokens of its prompt were read here before, in an earlier turn.
        """
        expected = self.predictor.predict(
            self.name,
            prompt_tokens=max(request.prompt_tokens - spared, 0),
            output_tokens_max=max_output_tokens * request.answers,
            queue_depth=self._waiting(),
            now_ns=now_ns,
        )
        problem = self.engine.problem()
        if problem is None and not self.breaker.allows(now_ns):
            problem = self.breaker.state_sentence(now_ns)
        cost: float | None = None
        rates = self._rates
        if rates is not None:
            cost = rates[0] + request.prompt_tokens * rates[1] + expected.output_tokens * rates[2]
        return Candidate(
            name=self.name,
            site=self.site.name,
            local=self.local,
            task=self.model.task,
            capabilities=self.engine.capabilities,
            context_tokens=self.context_tokens,
            parallel=self.parallel,
            queue=self.queue,
            in_flight=self.in_flight,
            ttft_ms=expected.ttft_ms,
            # An attempt that fails is made again elsewhere: its time is lost.
            total_ms=expected.optimistic_ms / max(1.0 - expected.failure, 0.05),
            cost=cost,
            carbon_g=self._carbon_g(request, int(expected.output_tokens), expected.total_ms),
            quality=self.quality,
            affordable=affordable,
            problem=problem,
        )

    def patience_ms(self, request: InferenceRequest, max_output_tokens: int, now_ns: int) -> float | None:
        """How long to wait here for a first byte while another endpoint could answer; None where nothing says.

        What runs on this site is waited for: it can be slow, but no packet of it can vanish.
        """
        if self.local and self.terms.deployment.url is None:
            return None
        return self.predictor.patience(
            self.name,
            prompt_tokens=request.prompt_tokens,
            output_tokens_max=max_output_tokens * request.answers,
            queue_depth=self._waiting(),
            now_ns=now_ns,
            whole=not request.stream,
        )

    def time_bound_ms(self, request: InferenceRequest, max_output_tokens: int, now_ns: int) -> float:
        """Within how long, nineteen times of twenty, the caller gets something: a first token, or a whole answer."""
        bounds = self.predictor.bounds(
            self.name,
            prompt_tokens=request.prompt_tokens,
            output_tokens_max=max_output_tokens * request.answers,
            queue_depth=self._waiting(),
            now_ns=now_ns,
        )
        return bounds.ttft_ms[1] if request.stream else bounds.total_ms[1]

    def _waiting(self) -> int:
        return max(0, self.in_flight - self.parallel + 1)

    def _carbon_g(self, request: InferenceRequest, output: int, total_ms: float) -> float | None:
        energy, grid = self.terms.energy, self.terms.grid
        if energy is None or grid is None:
            return None
        spent = energy.answer_energy(
            busy_ns=int(total_ms * NS_PER_MS),
            threads=self.terms.threads,
            concurrency=1.0,
            output_tokens=output,
            input_tokens=request.prompt_tokens,
        )
        return None if spent is None else carbon(spent[0], grid.grams_per_kwh) / NG_PER_G

    def takes(self, now_ns: int) -> bool:
        """Whether it would take a request now, as far as can be told without asking it."""
        return (
            self.in_flight < self.parallel + self.queue
            and self.engine.problem() is None
            and self.breaker.allows(now_ns)
        )

    def begin(
        self, ticket: int, now_ns: int, patience_ms: float | None = None, *, spared: int = 0
    ) -> Running:
        """Count one more attempt in flight; `Running.end` counts it out, whatever happened."""
        waiting = self._waiting()
        self.in_flight += 1
        return Running(self, ticket, now_ns, waiting, patience_ms=patience_ms, spared=spared)

    def left(self, now_ns: int) -> None:
        """A request's patience with it ended."""
        self.predictor.left(self.name, now_ns=now_ns)


class Running:
    """One attempt in flight at one endpoint."""

    __slots__ = ("beside", "endpoint", "first_ns", "patience_ms", "spared", "started_ns", "ticket", "waiting")

    def __init__(
        self, endpoint: Endpoint, ticket: int, started_ns: int, waiting: int, *, patience_ms: float | None,
        spared: int,
    ) -> None:  # fmt: skip
        """Remember when it started, who was there, and how long a first byte is waited for (None: without end)."""
        self.spared = spared
        self.patience_ms = patience_ms
        self.endpoint = endpoint
        self.ticket = ticket
        self.started_ns = started_ns
        self.waiting = waiting
        self.beside = endpoint.in_flight
        self.first_ns: int | None = None

    def end(self, request: InferenceRequest, max_output_tokens: int, spent: Spent, now_ns: int) -> Attempt:
        """Count it out, teach breaker and predictions, and give its record."""
        endpoint = self.endpoint
        # How many shared the engine, on average: those at its start and those at its end.
        concurrency = max(1.0, min((self.beside + endpoint.in_flight) / 2, endpoint.parallel))
        endpoint.in_flight -= 1
        ttft = None if self.first_ns is None else self.first_ns - self.started_ns
        total = now_ns - self.started_ns
        endpoint.breaker.record(
            self.ticket, spent.outcome, now_ns, began=ttft is not None, retry_after_s=spent.retry_after_s
        )
        energy, power = endpoint.terms.energy, endpoint.power
        if energy is not None and energy.local:
            power.busy_thread_ns += int(total * endpoint.terms.threads / concurrency)
        done = attempt(
            endpoint.terms, request, spent, ttft_ns=ttft, total_ns=total, concurrency=concurrency,
            measured_uw_per_thread=power.measured.uw_per_thread,
        )  # fmt: skip
        if spent.outcome in ("ok", "unavailable", "failed"):
            endpoint.predictor.outcome(endpoint.name, failed=spent.outcome != "ok")
        if spent.outcome == "ok":
            self._learn(request, max_output_tokens, done, now_ns)
        return done

    def _learn(self, request: InferenceRequest, max_output_tokens: int, done: Attempt, now_ns: int) -> None:
        endpoint, tokens = self.endpoint, done.usage.output_tokens
        # What an engine says of its cache is better than what we thought of it.
        prompt = max(request.prompt_tokens - (done.usage.cached_tokens or self.spared), 0)
        tokens_max = max_output_tokens * request.answers
        if done.ttft_ns is None:
            endpoint.predictor.observe_whole(
                endpoint.name, now_ns=now_ns, total_ns=done.total_ns, prompt_tokens=prompt,
                tokens=tokens, tokens_max=tokens_max, queue_depth=self.waiting,
            )  # fmt: skip
            return
        per_token = (done.total_ns - done.ttft_ns) // (tokens - 1) if tokens > 1 else None
        endpoint.predictor.observe(
            endpoint.name, now_ns=now_ns, ttft_ns=done.ttft_ns, prompt_tokens=prompt,
            token_ns=per_token, tokens=tokens, tokens_max=tokens_max, queue_depth=self.waiting,
        )  # fmt: skip


def _rates(price: Price) -> tuple[float, float, float]:
    """A request, an input token, an output token, in whole units of the currency: for comparing only."""
    unit = 10.0 ** CURRENCY_SCALE[price.currency]
    return price.request / unit, price.input / (1e6 * unit), price.output / (1e6 * unit)


def deadline(received_ns: int, timeout_s: float, max_latency_ms: int | None) -> int:
    """The absolute deadline: the route's time, or the caller's where that is shorter."""
    allowed = int(timeout_s * NS_PER_S)
    if max_latency_ms is not None:
        allowed = min(allowed, max_latency_ms * NS_PER_MS)
    return received_ns + allowed
