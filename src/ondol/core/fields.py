"""The types of fields that documents share: names, numbers within bounds, durations, money as text."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

Name = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9]([a-z0-9._/-]{0,126}[a-z0-9])?$")]
Positive = Annotated[int, msgspec.Meta(ge=1)]
Fraction = Annotated[float, msgspec.Meta(ge=0, le=1)]
Seconds = Annotated[float, msgspec.Meta(gt=0, le=86_400 * 366)]
Decimals = Annotated[str, msgspec.Meta(pattern=r"^[0-9]{1,15}(\.[0-9]{1,12})?$")]
Tier = Literal["device", "edge", "pop", "cloud"]
EngineKind = Literal["llamacpp", "encoder", "upstream", "peer", "fake"]
Pattern = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9*]([A-Za-z0-9._/*-]{0,126}[A-Za-z0-9*])?$")]
Step = Annotated[str, msgspec.Meta(pattern=r"^[0-9]{1,6}%?$")]
