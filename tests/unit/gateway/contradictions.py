"""Seeded pairs of questions that look alike and must not share an answer, English and Korean."""

from __future__ import annotations

import random
from collections.abc import Iterator

Pair = tuple[str, str, str]
"""The kind of contradiction, a question, and one that contradicts it."""

VERBS_EN = [
    "block",
    "renew",
    "replace",
    "register",
    "print",
    "share",
    "scan",
    "refund",
    "upgrade",
    "transfer",
]
THINGS_EN = [
    "card",
    "contract",
    "invoice",
    "subscription",
    "router",
    "parcel",
    "ticket",
    "account",
    "licence",
]
OPPOSITES_EN = [
    ("activate", "deactivate"), ("open", "close"), ("enable", "disable"), ("lock", "unlock"), ("buy", "sell"),
    ("install", "uninstall"), ("accept", "reject"), ("upload", "download"), ("increase", "decrease"),
    ("cancel", "order"), ("add", "remove"), ("start", "stop"), ("send", "receive"), ("deposit", "withdraw"),
]  # fmt: skip
THINGS_KO = ["카드", "계약", "영수증", "구독", "공유기", "소포", "승차권", "계좌", "면허", "보험"]
VERBS_KO = ["갱신", "교체", "출력", "공유", "환불", "이전", "조회", "발급", "변경", "정지"]
OPPOSITES_KO = [
    ("활성화", "비활성화"), ("취소", "신청"), ("설치", "제거"), ("가입", "탈퇴"), ("입금", "출금"), ("수락", "거절"),
    ("업로드", "다운로드"), ("연결", "해제"), ("시작", "종료"), ("허용", "금지"), ("구매", "판매"),
]  # fmt: skip
DAYS_EN = [
    "Monday",
    "Tuesday",
    "Wednesday",
    "Thursday",
    "Friday",
    "Saturday",
    "Sunday",
    "January",
    "June",
    "October",
]
DAYS_KO = ["월요일", "화요일", "수요일", "목요일", "금요일", "토요일", "일요일", "내일", "모레", "주말"]
PLACES_EN = [
    "Seoul",
    "Busan",
    "Tokyo",
    "Paris",
    "Berlin",
    "London",
    "Canada",
    "Vietnam",
    "Lisbon",
    "Nairobi",
    "Quito",
]
PLACES_KO = [
    "서울",
    "부산",
    "대구",
    "도쿄",
    "파리",
    "베를린",
    "캐나다",
    "베트남",
    "리스본",
    "나이로비",
    "안동",
    "통영",
]
NAMES_EN = ["Alice", "Bogdan", "Chandra", "Dmitri", "Eun-ji", "Fatima", "Zorro3", "Acme", "Globex", "Initech"]
NAMES_KO = ["김민수", "이서연", "박지훈", "최유나", "정하늘", "한빛전자", "누리은행", "다온보험", "라온통신"]
NUMBERS_EN = ["two", "three", "5", "7", "12", "fifteen", "20", "forty", "100", "250"]
NUMBERS_KO = ["두", "세", "다섯", "7", "열", "12", "스무", "30", "백", "250"]
UNITS_EN = [
    "minutes",
    "hours",
    "days",
    "weeks",
    "months",
    "years",
    "dollars",
    "euros",
    "kilograms",
    "kilometres",
]
UNITS_KO = ["분", "시간", "일", "주", "개월", "년", "달러", "유로", "킬로그램", "킬로미터"]
POLITE_EN = [("", ""), ("Hi, ", ""), ("", " please"), ("Hello, ", " thanks"), ("Please ", "")]
POLITE_KO = [("", ""), ("혹시 ", ""), ("안녕하세요 ", ""), ("저기 ", " 요")]


