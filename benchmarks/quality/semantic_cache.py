"""How good the verified semantic cache is: wrong hits a hit served, and the share of repeats served.

    python -m benchmarks.quality.semantic_cache --data DIR [--json FILE] [--streams 20]

Protocol.  The questions of a set come in random order, one stream a seed, into an empty cache that has learnt nothing.
A question whose text came before is the exact cache's and left out.  Sets of groups (ParaKQC, Banking77): what is not
served goes to the model, whose answer is the label of the group, and is cached; a hit is right if the labels are
equal; a repeat is a question whose group came before.  Sets of pairs (QuestionPair, KorSTS): the second side is asked
of a cache that holds the first side and 20 first sides of other pairs; a hit is right if it is the own first side of
a pair that is labelled the same; a repeat is such a pair.  Labels: of every question that goes to the model, the
candidate's answer is compared with the model's; all are counted.  The only calls made for learning are the checked.

The single threshold is that of the same encoder on the same streams, the best of a grid in hindsight, with at least
50 hits.  TF-IDF: the published baseline of the data, one threshold in hindsight on pairs, which is an easier protocol.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import msgspec
import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.quality.data import folder
from benchmarks.quality.semantic_sets import NAMES, QuestionSet, load
from ondol.core.route_terms import SemanticPolicy
from ondol.gateway.cache import Entry
from ondol.gateway.semantic import Check, Question, SemanticCache, Serve
from ondol.gateway.semantic_features import NEIGHBOURS

ROOT = Path(__file__).resolve().parent.parent.parent
ERRORS = (0.05, 0.01)
TF_IDF = {
    "questionpair_ko": (0.825, 0.336), "parakqc_ko": (0.403, 0.002), "korsts_ko": (0.070, 0.037),
    "banking77_en": (0.088, 0.026),
}  # fmt: skip
THRESHOLDS = [0.6 + 0.02 * step for step in range(20)]
THRESHOLD_STREAMS = 3
HITS_MIN = 50
GATED_HITS = 299


class Sums(msgspec.Struct):
    """Counts of one stream, or of several."""

    asked: int = 0
    repeats: int = 0
    hits: int = 0
    wrong: int = 0
    checked: int = 0
    labels: int = 0
    refused: int = 0
    late_repeats: int = 0
    late_right: int = 0

    def plus(self, other: Sums) -> Sums:
        return Sums(*(getattr(self, name) + getattr(other, name) for name in self.__struct_fields__))

    @property
    def recall(self) -> float:
        return (self.hits - self.wrong) / max(1, self.repeats)


class _Index:
    """What is cached of a set, found by cosine: exactly what the memory's child does, on cosines made before."""

    def __init__(self, questions: QuestionSet, seed: int) -> None:
        self._set = questions
        self._seed = seed
        self._places = np.zeros(len(questions.cached), np.int64)
        self._count = 0

    def add(self, place: int) -> None:
        self._places[self._count] = place
        self._count += 1

    def search(self, at: int, k: int) -> list[tuple[int, float]]:
        places = (
            np.array(self._set.others(at, self._seed)) if self._set.of_pairs else self._places[: self._count]
        )
        if not len(places):
            return []
        cosines = self._set.cosines[at][places]
        best = np.argpartition(-cosines, k - 1)[:k] if len(places) > k else np.arange(len(places))
        best = best[np.argsort(-cosines[best], kind="stable")]
        return [(int(places[one]), float(cosines[one])) for one in best]


def stream(questions: QuestionSet, seed: int, max_error: float) -> Sums:
    """One stream through the cache."""
    policy = SemanticPolicy(max_error=max_error)
    cache = SemanticCache(10**12)
    index, dice, sums = _Index(questions, seed), random.Random(f"dice {seed}"), Sums()
    keys: dict[int, int] = {}
    groups: set[int] = set()
    if questions.of_pairs:
        for place, text in enumerate(questions.cached):
            kept, _ = cache.put(_question(text), _entry(place), said=f"answer {place}", now_ns=0)
            keys[place] = kept or 0
        places = {key: place for place, key in keys.items()}
    order = questions.order(seed)
    for step, at in enumerate(order):
        one = questions.asked[at]
        repeat = one.same if questions.of_pairs else one.group in groups
        late = step * 2 >= len(order)
        found = [(keys[place], cosine) for place, cosine in index.search(at, NEIGHBOURS)]
        question = _question(one.text)
        verdict = cache.lookup(question, policy, found, now_ns=1, dice=dice.random())
        trial = verdict.trial
        right = trial is not None and (
            one.same and places[trial.key] == one.own
            if questions.of_pairs
            else trial.entry.model == str(one.group)
        )
        sums.asked += 1
        sums.repeats += repeat
        sums.late_repeats += repeat and late
        if isinstance(verdict, Serve):
            sums.hits += 1
            sums.wrong += not right
            sums.late_right += right and late
            continue
        sums.checked += isinstance(verdict, Check)
        sums.refused += trial is not None and trial.objected
        if trial is not None:
            sums.labels += 1
            cache.learn(trial, "same" if right else "different")
        if not questions.of_pairs:
            key, _ = cache.put(question, _entry(one.group), said=f"answer {one.group}", now_ns=1)
            keys[at] = key or 0
            index.add(at)
            groups.add(one.group)
    return sums


