"""Asking a site over HTTP, as any client would: questions that stream, and the administration calls."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from types import TracebackType
from typing import Any, Self

import msgspec
from pyreqwest.client import Client, ClientBuilder
from pyreqwest.exceptions import PyreqwestError
from pyreqwest.request import RequestBuilder
from pyreqwest.response import Response

from ondol.cli.installation import CommandFailed, Target

_CONNECT_S = 5.0
_READ_S = 120.0


class Answer(msgspec.Struct, kw_only=True):
    """One answered question: what the client saw, and what the site says of it.

    `ttft_s` and `total_s` are measured here.  `ondol` is the reply's own account (the field of that name
    in the last chunk, or the headers), `record` the ledger's record with the reason's sentences.
    """

    text: str
    ttft_s: float | None
    total_s: float
    input_tokens: int | None = None
    output_tokens: int | None = None
    ondol: dict[str, Any] = {}
    record: dict[str, Any] = {}

    @property
    def site(self) -> str:
        """Where it was answered."""
        return str(self.record.get("answered_by") or self.ondol.get("site") or "?")

    def reason(self, lang: str) -> str:
        """Why it was answered there, as a sentence (`en` or `ko`), else as a code."""
        reason = self.record.get("reason") or {}
        return str(reason.get(lang) or self.ondol.get("reason") or "?")


class Asker:
    """A connection to one site with one key.  Use as an async context manager."""

    def __init__(self, target: Target) -> None:
        """Name the site; nothing is opened yet."""
        self._target = target
        self._client: Client = (
            ClientBuilder()
            .no_proxy()
            .connect_timeout(timedelta(seconds=_CONNECT_S))
            .read_timeout(timedelta(seconds=_READ_S))
            .build()
        )

    async def __aenter__(self) -> Self:
        """Open for use."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the connections."""
        await self._client.close()

    async def get(self, path: str) -> Any:
        """The decoded JSON of a GET."""
        return await self._call("GET", path, None)

    async def post(self, path: str, body: dict[str, Any]) -> Any:
        """The decoded JSON of a POST."""
        return await self._call("POST", path, body)

    async def delete(self, path: str) -> Any:
        """The decoded JSON of a DELETE."""
        return await self._call("DELETE", path, None)

    async def is_ready(self) -> bool:
        """Whether the site says that it can answer."""
        try:
            response = await self._client.get(f"{self._target.url}/readyz").build().send()
        except PyreqwestError:
            return False
        return response.status == 200

    async def ask(
        self,
        question: str,
        *,
        model: str,
        headers: dict[str, str],
        options: dict[str, Any],
        stream: bool,
        on_text: Callable[[str], None],
    ) -> Answer:
        """Ask one question; `on_text` gets the text as it comes.

        Raises:
            CommandFailed: the site cannot be reached, refuses, or breaks off.
        """
        body: dict[str, Any] = {
            **options,
            "model": model,
            "messages": [{"role": "user", "content": question}],
            "stream": stream,
        }
        if stream:
            body["stream_options"] = {"include_usage": True}
        request = self._request("POST", "/v1/chat/completions", body).headers(headers)
        start = time.monotonic()
        try:
            if stream:
                answer = await self._streamed(request, start, on_text)
            else:
                answer = await self._whole(request, start, on_text)
        except PyreqwestError as error:
            raise self._unreachable(error) from error
        if answer.ondol.get("request_id"):
            answer.record = await self.get(f"/v1/ondol/requests/{answer.ondol['request_id']}")
        return answer

    async def _streamed(
        self, request: RequestBuilder, start: float, on_text: Callable[[str], None]
    ) -> Answer:
        pieces: list[str] = []
        answer = Answer(text="", ttft_s=None, total_s=0.0)
        async with request.streamed_read_buffer_limit(0).build_streamed() as response:
            if response.status != 200:
                raise _refused(response.status, bytes(await response.bytes()))
            answer.ondol = _from_headers(response)
            ended = False
            async for data in _events(response):
                if data == b"[DONE]":
                    ended = True
                    continue
                text = _take_event(answer, msgspec.json.decode(data))
                if text:
                    if answer.ttft_s is None:
                        answer.ttft_s = time.monotonic() - start
                    pieces.append(text)
                    on_text(text)
        if not ended:
            raise CommandFailed("the stream broke off before its end ([DONE] never came).")
        answer.total_s = time.monotonic() - start
        answer.text = "".join(pieces)
        return answer

    async def _whole(self, request: RequestBuilder, start: float, on_text: Callable[[str], None]) -> Answer:
        response = await request.build().send()
        payload = bytes(await response.bytes())
        if response.status != 200:
            raise _refused(response.status, payload)
        answer = Answer(text="", ttft_s=None, total_s=time.monotonic() - start)
        answer.ondol = _from_headers(response)
        body = msgspec.json.decode(payload)
        answer.text = body["choices"][0]["message"]["content"] or ""
        _take_usage(answer, body.get("usage"))
        on_text(answer.text)
        return answer

    def _request(self, method: str, path: str, body: dict[str, Any] | None) -> RequestBuilder:
        request = self._client.request(method, self._target.url + path).bearer_auth(self._target.key)
        if body is None:
            return request
        return request.header("content-type", "application/json").body_bytes(msgspec.json.encode(body))

    async def _call(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        try:
            response = await self._request(method, path, body).build().send()
            payload = bytes(await response.bytes())
        except PyreqwestError as error:
            raise self._unreachable(error) from error
        if response.status >= 300:
            raise _refused(response.status, payload)
        return msgspec.json.decode(payload) if payload else None

    def _unreachable(self, error: PyreqwestError) -> CommandFailed:
        return CommandFailed(
            f"{self._target.url} cannot be reached or broke off ({error.message}). "
            "Is the site running? Its log says more."
        )


def _take_event(answer: Answer, event: dict[str, Any]) -> str:
    """Note what an event says, and return the new text in it.

    Raises:
        CommandFailed: the event is an error.
    """
    error = event.get("error")
    if error:
        raise CommandFailed(f"the answer broke off: {error.get('message', error)}")
    _take_usage(answer, event.get("usage"))
    if "ondol" in event:
        answer.ondol.update(event["ondol"])
    choices = event.get("choices") or []
    return str(choices[0].get("delta", {}).get("content") or "") if choices else ""


def _take_usage(answer: Answer, usage: dict[str, Any] | None) -> None:
    if usage:
        answer.input_tokens = usage.get("prompt_tokens")
        answer.output_tokens = usage.get("completion_tokens")


async def _events(response: Response) -> AsyncIterator[bytes]:
    """The data of each event of a stream, as it comes."""
    pending = b""
    while (chunk := await response.body_reader.read_chunk()) is not None:
        *lines, pending = (pending + bytes(chunk)).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()


def _from_headers(response: Response) -> dict[str, Any]:
    """The `x-ondol-*` headers under the names that the field `ondol` uses."""
    found: dict[str, Any] = {}
    for name in ("request-id", "site", "model", "deployment", "cache", "reason", "cost"):
        value = response.get_header(f"x-ondol-{name}")
        if value is not None:
            found[name.replace("-", "_")] = value
    for name in ("energy-j", "carbon-g"):
        value = response.get_header(f"x-ondol-{name}")
        if value is not None:
            found[name.replace("-", "_")] = float(value)
    return found


def _refused(status: int, payload: bytes) -> CommandFailed:
    try:
        error = msgspec.json.decode(payload)["error"]
        return CommandFailed(f"{error['message']} ({status} {error.get('code') or error.get('type')})")
    except (msgspec.DecodeError, KeyError, TypeError):
        return CommandFailed(f"the site answered {status} without saying why.")
