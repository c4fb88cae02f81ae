"""The keys of one upstream: where they are, which is good now, and until when the others are not.

Owns the secrets of one engine, in memory only; knows nothing of HTTP.  Invariant: a secret is in no
message, log line or `repr`; a key is named by its source.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from ondol.core.catalog import KeySource
from ondol.core.ports import Clock
from ondol.errors import EngineUnavailable
from ondol.units import NS_PER_S

REFUSED_S: Final = 60.0
"""How long a key that the server refuses is left out: long enough to be quiet, short enough to heal."""
LIMITED_S: Final = 1.0
"""How long a limited key rests when the server does not say."""
_LOOK_EVERY_NS: Final = 5 * NS_PER_S
_KEY_CHARS_MAX: Final = 4096

_log = logging.getLogger(__name__)


class Key:
    """One key and its state.  Owned by its ring."""

    __slots__ = ("_secret", "mtime_ns", "path", "refused", "source", "trouble", "until_ns", "variable")

    def __init__(self, source: str, *, variable: str | None = None, path: Path | None = None) -> None:
        """Name the source; the secret is read by the ring."""
        self.source = source
        self.variable = variable
        self.path = path
        self._secret: str | None = None
        self.mtime_ns = -1
        self.trouble: str | None = None
        self.until_ns = 0
        self.refused = False

    def __repr__(self) -> str:
        """The source, never the secret."""
        return f"Key({self.source})"

    def headers(self) -> dict[str, str]:
        """The Authorization header, or none for an upstream without keys."""
        return {} if self._secret is None else {"Authorization": f"Bearer {self._secret}"}

    def take(self, text: str) -> None:
        """Take the secret from the text of its source; a changed one is judged anew."""
        secret = text.strip()
        if not secret:
            self._secret, self.trouble = None, f"{self.source} is empty"
        elif len(secret) > _KEY_CHARS_MAX or not secret.isascii() or not secret.isprintable():
            self._secret, self.trouble = None, f"{self.source} holds more than one printable ASCII key"
        else:
            if secret != self._secret:
                self.until_ns, self.refused = 0, False
            self._secret, self.trouble = secret, None

    def lose(self, why: str) -> None:
        """Have no secret, and say why."""
        self._secret, self.trouble, self.mtime_ns = None, f"{self.source} {why}", -1


class KeyRing:
    """Hands out good keys in turn.  Single-threaded: all methods run on the engine's event loop."""

    def __init__(
        self, sources: Sequence[KeySource], *, folder: Path, environ: Mapping[str, str], clock: Clock
    ) -> None:
        """Note the sources; relative files are taken from `folder`.  Nothing is read before `load`."""
        self._environ = environ
        self._clock = clock
        self._keys: list[Key] = []
        for source in sources:
            if source.env is not None:
                self._keys.append(Key(f"environment variable {source.env}", variable=source.env))
            elif source.file is not None:
                self._keys.append(Key(f"key file {source.file}", path=folder / source.file))
        self._open = not self._keys
        if self._open:
            self._keys.append(Key("no key"))
        self._turn = 0
        self._look_ns = 0

    def load(self) -> None:
        """Read every source now."""
        for key in self._keys:
            if key.variable is not None:
                if (text := self._environ.get(key.variable)) is None:
                    key.lose("is not set")
                else:
                    key.take(text)
            key.mtime_ns = -1
        self._read_files()

    def pick(self) -> Key:
        """The next good key.

        Raises:
            EngineUnavailable: no key is good now; `retry_after_s` says when the first will be.
        """
        now_ns = self._clock.now_ns()
        if now_ns >= self._look_ns:
            self._read_files()
        keys = self._keys
        for step in range(len(keys)):
            key = keys[(self._turn + step) % len(keys)]
            if key.until_ns <= now_ns and key.trouble is None:
                self._turn = (self._turn + step + 1) % len(keys)
                return key
        raise EngineUnavailable(self.problem() or "no key is good now", retry_after_s=self.wait_s())

    def has_good(self) -> bool:
        """Whether `pick` would give a key."""
        now_ns = self._clock.now_ns()
        for key in self._keys:  # noqa: SIM110 - a generator costs as much as the rest; asked every request
            if key.until_ns <= now_ns and key.trouble is None:
                return True
        return False

    def limit(self, key: Key, retry_after_s: float | None) -> None:
        """Rest a key that the server limits, for as long as it says."""
        wait_s = LIMITED_S if retry_after_s is None else max(retry_after_s, 0.001)
        key.until_ns = max(key.until_ns, self._clock.now_ns() + int(wait_s * NS_PER_S))

    def refuse(self, key: Key, status: int) -> None:
        """Leave out a key that the server does not accept; the log says so once until it works again."""
        key.until_ns = self._clock.now_ns() + int(REFUSED_S * NS_PER_S)
        if not key.refused:
            key.refused = True
            _log.warning(
                "upstream refuses %s with HTTP %d; it is left out for %d s at a time",
                "requests without a key" if self._open else f"the key of {key.source}",
                status,
                int(REFUSED_S),
            )

    def good(self, key: Key) -> None:
        """Note that a key works; the log says so once after a refusal."""
        if key.refused:
            key.refused = False
            _log.info("upstream accepts the key of %s again", key.source)

    def problem(self) -> str | None:
        """None while a key is good, else why none is and until when."""
        now_ns = self._clock.now_ns()
        if now_ns >= self._look_ns:
            self._read_files()
        if self.has_good():
            return None
        wait_s = self.wait_s()
        if wait_s is None:
            return "no key: " + "; ".join(key.trouble or key.source for key in self._keys)
        until = datetime.fromtimestamp(self._clock.wall_ns() / NS_PER_S + wait_s, UTC)
        who = "the server limits or refuses us" if self._open else f"all {len(self._keys)} keys rest"
        return f"{who} until {until:%H:%M:%S} UTC ({wait_s:.0f} s from now)"

    def wait_s(self) -> float | None:
        """Seconds until the first key is good; None when no source has a key."""
        now_ns = self._clock.now_ns()
        waits = [key.until_ns - now_ns for key in self._keys if key.trouble is None]
        return max(min(waits), 0) / NS_PER_S if waits else None

    def _read_files(self) -> None:
        # A stat and, when a file is new, one read of some hundred bytes every 5 s: cheaper on the loop
        # than the hop to a thread and back.
        self._look_ns = self._clock.now_ns() + _LOOK_EVERY_NS
        for key in self._keys:
            if key.path is None:
                continue
            try:
                mtime_ns = key.path.stat().st_mtime_ns
                if mtime_ns != key.mtime_ns:
                    with key.path.open(encoding="utf-8") as file:
                        text = file.read(_KEY_CHARS_MAX + 2)
                    key.take(text)
                    key.mtime_ns = mtime_ns
            except FileNotFoundError:
                key.lose("does not exist")
            except UnicodeDecodeError:
                key.lose("is not text")
            except OSError as error:
                key.lose(f"cannot be read ({error.strerror})")
