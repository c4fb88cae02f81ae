"""Which requests may be answered from similar ones at all, and what of them must be exactly equal.

All but the last question is hashed into the namespace: the tenant first, then route, generation of the catalogue,
objective, every other message and every parameter.  Only the text of the last user message is compared by meaning.
"""

from __future__ import annotations

import re
from typing import Any, Final

import msgspec

from ondol.core.inference import Capability, DataClass, InferenceRequest, Task
from ondol.core.route_terms import SemanticPolicy
from ondol.gateway.cache import IGNORED_FIELDS
from ondol.gateway.semantic import Miss, Question, namespace_of
from ondol.gateway.semantic_text import normal

TEXT_CHARS_MAX: Final = 2000
"""A longer question holds too much for one vector, and for guards."""
TEXT_CHARS_MIN: Final = 2

_PERSONAL: Final = re.compile(
    r"[^\s@]+@[^\s@]+\.[a-z]{2,}"  # e-mail
    r"|(?<!\d)\d{6}[- ]?[1-8]\d{6}(?!\d)"  # Korean resident and foreigner numbers
    r"|(?<!\d)\+?\d[\d ().-]{7,}\d(?!\d)"  # telephone, card, account
    r"|(?<!\d)\d{7,}(?!\d)"
    r"|\b[a-z]{2}\d{2}[a-z0-9]{11,30}\b"  # IBAN
    r"|\b[a-z]{1,2}\d{6,9}\b"  # passport
    r"|\b(?=[a-z0-9]*\d)(?=[a-z0-9]*[a-z])[a-z0-9]{12,}\b"  # order numbers, tokens
    r"|\bmy name is\b|\bi live (?:at|in)\b|제 이름은|내 이름은|저는 [가-힣]{2,4}(?:입니다|이에요|예요)|주민등록번호|비밀번호는"
)
_TIME_BOUND: Final = re.compile(
    r"(?<![a-z])(?:today|tonight|tomorrow|yesterday|now|currently|current|right now|at the moment|this (?:week|month|year"
    r"|morning|afternoon|evening)|(?:last|next) (?:week|month|year)|latest|recent|recently|news|weather|forecast"
    r"|temperature|stock price|exchange rate|what time|what day|what date|open now|score|traffic|live)(?![a-z])"
    r"|오늘|내일|어제|모레|그제|지금|현재|방금|요즘|요새|최근|최신|이번\s?(?:주|달|해|년)|다음\s?(?:주|달|해)|지난\s?(?:주|달|해)"
    r"|올해|내년|작년|날씨|기온|미세먼지|예보|뉴스|주가|환율|시세|몇\s?시(?:야|지|인지|니|예요|에요|입니까)|며칠이|무슨 요일|실시간|교통"
)

_ENCODER: Final = msgspec.json.Encoder(order="deterministic")

WHY: Final = {
    "semantic_task": ("only chat is answered from similar questions", "대화 요청만 비슷한 질문의 답을 다시 씁니다"),
    "semantic_data_class": (
        "confidential and restricted content is never compared with other questions",
        "기밀 또는 제한 등급의 내용은 다른 질문과 비교하지 않습니다",
    ),
    "semantic_tools": ("tools, or what they said, decide the answer", "도구나 도구의 결과가 답을 정합니다"),
    "semantic_modality": ("there is more than text in it", "글이 아닌 내용이 있습니다"),
    "semantic_choices": ("several answers, or scores of words, are asked for", "여러 답이나 낱말의 점수를 요청했습니다"),
    "semantic_temperature": ("its temperature is above what the route allows", "온도가 경로의 허용치를 넘습니다"),
    "semantic_conversation": ("the conversation is too long, or does not end with a question", "대화가 너무 길거나 질문으로 끝나지 않습니다"),
    "semantic_length": ("the question is too short or too long to compare", "질문이 비교하기에 너무 짧거나 깁니다"),
    "semantic_personal": ("it holds something personal", "개인에 관한 내용이 있습니다"),
    "semantic_time_bound": (
        "the answer depends on the time, and the route sets no time_bound_ttl_s",
        "답이 때에 따라 다르며, 경로에 time_bound_ttl_s가 없습니다",
    ),
}  # fmt: skip


