"""The `llamacpp` engine: a GGUF model in a child process, answered by llama.cpp's own server.

It owns the child, the key between the two, and what of a request reaches llama.cpp.  Only fields that
mean the same to a client of any OpenAI server, and sampling parameters, are passed on: others of
llama.cpp's own would go around the token limit (`n_predict`), pick another caller's slot (`id_slot`) or
reuse another tenant's prompt (`cache_prompt`).
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import msgspec

from ondol.core.inference import Capability, Chunk, Completion, Task
from ondol.core.ports import Clock, EngineCall
from ondol.engines.child import Backoff, Child, Ready
from ondol.engines.exchange import Exchange
from ondol.engines.fanout import join, merge, split
from ondol.errors import BadModelFile, EngineRejected, EngineUnavailable
from ondol.wire.gguf import GgufHeader, read_header
from ondol.wire.openai_answers import upstream_body

CONTEXT_TOKENS_DEFAULT: Final = 4096
"""Where a deployment says none: enough for a conversation, and little memory next to any model."""

_FIELDS: Final = frozenset(
    {
        "messages", "prompt", "max_tokens", "max_completion_tokens", "temperature", "top_p", "stop", "n",
        "stream", "stream_options", "seed", "presence_penalty", "frequency_penalty", "logit_bias",
        "logprobs", "top_logprobs", "response_format", "tools", "tool_choice", "parallel_tool_calls",
        "reasoning_effort", "chat_template_kwargs", "top_k", "min_p", "typical_p", "repeat_penalty",
        "repeat_last_n", "xtc_probability", "xtc_threshold", "dynatemp_range", "dynatemp_exponent",
        "mirostat", "mirostat_tau", "mirostat_eta",
    }
)  # fmt: skip
_ALWAYS: Final = frozenset(
    {
        Capability.JSON_OBJECT,
        Capability.JSON_SCHEMA,
        Capability.LOGPROBS,
        Capability.LOGIT_BIAS,
        Capability.CHOICES,
        Capability.SEED,
    }
)


def declared(header: GgufHeader) -> frozenset[Capability]:
    """What llama.cpp can do with a model, seen from its file.

    Tools only where the chat template renders them: elsewhere they are dropped without a word.  A
    named `tool_choice` is never obeyed, nor are `echo`, `suffix` and `dimensions`.
    """
    return _ALWAYS | {Capability.TOOLS} if header.has_tools else _ALWAYS


def read_model(path: Path) -> GgufHeader:
    """The checked header of a GGUF file on disk.

    Raises:
        BadModelFile: it is none, or is not there.
    """
    try:
        with path.open("rb") as file:
            descriptor = file.fileno()
            size = os.fstat(descriptor).st_size
            return read_header(lambda offset, count: os.pread(descriptor, count, offset), size)
    except OSError as error:
        raise BadModelFile(f"the model file {path.name} cannot be read: {error.strerror}") from error


class LlamaCppEngine:
    """One GGUF model in one child process, with `parallel` slots of `context_tokens` each.

    Args:
        name: how sentences call the engine.
        alias: how answers call the model; None takes `name`.
        model_path: a GGUF file.
        clock: for deadlines.
        context_tokens: prompt and answer of one request; None takes the model's own, 4096 at most.
        parallel: requests computed at once; more wait in llama.cpp.
        threads: None takes the processors that this process may use.
        capabilities: None takes what `declared` says of the file.
        gpu_layers: layers put on a GPU, where the installed build of xllamacpp has one; -1 all.
        cache_ram_mib: memory for the prompts of earlier requests.
        connect_timeout_s: to the child, on loopback.
        read_timeout_s: the longest silence; an unstreamed answer is silent until it is whole.
        backoff: pauses between restarts.
    """

    def __init__(
        self,
        *,
        name: str,
        model_path: Path,
        clock: Clock,
        alias: str | None = None,
        context_tokens: int | None = None,
        parallel: int = 2,
        threads: int | None = None,
        capabilities: frozenset[Capability] | None = None,
        gpu_layers: int = 0,
        cache_ram_mib: int = 256,
        connect_timeout_s: float = 5.0,
        read_timeout_s: float = 600.0,
        backoff: Backoff | None = None,
    ) -> None:
        """Check the file's header; `start` loads it.

        Raises:
            BadModelFile: the file is not one that can be loaded.
        """
        header = read_model(model_path)
        if context_tokens is None:
            context_tokens = min(header.context_tokens or CONTEXT_TOKENS_DEFAULT, CONTEXT_TOKENS_DEFAULT)
        self.header = header
        self.context_tokens = context_tokens
        self._name = name
        self._clock = clock
        self._connect_timeout_s = connect_timeout_s
        self._read_timeout_s = read_timeout_s
        self._capabilities = declared(header) if capabilities is None else capabilities
        self._exchange: Exchange | None = None
        self._tenant: str | None = None
        self._shared = False
        key = secrets.token_urlsafe(32)
        self._headers = {"authorization": f"Bearer {key}"}
        self._child = Child(
            name=f"llama.cpp with {name}",
            module="ondol.engines.llamacpp_child",
            config={
                "model_path": str(model_path.resolve()),
                "alias": alias or name,
                "context_tokens": context_tokens,
                "parallel": parallel,
                "threads": _processors() if threads is None else threads,
                "gpu_layers": gpu_layers,
                "cache_ram_mib": cache_ram_mib,
                "api_key": key,
                # Each open request holds one of its threads; the gateway lets more wait than it computes.
                "http_threads": max(2 * parallel, 4) + 4,
            },  # fmt: skip
            serve=self._serve,
            backoff=backoff,
        )

    @property
    def capabilities(self) -> frozenset[Capability]:
        """What it can do beyond its task."""
        return self._capabilities

    @property
    def child(self) -> Child:
        """The process, for status and tests."""
        return self._child

    async def start(self) -> None:
        """Start loading, in the background; `child.ready()` waits for the end of that."""
        self._child.start()

    def problem(self) -> str | None:
        """None when it can take a request now, else a sentence that says why not."""
        if self._exchange is not None:
            return None
        return self._child.problem() or f"llama.cpp with {self._name} has just ended"

    async def complete(self, call: EngineCall) -> Completion:
        """The whole answer.  Cancelling it ends the work in llama.cpp within a second."""
        exchange = self._open()
        calls = split(self._prepared(call))
        if len(calls) == 1:
            return await self._one(exchange, calls[0])
        tasks = [asyncio.create_task(self._one(exchange, part)) for part in calls]
        try:
            return join(await asyncio.gather(*tasks), call.request.n)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    def stream(self, call: EngineCall) -> AsyncIterator[Chunk]:
        """The answer's chunks as they come.  Closing the iterator ends the work in llama.cpp."""
        try:
            exchange = self._open()
            calls = split(self._prepared(call))
        except (EngineUnavailable, EngineRejected) as error:
            return _raising(error)
        streams = [
            exchange.stream(part.request.task, self._body(part), self._headers, part.deadline_ns)
            for part in calls
        ]
        return streams[0] if len(streams) == 1 else merge(streams, call.request.n)

    async def close(self) -> None:
        """End the child; returns when it is gone."""
        await self._child.close()

    async def _serve(
        self, ready: Ready, _reader: asyncio.StreamReader, _writer: asyncio.StreamWriter
    ) -> None:
        exchange = Exchange(
            f"http://127.0.0.1:{ready['port']}/v1",
            connect_timeout_s=self._connect_timeout_s,
            read_timeout_s=self._read_timeout_s,
            clock=self._clock,
        )
        self._exchange = exchange
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            self._exchange = None
            await exchange.close()

    def _open(self) -> Exchange:
        exchange = self._exchange
        if exchange is None:
            raise EngineUnavailable(self.problem() or f"{self._name} is not ready")
        return exchange

    async def _one(self, exchange: Exchange, call: EngineCall) -> Completion:
        return await exchange.complete(call.request.task, self._body(call), self._headers, call.deadline_ns)

    def _prepared(self, call: EngineCall) -> EngineCall:
        """The call with the fields that llama.cpp may see.

        Raises:
            EngineRejected: it asks for what llama.cpp would answer in another form than OpenAI's.
        """
        request = call.request
        if request.task is Task.EMBEDDING:
            raise EngineRejected(f"{self._name} is a language model; it gives no embeddings", param="model")
        if request.task is Task.COMPLETION and request.body.get("logprobs") is not None:
            raise EngineRejected(
                f"{self._name} gives log-probabilities in chat only; use /v1/chat/completions",
                param="logprobs",
            )
        if request.task is Task.CHAT and not request.body.get("messages"):
            raise EngineRejected("found no messages, expected at least one", param="messages")
        # One tenant's time to first token must not tell what another one asked: as soon as there are
        # two, prompts are computed anew each time.
        tenant = call.principal.tenant
        if self._tenant is None:
            self._tenant = tenant
        self._shared = self._shared or tenant != self._tenant
        body = {field: value for field, value in request.body.items() if field in _FIELDS}
        body["cache_prompt"] = not self._shared
        return msgspec.structs.replace(call, request=msgspec.structs.replace(request, body=body))

    def _body(self, call: EngineCall) -> bytes:
        return upstream_body(call, self._name, limit_field="max_tokens")


def _processors() -> int:
    try:
        return max(len(os.sched_getaffinity(0)), 1)
    except AttributeError:
        return os.cpu_count() or 1


async def _raising(error: EngineUnavailable | EngineRejected) -> AsyncIterator[Chunk]:
    yield await _raise(error)


async def _raise(error: EngineUnavailable | EngineRejected) -> Chunk:
    raise error
