"""What speaks for and against giving a cached answer: numbers from the neighbours of a question.

Of the nearest cached questions each brings its similarity, its text and which answer it has.  Neighbours with
the same answer vote for it together; the answer with most votes is the candidate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import repeat
from typing import Final

import msgspec

from ondol.gateway.semantic_guards import Contradiction

NEIGHBOURS: Final = 10
"""How many are asked for: with more, votes changed little and cost grew."""
_LEXICAL_SHARE: Final = 0.4
_TEMPERATURE: Final = 0.08
"""Of the votes, in units of similarity: a neighbour that is 0.08 less similar has 1/e of the weight."""


class Neighbour(msgspec.Struct, frozen=True):
    """A cached question near the one that was asked: `similarity` is the cosine of the two."""

    entry: int
    answer: int
    similarity: float
    text: str
    grams: frozenset[str]


class Candidate(msgspec.Struct, frozen=True):
    """The neighbour whose answer might serve, and the features of that, of about unit size.

    `objection` is what a guard has against every neighbour with this answer (against the nearest, if there are many).
    """

    nearest: Neighbour
    features: tuple[float, ...]
    objection: Contradiction | None = None


def candidate(
    text: str,
    grams: frozenset[str],
    found: Sequence[Neighbour],
    weight: Callable[[frozenset[str]], float],
    against: Callable[[str], Contradiction | None],
) -> Candidate | None:
    """The best supported answer among `found` (most similar first); None where nothing was found.

    `weight` says how telling letter groups are together (rare ones more), `against` what a guard has against a cached text.
    Cost: some 100 µs for ten short neighbours.
    """
    if not found:
        return None
    mine = weight(grams) + 1e-9
    lexical = [_overlap(grams, mine, one.grams, weight) for one in found]
    joint = [one.similarity + _LEXICAL_SHARE * near[0] for one, near in zip(found, lexical, strict=True)]
    top = max(joint)
    votes: dict[int, float] = {}
    for one, strength in zip(found, joint, strict=True):
        votes[one.answer] = votes.get(one.answer, 0.0) + math.exp((strength - top) / _TEMPERATURE)
    answer = max(votes, key=votes.__getitem__)
    ours = [at for at, one in enumerate(found) if one.answer == answer]
    others = [at for at, one in enumerate(found) if one.answer != answer]
    ours.sort(key=joint.__getitem__, reverse=True)
    best, objection = ours[0], against(found[ours[0]].text)
    if objection is not None:
        best = next((at for at in ours[1:] if against(found[at].text) is None), best)
        objection = None if best != ours[0] else objection
    close = max(found[at].similarity for at in ours)
    other = max((found[at].similarity for at in others), default=found[-1].similarity)
    shared = max(lexical[at][0] for at in ours)
    shared_other = max((lexical[at][0] for at in others), default=0.0)
    nearest = found[best]
    vote = votes[answer] / sum(votes.values())
    support = len(ours) / NEIGHBOURS
    length = abs(math.log((len(text) + 1) / (len(nearest.text) + 1)))
    centred = (close - 0.7) * 5
    features = (
        1.0,
        centred,
        -math.log(max(1.0 - close, 1e-3)) - 1.5,
        min(close - other, 0.5) * 8,
        vote * 3 - 2,
        support * 2,
        (shared - 0.5) * 3,
        (shared - shared_other) * 3,
        lexical[best][1] * 3,
        lexical[best][2] * 3,
        length * 2,
        (vote * 3 - 2) * support * 2,
        (vote * 3 - 2) * centred,
        (shared - 0.5) * 3 * centred,
    )
    return Candidate(nearest, features, objection)


def _overlap(
    ours: frozenset[str], mine: float, theirs: frozenset[str], weight: Callable[[frozenset[str]], float]
) -> tuple[float, float, float]:
    """Shared weight over the mean of both (Dice), and the share that only ours, only theirs has."""
    both = weight(ours & theirs)
    only = weight(theirs - ours)
    whole = both + only + 1e-9
    return 2 * both / (mine + whole), 1 - both / mine, only / whole


class GramWeights:
    """How telling letter groups are, from how many of the texts seen have them; bounded."""

    def __init__(self, most: int = 200_000) -> None:
        """Remember at most `most` groups; one that is not remembered counts as rare."""
        self._counts: dict[str, int] = {}
        self._weights: dict[str, float] = {}
        self._texts = 0
        self._weighed = 0
        self._rare = math.log(2.0)
        self._most = most

    def add(self, grams: frozenset[str]) -> None:
        """One more text; the weights follow when their number has grown by an eighth."""
        counts = self._counts
        room = len(counts) < self._most
        for gram in grams:
            if room or gram in counts:
                counts[gram] = counts.get(gram, 0) + 1
        self._texts += 1
        self._rare = math.log(self._texts + 2.0)
        if self._texts >= self._weighed * 1.125 + 8:
            self._weighed = self._texts
            # An eighth's step, so that the cost of weighing all anew is a few groups a text.
            self._weights = {g: math.log((self._texts + 1) / (n + 0.5)) for g, n in counts.items()}

    def __call__(self, grams: frozenset[str]) -> float:
        """The weight of all together, of each the logarithm of how rare it is."""
        return sum(map(self._weights.get, grams, repeat(self._rare)), 0.0)
