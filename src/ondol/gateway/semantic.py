"""The verified semantic cache: whether the answer to a similar question may be given, and what is learnt from it.

`SemanticCache` owns the entries, and for every tenant and route what was learnt there.  It is pure state: the child
that embeds and searches is asked by the caller, who hands in what it found; time and the roll of the dice are
arguments.  The promise: of the hits served at most `max_error` are wrong (see `semantic_evidence`).

The order of one question: `lookup` gives Serve, Check or Miss.  After Check and Miss the model answers; its answer is
compared with the cached one (`semantic_compare`) where the verdict carries a `trial`, `learn` takes the outcome, and
`put` keeps the new answer.
"""

from __future__ import annotations

import functools
import hashlib
from collections import OrderedDict
from collections.abc import Iterable
from typing import Final, Literal

import msgspec

from ondol.core.route_terms import SemanticPolicy
from ondol.gateway.cache import Entry
from ondol.gateway.semantic_evidence import Evidence, Learner
from ondol.gateway.semantic_features import NEIGHBOURS, Candidate, GramWeights, Neighbour, candidate
from ondol.gateway.semantic_guards import contradiction, marks
from ondol.gateway.semantic_text import bare, grams, normal

Outcome = Literal["same", "different", "unsure"]

PRIOR: Final = (-2.0, 0.5, 0.3, 0.5, 0.5, 0.3, 0.5, 0.4, -0.4, -0.3, -0.3, 0.2, 0.1, 0.1)
"""What a route starts from, set by hand: similar, ahead of others, supported by several, few words that differ."""
OWNERS_MAX: Final = 1024
_OVERHEAD: Final = 640
"""Bytes of an entry beside its answer and question, measured at 0.5 to 0.6 KiB."""

_grams = functools.lru_cache(maxsize=16_384)(grams)
_marks = functools.lru_cache(maxsize=16_384)(marks)


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """What is compared by meaning, and the `namespace` of all that must be exactly equal."""

    tenant: str
    route: str
    generation: str
    namespace: bytes
    text: str
    ttl_s: float


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """A candidate that can be judged once the model has answered: its entry, and what the judgement teaches."""

    tenant: str
    route: str
    key: int
    answer: int
    score: float
    features: tuple[float, ...]
    objected: bool
    checked: bool
    entry: Entry


class Serve(msgspec.Struct, frozen=True, kw_only=True):
    """Give the cached answer.  `bound` is the upper limit of the share of wrong answers among such hits."""

    entry: Entry
    trial: Trial
    similarity: float
    bound: float


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """It might be served, but this one goes to the model, and the two answers are compared."""

    trial: Trial
    similarity: float


class Miss(msgspec.Struct, frozen=True, kw_only=True):
    """Ask the model.  Why: an ASCII code, and a sentence in English and Korean.

    Where there is a `trial`, the model's answer tells whether the candidate was right, at no cost.
    """

    code: str
    en: str
    ko: str
    trial: Trial | None = None
    similarity: float = 0.0


class SemanticStats(msgspec.Struct, frozen=True, kw_only=True):
    """What is held now, and counts since the start."""

    entries: int
    bytes: int
    bytes_max: int
    served: int
    checked: int
    checked_wrong: int
    missed: int
    refused: int
    labels: int
    alarms: int


class OwnerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What a route of a tenant has learnt; `threshold` is None while nothing is served."""

    tenant: str
    route: str
    max_error: float
    bound: float
    threshold: float | None
    outcomes: int
    alarms: int


class _Slot:
    __slots__ = ("answer", "entry", "expires_ns", "question", "size")

    def __init__(self, question: Question, answer: int, entry: Entry, expires_ns: int) -> None:
        self.question = question
        self.answer = answer
        self.entry = entry
        self.expires_ns = expires_ns
        self.size = _OVERHEAD + 2 * len(question.text.encode()) + entry.size()


class _Learnt:
    """What one tenant's route has learnt."""

    def __init__(self, policy: SemanticPolicy) -> None:
        self.learner = Learner(PRIOR)
        self.evidence = Evidence(policy.max_error, policy.confidence)
        self.weights = GramWeights()


