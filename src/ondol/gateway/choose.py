"""The stage `schedule` with what it needs: a snapshot of each endpoint for this request, and time for what can wait."""

from __future__ import annotations

import asyncio
from zoneinfo import ZoneInfo

from ondol.core.ports import Clock
from ondol.errors import BudgetExhausted, Overloaded
from ondol.gateway.affinity import Affinity, prefixes
from ondol.gateway.books import View
from ondol.gateway.call import Call
from ondol.gateway.endpoints import Endpoint
from ondol.gateway.flex import hold_s
from ondol.gateway.reserve import Purse
from ondol.gateway.schedule import Candidate, Choice, Wish, schedule


class Chooser:
    """Owned by the pipeline; remembers where conversations were."""

    def __init__(self, purse: Purse, clock: Clock) -> None:
        """Take the parts."""
        self._purse = purse
        self._clock = clock
        self._affinity = Affinity()

    async def choose(self, view: View, call: Call) -> Choice:
        """The endpoints to try, best first; a request that can wait is held until it is its time.

        Raises:
            OndolError: as `schedule`.
        """
        call.conversation = _conversation(view, call)
        while True:
            now_ns = self._clock.now_ns()
            candidates = [self._candidate(one, call, now_ns) for one in view.routes[call.route.name]]
            remaining_ms = (call.deadline_ns - now_ns) / 1e6
            choice, full = self._scheduled(view, call, candidates, remaining_ms)
            hold = 0.0
            if call.flex:
                hold = hold_s(
                    call.route.flex, wall_ns=call.wall_ns + now_ns - call.received_ns,
                    zone=ZoneInfo(view.catalog.gateway.timezone), remaining_ms=remaining_ms,
                    needs_ms=max([one.total_ms for one in candidates]), slot=choice is not None,
                )  # fmt: skip
            if hold > 0:
                await asyncio.sleep(hold)
            elif choice is not None:
                return choice
            elif full is not None:
                raise full

    def _scheduled(
        self, view: View, call: Call, candidates: list[Candidate], remaining_ms: float
    ) -> tuple[Choice | None, Overloaded | None]:
        wish = Wish(
            task=call.request.task,
            needs=call.request.needs,
            tokens_max=call.request.prompt_tokens_max,
            prompt_tokens=call.request.prompt_tokens,
            objective=call.objective,
            data_class=call.data_class,
            remaining_ms=remaining_ms,
            # When its time runs out it takes its place in the queue like everybody.
            flex=call.flex and max([one.total_ms for one in candidates]) < remaining_ms,
        )
        try:
            return schedule(wish, candidates), None
        except BudgetExhausted as error:
            raise self._purse.what_is_left(view, call) or error from error
        except Overloaded as error:
            return None, error

    def remember(self, call: Call, endpoint: Endpoint) -> None:
        """The conversation, as far as it went, was read there."""
        if call.conversation:
            self._affinity.put(
                call.conversation[-1], endpoint.name, call.request.prompt_tokens, self._clock.now_ns()
            )

    def spared(self, call: Call, endpoint: Endpoint) -> int:
        """Tokens of the prompt that this endpoint has read in an earlier turn."""
        if not call.conversation:
            return 0
        found = self._affinity.find(call.conversation, self._clock.now_ns())
        return found[1] if found is not None and found[0] == endpoint.name else 0

    def _candidate(self, endpoint: Endpoint, call: Call, now_ns: int) -> Candidate:
        affordable = True
        if call.budgets or call.hints.max_cost is not None:
            affordable = self._purse.affords(call, endpoint, now_ns)
        return endpoint.candidate(
            call.request,
            call.max_output_tokens,
            now_ns,
            affordable=affordable,
            spared=self.spared(call, endpoint),
        )


def _conversation(view: View, call: Call) -> tuple[bytes, ...]:
    """The parts of a conversation by their hashes, where more than one endpoint could go on with it."""
    messages = call.request.body.get("messages")
    if len(view.routes[call.route.name]) < 2 or not isinstance(messages, list):
        return ()
    return prefixes(call.principal.tenant, messages)