def single(questions: QuestionSet, seed: int, threshold: float) -> Sums:
    """One stream through a cache that serves the nearest from one similarity on."""
    index, sums = _Index(questions, seed), Sums()
    groups: set[int] = set()
    for at in questions.order(seed):
        one = questions.asked[at]
        sums.repeats += one.same if questions.of_pairs else one.group in groups
        found = index.search(at, 1)
        if found and found[0][1] >= threshold:
            place = found[0][0]
            right = (
                one.same and place == one.own
                if questions.of_pairs
                else questions.asked[place].group == one.group
            )
            sums.hits += 1
            sums.wrong += not right
        elif not questions.of_pairs:
            index.add(at)
            groups.add(one.group)
    return sums


def _question(text: str) -> Question:
    return Question(tenant="t", route="r", generation="g", namespace=b"n", text=text, ttl_s=10**6)


def _entry(group: int) -> Entry:
    return Entry(tenant="t", generation="g", body=b"", model=str(group))


_LOADED: dict[str, QuestionSet] = {}


def _work(name: str, data: Path, seed: int, what: tuple[str, float]) -> tuple[str, tuple[str, float], Sums]:
    """One stream, in a process of its own pool; a set is loaded once a process."""
    if name not in _LOADED:
        _LOADED.clear()
        _LOADED[name] = load(name, data, ROOT / ".cache" / "semantic")
    run = stream if what[0] == "ours" else single
    return name, what, run(_LOADED[name], seed, what[1])


def upper_limit(wrong: int, hits: int, confidence: float = 0.95) -> float:
    """Clopper and Pearson's one-sided upper limit of the share of wrong hits."""
    if not hits or wrong >= hits:
        return 1.0
    low, high = wrong / hits, 1.0
    for _ in range(60):
        share = (low + high) / 2
        terms = (
            math.lgamma(hits + 1) - math.lgamma(k + 1) - math.lgamma(hits - k + 1) + k * math.log(share)
            + (hits - k) * math.log1p(-share)
            for k in range(wrong + 1)
        )  # fmt: skip
        if sum(map(math.exp, terms)) > 1 - confidence:
            low = share
        else:
            high = share
    return high


def main() -> None:
    """Run everything, print the tables, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--streams", type=int, default=20)
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args()
    data = folder(given.data, *(f"cache_{name}" for name in NAMES))
    if data is None:
        return
    for name in NAMES:
        load(name, data, ROOT / ".cache" / "semantic")
    sums = _run(data, given.streams, given.processes)
    report = _report(sums, given.streams)
    _show(report)
    if given.json:
        given.json.write_text(json.dumps(report, indent=1) + "\n")


def _run(data: Path, streams: int, processes: int) -> dict[tuple[str, str, float], Sums]:
    jobs = [(name, seed, ("ours", error)) for name in NAMES for error in ERRORS for seed in range(streams)]
    jobs += [
        (name, seed, ("single", threshold))
        for name in NAMES
        for threshold in THRESHOLDS
        for seed in range(min(streams, THRESHOLD_STREAMS))
    ]
    jobs.sort(key=lambda job: job[0])
    sums: dict[tuple[str, str, float], Sums] = {}
    with Progress() as progress, ProcessPoolExecutor(processes) as pool:
        bar = progress.add_task("streams", total=len(jobs))
        for done in as_completed(pool.submit(_work, name, data, seed, what) for name, seed, what in jobs):
            name, what, one = done.result()
            sums[name, *what] = sums.get((name, *what), Sums()).plus(one)
            progress.advance(bar)
    return sums


def _report(sums: dict[tuple[str, str, float], Sums], streams: int) -> dict[str, object]:
    sets = []
    for name in NAMES:
        for place, error in enumerate(ERRORS):
            ours = sums[name, "ours", error]
            best = _best(sums, name, error)
            sets.append(
                {
                    "set": name, "max_error": error, "streams": streams, "asked": ours.asked, "repeats": ours.repeats,
                    "hits": ours.hits, "wrong": ours.wrong, "upper_limit": upper_limit(ours.wrong, ours.hits),
                    "checked": ours.checked, "labels": ours.labels, "refused_by_guards": ours.refused,
                    "repeats_served": ours.recall,
                    "repeats_served_second_half": ours.late_right / max(1, ours.late_repeats),
                    "single_threshold": best, "ratio": ours.recall / best if best else None,
                    "tf_idf_published": TF_IDF[name][place],
                }
            )  # fmt: skip
    languages = []
    for language in ("ko", "en"):
        for error in ERRORS:
            total = Sums()
            for name in NAMES:
                if name.endswith(language):
                    total = total.plus(sums[name, "ours", error])
            limit = upper_limit(total.wrong, total.hits)
            gated = error == ERRORS[0] or total.hits >= GATED_HITS
            languages.append(
                {
                    "language": language, "max_error": error, "hits": total.hits, "wrong": total.wrong,
                    "upper_limit": limit, "gated": gated, "holds": limit <= error if gated else None,
                    "share_checked": total.checked / max(1, total.checked + total.hits),
                }
            )  # fmt: skip
    return {"sets": sets, "languages": languages}


def _best(sums: dict[tuple[str, str, float], Sums], name: str, error: float) -> float:
    """The largest share of repeats that one threshold serves within the error."""
    runs = [sums[name, "single", threshold] for threshold in THRESHOLDS]
    return max(
        (run.recall for run in runs if run.hits >= HITS_MIN and run.wrong <= error * run.hits), default=0.0
    )


def _show(report: dict[str, object]) -> None:
    console = Console(width=160)
    for title in ("sets", "languages"):
        rows = report[title]
        assert isinstance(rows, list)
        table = Table(title=title)
        for name in rows[0]:
            table.add_column(name.replace("_", " "), justify="right")
        for row in rows:
            table.add_row(
                *(f"{value:.4f}" if isinstance(value, float) else str(value) for value in row.values())
            )
        console.print(table)


if __name__ == "__main__":
    main()