def contradictions(seed: int, count: int) -> Iterator[Pair]:
    """`count` pairs; the same seed gives the same."""
    dice = random.Random(seed)
    makers = (
        _negation_en, _opposite_en, _number_en, _unit_en, _entity_en, _direction_en, _question_en, _quantity_en,
        _negation_ko, _opposite_ko, _number_ko, _unit_ko, _entity_ko, _direction_ko, _question_ko, _quantity_ko,
    )  # fmt: skip
    for at in range(count):
        kind, one, other = makers[at % len(makers)](dice)
        polite = POLITE_KO if makers[at % len(makers)].__name__.endswith("ko") else POLITE_EN
        before, after = dice.choice(polite)
        other = f"{before}{other}{after}"
        yield (kind, one, other) if dice.random() < 0.5 else (kind, other, one)


def _negation_en(dice: random.Random) -> Pair:
    verb, thing = dice.choice(VERBS_EN), dice.choice(THINGS_EN)
    positive, negative = dice.choice(
        [
            (f"Can I {verb} my {thing}?", f"Can I not {verb} my {thing}?"),
            (f"I want to {verb} the {thing}", f"I don't want to {verb} the {thing}"),
            (f"{verb} my {thing} now", f"do not {verb} my {thing} now"),
            (f"My {thing} is valid, how do I {verb} it?", f"My {thing} isn't valid, how do I {verb} it?"),
            (f"How can I {verb} a {thing} with a receipt?", f"How can I {verb} a {thing} without a receipt?"),
            (f"Why did my {thing} {verb}?", f"Why did my {thing} never {verb}?"),
            (f"I know how to {verb} the {thing}", f"I do not know how to {verb} the {thing}"),
        ]
    )
    return "negation", positive, negative


def _negation_ko(dice: random.Random) -> Pair:
    verb, thing = dice.choice(VERBS_KO), dice.choice(THINGS_KO)
    positive, negative = dice.choice(
        [
            (f"{thing}을 {verb}해 주세요", f"{thing}을 {verb}하지 마세요"),
            (f"{thing} {verb}해도 되나요?", f"{thing} {verb} 안 해도 되나요?"),
            (f"{thing} {verb}했어요", f"{thing} {verb} 못 했어요"),
            (f"{thing}을 {verb}할 수 있어?", f"{thing}을 {verb}할 수 없어?"),
            (f"{thing} {verb}하고 싶어요", f"{thing} {verb}하고 싶지 않아요"),
            (f"{thing} {verb}이 됩니다", f"{thing} {verb}이 안됩니다"),
            (f"{thing} {verb}하자", f"{thing} {verb}하지 말자"),
        ]
    )
    return "negation", positive, negative


def _opposite_en(dice: random.Random) -> Pair:
    one, other = dice.choice(OPPOSITES_EN)
    thing = dice.choice(THINGS_EN)
    form = dice.choice(["How do I {} my {}?", "Can you {} the {} for me", "What happens when I {} a {}?"])
    return "opposite", form.format(one, thing), form.format(other, thing)


def _opposite_ko(dice: random.Random) -> Pair:
    one, other = dice.choice(OPPOSITES_KO)
    thing = dice.choice(THINGS_KO)
    form = dice.choice(["{1} {0} 방법 알려줘", "{1}을 {0}하려면 어떻게 해야 하나요?", "{1} {0}해 주세요"])
    return "opposite", form.format(one, thing), form.format(other, thing)


def _number_en(dice: random.Random) -> Pair:
    one, other = dice.sample(NUMBERS_EN, 2)
    form = dice.choice(
        ["How do I order {} cards?", "Is it free after {} days?", "I was charged {} times for the ticket"]
    )
    return "number", form.format(one), form.format(other)


def _number_ko(dice: random.Random) -> Pair:
    one, other = dice.sample(NUMBERS_KO, 2)
    form = dice.choice(["승차권 {} 장 예약해 줘", "{} 명 자리 있나요?", "소포 {} 개 보내려면 얼마예요?"])
    return "number", form.format(one), form.format(other)


