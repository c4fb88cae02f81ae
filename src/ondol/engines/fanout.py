"""Several answers to one request, asked for one by one and put together again.

llama.cpp does answer `n` and lists of prompts by itself, but its usage counts only one of the choices, and
what is not counted is not paid for.  So each choice is its own request, its usage is exact, and the
engine batches them as it batches any others.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any, Final

import msgspec

from ondol.core.inference import Chunk, Completion, Task, Usage
from ondol.core.ports import EngineCall
from ondol.errors import EngineFailed, EngineRejected, EngineUnavailable

PARTS_MAX: Final = 128
"""Most choices (prompts times `n`) of one request: OpenAI allows an `n` of 128."""

_ENCODER = msgspec.json.Encoder()
_DECODER = msgspec.json.Decoder()


def split(call: EngineCall) -> list[EngineCall]:
    """The calls of one choice each, in the order of their choices; the call itself where it is one.

    With a seed, choice i has the seed plus i: the same request gives the same, but different, choices.

    Raises:
        EngineRejected: it asks for more than `PARTS_MAX` choices.
    """
    request = call.request
    prompts = _prompts(request.body) if request.task is Task.COMPLETION else None
    if request.n == 1 and (prompts is None or len(prompts) == 1):
        return [call]
    total = request.n * (1 if prompts is None else len(prompts))
    if total > PARTS_MAX:
        raise EngineRejected(
            f"found {total} choices (prompts times n), expected at most {PARTS_MAX}; send several requests",
            param="n",
        )
    parts = []
    for index in range(total):
        body = {key: value for key, value in request.body.items() if key != "n"}
        if prompts is not None:
            body["prompt"] = prompts[index // request.n]
        if isinstance(body.get("seed"), int):
            body["seed"] += index
        part = msgspec.structs.replace(request, body=body, n=1)
        parts.append(msgspec.structs.replace(call, request=part))
    return parts


def join(answers: Sequence[Completion], n: int) -> Completion:
    """One answer with the choices of all, of which each `n` in a row have the same prompt.

    Raises:
        EngineUnavailable: an answer has no choice.
    """
    whole: dict[str, Any] = {}
    choices = []
    for index, answer in enumerate(answers):
        body = _DECODER.decode(answer.body)
        whole = whole or body
        try:
            choice = body["choices"][0]
        except (KeyError, IndexError, TypeError) as error:
            raise EngineUnavailable("the engine gave an answer without a choice") from error
        choice["index"] = index
        choices.append(choice)
    usage = _sum([answer.usage for answer in answers], n)
    whole["choices"] = choices
    whole.pop("timings", None)
    whole["usage"] = _usage_json(usage)
    return Completion(body=_ENCODER.encode(whole), usage=usage, model=answers[0].model)


async def merge(streams: Sequence[AsyncIterator[Chunk]], n: int) -> AsyncIterator[Chunk]:
    """The chunks of all streams as they come, then one chunk with the usage of all.

    Closing it closes every stream.

    Raises: what the first stream to fail raises; once a chunk has gone out, that is never
        EngineUnavailable but EngineFailed.
    """
    # Bounded: a client that reads slowly slows the engine, instead of filling our memory.
    queue: asyncio.Queue[tuple[int, Chunk | BaseException | None]] = asyncio.Queue(maxsize=2 * len(streams))
    tasks = {asyncio.create_task(_pump(index, stream, queue)) for index, stream in enumerate(streams)}
    usages: list[Usage | None] = [None] * len(streams)
    head: dict[str, Any] | None = None
    running = len(streams)
    try:
        while running:
            index, item = await queue.get()
            if item is None:
                running -= 1
                continue
            if isinstance(item, BaseException):
                if head is not None and isinstance(item, EngineUnavailable):
                    raise EngineFailed(item.message) from item
                raise item
            usages[index] = item.usage or usages[index]
            if not item.has_choices:
                continue
            body = _DECODER.decode(item.data)
            if head is None:
                head = {key: body[key] for key in ("id", "created", "model", "object") if key in body}
            body.update(head)
            body.pop("usage", None)
            for choice in body["choices"]:
                choice["index"] = index
            yield msgspec.structs.replace(item, data=_ENCODER.encode(body), usage=None)
        usage = _sum(usages, n)
        last = {**(head or {}), "choices": [], "usage": _usage_json(usage)}
        yield Chunk(data=_ENCODER.encode(last), has_choices=False, usage=usage)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def _pump(
    index: int,
    stream: AsyncIterator[Chunk],
    queue: asyncio.Queue[tuple[int, Chunk | BaseException | None]],
) -> None:
    try:
        async for chunk in stream:
            await queue.put((index, chunk))
        await queue.put((index, None))
    except asyncio.CancelledError:
        raise
    except Exception as error:
        # Handed over to the reader, who raises it.
        await queue.put((index, error))
    finally:
        close = getattr(stream, "aclose", None)
        if close is not None:
            await close()


def _prompts(body: dict[str, Any]) -> list[Any] | None:
    """The prompts of a completion request that has a list of them: of texts, or of token arrays."""
    prompt = body.get("prompt")
    if isinstance(prompt, list) and prompt and all(isinstance(item, str | list) for item in prompt):
        return prompt
    return None


def _sum(usages: Sequence[Usage | None], n: int) -> Usage:
    """All output, and each prompt once, as OpenAI counts it.  A missing part makes it an estimate."""
    known = [usage or Usage(estimated=True) for usage in usages]
    prompts = known[::n]
    return Usage(
        input_tokens=sum(usage.input_tokens for usage in prompts),
        output_tokens=sum(usage.output_tokens for usage in known),
        cached_tokens=sum(usage.cached_tokens for usage in prompts),
        reasoning_tokens=sum(usage.reasoning_tokens for usage in known),
        estimated=any(usage.estimated for usage in known),
    )


def _usage_json(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.input_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.input_tokens + usage.output_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }
