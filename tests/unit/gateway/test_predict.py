"""Predictions: priors, learning, outliers, pauses and queues."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ondol.core.fields import Tier
from ondol.gateway.predict import Bounds, Prediction, Predictor, Prior, prior

SECOND = 1_000_000_000
MS = 1_000_000
FLAT = Prior(first_token_ms=100, prompt_ms_per_1k=0, token_ms=10, output_share=0.5)


def predictor(one: Prior = FLAT, *, parallel: int = 1) -> Predictor:
    made = Predictor()
    made.add("e", one, parallel=parallel)
    return made


def predict(
    one: Predictor, *, prompt: int = 0, output: int = 0, queue: int = 0, now_ns: int = 0
) -> Prediction:
    return one.predict("e", prompt_tokens=prompt, output_tokens_max=output, queue_depth=queue, now_ns=now_ns)


def teach(one: Predictor, ttft_ms: float, *, times: int = 1, now_ns: int = 0, prompt: int = 0) -> None:
    for _ in range(times):
        one.observe("e", now_ns=now_ns, ttft_ns=int(ttft_ms * MS), prompt_tokens=prompt)


def test_before_any_answer_the_prior_speaks() -> None:
    said = predict(predictor(), output=100)
    assert (said.ttft_ms, said.per_token_ms, said.output_tokens, said.samples) == (100, 10, 50, 0)
    assert said.total_ms == 600
    assert said.optimistic_ms == pytest.approx(420)


@pytest.mark.parametrize("tier", ["device", "edge", "pop", "cloud"])
def test_the_prior_of_a_tier_is_one_round_trip_away(tier: Tier) -> None:
    assert prior(tier, 80).first_token_ms == prior(tier, 0).first_token_ms + 80


def test_all_three_figures_are_learnt() -> None:
    one = predictor()
    for _ in range(100):
        one.observe(
            "e", now_ns=0, ttft_ns=40 * MS, prompt_tokens=0, token_ns=20 * MS, tokens=90, tokens_max=100
        )
    said = predict(one, output=100)
    assert said.ttft_ms == pytest.approx(40, rel=0.02)
    assert said.per_token_ms == pytest.approx(20, rel=0.02)
    assert said.output_tokens == pytest.approx(90, rel=0.02)
    assert said.samples == 100
    assert said.optimistic_ms == pytest.approx(said.total_ms, rel=0.04)


def test_long_prompts_are_told_from_short_ones() -> None:
    one = predictor(Prior(first_token_ms=100, prompt_ms_per_1k=100, token_ms=10))
    for number in range(400):
        prompt = (100, 500, 2000)[number % 3]
        teach(one, 50 + 2.8 * prompt, prompt=prompt)
    assert predict(one, prompt=100).ttft_ms == pytest.approx(330, rel=0.1)
    assert predict(one, prompt=2000).ttft_ms == pytest.approx(5650, rel=0.05)


def test_very_long_prompts_do_not_make_it_swing() -> None:
    one = predictor(Prior(first_token_ms=100, prompt_ms_per_1k=100, token_ms=10))
    guesses = []
    for _ in range(50):
        teach(one, 20_000, prompt=128_000)
        guesses.append(predict(one, prompt=128_000).ttft_ms)
    assert guesses == sorted(guesses)
    assert guesses[-1] == pytest.approx(20_000, rel=0.05)


def test_one_stalled_request_does_not_spoil_it() -> None:
    one = predictor()
    teach(one, 100, times=50)
    teach(one, 3_600_000)
    assert predict(one).ttft_ms < 140


def test_a_real_change_is_learnt_within_seconds() -> None:
    one = predictor()
    for second in range(100):
        teach(one, 100 if second < 50 else 400, now_ns=second * SECOND)
    assert predict(one, now_ns=99 * SECOND).ttft_ms == pytest.approx(400, rel=0.1)


def test_after_a_pause_the_next_answer_counts_half() -> None:
    one = predictor()
    teach(one, 100, times=50)
    teach(one, 200, now_ns=3600 * SECOND)
    assert predict(one, now_ns=3600 * SECOND).ttft_ms == pytest.approx(150, rel=0.01)


def test_an_endpoint_that_was_slow_once_is_believed_better_with_time() -> None:
    one = predictor()
    teach(one, 700, times=50)
    slow = predict(one).ttft_ms
    later = predict(one, now_ns=600 * SECOND).ttft_ms
    assert later == pytest.approx(100 + (slow - 100) / 2)
    assert predict(one, now_ns=86_400 * SECOND).ttft_ms == pytest.approx(100)


def test_an_endpoint_that_was_fast_stays_believed_fast() -> None:
    one = predictor()
    teach(one, 20, times=100)
    assert predict(one, now_ns=86_400 * SECOND).ttft_ms == predict(one).ttft_ms


def test_a_queue_costs_its_share_of_the_parallel_slots() -> None:
    one = predictor(parallel=4)
    alone = predict(one).ttft_ms
    assert predict(one, queue=8).ttft_ms == pytest.approx(alone + 8 / 4 * 1100)


def test_the_wait_in_the_queue_is_not_learnt_as_slowness() -> None:
    one = predictor()
    for _ in range(50):
        one.observe("e", now_ns=0, ttft_ns=100 * MS, prompt_tokens=0, tokens=100, tokens_max=100)
    wait_ms = predict(one, queue=3).ttft_ms - predict(one).ttft_ms
    one.observe("e", now_ns=0, ttft_ns=int((100 + wait_ms) * MS), prompt_tokens=0, queue_depth=3)
    assert predict(one).ttft_ms == pytest.approx(100, rel=0.02)


def test_adding_again_keeps_what_was_learnt_and_removal_forgets() -> None:
    one = predictor()
    teach(one, 20, times=50)
    one.add("e", FLAT, parallel=2)
    assert predict(one).samples == 50
    one.keep_only(frozenset())
    teach(one, 20)
    with pytest.raises(KeyError):
        predict(one)


@given(
    st.lists(
        st.tuples(
            st.integers(-(10**15), 10**15), st.integers(0, 10**7), st.none() | st.integers(0, 10**13),
            st.none() | st.integers(0, 10**6), st.integers(0, 1000), st.integers(0, 10**15),
        ),
        max_size=30,
    )
)  # fmt: skip
def test_figures_stay_finite_and_not_negative(
    seen: list[tuple[int, int, int | None, int | None, int, int]],
) -> None:
    one = predictor(prior("edge", 0))
    for ttft_ns, prompt, token_ns, tokens, queue, now_ns in seen:
        one.observe(
            "e", now_ns=now_ns, ttft_ns=ttft_ns, prompt_tokens=prompt, token_ns=token_ns, tokens=tokens,
            tokens_max=100, queue_depth=queue,
        )  # fmt: skip
        said = predict(one, prompt=prompt, output=1000, queue=queue, now_ns=now_ns)
        for figure in (said.ttft_ms, said.per_token_ms, said.total_ms, said.optimistic_ms):
            assert math.isfinite(figure)
            assert figure >= 0
        assert 0 <= said.output_tokens <= 1000


def patience(one: Predictor, *, whole: bool = False, now_ns: int = 0, output: int = 0) -> float | None:
    return one.patience(
        "e", prompt_tokens=0, output_tokens_max=output, queue_depth=0, now_ns=now_ns, whole=whole
    )


def test_patience_is_said_once_ten_answers_were_seen() -> None:
    one = predictor()
    teach(one, 100, times=9)
    assert patience(one) is None
    teach(one, 100)
    assert patience(one) == pytest.approx(100 * 1.4 + 200)


def test_patience_is_the_99th_percentile_and_a_margin() -> None:
    one = predictor()
    for _ in range(5):
        teach(one, 100, times=99)
        teach(one, 400)
    said = patience(one)
    assert said is not None
    assert 300 <= said <= 700
    teach(one, 100, times=300)
    assert patience(one) == pytest.approx(300, rel=0.05)


def test_patience_with_a_whole_answer_counts_its_tokens() -> None:
    one = predictor()
    for _ in range(100):
        one.observe(
            "e", now_ns=0, ttft_ns=100 * MS, prompt_tokens=0, token_ns=10 * MS, tokens=50, tokens_max=100
        )
    assert patience(one, output=100) == pytest.approx(300, rel=0.05)
    assert patience(one, whole=True, output=100) == pytest.approx(800, rel=0.05)


def test_patience_grows_while_everything_is_taken_elsewhere_and_an_answer_ends_that() -> None:
    one = predictor()
    teach(one, 100, times=100)
    one.left("e", now_ns=0)
    assert patience(one, now_ns=0) == pytest.approx(300, rel=0.01)
    one.left("e", now_ns=200 * SECOND)
    assert patience(one, now_ns=300 * SECOND) == pytest.approx(400, rel=0.01)
    assert patience(one, now_ns=10**6 * SECOND) == pytest.approx(1000, rel=0.01)
    teach(one, 100)
    assert patience(one, now_ns=10**6 * SECOND) == pytest.approx(300, rel=0.01)


def test_output_is_expected_by_the_length_of_the_prompt() -> None:
    one = predictor()
    for _ in range(30):
        one.observe("e", now_ns=0, ttft_ns=MS, prompt_tokens=10, tokens=20, tokens_max=1000)
        one.observe("e", now_ns=0, ttft_ns=MS, prompt_tokens=5000, tokens=400, tokens_max=1000)
    assert predict(one, prompt=11, output=1000).output_tokens == pytest.approx(20, abs=12)
    assert predict(one, prompt=4500, output=1000).output_tokens == pytest.approx(400, abs=12)
    assert predict(one, prompt=4500, output=50).output_tokens == 50
    assert predict(one, prompt=300, output=1000).output_tokens == pytest.approx(210, abs=12)


def bounds(one: Predictor, *, prompt: int = 0, output: int = 1000, queue: int = 0) -> Bounds:
    return one.bounds("e", prompt_tokens=prompt, output_tokens_max=output, queue_depth=queue, now_ns=0)


def test_what_was_hardly_seen_is_bounded_hardly_at_all() -> None:
    said = bounds(predictor())
    assert said.ttft_ms == pytest.approx((12.5, 800))
    assert said.output_tokens == pytest.approx((0, 1000))
    assert said.total_ms == pytest.approx((5100 / 8, 5100 * 8))


def test_bounds_are_those_of_what_was_seen_and_the_wait_comes_on_top() -> None:
    one = predictor()
    for n in range(200):
        one.observe(
            "e",
            now_ns=0,
            ttft_ns=(90 + n % 21) * MS,
            prompt_tokens=0,
            token_ns=10 * MS,
            tokens=50 + n % 11,
            tokens_max=100,
        )
    said = bounds(one, output=100)
    assert said.ttft_ms == pytest.approx((91, 109), abs=3)
    assert said.output_tokens == pytest.approx((50, 60), abs=1)
    assert said.total_ms == pytest.approx((610, 700), abs=25)
    later = bounds(one, output=100, queue=2)
    assert later.wait_ms > 1000
    assert later.ttft_ms[0] == pytest.approx(said.ttft_ms[0] + later.wait_ms)


def test_the_stated_share_of_answers_is_within_the_bounds() -> None:
    rng = random.Random(3)
    one, within, tries = predictor(), [0, 0, 0], 4000
    for n in range(tries + 500):
        prompt = int(rng.lognormvariate(5, 1))
        first = (50 + prompt / 10) * rng.lognormvariate(0, 0.3)
        tokens = 1 + int(rng.lognormvariate(3 + prompt.bit_length() / 10, 0.5))
        token = 8 * rng.lognormvariate(0, 0.1)
        said = bounds(one, prompt=prompt)
        if n >= 500:
            seen = (first, first + token * tokens, tokens)
            for at, (value, (low, high)) in enumerate(
                zip(seen, (said.ttft_ms, said.total_ms, said.output_tokens), strict=True)
            ):
                within[at] += low <= value <= high
        one.observe(
            "e", now_ns=n * SECOND, ttft_ns=int(first * MS), prompt_tokens=prompt, token_ns=int(token * MS),
            tokens=tokens, tokens_max=1000,
        )  # fmt: skip
    assert all(0.85 <= count / tries <= 0.95 for count in within), within


def test_the_chance_of_failure_is_that_of_the_last_attempts() -> None:
    one = predictor()
    assert predict(one).failure == 0
    for n in range(500):
        one.outcome("e", failed=n % 4 == 0)
    assert predict(one).failure == pytest.approx(0.25, abs=0.05)
    for _ in range(300):
        one.outcome("e", failed=False)
    assert predict(one).failure < 0.01
    one.outcome("unknown", failed=True)


def test_answers_in_one_piece_teach_the_time_of_a_token() -> None:
    rng = random.Random(5)
    one = predictor(Prior(first_token_ms=100, prompt_ms_per_1k=100, token_ms=30))
    for n in range(600):
        tokens = rng.randrange(1, 200)
        took = 40 + 5 * tokens
        one.observe_whole(
            "e", now_ns=n * SECOND, total_ns=took * MS, prompt_tokens=0, tokens=tokens, tokens_max=1000
        )
    said = predict(one, output=1000)
    assert said.per_token_ms == pytest.approx(5, rel=0.1)
    assert said.ttft_ms == pytest.approx(40, abs=25)
    assert said.total_ms == pytest.approx(40 + 5 * said.output_tokens, rel=0.1)
    one.observe_whole("gone", now_ns=0, total_ns=1, prompt_tokens=0)


def test_embeddings_have_no_tokens_and_teach_the_first() -> None:
    one = predictor()
    for n in range(100):
        one.observe_whole("e", now_ns=n * SECOND, total_ns=3 * MS, prompt_tokens=0)
    assert predict(one).total_ms == pytest.approx(3, rel=0.1)


def test_an_endpoint_that_gave_few_answers_borrows_their_lengths_from_all() -> None:
    one = predictor()
    one.add("other", FLAT)
    for _ in range(30):
        one.observe("other", now_ns=0, ttft_ns=MS, prompt_tokens=10, tokens=20, tokens_max=1000)
    one.observe("e", now_ns=0, ttft_ns=MS, prompt_tokens=10, tokens=900, tokens_max=1000)
    assert predict(one, prompt=10, output=1000).output_tokens < 120
    for _ in range(30):
        one.observe("e", now_ns=0, ttft_ns=MS, prompt_tokens=10, tokens=900, tokens_max=1000)
    assert predict(one, prompt=10, output=1000).output_tokens > 700