class SemanticCache:
    """Entries by key, the oldest given up first, and what each tenant's route has learnt."""

    def __init__(self, max_bytes: int) -> None:
        """Hold at most `max_bytes` of entries."""
        self._max_bytes = max_bytes
        self._slots: OrderedDict[int, _Slot] = OrderedDict()
        self._learnt: OrderedDict[tuple[str, str], _Learnt] = OrderedDict()
        self._bytes = 0
        self._last = 0
        self._served = self._checked = self._wrong = self._missed = self._refused = self._labels = 0

    # ---- one question

    def lookup(
        self,
        question: Question,
        policy: SemanticPolicy,
        found: Iterable[tuple[int, float]],
        *,
        now_ns: int,
        dice: float,
    ) -> Serve | Check | Miss:
        """The verdict on what the memory found: keys with cosines, most similar first.

        `dice` is a fresh random number in [0, 1): below `checked` a hit is checked.  Some 0.5 ms for short questions.
        """
        learnt = self._owner(question.tenant, question.route, policy)
        near = self._neighbours(question, found, now_ns)
        text = normal(question.text)
        asked = _marks(question.text)
        best = candidate(
            text, _grams(text), near, learnt.weights, lambda other: contradiction(asked, _marks(other))
        )
        if best is None:
            self._missed += 1
            return _miss("semantic_empty")
        score = learnt.learner.score(best.features)
        evidence = learnt.evidence
        if best.objection is None:
            evidence.saw(score)
        hit = best.objection is None and evidence.serves(score)
        trial = self._trial(question, best, score, checked=hit)
        if best.objection is not None:
            self._refused += 1
            why = best.objection
            return Miss(
                code=f"semantic_guard_{why.code}",
                en=why.en,
                ko=why.ko,
                trial=trial,
                similarity=best.nearest.similarity,
            )
        if not hit:
            self._missed += 1
            return _miss(
                "semantic_unsure" if evidence.threshold is not None else "semantic_learning", trial, best
            )
        if dice < policy.checked:
            self._checked += 1
            return Check(trial=trial, similarity=best.nearest.similarity)
        self._served += 1
        return Serve(entry=trial.entry, trial=trial, similarity=best.nearest.similarity, bound=evidence.bound)

    def learn(self, trial: Trial, outcome: Outcome) -> None:
        """Take in how the cached answer compared with the model's; `unsure` counts as wrong."""
        learnt = self._learnt.get((trial.tenant, trial.route))
        if learnt is None:
            return
        right = outcome == "same"
        self._labels += 1
        self._wrong += trial.checked and not right
        learnt.learner.learn(trial.features, right)
        if not trial.objected:
            learnt.evidence.learn(trial.score, right, checked=trial.checked)

    def teach(
        self,
        tenant: str,
        route: str,
        policy: SemanticPolicy,
        *,
        cached: str,
        asked: str,
        similarity: float,
        same: bool,
    ) -> None:
        """Take in a labelled pair: a question as if it were cached, one as if it were asked, their cosine."""
        learnt = self._owner(tenant, route, policy)
        near = [Neighbour(0, 0, similarity, cached, _grams(normal(cached)))]
        text, marked = normal(asked), _marks(asked)
        best = candidate(
            text, _grams(text), near, learnt.weights, lambda other: contradiction(marked, _marks(other))
        )
        assert best is not None  # there is one neighbour
        self._labels += 1
        score = learnt.learner.score(best.features)
        learnt.learner.learn(best.features, same)
        if best.objection is None:
            learnt.evidence.saw(score)
            learnt.evidence.learn(score, same, checked=False)

    def complain(self, trial: Trial) -> tuple[int, ...]:
        """A caller says that an answer served was wrong; the keys that are dropped for it.

        It counts as a wrong outcome.  That nobody complained counts as nothing: it would be a biased sample.
        """
        self.learn(trial, "different")
        return (trial.key,) if self._remove(trial.key) else ()

    def put(
        self, question: Question, entry: Entry, *, said: str, now_ns: int, same_as: Trial | None = None
    ) -> tuple[int | None, tuple[int, ...]]:
        """Keep an answer: its new key for the memory, and the keys given up for it.

        `said` is the text of the answer: questions with equal answers vote together.  So do they where it was found
        to be the same as that of the trial `same_as`.  The key is None where the answer is larger than an eighth of
        the bound.
        """
        self._last += 1
        key = self._last
        answer = _answer_id(question.namespace, said) if same_as is None else same_as.answer
        slot = _Slot(question, answer, entry, now_ns + int(question.ttl_s * 1e9))
        if slot.size > self._max_bytes // 8:
            return None, ()
        gone = []
        while self._bytes + slot.size > self._max_bytes:
            gone.append(next(iter(self._slots)))
            self._remove(gone[-1])
        self._slots[key] = slot
        self._bytes += slot.size
        learnt = self._learnt.get((question.tenant, question.route))
        if learnt is not None:
            learnt.weights.add(_grams(normal(question.text)))
        return key, tuple(gone)

    # ---- keeping house

    def forget(self, keys: Iterable[int]) -> None:
        """Drop what the memory gave up."""
        for key in keys:
            self._remove(key)

    def drop_tenant(self, tenant: str) -> tuple[int, ...]:
        """Forget a tenant's entries and all that its routes learnt; the keys to remove from the memory."""
        for owner in [one for one in self._learnt if one[0] == tenant]:
            del self._learnt[owner]
        return self._drop(key for key, slot in self._slots.items() if slot.question.tenant == tenant)

    def purge(self, generation: str) -> tuple[int, ...]:
        """Forget what was not made under `generation`; the keys to remove from the memory."""
        return self._drop(key for key, slot in self._slots.items() if slot.question.generation != generation)

    def expire(self, now_ns: int) -> tuple[int, ...]:
        """Forget what is too old; the keys to remove from the memory.  O(entries)."""
        return self._drop(key for key, slot in self._slots.items() if now_ns >= slot.expires_ns)

    def clear(self) -> None:
        """Forget every entry: the memory has ended, and its vectors with it.  What was learnt stays."""
        self._slots.clear()
        self._bytes = 0

    def stats(self) -> SemanticStats:
        """Counts since the start, and what is held now."""
        return SemanticStats(
            entries=len(self._slots), bytes=self._bytes, bytes_max=self._max_bytes, served=self._served,
            checked=self._checked, checked_wrong=self._wrong, missed=self._missed, refused=self._refused,
            labels=self._labels, alarms=sum(one.evidence.alarms for one in self._learnt.values()),
        )  # fmt: skip

    def owners(self) -> tuple[OwnerStatus, ...]:
        """What each tenant's route has learnt."""
        return tuple(
            OwnerStatus(
                tenant=tenant, route=route, max_error=one.evidence.max_error, bound=one.evidence.bound,
                threshold=one.evidence.threshold, outcomes=round(one.evidence.outcomes), alarms=one.evidence.alarms,
            )
            for (tenant, route), one in self._learnt.items()
        )  # fmt: skip

    # ---- parts

    def _owner(self, tenant: str, route: str, policy: SemanticPolicy) -> _Learnt:
        owner = (tenant, route)
        learnt = self._learnt.get(owner)
        if learnt is None:
            if len(self._learnt) >= OWNERS_MAX:
                self._learnt.popitem(last=False)
            learnt = self._learnt[owner] = _Learnt(policy)
        self._learnt.move_to_end(owner)
        learnt.evidence.promise(policy.max_error, policy.confidence)
        return learnt

    def _neighbours(
        self, question: Question, found: Iterable[tuple[int, float]], now_ns: int
    ) -> list[Neighbour]:
        near = []
        for key, similarity in found:
            slot = self._slots.get(key)
            # The memory is asked for one namespace; that is not trusted here, and a key may have gone meanwhile.
            if slot is None or slot.question.namespace != question.namespace or now_ns >= slot.expires_ns:
                continue
            text = slot.question.text
            near.append(Neighbour(key, slot.answer, similarity, text, _grams(normal(text))))
        return near[:NEIGHBOURS]

    def _trial(self, question: Question, best: Candidate, score: float, *, checked: bool) -> Trial:
        key = best.nearest.entry
        return Trial(
            tenant=question.tenant, route=question.route, key=key, answer=best.nearest.answer, score=score,
            features=best.features, objected=best.objection is not None, checked=checked,
            entry=self._slots[key].entry,
        )  # fmt: skip

    def _drop(self, keys: Iterable[int]) -> tuple[int, ...]:
        gone = tuple(keys)
        for key in gone:
            self._remove(key)
        return gone

    def _remove(self, key: int) -> bool:
        slot = self._slots.pop(key, None)
        if slot is None:
            return False
        self._bytes -= slot.size
        return True


SENTENCES: Final = {
    "semantic_empty": ("nothing similar is cached", "비슷한 질문이 캐시에 없습니다"),
    "semantic_learning": (
        "there is not yet enough evidence on this route to serve similar questions",
        "이 경로에서는 비슷한 질문의 답을 다시 쓸 근거가 아직 부족합니다",
    ),
    "semantic_unsure": (
        "the similar question that is cached is not similar enough for the promised error",
        "캐시에 있는 비슷한 질문은 약속한 오류율을 지킬 만큼 비슷하지 않습니다",
    ),
}


def _miss(code: str, trial: Trial | None = None, best: Candidate | None = None) -> Miss:
    en, ko = SENTENCES[code]
    return Miss(code=code, en=en, ko=ko, trial=trial, similarity=best.nearest.similarity if best else 0.0)


def _answer_id(namespace: bytes, said: str) -> int:
    return int.from_bytes(namespace_of(namespace, bare(said).encode("utf-8", "replace"))[:8], "big")


def namespace_of(*parts: bytes) -> bytes:
    """The id of a namespace: a hash over parts of which each is told apart by its length."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.digest()
