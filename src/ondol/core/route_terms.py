"""What a route promises beyond where it is answered: caches, captures, and work that can wait."""

from __future__ import annotations

from typing import Annotated

import msgspec

from ondol.core.fields import Seconds


class SemanticPolicy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a route promises of the answers that it gives to similar questions.

    Of those served at most `max_error` are wrong, with `confidence` (of each moment's choice of hits).  The share
    `checked` of what would be served goes to the model too and is compared.  Answers live `ttl_s`; to questions
    about today or now `time_bound_ttl_s`, without which they are not cached.  Such with more than `messages_max`
    messages or a temperature above `max_temperature` are not looked up.
    """

    max_error: Annotated[float, msgspec.Meta(ge=0.001, le=0.2)] = 0.01
    confidence: Annotated[float, msgspec.Meta(ge=0.8, le=0.999)] = 0.95
    checked: Annotated[float, msgspec.Meta(ge=0.01, le=1)] = 0.05
    ttl_s: Seconds = 86_400.0
    time_bound_ttl_s: Annotated[float, msgspec.Meta(gt=0, le=86_400)] | None = None
    max_temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] = 1.0
    messages_max: Annotated[int, msgspec.Meta(ge=1, le=64)] = 8


class CachePolicy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Whether the exact same request may get the same answer again, and for how long.

    With `semantic` also a similar one.
    """

    ttl_s: Seconds = 3600.0
    max_temperature: Annotated[float, msgspec.Meta(ge=0)] = 2.0
    semantic: SemanticPolicy | None = None


class Capture(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Keep prompts and answers for debugging, and delete them after `retention_s`."""

    retention_s: Seconds


class Flex(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How long requests with `service_tier: "flex"` may wait, beyond the route's `timeout_s`, and for what.

    They wait for a free slot; with `hours` (`22:00-06:00`, in the time zone of the site's Gateway document), those in
    which electricity is cheap or green, also for these.
    """

    wait_s: Seconds = 600.0
    hours: Annotated[str, msgspec.Meta(pattern=r"^\d\d:\d\d-\d\d:\d\d$")] | None = None
