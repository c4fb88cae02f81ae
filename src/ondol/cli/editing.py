"""Changes to a site's YAML file as text, so that comments, order and layout stay as the owner wrote them.

Places are found with PyYAML's marks.  Every edit is proved before it is returned: the new text, read as
YAML, must differ from the old one by exactly the change meant.  Where that does not hold (anchors, odd
layouts), the edit is refused with the words to write by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import yaml

from ondol.cli.installation import CommandFailed

Documents = list[dict[str, Any]]


def append_to_list(text: str, *, kind: str, name: str, key: str, item: str) -> str:
    """The text with `item` at the end of a document's list; unchanged when it is in it already.

    Raises:
        CommandFailed: there is no such document, or the list is written in a way that we cannot edit.
    """
    node = _value(text, kind, name, key)
    by_hand = f"add {item!r} to `{key}` of {kind} {name!r} by hand"
    if not isinstance(node, yaml.SequenceNode):
        raise CommandFailed(f"`{key}` of {kind} {name!r} is no list in the file; {by_hand}.")
    if any(isinstance(one, yaml.ScalarNode) and one.value == item for one in node.value):
        return text
    if not node.value:
        edited = _splice(text, node.start_mark.index + 1, item)
    elif node.flow_style:
        edited = _splice(text, node.value[-1].end_mark.index, f", {item}")
    else:
        line_end = text.find("\n", node.value[-1].end_mark.index)
        row = " " * node.start_mark.column + f"- {item}"
        if line_end < 0:
            edited = f"{text}{_newline(text)}{row}{_newline(text)}"
        else:
            edited = _splice(text, line_end + 1, row + _newline(text))

    def change(documents: Documents) -> None:
        _find(documents, kind, name)[key].append(item)

    return _proved(text, edited, change, by_hand)


def set_value(text: str, *, kind: str, name: str, key: str, value: str) -> str:
    """The text with another value for a scalar that is there; unchanged when it has that value.

    Raises:
        CommandFailed: there is no such document or key, or it is written in a way that we cannot edit.
    """
    node = _value(text, kind, name, key)
    by_hand = f"write `{key}: {value}` in {kind} {name!r} by hand"
    if not isinstance(node, yaml.ScalarNode):
        raise CommandFailed(f"`{key}` of {kind} {name!r} is no plain value in the file; {by_hand}.")
    if node.value == value:
        return text
    edited = text[: node.start_mark.index] + value + text[node.end_mark.index :]

    def change(documents: Documents) -> None:
        _find(documents, kind, name)[key] = value

    return _proved(text, edited, change, by_hand)


def append_documents(text: str, added: str) -> str:
    """The text with more documents at its end.

    Raises:
        CommandFailed: the end of the text is written in a way that we cannot add to.
    """
    newline = _newline(text)
    joined = text if not text or text.endswith("\n") else text + newline
    edited = f"{joined}---{newline}{added.replace(chr(10), newline)}"

    def change(documents: Documents) -> None:
        documents.extend(yaml.safe_load_all(added))

    return _proved(text, edited, change, f"add these documents by hand:\n{added}")


def names(text: str, kind: str) -> set[str]:
    """The names of all documents of a kind."""
    return {str(one.get("name")) for one in yaml.safe_load_all(text) if _is_kind(one, kind)}


def _is_kind(document: Any, kind: str) -> bool:
    return isinstance(document, dict) and document.get("kind") == kind


def _find(documents: Documents, kind: str, name: str) -> dict[str, Any]:
    return next(one for one in documents if _is_kind(one, kind) and one.get("name") == name)


def _value(text: str, kind: str, name: str, key: str) -> yaml.Node:
    """The node of a document's key."""
    known = []
    for document in yaml.compose_all(text, Loader=yaml.SafeLoader):
        if not isinstance(document, yaml.MappingNode):
            continue
        pairs = {one.value: value for one, value in document.value if isinstance(one, yaml.ScalarNode)}
        if getattr(pairs.get("kind"), "value", None) != kind:
            continue
        found = str(getattr(pairs.get("name"), "value", ""))
        known.append(found)
        if found != name:
            continue
        if key in pairs:
            node: yaml.Node = pairs[key]
            return node
        raise CommandFailed(f"{kind} {name!r} has no key `{key}` in the file; write it by hand.")
    listed = ", ".join(known) or "none"
    raise CommandFailed(f"the file has no {kind} named {name!r}; it has: {listed}.")


def _splice(text: str, at: int, added: str) -> str:
    return text[:at] + added + text[at:]


def _newline(text: str) -> str:
    return "\r\n" if "\r\n" in text else "\n"


def _proved(old: str, new: str, change: Callable[[Documents], None], by_hand: str) -> str:
    """`new`, if it says what `old` says plus the change; else a refusal."""
    wanted: Documents = [_unshared(one) for one in yaml.safe_load_all(old)]
    change(wanted)
    try:
        is_right = list(yaml.safe_load_all(new)) == wanted
    except yaml.YAMLError:
        is_right = False
    if not is_right:
        raise CommandFailed(f"the file is laid out in a way that cannot be edited safely; {by_hand}.")
    return new


def _unshared(value: Any) -> Any:
    """A copy in which aliases are apart, so that a change to one place is a change to one place."""
    if isinstance(value, dict):
        return {key: _unshared(one) for key, one in value.items()}
    return [_unshared(one) for one in value] if isinstance(value, list) else value
