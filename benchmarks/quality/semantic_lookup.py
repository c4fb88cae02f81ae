"""How long a semantic lookup takes: encode, search, and the verdict, against a cache of many questions.

    python -m benchmarks.quality.semantic_lookup [--entries 100000] [--json FILE]

Questions are generated, Korean and English in turn, all in one namespace.  Times are those of the caller: through the
pipe to the memory's process and back, one question at a time.  `lag` is the longest that the event loop was held
while 500 lookups ran, as a task that sleeps 1 ms saw it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from pathlib import Path

from rich.progress import Progress

from ondol.core.route_terms import SemanticPolicy
from ondol.engines.memory import MemoryEngine
from ondol.gateway.cache import Entry
from ondol.gateway.semantic import Question, SemanticCache
from ondol.gateway.semantic_features import NEIGHBOURS

SPACE = b"n" * 32
ASKED = 500

SUBJECTS_EN = "card invoice parcel contract router ticket licence loan policy deposit voucher meter".split()
VERBS_EN = "renew block replace track cancel print share change return insure upgrade move".split()
ADVERBS_EN = (
    "online abroad without the app in the shop for my company after the deadline on a weekend".split()
)
SUBJECTS_KO = "카드 청구서 소포 계약 공유기 승차권 면허 대출 보험 예금 상품권 계량기".split()
VERBS_KO = "갱신 정지 교체 조회 취소 출력 공유 변경 반품 가입 승급 이전".split()


def question(dice: random.Random, chars: int) -> str:
    """A question of about that many characters."""
    korean = dice.random() < 0.5
    words: list[str] = []
    while len(" ".join(words)) < chars - 12:
        subject, verb = (SUBJECTS_KO, VERBS_KO) if korean else (SUBJECTS_EN, VERBS_EN)
        words += (
            [f"{dice.choice(subject)}{dice.randrange(1000)}번을", f"{dice.choice(verb)}하고"]
            if korean
            else [
                dice.choice(verb),
                "my",
                f"{dice.choice(subject)} {dice.randrange(1000)}",
                dice.choice(ADVERBS_EN),
            ]
        )
    return ("어떻게 " if korean else "how do I ") + " ".join(words)


async def measure(entries: int) -> dict[str, object]:
    """Fill the memory, then ask."""
    dice = random.Random(1)
    memory = MemoryEngine(entries_max=entries + ASKED, timeout_s=60.0)
    cache = SemanticCache(1 << 32)
    try:
        await memory.ready()
        with Progress() as progress:
            bar = progress.add_task("entries", total=entries)
            for at in range(0, entries, 32):
                texts = [question(dice, 40) for _ in range(min(32, entries - at))]
                await asyncio.gather(*(_put(memory, cache, text) for text in texts))
                progress.advance(bar, len(texts))
        found: dict[str, object] = {"entries": memory.entries}
        for least, most in ((8, 100), (100, 100), (400, 400), (1000, 1000)):
            name = f"{least}_to_{most}_characters"
            found[name] = await _lookups(memory, cache, dice, least, most)
        return found
    finally:
        await memory.close()


async def _put(memory: MemoryEngine, cache: SemanticCache, text: str) -> None:
    entry = Entry(tenant="t", generation="g")
    key, _ = cache.put(_question(text), entry, said=text, now_ns=0)
    if key is not None:
        await memory.add(SPACE, key, text)


async def _lookups(
    memory: MemoryEngine, cache: SemanticCache, dice: random.Random, least: int, most: int
) -> dict[str, float]:
    policy = SemanticPolicy()
    whole, searching, verdicts, encoding = [], [], [], []
    worst = [0.0]
    lag = asyncio.create_task(_lag(worst))
    try:
        for _ in range(ASKED):
            chars = dice.randint(least, most)
            text = question(dice, chars + 12)[:chars]
            begun = time.perf_counter()
            near = await memory.search(SPACE, text, NEIGHBOURS)
            searched = time.perf_counter()
            cache.lookup(_question(text), policy, near.found, now_ns=1, dice=0.5)
            whole.append(time.perf_counter() - begun)
            searching.append(searched - begun)
            encoding.append(near.encode_us)
            verdicts.append(time.perf_counter() - searched)
    finally:
        lag.cancel()
    return {
        "lookup_ms_p50": round(statistics.median(whole) * 1e3, 3),
        "lookup_ms_p95": round(statistics.quantiles(whole, n=20)[18] * 1e3, 3),
        "encode_and_search_ms_p50": round(statistics.median(searching) * 1e3, 3),
        "of_it_encode_ms_p50": round(statistics.median(encoding) / 1e3, 3),
        "verdict_ms_p50": round(statistics.median(verdicts) * 1e3, 3),
        "lag_ms_max": round(worst[0] * 1e3, 3),
    }


async def _lag(worst: list[float]) -> None:
    while True:
        begun = time.perf_counter()
        await asyncio.sleep(0.001)
        worst[0] = max(worst[0], time.perf_counter() - begun - 0.001)


def _question(text: str) -> Question:
    return Question(tenant="t", route="r", generation="g", namespace=SPACE, text=text, ttl_s=10**6)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--entries", type=int, default=100_000)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    found = asyncio.run(measure(given.entries))
    print(json.dumps(found, indent=1))
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
