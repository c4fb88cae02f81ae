"""The text form of API keys: `ondol_<id>_<secret><crc>`.

`id` finds the record, `secret` is 256 random bits as 43 base-62 characters, `crc` is the CRC-32 of all
before it as 6, so that a typing error is seen without a look-up.  The HMAC at rest covers the 43
characters themselves: they are never decoded.

Source: the form of GitHub's tokens (prefix for scanners, checksum in base 62).
"""

from __future__ import annotations

import hmac
from typing import Final
from zlib import crc32

PREFIX: Final = "ondol_"
ID_LENGTH: Final = 10
ID_LENGTH_MAX: Final = 32
SECRET_LENGTH: Final = 43
"""The least n with 62^n >= 2^256."""
CRC_LENGTH: Final = 6

_DIGITS: Final = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_TEXT_MAX: Final = len(PREFIX) + ID_LENGTH_MAX + 1 + SECRET_LENGTH + CRC_LENGTH


def base62(number: int, length: int) -> str:
    """`number` in base 62, most significant digit first, filled with zeros; what does not fit is cut off."""
    digits = []
    for _ in range(length):
        number, digit = divmod(number, 62)
        digits.append(_DIGITS[digit])
    return "".join(reversed(digits))


def secret_text(raw: bytes) -> str:
    """32 random bytes as the secret's 43 characters."""
    assert len(raw) == 32, "a secret has 256 bits"
    return base62(int.from_bytes(raw, "big"), SECRET_LENGTH)


def make_key(key_id: str, secret: str) -> str:
    """The key as its owner gets it."""
    body = f"{PREFIX}{key_id}_{secret}"
    return body + base62(crc32(body.encode()), CRC_LENGTH)


def parse_key(text: str) -> tuple[str, str] | None:
    """(id, secret), or None where the text is not a key: prefix, lengths, alphabet or checksum."""
    if not text.startswith(PREFIX) or len(text) > _TEXT_MAX or not text.isascii():
        return None
    key_id, _, rest = text[len(PREFIX) :].partition("_")
    if not 0 < len(key_id) <= ID_LENGTH_MAX or len(rest) != SECRET_LENGTH + CRC_LENGTH:
        return None
    if not (key_id + rest).isalnum():
        return None
    if base62(crc32(text[:-CRC_LENGTH].encode()), CRC_LENGTH) != text[-CRC_LENGTH:]:
        return None
    return key_id, rest[:SECRET_LENGTH]


def mac(pepper: bytes, secret: str) -> bytes:
    """HMAC-SHA-256(pepper, secret): what is kept of a secret."""
    return hmac.digest(pepper, secret.encode(), "sha256")