def _unit_en(dice: random.Random) -> Pair:
    one, other = dice.sample(UNITS_EN, 2)
    number, form = (
        dice.choice(["3", "10", "20"]),
        dice.choice(["What is {} {} in the plan?", "Does it end after {} {}?"]),
    )
    return "unit", form.format(number, one), form.format(number, other)


def _unit_ko(dice: random.Random) -> Pair:
    one, other = dice.sample(UNITS_KO, 2)
    number, form = (
        dice.choice(["3", "10", "20"]),
        dice.choice(["{}{} 연장하면 얼마예요?", "요금제에서 {}{} 더 쓸 수 있어?"]),
    )
    return "unit", form.format(number, one), form.format(number, other)


def _entity_en(dice: random.Random) -> Pair:
    kind, words, forms = dice.choice(
        [
            ("date", DAYS_EN, ["Is the shop open on {}?", "Can you move my appointment to {}?"]),
            (
                "place",
                PLACES_EN,
                ["How do I get to {}?", "What does a parcel to {} cost?", "Do you ship to {} for free?"],
            ),
            ("name", NAMES_EN, ["What is the number of {}?", "Can I pay the invoice of {} later?"]),
        ]
    )
    one, other = dice.sample(words, 2)
    form = dice.choice(forms)
    return kind, form.format(one), form.format(other)


def _entity_ko(dice: random.Random) -> Pair:
    kind, words, forms = dice.choice(
        [
            ("date", DAYS_KO, ["{}에 문 여나요?", "약속을 {}로 옮겨 줘"]),
            ("place", PLACES_KO, ["{}까지 어떻게 가나요?", "{}에 소포 보내면 얼마예요?"]),
            ("name", NAMES_KO, ["{} 전화번호 알려줘", "{} 청구서를 나중에 내도 되나요?"]),
        ]
    )
    one, other = dice.sample(words, 2)
    form = dice.choice(forms)
    return kind, form.format(one), form.format(other)


def _direction_en(dice: random.Random) -> Pair:
    one, other = dice.sample(THINGS_EN, 2)
    form = dice.choice(["Is the {} cheaper than the {}?", "Can I turn a {} into a {}?"])
    return "direction", form.format(one, other), form.format(other, one)


def _direction_ko(dice: random.Random) -> Pair:
    one, other = dice.sample(THINGS_KO, 2)
    form = dice.choice(["{}가 {}보다 비싸?", "{} 말고 {} 보여 줘"])
    return "direction", form.format(one, other), form.format(other, one)


def _question_en(dice: random.Random) -> Pair:
    one, other = dice.sample(["Who", "When", "Where", "Why"], 2)
    verb, thing = dice.choice(VERBS_EN), dice.choice(THINGS_EN)
    form = dice.choice(["{} did you {} my {}?", "{} can {} a {}"])
    return "question", form.format(one, verb, thing), form.format(other, verb, thing)


def _question_ko(dice: random.Random) -> Pair:
    one, other = dice.sample(["누가", "언제", "어디서", "왜"], 2)
    verb, thing = dice.choice(VERBS_KO), dice.choice(THINGS_KO)
    return "question", f"{thing} {one} {verb}해요?", f"{thing} {other} {verb}해요?"


def _quantity_en(dice: random.Random) -> Pair:
    one, other = dice.choice(
        [("all", "some"), ("always", "never"), ("at least", "at most"), ("more", "less"), ("before", "after")]
    )
    thing, verb = dice.choice(THINGS_EN), dice.choice(VERBS_EN)
    return (
        "quantity",
        f"Can I {verb} {one} of the {thing} cases?",
        f"Can I {verb} {other} of the {thing} cases?",
    )


def _quantity_ko(dice: random.Random) -> Pair:
    one, other = dice.choice(
        [("모든", "일부"), ("최대", "최소"), ("비싼", "저렴한"), ("많은", "적은"), ("절반", "전부")]
    )
    thing, verb = dice.choice(THINGS_KO), dice.choice(VERBS_KO)
    return "quantity", f"{one} {thing} {verb}해 주세요", f"{other} {thing} {verb}해 주세요"
