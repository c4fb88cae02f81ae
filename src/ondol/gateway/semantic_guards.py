"""Guards: what makes two similar questions different, whatever their similarity says.

`marks` notes once for each question what matters (negations, numbers, dates, places, names ...); `contradiction`
compares the notes of two.  A guard only ever refuses: what it lets pass still needs evidence.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

import msgspec

from ondol.gateway.semantic_numbers import Number, numbers
from ondol.gateway.semantic_text import bare, language, normal, words
from ondol.gateway.semantic_words import (
    AMOUNTS,
    COLOURS,
    DAYS,
    MONEY,
    OPPOSITES,
    PLACES,
    QUESTIONS,
)


class Marks(msgspec.Struct, frozen=True, kw_only=True):
    """What the guards know of a question."""

    bare: str
    language: str
    words: tuple[str, ...]
    negations: int
    plain_negations: int
    numbers: frozenset[Number]
    poles: Mapping[str, set[str]]
    questions: frozenset[str]
    days: frozenset[str]
    places: frozenset[str]
    amounts: frozenset[str]
    money: frozenset[str]
    colours: frozenset[str]
    names: frozenset[str]
    than: frozenset[str]


class Contradiction(msgspec.Struct, frozen=True):
    """Why a cached answer is refused: an ASCII code, and the sentence in English and Korean."""

    code: str
    en: str
    ko: str


def _contradiction(code: str, what: str, ko: str) -> Contradiction:
    return Contradiction(
        code, f"the similar question that is cached has {what}", f"비슷한 질문이 캐시에 있지만 {ko} 다릅니다"
    )


REASONS: Final = {
    one.code: one
    for one in (
        _contradiction("language", "another language", "언어가"),
        _contradiction("negation", "another negation", "부정 표현이"),
        _contradiction("opposite", "an opposite word", "반대되는 낱말이 있어 뜻이"),
        _contradiction("number", "another number", "숫자가"),
        _contradiction("unit", "another unit", "단위가"),
        _contradiction("date", "another day or time", "날짜나 시간이"),
        _contradiction("place", "another place", "장소가"),
        _contradiction("question", "another question word", "묻는 것이"),
        _contradiction("quantity", "another quantity word", "수량 표현이"),
        _contradiction("currency", "another currency", "통화가"),
        _contradiction("colour", "another colour", "색이"),
        _contradiction("name", "another name", "이름이"),
        _contradiction("direction", "the same words in another order", "낱말의 순서가"),
        _contradiction("word", "one other word in nearly the same sentence", "거의 같은 문장에서 낱말이"),
        _contradiction(
            "unknown_language", "other words in a language without guards", "지원하지 않는 언어의 낱말이"
        ),
    )
}


class _Words:
    """All word lists, looked for in one pass over a text: words by their first letter.

    Regular expressions of so many alternatives took ten times as long.
    """

    def __init__(self, tables: Mapping[str, Mapping[str, str]], *, whole: str) -> None:
        """`whole` is the table whose Korean words must begin one."""
        self._from: dict[str, list[tuple[str, bool, bool, str, str]]] = {}
        for table, lines in tables.items():
            for name, line in lines.items():
                for word in line.split():
                    self._add(table, name, word, whole=table == whole)

    def _add(self, table: str, name: str, word: str, *, whole: bool) -> None:
        if word >= "가":
            # A last `_` wants the word to end there; a word of one syllable wants to begin one, as all do if `whole`.
            plain = word.rstrip("_")
            begins, ends = whole or len(plain) == 1, word.endswith("_")
            forms = {plain.replace("_", ""), plain.replace("_", " ")}
        else:
            begins = ends = word.isascii() and word[0].isalpha()
            forms = {word.replace("_", " ")}
        for form in forms:
            self._from.setdefault(form[0], []).append((form, begins, ends, table, name))

    def found(self, text: str) -> dict[str, set[str]]:
        """The names by table."""
        names: dict[str, set[str]] = {}
        before = ""
        for at, letter in enumerate(text):
            inside = _alike(before, letter)
            before = letter
            for form, begins, ends, table, name in self._from.get(letter, ()):
                if begins and inside or not text.startswith(form, at):
                    continue
                end = at + len(form)
                if not (ends and end < len(text) and _alike(form[-1], text[end])):
                    names.setdefault(table, set()).add(name)
        return names


def _alike(one: str, other: str) -> bool:
    """Whether two letters can be of one word: both plain Latin, or both Korean."""
    return ("a" <= one <= "z" and "a" <= other <= "z") or ("가" <= one <= "힣" and "가" <= other <= "힣")


_WORDS: Final = _Words(
    {
        "opposites": {
            f"{at} {side}": pole
            for at, line in enumerate(OPPOSITES.strip().splitlines())
            for side, pole in enumerate(line.split("|"))
        },
        "questions": QUESTIONS,
        "days": {**DAYS, "may": "in_may of_may on_may by_may since_may until_may"},
        "places": PLACES,
        "amounts": AMOUNTS,
        "money": MONEY,
        "colours": COLOURS,
    },
    whole="places",
)

_NEGATION_EN: Final = re.compile(
    r"(?<![a-z])(?:not|no|never|none|nothing|nobody|nowhere|without|neither|nor|cannot|cant|dont|doesnt|didnt|wont|isnt"
    r"|arent|wasnt|werent|couldnt|shouldnt|wouldnt|havent|hasnt|hadnt|unable|instead of|rather than|except|unless"
    r"|hardly|avoid|refrain)(?![a-z])|n't(?![a-z])"
)
_NOT_KNOWING: Final = re.compile(
    r"(?:i )?(?:do not|don't|dont) (?:really )?(?:know|understand|see)|(?:i am |i'm )?not (?:sure|certain)|no idea|모르|몰라|모른"
)
"""«I do not know how to …» asks how to: such a negation counts only between sentences of the same words."""
_AN_NOUNS: Final = "녕|전|내|경|심|부|주|정|방|과|건|락|색|개|양|면|마|타|테|보리|산|성|암|나푸|동|드로"
_NEGATION_KO: Final = re.compile(
    rf"(?<![가-힣])안(?=\s)|(?<![가-힣])안(?!{_AN_NOUNS})(?=[가-힣])|(?<![가-힣])안(?:나[가오요]|내[고요])"
    r"|(?<![가-힣])못(?!생|지않)|잘못하지|않|(?<=지)\s?(?:말|마(?![가-힣]|세|십|라|시|요)|마(?:세|십|라|시|요))|말고|말아|말라"
    r"|없(?!애)|(?<![가-힣])아니(?!면)|(?<=[이가은는도])\s아닌|(?<![가-힣])아닌|금지|불가|불필요|모르|몰라|모른|대신|제외|빼고|싫"
)
_CAPITAL: Final = re.compile(r"(?<![^\W_])[A-Z][A-Za-z0-9&'-]*")
_LATIN: Final = re.compile(r"[a-z][a-z0-9&'-]+")
_CODED: Final = re.compile(r"(?<![^\W_])(?=[^\W_]*\d)(?=[^\W_]*[a-z])[a-z0-9-]+")
_TITLED: Final = re.compile(
    r"([가-힣]{2,4})\s?(?:씨|님|선생|대리|과장|부장|팀장|사장|교수|박사|의원|대통령|총리|장관|감독|선수)"
)
_THAN: Final = re.compile(
    r"(?:than (?:the |a |an )?)([^\W_]+)|([^\W_]+?)(?:[은는이가을를])?(?:보다|\s?말고|\s?대신)(?![가-힣])"
)
_ROLE: Final = re.compile(
    r"(?P<stem>[^\W_]{2,}?)(?:(?P<subject>이|가|은|는)|(?P<object>을|를)|(?P<from>에서|부터|한테서)|(?P<to>에게|한테|까지|으로|로))"
)
_POLITE: Final = frozenset(
    "please hi hello hey thanks thank kindly 혹시 좀 제발 안녕하세요 저기 저기요 저 요".split()
)
_NOT_NAMES: Final = frozenset("i i'm i've i'd i'll ok asap please hi hello thanks my the a an".split())
_HAND: Final = frozenset(
    (
        "a an the is are am be was were do does did to of for in on at by and or my your me i you it this "
        "that please can could would will shall should how what have has had get there"
    ).split()
)


def marks(question: str) -> Marks:
    """What the guards know of a question.  Linear in its length; some 60 µs for 100 characters."""
    text = normal(question)
    tongue = language(text)
    negation = _NEGATION_KO if tongue == "ko" else _NEGATION_EN
    poles: dict[str, set[str]] = {}
    listed = _WORDS.found(text)
    for contrast, _, side in (name.partition(" ") for name in listed.get("opposites", ())):
        poles.setdefault(contrast, set()).add(side)
    plain = _NOT_KNOWING.sub(" ", text)
    return Marks(
        bare=bare(question),
        language=tongue,
        words=tuple(words(text)),
        negations=len(negation.findall(text)),
        plain_negations=len(negation.findall(plain)),
        numbers=numbers(text),
        poles=poles,
        questions=frozenset(listed.get("questions", ())),
        days=frozenset(listed.get("days", ())),
        places=frozenset(listed.get("places", ())),
        amounts=frozenset(listed.get("amounts", ())),
        money=frozenset(listed.get("money", ())),
        colours=frozenset(listed.get("colours", ())),
        names=_names(question, text, tongue),
        than=frozenset(one or other for one, other in _THAN.findall(text)),
    )


def _names(question: str, text: str, tongue: str) -> frozenset[str]:
    """Capital words inside a sentence, words with figures, and in Korean: Latin words and names before a title."""
    coded = set(_CODED.findall(text))
    if tongue == "ko":
        return frozenset(coded | set(_LATIN.findall(text)) | set(_TITLED.findall(text)))
    capitals = set()
    letters = [letter for letter in question if letter.isalpha()]
    if sum(map(str.isupper, letters)) * 2 < len(letters):
        for match in _CAPITAL.finditer(question):
            before = question[: match.start()].rstrip()
            if before and before[-1] not in ".?!:\"'-(":
                capitals.add(match[0].casefold().removesuffix("'s"))
    return frozenset(coded | capitals) - _NOT_NAMES


def contradiction(asked: Marks, cached: Marks) -> Contradiction | None:
    """Why the answer to `cached` must not be given to `asked`, or None where no guard objects."""
    code = _code(asked, cached)
    return None if code is None else REASONS[code]


def _code(asked: Marks, cached: Marks) -> str | None:
    if asked.bare == cached.bare:
        return None if asked.numbers == cached.numbers else "number"
    tongue = _tongue(asked, cached)
    if tongue is None:
        return "language"
    if tongue not in ("ko", "en"):
        return "unknown_language"
    if asked.plain_negations != cached.plain_negations or (
        asked.negations != cached.negations and _shared(asked, cached) > 0.5
    ):
        return "negation"
    if any(side != cached.poles[at] for at, side in asked.poles.items() if at in cached.poles):
        return "opposite"
    if {value for value, _ in asked.numbers} != {value for value, _ in cached.numbers}:
        return "number"
    if asked.numbers != cached.numbers and _units_differ(asked.numbers, cached.numbers):
        return "unit"
    for code, ours, theirs in (
        ("date", asked.days, cached.days),
        ("place", asked.places, cached.places),
        ("currency", asked.money, cached.money),
        ("quantity", asked.amounts, cached.amounts),
    ):
        if ours != theirs:
            return code
    if asked.questions != cached.questions and asked.questions and cached.questions:
        return "question"
    if asked.colours != cached.colours:
        return "colour"
    if not _known(asked.names, cached) or not _known(cached.names, asked):
        return "name"
    if asked.than != cached.than and asked.than and cached.than:
        return "direction"
    played, other = _roles(asked.words), _roles(cached.words)
    if sum(played[word] != other[word] for word in played.keys() & other.keys()) > 1:
        return "direction"
    return _same_sentence(asked, cached)


def _tongue(asked: Marks, cached: Marks) -> str | None:
    """The language of both; a few Latin words are English where the other is, and they are mostly its words."""
    if asked.language == cached.language:
        return asked.language
    both = {asked.language, cached.language} == {"en", "la"}
    return "en" if both and _shared(asked, cached) >= 0.5 else None


def _shared(asked: Marks, cached: Marks) -> float:
    """Of the question with fewer words, the share of its words that the other has."""
    ours, theirs = set(asked.words), set(cached.words)
    return len(ours & theirs) / max(1, min(len(ours), len(theirs)))


def _units_differ(ours: frozenset[Number], theirs: frozenset[Number]) -> bool:
    known = dict(theirs)
    return any(unit and known.get(value) and known[value] != unit for value, unit in ours)


def _known(names: frozenset[str], other: Marks) -> bool:
    """Whether the other question has each of the names, as a word or run together."""
    return all(name in other.words or name in other.bare for name in names)


def _same_sentence(asked: Marks, cached: Marks) -> str | None:
    """`direction` for the same words in another order, `word` where one or two words were replaced."""
    ours = [word for word in asked.words if word not in _POLITE]
    theirs = [word for word in cached.words if word not in _POLITE]
    if sorted(ours) == sorted(theirs):
        return "direction" if ours != theirs and asked.language == "en" else None
    head = 0
    while head < min(len(ours), len(theirs)) and ours[head] == theirs[head]:
        head += 1
    tail = 0
    while tail < min(len(ours), len(theirs)) - head and ours[-1 - tail] == theirs[-1 - tail]:
        tail += 1
    mine, other = ours[head : len(ours) - tail], theirs[head : len(theirs) - tail]
    if not mine or not other or max(len(mine), len(other)) > 2 or head + tail < max(len(mine), len(other)):
        return None
    if numbers(" ".join(mine)) and numbers(" ".join(other)):
        return None  # They were compared as numbers.
    left, right = _content(mine), _content(other)
    if not left or not right or any(_akin(a, b) for a in left for b in right):
        return None
    return "word"


def _roles(words: tuple[str, ...]) -> dict[str, str]:
    """What Korean particles make of the words before them: subject, object, from, to."""
    found = {}
    for word in words:
        match = _ROLE.fullmatch(word)
        if match:
            found[match["stem"]] = match.lastgroup or ""
    return found


def _content(group: list[str]) -> list[str]:
    """The words that carry the meaning."""
    return [word for word in group if word not in _HAND]


def _akin(one: str, other: str) -> bool:
    """Whether two words are forms of one: they begin alike, for half of the longer one or all of the shorter."""
    same = 0
    while same < min(len(one), len(other)) and one[same] == other[same]:
        same += 1
    least = 3 if one.isascii() else 1
    return same >= least and (same * 2 >= max(len(one), len(other)) or same == min(len(one), len(other)))
