"""The four sets of the semantic cache as streams of questions, and their vectors from the default encoder."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from benchmarks.quality.data import rows
from ondol.gateway.semantic_text import bare, normal

DISTRACTORS = 20
Floats = npt.NDArray[np.float32]


class Asked(msgspec.Struct, frozen=True):
    """A question of the stream.  `own` is the pair's first side, in the sets of pairs, and `same` its label."""

    text: str
    group: int
    own: int = -1
    same: bool = False


class QuestionSet(msgspec.Struct, frozen=True):
    """A set: what is asked, what can be cached (the questions themselves, or the pairs' first sides), cosines."""

    name: str
    language: str
    asked: list[Asked]
    cached: list[str]
    cosines: Floats

    @property
    def of_pairs(self) -> bool:
        return self.asked[0].own >= 0

    def order(self, seed: int) -> list[int]:
        """The questions in the order of one stream; what the exact cache would answer is left out."""
        order = list(range(len(self.asked)))
        random.Random(seed).shuffle(order)
        seen: set[str] = set()
        kept = []
        for at in order:
            text = normal(self.asked[at].text)
            if text not in seen:
                seen.add(text)
                kept.append(at)
        return kept

    def others(self, at: int, seed: int) -> list[int]:
        """The cache that a question of a pair meets: its first side among some of other pairs."""
        own = self.asked[at].own
        drawn = random.Random(f"{seed} {at}").sample(range(len(self.cached)), DISTRACTORS)
        return [own, *(other for other in drawn if other != own)]


NAMES = ("questionpair_ko", "parakqc_ko", "korsts_ko", "banking77_en")


def load(name: str, data: Path, cache: Path) -> QuestionSet:
    """Read a set and its vectors; they are computed once and kept under `cache`."""
    if name in ("parakqc_ko", "banking77_en"):
        file, label = {
            "parakqc_ko": ("utterances.csv.gz", "group"),
            "banking77_en": ("queries.csv.gz", "category"),
        }[name]
        read = rows(data / f"cache_{name}" / file)
        numbers = {group: at for at, group in enumerate(dict.fromkeys(row[label] for row in read))}
        asked = [Asked(row["text"], numbers[row[label]]) for row in read]
        cached = [one.text for one in asked]
    else:
        asked, cached = _pairs(name, data)
    vectors = _vectors([*(one.text for one in asked), *cached], cache)
    cosines = vectors[: len(asked)] @ vectors[len(asked) :].T
    return QuestionSet(name, name[-2:], asked, cached, cosines)


def _pairs(name: str, data: Path) -> tuple[list[Asked], list[str]]:
    """Pairs that differ in more than blanks and punctuation; KorSTS: 4 and above is the same, below 3 different."""
    if name == "questionpair_ko":
        read = [
            (row["question1"], row["question2"], row["is_different"] == "0")
            for row in rows(data / "cache_questionpair_ko" / "pairs.csv.gz")
        ]
    else:
        read = [
            (row["sentence1"], row["sentence2"], float(row["score"]) >= 4)
            for row in rows(data / "cache_korsts_ko" / "train.csv.gz")
            if not 3 <= float(row["score"]) < 4
        ]
    read = [pair for pair in read if bare(pair[0]) != bare(pair[1])]
    places: dict[str, int] = {}
    cached: list[str] = []
    for first, _, _ in read:
        if normal(first) not in places:
            places[normal(first)] = len(cached)
            cached.append(first)
    return [
        Asked(second, at, places[normal(first)], same) for at, (first, second, same) in enumerate(read)
    ], cached


def _vectors(texts: list[str], cache: Path) -> Floats:
    unique = list(dict.fromkeys(texts))
    digest = hashlib.sha256("\0".join(unique).encode()).hexdigest()[:16]
    path = cache / f"{digest}.npy"
    if path.exists():
        vectors: Floats = np.load(path)
    else:
        vectors = _encode(unique)
        cache.mkdir(parents=True, exist_ok=True)
        np.save(path, vectors)
    places = {text: at for at, text in enumerate(unique)}
    return vectors[[places[text] for text in texts]]


def _encode(texts: list[str]) -> Floats:
    from ondol.engines.encoder_child import load_encoder

    encoder: Any = load_encoder(2)[0]
    # By length, so that a batch pads little.
    order = sorted(range(len(texts)), key=lambda at: len(texts[at]))
    vectors = np.zeros((len(texts), 512), np.float32)
    for begin in range(0, len(order), 32):
        batch = order[begin : begin + 32]
        vectors[batch] = encoder.encode([texts[at] for at in batch])
    return vectors
