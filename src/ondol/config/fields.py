"""Nodes to the structs of `core.catalog`, field by field, so that every wrong field is said at once.

What a field allows is read off its type; nothing about single kinds or fields stands here, save the
words for the patterns.
"""

from __future__ import annotations

import re
import types
from typing import Any, Final, TypeVar, Union, get_args, get_origin

import msgspec
from msgspec import inspect

from ondol.config.report import Report, choices, is_secret, quoted
from ondol.config.text import Node
from ondol.core import fields as shared

S = TypeVar("S", bound=msgspec.Struct)

_STEP = re.compile(r"\.([^.\[\]]+)|\[(\d+)\]|\[\.\.\.\]")
_SECRET_FIELDS: Final = ("api_key", "apikey", "key", "password", "secret", "token", "authorization")


def _pattern(annotated: Any) -> str:
    return str(get_args(annotated)[1].pattern)


_PATTERN_WORDS: Final = {
    _pattern(shared.Name): "a name of small letters, digits and . _ / - (at most 128)",
    _pattern(shared.Decimals): 'a decimal number that is not negative, such as "12.50"',
    _pattern(shared.Pattern): "a name in which * stands for anything, such as shop-* or kr-*",
    _pattern(shared.Step): "a number of sites or a share of them, such as 1 or 10%",
    r"^\d\d:\d\d-\d\d:\d\d$": "two times of the day, such as 22:00-06:00",
    r"^[A-Z]{2}$": "a country of two capital letters (ISO 3166), such as KR",
    r"^sha256:[0-9a-f]{64}$": "sha256: and 64 hexadecimal digits",
}


def build(node: Node, struct: type[S], where: str, report: Report, *, ignore: str | None = None) -> S | None:
    """The struct that a mapping describes, or None after reporting all that is wrong with it."""
    if not isinstance(node.value, dict):
        report.wrong(node, where, f"a mapping with {_field_names(struct)}")
        return None
    fields = {field.name: field for field in msgspec.structs.fields(struct)}
    values: dict[str, Any] = {}
    is_good = True
    for key, child in node.value.items():
        if key == ignore:
            continue
        if key not in fields:
            _unknown_field(key, child, where, fields, report)
            is_good = False
            continue
        value = _value(child, fields[key].type, f"{where}.{key}", report)
        is_good = is_good and value is not _BAD
        values[key] = value
    for name, field in fields.items():
        if field.required and name not in node.value:
            report.add(node.line, f"{where}.{name}: missing; allowed: {allowed(field.type)}")
            is_good = False
    return struct(**values) if is_good else None


_BAD: Final = object()


def _value(node: Node, kind: Any, where: str, report: Report) -> Any:
    """A field's value, or _BAD after a report."""
    struct, is_list = _struct_of(kind)
    if struct is not None and not is_list and node.value is not None:
        built = build(node, struct, where, report)
        return _BAD if built is None else built
    if struct is not None and is_list and isinstance(node.value, list):
        items = [build(item, struct, f"{where}[{i}]", report) for i, item in enumerate(node.value)]
        return _BAD if None in items else tuple(items)
    if get_origin(kind) is dict and isinstance(node.value, dict):
        inner = get_args(kind)[1]
        found = {key: _value(child, inner, f"{where}.{key}", report) for key, child in node.value.items()}
        return _BAD if any(value is _BAD for value in found.values()) else found
    if _secret_inside(node, where, report):
        return _BAD
    try:
        return msgspec.convert(_as_written(node, inspect.type_info(kind)), kind, strict=True)
    except msgspec.ValidationError as error:
        path = _path(str(error))
        steps = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
        report.wrong(node.at(*path), where + steps, allowed(kind, *path))
        return _BAD


def _struct_of(kind: Any) -> tuple[type[msgspec.Struct] | None, bool]:
    """The struct inside `X`, `X | None` or `tuple[X, ...]`, and whether it is the last."""
    if get_origin(kind) in (Union, types.UnionType):
        rest = [arm for arm in get_args(kind) if arm is not type(None)]
        return _struct_of(rest[0]) if len(rest) == 1 else (None, False)
    if get_origin(kind) is tuple:
        inner, _ = _struct_of(get_args(kind)[0])
        return inner, True
    is_struct = isinstance(kind, type) and issubclass(kind, msgspec.Struct)
    return (kind if is_struct else None), False


