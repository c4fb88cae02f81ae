"""Who speaks for each site, as one replica read it a moment ago.  Pure; times are monotonic.

With it a watch finds out that it must end, and a file is given to a site, without asking the database each time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from ondol.core.trust import Credential
from ondol.hub.sites import Speaker
from ondol.units import NS_PER_S

READ_EVERY_S: Final = 5.0
GOOD_S: Final = 15.0
"""What is older than this says nothing: the database is away, and it alone knows."""


class Roster:
    """Bounded by the sites of the fleet."""

    def __init__(self) -> None:
        """Nothing was read yet."""
        self._speakers: Mapping[str, Speaker] = {}
        self._read_ns: int | None = None
        self._read = 0
        self.begun = 0

    def due(self, now_ns: int) -> bool:
        """Whether it is time to read it again, though nothing is known to have changed."""
        return self._read_ns is None or now_ns - self._read_ns >= READ_EVERY_S * NS_PER_S

    def begin(self) -> int:
        """A reading begins now; its number."""
        self.begun += 1
        return self.begun

    def take(self, speakers: Mapping[str, Speaker], number: int, now_ns: int) -> None:
        """Know what that reading, which began at `now_ns`, has found."""
        self._speakers = speakers
        self._read = number
        self._read_ns = now_ns

    def lets_in(self, credential: Credential, now_ns: int) -> bool:
        """Whether the key is surely the site's, which is not out.  False is no verdict: ask the database."""
        if self._read_ns is None or now_ns - self._read_ns > GOOD_S * NS_PER_S:
            return False
        speaker = self._speakers.get(credential.site)
        return speaker is not None and not speaker.is_out and speaker.key == credential.key

    def has_ended(self, credential: Credential, instance: str, since: int) -> bool:
        """Whether a process surely speaks for its site no longer.

        `since` is what `begun` was when it was let in: an older reading cannot know it.
        """
        if self._read <= since:
            return False
        speaker = self._speakers.get(credential.site)
        return (
            speaker is None or speaker.is_out or speaker.key != credential.key or speaker.instance != instance
        )
