"""The numbers of a question with their units, as figures or as English or Korean words."""

from __future__ import annotations

import re
from typing import Final

from ondol.gateway.semantic_words import UNITS

_ENGLISH: Final = dict(
    zip(
        (
            "zero two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
            "sixteen seventeen eighteen nineteen"
        ).split(),
        (0, *range(2, 20)),
        strict=True,
    )
) | {
    word: 10 * (at + 2)
    for at, word in enumerate(["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"])
}
_SCALES: Final = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9}
_ORDINALS: Final = {
    word: at + 2
    for at, word in enumerate(
        ["second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth"]
    )
}
_NATIVE_ONES: Final = {
    "한": 1, "하나": 1, "두": 2, "둘": 2, "세": 3, "셋": 3, "네": 4, "넷": 4, "다섯": 5, "여섯": 6, "일곱": 7, "여덟": 8,
    "아홉": 9,
}  # fmt: skip
_NATIVE_TENS: Final = {
    "열": 10, "스물": 20, "스무": 20, "서른": 30, "마흔": 40, "쉰": 50, "예순": 60, "일흔": 70, "여든": 80, "아흔": 90
}  # fmt: skip
_DIGITS: Final = {letter: at + 1 for at, letter in enumerate("일이삼사오육칠팔구")} | {"영": 0, "공": 0}
_TENS: Final = {"십": 10, "백": 100, "천": 1000}
_MYRIADS: Final = {"만": 10**4, "억": 10**8, "조": 10**12}

_UNIT_OF: Final = {word: unit for unit, words in UNITS.items() for word in words.split()}
_KOREAN_UNITS: Final = "|".join(sorted((word for word in _UNIT_OF if word >= "가"), key=len, reverse=True))
_LATIN_UNITS: Final = "|".join(
    sorted((re.escape(word) for word in _UNIT_OF if word < "가" and word.isascii()), key=len, reverse=True)
)
_FIGURES: Final = re.compile(
    r"(?P<money>[$€£¥₩])?\s?(?P<number>\d[\d,]*(?:[.:/-]\d+)*)(?P<large>[십백천만억조]*)\s?"
    rf"(?P<unit>{_KOREAN_UNITS}|(?:{_LATIN_UNITS})(?![a-z]))?"
)
_ONES: Final = "|".join(sorted(_NATIVE_ONES, key=len, reverse=True))
_AFTER: Final = r"(?=[^가-힣]|$|에|은|는|이|가|을|를|의|로|으로|부터|까지|만|말고|쯤|정도|씩|보다|짜리|동안|전|후|내|뒤|안|간|째|밖|와|과|하고|랑|도|인|입|이다)"
_NATIVE_UNITS: Final = (
    "시간|시|명|개월|개|사람|살|달|번|잔|장|마리|권|대|가지|배|쪽|주|주일|병|켤레|박스|곳|군데|자리|분"
)
_NATIVE: Final = re.compile(
    rf"(?<![가-힣])(?P<tens>{'|'.join(_NATIVE_TENS)})?(?P<ones>{_ONES})?\s?(?P<unit>{_NATIVE_UNITS}){_AFTER}"
)
_DIGIT: Final = "[일이삼사오육칠팔구]"
_SINO: Final = re.compile(
    rf"(?<![가-힣])(?P<number>(?:{_DIGIT}?[십백천만억조])+{_DIGIT}?(?=\s?(?:{_KOREAN_UNITS}))|{_DIGIT}(?=월|년|층|학년|개월|주|번|위|점|박|호|단))"
    rf"\s?(?P<unit>{_KOREAN_UNITS}|호|단|점){_AFTER}"
)
_ALONE: Final = re.compile(r"(?<![가-힣])(두|세|둘|셋|넷|다섯|여섯|일곱|여덟|아홉|열)(?=\s|이서|이\s|은\s|$)")
# Words that begin like a number with its unit: 이번, 사장, 일주일 is one.
_NOT_NUMBERS: Final = re.compile(
    r"(?<![가-힣])(이번|이분|이달|이 달|이 사람|이 분|이 시간|이 개|이개|한번|한 번|사장|사람|이등|일대|일번|세대|네 번호|두루"
    r"|일일이|하나도|둘 중|둘중|한 분|네 분|공장|공대|사회|일시|이시|만일|천장|이월|공인|천만에|이층버스|오월|일인|이인|만년|사시|이도|사도|조회|조개|오개|네시)"
)
_OF_ONE: Final = frozenset(("person", "piece", "animal", "times", ""))

Number = tuple[str, str]
"""A value as canonical text, and its unit or nothing."""


def numbers(text: str) -> frozenset[Number]:
    """The numbers of a `normal` text.  Single things are left out, where languages say «a», «한» or nothing."""
    found: set[Number] = set()
    text = _NOT_NUMBERS.sub(" ", text)

    def figure(match: re.Match[str]) -> str:
        value = _figure(match["number"], match["large"])
        unit = _UNIT_OF.get(match["money"] or match["unit"] or "", "")
        found.add((value, unit))
        return " "

    def native(match: re.Match[str]) -> str:
        if not match["tens"] and not match["ones"]:
            return match[0]
        value = _NATIVE_TENS.get(match["tens"] or "", 0) + _NATIVE_ONES.get(match["ones"] or "", 0)
        found.add((str(value), _UNIT_OF.get(match["unit"], "")))
        return " "

    def sino(match: re.Match[str]) -> str:
        found.add((str(_sino(match["number"])), _UNIT_OF.get(match["unit"], "")))
        return " "

    def alone(match: re.Match[str]) -> str:
        found.add((str(_NATIVE_ONES.get(match[1]) or _NATIVE_TENS[match[1]]), ""))
        return " "

    text = _FIGURES.sub(figure, text)
    text = _ALONE.sub(alone, _SINO.sub(sino, _NATIVE.sub(native, text)))
    found.update(_in_words(text.split()))
    return frozenset(one for one in found if not (one[0] == "1" and one[1] in _OF_ONE))


def _figure(number: str, large: str) -> str:
    plain = number.replace(",", "")
    if not plain.replace(".", "", 1).isdigit():
        return plain
    value = float(plain)
    for letter in large:
        value *= _TENS.get(letter) or _MYRIADS[letter]
    return str(int(value)) if value == int(value) else repr(value)


def _sino(number: str) -> int:
    total = part = digit = 0
    for letter in number:
        if letter in _DIGITS:
            digit = digit * 10 + _DIGITS[letter]
        elif letter in _TENS:
            part += (digit or 1) * _TENS[letter]
            digit = 0
        else:
            total += (part + digit or 1) * _MYRIADS[letter]
            part = digit = 0
    return total + part + digit


def _in_words(tokens: list[str]) -> set[Number]:
    """English number words; «one» is left out, it is mostly a pronoun."""
    found: set[Number] = set()
    value: int | None = None
    for token in [*tokens, ""]:
        for word in token.strip(".,?!;:\"'()").split("-") if token else [""]:
            if word in _ENGLISH:
                value = (value or 0) + _ENGLISH[word]
            elif word in _SCALES:
                value = (value or 1) * _SCALES[word]
            elif word in _ORDINALS and word != "second":
                value = (value or 0) + _ORDINALS[word]
            elif word == "one" and value is not None:
                value += 1
            elif word != "and" and value is not None:
                found.add((str(value), _UNIT_OF.get(word, "") if word.isascii() else ""))
                value = None
    return found
