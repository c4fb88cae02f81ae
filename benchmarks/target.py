"""Where a request goes, and its bytes."""

from __future__ import annotations

import msgspec

PROMPT = "Name the three primary colours, and say in one sentence why they are called so."
ANSWER = "Red, yellow and blue: no mixture of other paints gives them, and mixtures of them give the rest."


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """One API of one server on 127.0.0.1; `model` is what the request asks for."""

    port: int
    path: str = "/v1/chat/completions"
    model: str = "bench"
    headers: tuple[tuple[str, str], ...] = ()
    method: str = "POST"

    @property
    def url(self) -> str:
        """The address as text."""
        return f"http://127.0.0.1:{self.port}{self.path}"

    def body(self, prompt: str = PROMPT, *, stream: bool = False) -> bytes:
        """A chat request of about 200 bytes, as clients send it."""
        if self.method == "GET":
            return b""
        message = {
            "model": self.model,
            "messages": [
                {"role": "system", "content": "You are brief and exact."},
                {"role": "user", "content": prompt},
            ],
            "max_tokens": 256,
        }
        return msgspec.json.encode(message | ({"stream": True} if stream else {}))

    def request(self, prompt: str = PROMPT, *, stream: bool = False, body: bytes | None = None) -> bytes:
        """The whole HTTP/1.1 request, with `body` or the usual one."""
        body = self.body(prompt, stream=stream) if body is None else body
        lines = [f"{self.method} {self.path} HTTP/1.1", f"Host: 127.0.0.1:{self.port}", "Accept: */*"]
        lines += [f"{name}: {value}" for name, value in self.headers]
        if body:
            lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
        return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def completion() -> bytes:
    """The one answer that the instant upstream gives: a chat completion of about 500 bytes."""
    return msgspec.json.encode(
        {
            "id": "chatcmpl-bench0000000000000000001",
            "object": "chat.completion",
            "created": 1_760_000_000,
            "model": "bench-model",
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": ANSWER},
                    "logprobs": None,
                    "finish_reason": "stop",
                }
            ],
            "usage": {"prompt_tokens": 34, "completion_tokens": 23, "total_tokens": 57},
            "system_fingerprint": "fp_bench",
        }
    )
