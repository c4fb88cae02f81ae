"""The smallest JSON value that a JSON schema allows, for the common keywords; pure and bounded."""

from __future__ import annotations

from typing import Any, Final

_DEPTH_MAX: Final = 16
_NODES_MAX: Final = 1000
_FORMATS: Final = {
    "date": "2026-01-01",
    "date-time": "2026-01-01T00:00:00Z",
    "time": "00:00:00Z",
    "email": "a@example.com",
    "uri": "https://example.com/",
    "uuid": "00000000-0000-4000-8000-000000000000",
    "ipv4": "192.0.2.1",
}


class SchemaTooLarge(ValueError):
    """The schema nests or spreads past the bound."""


def instance_of(schema: Any) -> Any:
    """An instance of the schema; `pattern`, `not` and `if` are not looked at.

    Raises:
        SchemaTooLarge: more than 16 levels (a schema that needs itself) or 1,000 values.
    """
    return _Builder(schema).build(schema, 0)


class _Builder:
    def __init__(self, root: Any) -> None:
        self._root = root
        self._nodes = 0

    def build(self, schema: Any, depth: int) -> Any:
        self._nodes += 1
        if depth > _DEPTH_MAX or self._nodes > _NODES_MAX:
            raise SchemaTooLarge(
                f"the JSON schema needs more than {_DEPTH_MAX} levels or {_NODES_MAX} values"
            )
        if not isinstance(schema, dict):
            return {}
        if "const" in schema:
            return schema["const"]
        if isinstance(schema.get("enum"), list) and schema["enum"]:
            return schema["enum"][0]
        if isinstance(schema.get("$ref"), str):
            return self.build(self._resolve(schema["$ref"]), depth + 1)
        for keyword in ("anyOf", "oneOf"):
            options = schema.get(keyword)
            if isinstance(options, list) and options:
                return self.build(options[0], depth + 1)
        if isinstance(schema.get("allOf"), list) and "type" not in schema:
            merged: dict[str, Any] = {}
            for part in schema["allOf"]:
                built = self.build(part, depth + 1)
                if not isinstance(built, dict):
                    return built
                merged |= built
            return merged
        return self._typed(schema, depth)

    def _typed(self, schema: dict[str, Any], depth: int) -> Any:
        kind = schema.get("type")
        if isinstance(kind, list):
            kind = kind[0] if kind else None
        if kind == "array" or (kind is None and "items" in schema):
            count = _whole(schema.get("minItems"), 0)
            if count > _NODES_MAX:
                raise SchemaTooLarge(f"the JSON schema needs an array of {count} items")
            return [self.build(schema.get("items", {}), depth + 1) for _ in range(count)]
        if kind == "string":
            return _text(schema)
        if kind in {"integer", "number"}:
            return _number(schema, whole=kind == "integer")
        if kind == "boolean":
            return True
        if kind == "null":
            return None
        required = schema.get("required")
        properties = schema.get("properties")
        properties = properties if isinstance(properties, dict) else {}
        names = required if isinstance(required, list) else []
        return {
            name: self.build(properties.get(name, {}), depth + 1) for name in names if isinstance(name, str)
        }

    def _resolve(self, reference: str) -> Any:
        node = self._root
        for part in reference.removeprefix("#").strip("/").split("/"):
            if part:
                node = node.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(node, dict) else {}
        return node


def _text(schema: dict[str, Any]) -> str:
    known = _FORMATS.get(str(schema.get("format")))
    if known is not None:
        return known
    shortest = _whole(schema.get("minLength"), 0)
    longest = _whole(schema.get("maxLength"), 1000)
    if shortest > _NODES_MAX:
        raise SchemaTooLarge(f"the JSON schema needs a text of {shortest} characters")
    return "stone"[:longest].ljust(shortest, "x")


def _number(schema: dict[str, Any], *, whole: bool) -> int | float:
    low, high = schema.get("minimum"), schema.get("maximum")
    above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    step = 1 if whole else 0.5
    value: int | float = 0
    if isinstance(low, int | float) and value < low:
        value = low
    if isinstance(above, int | float) and value <= above:
        value = above + step
    if isinstance(high, int | float) and value > high:
        value = high
    if isinstance(below, int | float) and value >= below:
        value = below - step
    multiple = schema.get("multipleOf")
    if isinstance(multiple, int | float) and multiple > 0:
        value = -(-value // multiple) * multiple
    return int(-(-value // 1)) if whole else value


def _whole(value: Any, default: int) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else default
