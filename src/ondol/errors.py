"""The error tree.  Each class has a stable `code`, and says whether trying again can help.

    OndolError
    ├── RequestError        the caller must change something
    │   ├── InvalidRequest · Unauthenticated · Forbidden · UnknownModel · NotFound
    │   ├── TooLarge · Unsupported · NotServed · Conflict
    │   └── BadSignature · Fenced · HelloAgain · RangeRefused
    ├── Refused             we could, but will not now
    │   ├── RateLimited · BudgetExhausted · Overloaded · Draining
    │   ├── NoEndpoint · LedgerUnavailable · LedgerFull
    │   └── LinkDown · HubRefused
    ├── EngineError         the model's side failed
    │   ├── EngineUnavailable    before the first byte: another engine may take over
    │   ├── EngineRejected       the engine says that the request itself is wrong
    │   ├── EngineFailed         after the first byte: nobody may take over
    │   └── DeadlineExceeded     the time that the caller allows is used up
    ├── StateError          durable state is not as it must be
    │   ├── LedgerBroken · DigestMismatch · SchemaTooNew · DirectoryLocked
    │   ├── BadModelFile · GenerationRefused
    │   └── StateUnavailable
    └── ConfigError         a named key, the value found, what is allowed

No class knows HTTP; `wire.statuses` maps classes to statuses, `cli` maps them to exit codes.
A message says what was found, what was expected and what to do.  It never holds a prompt or a secret.
"""

from __future__ import annotations

from typing import ClassVar


class OndolError(Exception):
    """The base of everything that Ondol raises on purpose."""

    code: ClassVar[str] = "internal_error"
    retryable: ClassVar[bool] = False
    request_id: str | None = None
    headers: tuple[tuple[str, str], ...] = ()

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        """Keep the sentence, the request field that it is about, and when trying again may help."""
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s


class RequestError(OndolError):
    """The caller must change something."""


class InvalidRequest(RequestError):
    """The request is not well formed."""

    code = "invalid_request"


class Unauthenticated(RequestError):
    """The caller is nobody we know.  One message for every cause, so that nothing leaks."""

    code = "invalid_api_key"


class ExpiredApiKey(Unauthenticated):
    """The key has expired; only a caller who has proved to hold its secret is told."""

    code = "expired_api_key"


class RevokedApiKey(Unauthenticated):
    """The key was revoked; only a caller who has proved to hold its secret is told."""

    code = "revoked_api_key"


class Forbidden(RequestError):
    """We know the caller, who may not do this."""

    code = "forbidden"


class UnknownModel(RequestError):
    """No route has the name that the caller sent as `model`."""

    code = "model_not_found"


class NotFound(RequestError):
    """The thing asked for does not exist, or is not the caller's to see."""

    code = "not_found"


class TooLarge(RequestError):
    """Some part of the request passes its bound."""

    code = "request_too_large"


class Unsupported(RequestError):
    """No engine behind this route can do what the request asks for."""

    code = "unsupported_by_model"


class NotServed(RequestError):
    """An API of the protocol that this gateway does not serve."""

    code = "not_served"


class Conflict(RequestError):
    """The request contradicts one that was made before under the same idempotency key."""

    code = "idempotency_conflict"


class BadSignature(RequestError):
    """A signed statement, model or range does not prove what it says."""

    code = "bad_signature"


class Fenced(RequestError):
    """Another machine lives with the same identity, and it was there first."""

    code = "fenced"


class HelloAgain(RequestError):
    """The hub does not know this process of the site: it shall say hello, then ask again."""

    code = "hello_again"


class RangeRefused(RequestError):
    """A range of the ledger does not continue what the hub has: forked, or changed on its way."""

    code = "range_refused"


class Refused(OndolError):
    """We could, but will not now."""

    retryable = True


class RateLimited(Refused):
    """A limit on requests or tokens over time is reached."""

    code = "rate_limit_exceeded"


class BudgetExhausted(Refused):
    """A hard budget has not enough left for the worst case of this request."""

    code = "budget_exhausted"
    retryable = False


class Overloaded(Refused):
    """Every place that could answer is full."""

    code = "overloaded"


class Draining(Refused):
    """This gateway is about to stop."""

    code = "draining"


class NoEndpoint(Refused):
    """Every endpoint of the route was dropped; the message says why, one by one."""

    code = "no_endpoint"


class LedgerUnavailable(Refused):
    """The ledger cannot commit, so no billable work is done."""

    code = "ledger_unavailable"


class LedgerFull(Refused):
    """The ledger is at its bound, so no new billable work is taken."""

    code = "ledger_full"


class LinkDown(Refused):
    """The hub, or another site, cannot be reached now."""

    code = "link_down"


class HubRefused(Refused):
    """The hub answered, and said no; `why` is the stable code that it gave, `hub_ns` its time if it said that."""

    code = "hub_refused"
    retryable = False

    def __init__(
        self, message: str, *, why: str = "", retry_after_s: float | None = None, hub_ns: int = 0
    ) -> None:
        """Keep the hub's own code beside its sentence."""
        super().__init__(message, retry_after_s=retry_after_s)
        self.why = why
        self.hub_ns = hub_ns


class EngineError(OndolError):
    """The model's side failed."""

    retryable = True


class EngineUnavailable(EngineError):
    """The engine failed before its first byte: another may take over."""

    code = "engine_unavailable"


class EngineRejected(EngineError):
    """The engine says that the request itself is wrong; `status` is the HTTP status it gave."""

    code = "engine_rejected"
    retryable = False

    def __init__(self, message: str, *, status: int = 400, param: str | None = None) -> None:
        """Keep the status beside the sentence."""
        super().__init__(message, param=param)
        self.status = status


class EngineFailed(EngineError):
    """The engine failed after its first byte: nobody may take over."""

    code = "engine_failed"


class DeadlineExceeded(EngineError):
    """The time that the caller (or the route) allows is used up."""

    code = "deadline_exceeded"


class StateError(OndolError):
    """Durable state is not as it must be."""


class StateUnavailable(StateError):
    """Durable state cannot be read or written now (a full disk, a lock, a server that is away)."""

    code = "state_unavailable"
    retryable = True


class LedgerBroken(StateError):
    """The hash chain of the ledger does not hold at a record."""

    code = "ledger_broken"


class DigestMismatch(StateError):
    """A file is not the one that its digest names."""

    code = "digest_mismatch"


class SchemaTooNew(StateError):
    """The data was written by a newer Ondol, and we do not go back."""

    code = "schema_too_new"


class DirectoryLocked(StateError):
    """Another process uses the data directory."""

    code = "directory_locked"


class BadModelFile(StateError):
    """A model file is not what it says, or passes a bound; no native code has seen it."""

    code = "bad_model_file"


class GenerationRefused(StateError):
    """A desired state that this site does not take; the one it has stays."""

    code = "generation_refused"


class ConfigError(OndolError):
    """The configuration is wrong; the message has file, line, what was found and what is allowed."""

    code = "invalid_config"
