"""The HTTP status of every error that Ondol raises."""

from __future__ import annotations

import pytest

from ondol import errors
from ondol.errors import EngineRejected, OndolError
from ondol.wire.statuses import status_of

STATUS = {
    "OndolError": 500, "RequestError": 400, "InvalidRequest": 400, "Unauthenticated": 401,
    "ExpiredApiKey": 401, "RevokedApiKey": 401, "Forbidden": 403, "UnknownModel": 404, "NotFound": 404,
    "TooLarge": 413, "Unsupported": 400, "NotServed": 501, "Conflict": 422, "Refused": 503,
    "RateLimited": 429, "BudgetExhausted": 402, "Overloaded": 503, "Draining": 503, "NoEndpoint": 503,
    "LedgerUnavailable": 503, "LedgerFull": 503, "EngineError": 503, "EngineUnavailable": 503,
    "EngineRejected": 400, "EngineFailed": 502, "DeadlineExceeded": 504, "StateError": 500,
    "LedgerBroken": 500, "DigestMismatch": 500, "SchemaTooNew": 500, "DirectoryLocked": 500,
    "BadModelFile": 500, "ConfigError": 422, "BadSignature": 400, "Fenced": 409, "HelloAgain": 409, "RangeRefused": 409,
    "LinkDown": 503, "HubRefused": 503, "GenerationRefused": 500, "StateUnavailable": 503,
}  # fmt: skip
KINDS = {
    name: kind
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, OndolError)
}


def test_no_error_is_forgotten() -> None:
    assert STATUS.keys() == KINDS.keys()


@pytest.mark.parametrize("name", STATUS)
def test_each_error_has_its_status(name: str) -> None:
    assert status_of(KINDS[name]("m")) == STATUS[name]


@pytest.mark.parametrize("status", [400, 404, 413, 422])
def test_what_an_engine_rejects_keeps_the_engines_status(status: int) -> None:
    assert status_of(EngineRejected("m", status=status)) == status


def test_a_new_kind_of_an_error_has_the_status_of_its_family() -> None:
    class Weekend(errors.Refused):
        """The shop is closed."""

    assert status_of(Weekend("m")) == 503
