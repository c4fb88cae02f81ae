"""How two questions are compared as text: one normal form, its words, its letter groups, its script.

Pure functions over `str`; costs are linear in the text.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Final

_WORD: Final = re.compile(r"[^\W_]+(?:[.'’:-][^\W_]+)*")
_DASHES: Final = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "-", "−": "-"})
_SCRIPTS: Final = (
    ("ko", re.compile(r"[\u1100-\u11ff\u3130-\u318f\uac00-\ud7af]")),
    ("ja", re.compile(r"[\u3040-\u30ff]")),
    ("zh", re.compile(r"[\u3400-\u9fff]")),
    ("ru", re.compile(r"[\u0400-\u04ff]")),
    ("ar", re.compile(r"[\u0600-\u06ff]")),
    ("th", re.compile(r"[\u0e00-\u0e7f]")),
    ("la", re.compile(r"[A-Za-z\u00c0-\u024f]")),
)
# Words that nearly every English question of a few words has one of, and other languages in this script do not.
_ENGLISH: Final = frozenset(
    (
        "a an and are be can cannot can't could did do does don't for from get have he how i i'm if in is "
        "it its me my need no not of on or please she should tell that the their there they this to want "
        "was we what what's when where which who why will with would you your"
    ).split()
)


def normal(text: str) -> str:
    """The text as it is compared: compatibility forms and letter case folded, quotes and blanks made one kind."""
    return " ".join(unicodedata.normalize("NFKC", text).translate(_DASHES).casefold().split())


def bare(text: str) -> str:
    """The words of a text alone: two questions that differ in blanks and punctuation only are equal here."""
    return "".join(words(normal(text)))


def words(text: str) -> list[str]:
    """The words and numbers of a `normal` text, in order; `3.5`, `can't` and `10:30` are one each."""
    return _WORD.findall(text)


def grams(text: str) -> frozenset[str]:
    """Groups of two and three letters inside the words of a `normal` text, with the edges of words marked."""
    found: set[str] = set()
    for word in words(text):
        edged = f" {word} "
        found.update(edged[at : at + 2] for at in range(len(edged) - 1))
        found.update(edged[at : at + 3] for at in range(len(edged) - 2))
    return frozenset(found)


def language(text: str) -> str:
    """`ko`, `en`, another script's code, `la` for Latin letters that are not plainly English, `` for none.

    Korean text with Latin names is Korean: a tenth of its letters suffice.
    """
    counts = {name: len(pattern.findall(text)) for name, pattern in _SCRIPTS}
    total = sum(counts.values())
    if not total:
        return ""
    for name, _ in _SCRIPTS[:-1]:
        if counts[name] * 10 >= total:
            return name
    return "en" if not _ENGLISH.isdisjoint(words(normal(text))) else "la"
