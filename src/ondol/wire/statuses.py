"""The HTTP status of each error: the one place that knows both."""

from __future__ import annotations

from typing import Final

from ondol.errors import (
    BudgetExhausted,
    ConfigError,
    Conflict,
    DeadlineExceeded,
    EngineError,
    EngineFailed,
    EngineRejected,
    Fenced,
    Forbidden,
    HelloAgain,
    NotFound,
    NotServed,
    OndolError,
    RangeRefused,
    RateLimited,
    Refused,
    RequestError,
    StateUnavailable,
    TooLarge,
    Unauthenticated,
    UnknownModel,
)

_STATUS: Final[tuple[tuple[type[OndolError], int], ...]] = (
    (TooLarge, 413), (Unauthenticated, 401), (Forbidden, 403), (UnknownModel, 404), (NotFound, 404),
    (NotServed, 501), (Conflict, 422), (Fenced, 409), (HelloAgain, 409), (RangeRefused, 409), (RequestError, 400),
    (RateLimited, 429), (BudgetExhausted, 402),
    (Refused, 503), (StateUnavailable, 503), (DeadlineExceeded, 504), (EngineFailed, 502), (EngineError, 503),
    (ConfigError, 422),
)  # fmt: skip


def status_of(error: OndolError) -> int:
    """The HTTP status of an error class; 500 for what should not happen."""
    if isinstance(error, EngineRejected):
        return error.status
    return next((status for kind, status in _STATUS if isinstance(error, kind)), 500)
