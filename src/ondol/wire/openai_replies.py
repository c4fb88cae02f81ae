"""OpenAI's replies that are ours to make: errors, the list of models, and what is served at all."""

from __future__ import annotations

from typing import Final

import msgspec


class _Error(msgspec.Struct):
    message: str
    type: str
    param: str | None
    code: str


class _ErrorBody(msgspec.Struct):
    error: _Error


def error_body(*, message: str, kind: str, code: str, param: str | None = None) -> bytes:
    """OpenAI's error object: `{"error": {"message", "type", "param", "code"}}`."""
    return msgspec.json.encode(_ErrorBody(_Error(message, kind, param, code)))


class RouteModel(msgspec.Struct):
    """One entry of the list of models: a route that the caller may use."""

    id: str
    created: int
    owned_by: str
    object: str = "model"


def models_body(models: list[RouteModel]) -> bytes:
    """The answer of GET /v1/models."""
    return msgspec.json.encode({"object": "list", "data": models})


SERVED: Final = (
    "POST /v1/chat/completions",
    "POST /v1/completions",
    "POST /v1/embeddings",
    "GET /v1/models",
    "GET /v1/models/{model}",
)
NOT_SERVED: Final = (
    "assistants", "audio", "batches", "chatkit", "containers", "conversations", "evals", "files",
    "fine_tuning", "images", "moderations", "organization", "realtime", "responses", "threads",
    "uploads", "vector_stores", "videos", "edits", "engines", "fine-tunes", "skills",
)  # fmt: skip
"""First path segments under /v1 of OpenAI's API that this gateway does not serve (API reference, 2026)."""
