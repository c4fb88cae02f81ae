"""The semantic half of `lookup`, and what follows an answer: it is compared, learnt from and kept.

The shell around `semantic`: it asks the memory, in the time of a request only to search, the rest afterwards.  Whatever
fails here, the request goes on without a cache (P4: the model answers).
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from typing import Any, Final

import msgspec

from ondol.core.memory import Memory
from ondol.core.ports import Clock
from ondol.core.route_terms import SemanticPolicy
from ondol.errors import EngineUnavailable, OndolError
from ondol.gateway.cache import Entry
from ondol.gateway.call import Asked, Call
from ondol.gateway.semantic import Check, Miss, SemanticCache, Serve, Trial
from ondol.gateway.semantic_compare import compare_answers
from ondol.gateway.semantic_eligible import eligible
from ondol.gateway.semantic_features import NEIGHBOURS
from ondol.wire.openai_text import Said, said_in, said_in_chunks

SEARCH_S: Final = 0.25
"""A question waits for the memory at most so long: it is to make answers quicker."""
READY_S: Final = 30.0
COMPARED_CHARS_MAX: Final = 4000
TRIALS_MAX: Final = 8192
"""Answers served whose callers may still complain."""


class Recall:
    """Owned by the pipeline; `spawn` runs what need not be waited for, `dice` gives floats in [0, 1)."""

    def __init__(
        self, *, cache: SemanticCache, memory: Memory, clock: Clock, dice: Callable[[], float],
        spawn: Callable[[Coroutine[Any, Any, None]], None],
    ) -> None:  # fmt: skip
        """Take the parts; nothing is started before a route wants it."""
        self.cache = cache
        self._memory = memory
        self._clock = clock
        self._dice = dice
        self._spawn = spawn
        self._epoch = 0
        self._trials: OrderedDict[str, Trial] = OrderedDict()

    async def lookup(self, call: Call, policy: SemanticPolicy, generation: str) -> tuple[str, Asked | None]:
        """The verdict on what is remembered: a code, and what there is to learn from.

        Some 3 ms for a short question, in the memory's process; `semantic_off` where that does not answer.
        """
        question = eligible(
            call.request, policy, call.data_class, tenant=call.principal.tenant, generation=generation,
            objective=call.objective.value,
        )  # fmt: skip
        if isinstance(question, Miss):
            return question.code, None
        try:
            async with asyncio.timeout(SEARCH_S):
                near = await self._memory.search(question.namespace, question.text, NEIGHBOURS)
        except (OndolError, TimeoutError):
            return "semantic_off", None
        self._began_anew()
        verdict = self.cache.lookup(
            question, policy, near.found, now_ns=self._clock.now_ns(), dice=self._dice()
        )
        if isinstance(verdict, Serve):
            self._trials[call.request_id] = verdict.trial
            if len(self._trials) > TRIALS_MAX:
                self._trials.popitem(last=False)
            return "cache_semantic", Asked(question=question, verdict=verdict, number=near.number)
        code = "semantic_check" if isinstance(verdict, Check) else verdict.code
        return code, Asked(question=question, verdict=verdict, number=near.number)

    def answered(self, asked: Asked, entry: Entry) -> None:
        """A model has answered what was looked up: learn and remember, after the request."""
        self._spawn(self._answered(asked, entry))

    def complain(self, request_id: str) -> bool:
        """A caller says that an answer from here was wrong; False where nothing is known of it any more."""
        trial = self._trials.pop(request_id, None)
        if trial is None:
            return False
        self._remove(self.cache.complain(trial))
        return True

    async def teach(
        self, *, tenant: str, route: str, policy: SemanticPolicy, pairs: list[tuple[str, str, bool]]
    ) -> int:
        """Learn from labelled pairs (a question that is cached, one that is asked, whether one answer fits both).

        Raises:
            OndolError: the memory cannot answer; what was learnt by then stays.
        """
        try:
            async with asyncio.timeout(READY_S):
                await self._memory.ready()
        except TimeoutError as error:
            raise EngineUnavailable(f"the memory did not start within {READY_S:g} s") from error
        for cached, asked, same in pairs:
            similarity = await self._memory.similarity(cached, asked)
            self.cache.teach(
                tenant, route, policy, cached=cached, asked=asked, similarity=similarity, same=same
            )
        return len(pairs)

    def keep_house(self, generation: str) -> None:
        """Forget what is too old or of another catalogue."""
        self._remove(self.cache.expire(self._clock.now_ns()) + self.cache.purge(generation))

    def status(self) -> dict[str, Any]:
        """What is held, what each route has learnt, and why similar questions are not found where they are not."""
        return {
            "problem": self._memory.problem(), "routes": self.cache.owners(),
            **msgspec.structs.asdict(self.cache.stats()),
        }  # fmt: skip

    async def close(self) -> None:
        """End the memory."""
        await self._memory.close()

    # ---- inside

    async def _answered(self, asked: Asked, entry: Entry) -> None:
        try:
            said = _said(entry)
            if said is None:
                return
            trial = None if isinstance(asked.verdict, Serve) else asked.verdict.trial
            same = False
            if trial is not None:
                same = await self._compare(trial, said.text)
            self._began_anew()
            question = asked.question
            key, gone = self.cache.put(
                question, entry, said=said.text, now_ns=self._clock.now_ns(), same_as=trial if same else None
            )
            if key is not None:
                given_up = await self._memory.add(
                    question.namespace, key, question.text, vector_of=asked.number
                )
                self.cache.forget(given_up)
            self._remove(gone)
        except (OndolError, TimeoutError):
            return  # the memory is away: nothing is remembered, and the next question finds that out, too

    async def _compare(self, trial: Trial, said: str) -> bool:
        cached = _said(trial.entry)
        if cached is None:
            return False
        similarity = None
        if max(len(said), len(cached.text)) <= COMPARED_CHARS_MAX and said.strip() and cached.text.strip():
            similarity = await self._memory.similarity(said, cached.text)
        outcome = compare_answers(said, cached.text, similarity)
        self.cache.learn(trial, outcome)
        return outcome == "same"

    def _began_anew(self) -> None:
        """Where the memory's process has ended, its vectors are gone: so are the entries that they led to."""
        if self._memory.epoch != self._epoch:
            if self._epoch:
                self.cache.clear()
            self._epoch = self._memory.epoch

    def _remove(self, keys: tuple[int, ...]) -> None:
        if keys:
            self._spawn(self._removed(keys))

    async def _removed(self, keys: tuple[int, ...]) -> None:
        try:
            await self._memory.remove(keys)
        except OndolError:
            return  # the cache has forgotten them: what the memory still finds leads nowhere


def _said(entry: Entry) -> Said | None:
    """The answer's text where it may be given again: whole, and nothing but text."""
    try:
        said = said_in_chunks(entry.chunks) if entry.chunks else said_in(entry.body)
    except msgspec.DecodeError:
        return None
    return said if said.plain and said.finish == "stop" and said.text.strip() else None