def eligible(
    request: InferenceRequest,
    policy: SemanticPolicy,
    data_class: DataClass,
    *,
    tenant: str,
    generation: str,
    objective: str = "",
) -> Question | Miss:
    """The question to look up, or why it may not be.  Linear in the request."""
    code = _refusal(request, policy, data_class)
    if code is not None:
        return _why(code)
    messages = request.body["messages"]
    text = _text_of(messages[-1].get("content"))
    if text is None:
        return _why("semantic_modality")
    text = text.strip()
    if not TEXT_CHARS_MIN <= len(text) <= TEXT_CHARS_MAX:
        return _why("semantic_length")
    plain = normal(text)
    if _PERSONAL.search(plain):
        return _why("semantic_personal")
    ttl_s: float | None = policy.ttl_s
    if _TIME_BOUND.search(plain):
        ttl_s = policy.time_bound_ttl_s
    if ttl_s is None:
        return _why("semantic_time_bound")
    rest = {
        name: value
        for name, value in request.body.items()
        if name not in IGNORED_FIELDS and name != "messages"
    }
    last = {name: value for name, value in messages[-1].items() if name != "content"}
    exact = _ENCODER.encode((objective, request.stream, request.include_usage, rest, messages[:-1], last))
    return Question(
        tenant=tenant,
        route=request.route,
        generation=generation,
        namespace=namespace_of(tenant.encode(), request.route.encode(), generation.encode(), exact),
        text=text,
        ttl_s=ttl_s,
    )


def _refusal(request: InferenceRequest, policy: SemanticPolicy, data_class: DataClass) -> str | None:
    body = request.body
    messages = body.get("messages")
    if request.task is not Task.CHAT or not isinstance(messages, list) or not messages:
        return "semantic_task"
    if data_class.rank >= DataClass.CONFIDENTIAL.rank:
        return "semantic_data_class"
    if body.get("user") is not None or body.get("safety_identifier") is not None:
        return "semantic_personal"
    if _has_tools(body, messages) or Capability.WEB_SEARCH in request.needs:
        return "semantic_tools"
    if request.needs & {Capability.AUDIO_OUT, Capability.AUDIO, Capability.IMAGE, Capability.FILE}:
        return "semantic_modality"
    if request.answers > 1 or body.get("logprobs") or Capability.PREDICTION in request.needs:
        return "semantic_choices"
    temperature = body.get("temperature")
    if (1.0 if temperature is None else temperature) > policy.max_temperature:
        return "semantic_temperature"
    last = messages[-1]
    if len(messages) > policy.messages_max or not isinstance(last, dict) or last.get("role") != "user":
        return "semantic_conversation"
    others = " ".join(
        _text_of(one.get("content")) or ""
        for one in messages[:-1]
        if isinstance(one, dict) and one.get("role") == "user"
    )
    return "semantic_personal" if others and _PERSONAL.search(normal(others)) else None


def _has_tools(body: dict[str, Any], messages: list[Any]) -> bool:
    if body.get("tools") or body.get("functions"):
        return True
    return any(
        isinstance(one, dict)
        and (one.get("role") in ("tool", "function") or one.get("tool_calls") or one.get("function_call"))
        for one in messages
    )


def _text_of(content: Any) -> str | None:
    """The text of a message; None where it holds anything else."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return None
    parts = [one.get("text") for one in content if isinstance(one, dict) and one.get("type") == "text"]
    if len(parts) != len(content) or not all(isinstance(part, str) for part in parts):
        return None
    return "\n".join(part for part in parts if isinstance(part, str))


def _why(code: str) -> Miss:
    en, ko = WHY[code]
    return Miss(code=code, en=en, ko=ko)