def _as_written(node: Node, kind: inspect.Type) -> Any:
    """The plain value of a node; where text is wanted, a number is the text that was written."""
    if isinstance(node.value, dict) and isinstance(kind, inspect.DictType):
        return {key: _as_written(child, kind.value_type) for key, child in node.value.items()}
    if isinstance(node.value, list) and isinstance(kind, inspect.VarTupleType):
        return [_as_written(child, kind.item_type) for child in node.value]
    arms = kind.types if isinstance(kind, inspect.UnionType) else (kind,)
    is_number = isinstance(node.value, (int, float)) and not isinstance(node.value, bool)
    wants_number = any(isinstance(arm, inspect.IntType | inspect.FloatType) for arm in arms)
    if is_number and not wants_number and any(isinstance(arm, inspect.StrType) for arm in arms):
        return node.text
    if len(arms) > 1:
        for arm in arms:
            if isinstance(arm, (inspect.DictType, inspect.VarTupleType)):
                return _as_written(node, arm)
    return node.data()


def _secret_inside(node: Node, where: str, report: Report) -> bool:
    match node.value:
        case dict():
            return sum(_secret_inside(child, where, report) for child in node.value.values()) > 0
        case list():
            return sum(_secret_inside(child, where, report) for child in node.value) > 0
        case str() if is_secret(node.value):
            report.add(
                node.line,
                f"{where}: found a secret (not shown); allowed: no secret stands in a configuration; "
                "name where it is: keys: [{env: NAME}] or keys: [{file: PATH}]",
            )
            return True
        case _:
            return False


def _unknown_field(key: str, node: Node, where: str, fields: Any, report: Report) -> None:
    if key.lower() in _SECRET_FIELDS:
        report.add(
            node.line,
            f"{where}: found the field {quoted(key)}; allowed: no secret stands in a configuration; "
            "name where it is: keys: [{env: NAME}] or keys: [{file: PATH}]",
        )
        return
    report.add(node.line, f"{where}: found the field {quoted(key)}; allowed: {choices(key, fields)}")


def _path(message: str) -> list[str | int]:
    """The steps of `... - at `$.a[0]``, empty for the value itself."""
    _, _, tail = message.rpartition(" - at `$")
    steps = _STEP.finditer(tail.rstrip("`")) if tail != message else iter(())
    return [int(step[2]) if step[2] else step[1] for step in steps if step[1] or step[2]]


def _field_names(struct: type[msgspec.Struct]) -> str:
    return ", ".join(field.name for field in msgspec.structs.fields(struct))


def allowed(kind: Any, *path: str | int) -> str:
    """What a type allows, in words; with a path, what it allows inside of a list or mapping."""
    info = inspect.type_info(kind)
    for _ in path:
        arms = info.types if isinstance(info, inspect.UnionType) else (info,)
        for arm in arms:
            if isinstance(arm, inspect.VarTupleType):
                info = arm.item_type
            elif isinstance(arm, inspect.DictType):
                info = arm.value_type
    return _words(info)


def _words(info: inspect.Type) -> str:
    match info:
        case inspect.UnionType():
            return " or ".join(_words(arm) for arm in info.types if not isinstance(arm, inspect.NoneType))
        case inspect.StrType():
            return "a text" if info.pattern is None else _PATTERN_WORDS.get(info.pattern, info.pattern)
        case inspect.BoolType():
            return "true or false"
        case inspect.IntType():
            return "a whole number" + _range(info)
        case inspect.FloatType():
            return "a number" + _range(info)
        case inspect.LiteralType():
            return " | ".join(str(value) for value in info.values)
        case inspect.EnumType():
            return " | ".join(str(member.value) for member in info.cls)
        case inspect.VarTupleType():
            least = f" ({info.min_length} or more)" if info.min_length else ""
            return f"a list{least}, each {_words(info.item_type)}"
        case inspect.DictType():
            return f"a mapping, each value {_words(info.value_type)}"
        case inspect.StructType():
            return f"a mapping with {', '.join(field.name for field in info.fields)}"
        case _:
            return type(info).__name__.removesuffix("Type").lower()


def _range(info: inspect.IntType | inspect.FloatType) -> str:
    low, high = info.ge, info.le
    if info.gt is not None:
        more = f" above {info.gt:g}"
        return more if high is None else f"{more}, at most {high:g}"
    if low is not None and high is not None:
        return f" from {low:g} to {high:g}"
    if low is not None:
        return f" of at least {low:g}"
    return "" if high is None else f" of at most {high:g}"
