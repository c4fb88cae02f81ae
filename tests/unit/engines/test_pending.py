"""An engine whose model is not here: it says why, and answers nothing."""

from __future__ import annotations

from typing import cast

import pytest

from ondol.core.ports import Engine, EngineCall
from ondol.engines.pending import PendingEngine
from ondol.errors import EngineUnavailable

pytestmark = pytest.mark.anyio
CALL = cast(EngineCall, object())


async def test_it_says_what_is_so_at_that_moment_and_lets_others_take_over() -> None:
    words = ["helper: 43 % of 93 MB fetched", "helper: waits"]
    engine: Engine = PendingEngine(lambda: words[0])
    await engine.start()
    assert engine.problem() == "helper: 43 % of 93 MB fetched"
    del words[0]
    assert engine.problem() == "helper: waits"
    with pytest.raises(EngineUnavailable, match="waits"):
        await engine.complete(CALL)
    with pytest.raises(EngineUnavailable, match="waits"):
        await anext(engine.stream(CALL))
    assert engine.capabilities == frozenset()
    await engine.close()
