"""Whether two answers say the same: the outcome of a checked hit.

Only what is plain is called `same`; where in doubt, `unsure`, which counts as wrong.  So a wrong judgement here costs
hits before it costs truth.  The limits are of the default encoder and were chosen to be strict, not fitted.
"""

from __future__ import annotations

import re
from typing import Final

from ondol.gateway.semantic import Outcome
from ondol.gateway.semantic_guards import marks
from ondol.gateway.semantic_text import bare, grams, normal

SAME_SIMILARITY: Final = 0.9
SAME_OVERLAP: Final = 0.5
DIFFERENT_SIMILARITY: Final = 0.6
LENGTH_RATIO: Final = 2.0
_YES: Final = re.compile(r"(?:yes|yeah|sure|correct|true|네|예|맞습니다|그렇습니다)(?![\w가-힣])")
_NO: Final = re.compile(r"(?:no|nope|incorrect|false|아니요|아니오|아닙니다)(?![\w가-힣])")


def compare_answers(fresh: str, cached: str, similarity: float | None = None) -> Outcome:
    """Compare the model's answer with the cached one; `similarity` is the cosine of the two, where it is known.

    Linear in the texts.
    """
    if bare(fresh) == bare(cached) and bare(fresh):
        return "same"
    one, other = normal(fresh), normal(cached)
    if not one or not other:
        return "different"
    if _polarity(one) != _polarity(other):
        return "different"
    ours, theirs = marks(fresh), marks(cached)
    if {value for value, _ in ours.numbers} != {value for value, _ in theirs.numbers}:
        return "different"
    if ours.language != theirs.language or ours.places != theirs.places or ours.days != theirs.days:
        return "different"
    if similarity is not None and similarity < DIFFERENT_SIMILARITY:
        return "different"
    if similarity is None or similarity < SAME_SIMILARITY or ours.negations != theirs.negations:
        return "unsure"
    if any(side != theirs.poles[at] for at, side in ours.poles.items() if at in theirs.poles):
        return "unsure"
    if max(len(one), len(other)) > LENGTH_RATIO * min(len(one), len(other)):
        return "unsure"
    left, right = grams(one), grams(other)
    overlap = 2 * len(left & right) / max(1, len(left) + len(right))
    return "same" if overlap >= SAME_OVERLAP else "unsure"


def _polarity(text: str) -> str:
    """`yes` or `no` where the answer begins with it."""
    return "yes" if _YES.match(text) else "no" if _NO.match(text) else ""
