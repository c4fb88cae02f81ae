"""The shell of the semantic cache: nothing waits for it, what fails there costs no answer, and what it hears it learns."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine
from typing import Any

import pytest

from ondol.core.catalog import RouteDoc
from ondol.core.identity import Hints, Principal
from ondol.core.inference import DataClass, InferenceRequest, Task
from ondol.core.route_terms import CachePolicy, SemanticPolicy
from ondol.errors import EngineUnavailable
from ondol.gateway.cache import Entry
from ondol.gateway.call import Ask, Call
from ondol.gateway.recall import Recall
from ondol.gateway.semantic import SemanticCache, Serve

pytestmark = pytest.mark.anyio
POLICY = SemanticPolicy(max_error=0.2, checked=0.01)
ROUTE = RouteDoc(name="faq", deployments=("d",), cache=CachePolicy(semantic=POLICY))


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Found:
    """What a search gives."""

    def __init__(self, number: int, found: tuple[tuple[int, float], ...]) -> None:
        self.number, self.found = number, found


class Words:
    """A memory whose similarity is the share of words in common."""

    def __init__(self) -> None:
        self.epoch = 1
        self.kept: dict[tuple[bytes, int], str] = {}
        self.down = False
        self.slow_s = 0.0

    def problem(self) -> str | None:
        return "down" if self.down else None

    async def ready(self) -> None:
        self._must_be_up()

    async def search(self, namespace: bytes, text: str, k: int) -> Found:
        self._must_be_up()
        await asyncio.sleep(self.slow_s)
        near = [
            (key, _common(text, other)) for (place, key), other in self.kept.items() if place == namespace
        ]
        return Found(1, tuple(sorted(near, key=lambda one: -one[1])[:k]))

    async def add(self, namespace: bytes, key: int, text: str, *, vector_of: int = 0) -> tuple[int, ...]:
        self._must_be_up()
        self.kept[namespace, key] = text
        return ()

    async def remove(self, keys: tuple[int, ...]) -> None:
        self._must_be_up()
        for place in [one for one in self.kept if one[1] in keys]:
            del self.kept[place]

    async def similarity(self, one: str, other: str) -> float:
        self._must_be_up()
        return _common(one, other)

    async def close(self) -> None:
        self.down = True

    def _must_be_up(self) -> None:
        if self.down:
            raise EngineUnavailable("down")


def _common(one: str, other: str) -> float:
    ours, theirs = set(one.split()), set(other.split())
    return len(ours & theirs) / max(len(ours | theirs), 1)


class Still:
    """A clock that stands still."""

    def now_ns(self) -> int:
        return 0

    def wall_ns(self) -> int:
        return 0


class Bench:
    """A recall over a memory of words; what it spawns is run by `settle`."""

    def __init__(self) -> None:
        self.memory = Words()
        self.work: list[Coroutine[Any, Any, None]] = []
        self.recall = Recall(
            cache=SemanticCache(1 << 20),
            memory=self.memory,
            clock=Still(),
            dice=lambda: 0.5,
            spawn=self.work.append,
        )
        self._number = 0

    async def settle(self) -> None:
        while self.work:
            await self.work.pop(0)

    async def ask(
        self, text: str, *, tenant: str = "t", answer: str | None = "The answer."
    ) -> tuple[str, Call]:
        """Look up, and let a model answer where nothing is served."""
        self._number += 1
        made = call(text, tenant=tenant, request_id=f"r{self._number}")
        code, asked = await self.recall.lookup(made, POLICY, "g")
        if asked is not None and not isinstance(asked.verdict, Serve) and answer is not None:
            self.recall.answered(asked, Entry(tenant=tenant, generation="g", body=body(answer)))
            await self.settle()
        return code, made


def body(text: str, finish: str = "stop") -> bytes:
    return json.dumps({"choices": [{"message": {"content": text}, "finish_reason": finish}]}).encode()


def call(text: str, *, tenant: str = "t", request_id: str = "r") -> Call:
    fields = {"model": "faq", "messages": [{"role": "user", "content": text}], "temperature": 0}
    request = InferenceRequest(task=Task.CHAT, route="faq", body=fields)
    return Call(
        ask=Ask(task=Task.CHAT, raw=b"", header=lambda _: None, received_ns=0, wall_ns=0), request_id=request_id,
        principal=Principal(key_id="k", tenant=tenant, team="m"), request=request, route=ROUTE, hints=Hints(),
        data_class=DataClass.INTERNAL, deadline_ns=10**12,
    )  # fmt: skip


QUESTION = "how do i return a pair of shoes that do not fit me"


async def test_a_question_alike_is_served_once_there_is_evidence() -> None:
    bench = Bench()
    pairs = [(f"how do i return a {thing}", f"how can i return a {thing}", True) for thing in THINGS]
    assert await bench.recall.teach(tenant="t", route="faq", policy=POLICY, pairs=pairs) == len(pairs)
    assert (await bench.ask("how do i return a blue coat"))[0] == "semantic_empty"
    code, served = await bench.ask("how can i return a blue coat")
    assert code == "cache_semantic"
    assert bench.recall.complain(served.request_id)
    assert not bench.recall.complain(served.request_id), "one answer is complained of once"
    await bench.settle()
    assert (await bench.ask("how can i return a blue coat"))[0] != "cache_semantic"


async def test_another_tenant_finds_nothing() -> None:
    bench = Bench()
    await bench.ask(QUESTION)
    assert (await bench.ask(QUESTION, tenant="u"))[0] == "semantic_empty"


async def test_a_memory_that_is_down_or_slow_costs_the_cache_and_nothing_else() -> None:
    bench = Bench()
    bench.memory.down = True
    code, made = await bench.ask(QUESTION)
    assert (code, made.recalled) == ("semantic_off", None)
    with pytest.raises(EngineUnavailable):
        await bench.recall.teach(tenant="t", route="faq", policy=POLICY, pairs=[("a", "b", True)])
    bench.memory.down, bench.memory.slow_s = False, 10.0
    assert (await bench.ask(QUESTION))[0] == "semantic_off"


async def test_a_memory_that_fails_after_the_answer_is_found_out_by_the_next() -> None:
    bench = Bench()
    made = call(QUESTION)
    _, asked = await bench.recall.lookup(made, POLICY, "g")
    assert asked is not None
    bench.recall.answered(asked, Entry(tenant="t", generation="g", body=body("yes")))
    bench.memory.down = True
    await bench.settle()
    bench.memory.down = False
    assert (await bench.ask(QUESTION))[0] == "semantic_empty"


@pytest.mark.parametrize("answer", [body("cut", "length"), body(""), b"no json", body("x", "tool_calls")])
async def test_what_is_no_whole_text_is_not_kept(answer: bytes) -> None:
    bench = Bench()
    _, asked = await bench.recall.lookup(call(QUESTION), POLICY, "g")
    assert asked is not None
    bench.recall.answered(asked, Entry(tenant="t", generation="g", body=answer))
    await bench.settle()
    assert bench.memory.kept == {}


async def test_a_new_life_of_the_memory_forgets_what_led_there() -> None:
    bench = Bench()
    await bench.ask(QUESTION)
    assert bench.recall.cache.stats().entries == 1
    bench.memory.epoch, bench.memory.kept = 2, {}
    await bench.ask("something else altogether", answer=None)
    assert bench.recall.cache.stats().entries == 0


async def test_another_catalogue_forgets_what_was_made_under_the_old_one() -> None:
    bench = Bench()
    await bench.ask(QUESTION)
    bench.recall.keep_house("other")
    await bench.settle()
    assert bench.memory.kept == {}


THINGS = [
    f"{colour} {thing}"
    for colour in ("red", "green", "white", "black", "grey", "brown")
    for thing in ("coat", "shirt", "lamp", "chair", "table", "phone", "kettle", "mirror", "carpet", "pillow")
]
