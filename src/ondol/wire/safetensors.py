"""The header of a safetensors file, read under hard limits: JSON that says where each tensor lies.

Whatever the bytes, `read_header` returns a `SafetensorsHeader` or raises `BadModelFile`.  The tensors must cover the
file's data from its first byte to its last, without hole or overlap, as the format demands: what no tensor owns
could be another file in hiding.

Source: https://github.com/huggingface/safetensors (the section Format of its README).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Final

import msgspec

from ondol.errors import BadModelFile

ReadAt = Callable[[int, int], bytes]

HEADER_BYTES_MAX: Final = 16 * 1024 * 1024
TENSORS_MAX: Final = 65_536
_DIMENSIONS_MAX: Final = 16
_NAME_MAX: Final = 512
_METADATA_MAX: Final = 4096
_ELEMENTS_MAX: Final = 2**48
_DEPTH: Final = 3
_SQUARE: Final = bytes.maketrans(b"{}", b"[]")
_OTHER: Final = bytes(byte for byte in range(256) if byte not in b"[]{}")
_BITS: Final = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
    "C64": 64,
}  # fmt: skip


class SafetensorsHeader(msgspec.Struct, frozen=True, kw_only=True):
    """What a header says.  `starts` is where each tensor's data begins in the file, ascending."""

    tensors: int
    parameters: int
    metadata: dict[str, str]
    data_offset: int
    starts: tuple[int, ...]


def read_header(read_at: ReadAt, file_size: int) -> SafetensorsHeader:
    """The header of a file of `file_size` bytes that `read_at(offset, size)` reads.

    Raises:
        BadModelFile: it is no safetensors file, a bound is passed, or its tensors do not fill it exactly.
    """
    prefix = read_at(0, 8)
    if len(prefix) < 8:
        raise BadModelFile(f"found {file_size} bytes, expected at least 8 of a safetensors header's length")
    length = int.from_bytes(prefix, "little")
    if not 2 <= length <= HEADER_BYTES_MAX or 8 + length > file_size:
        raise BadModelFile(
            f"found a safetensors header of {length} bytes in a file of {file_size}; expected 2 to "
            f"{HEADER_BYTES_MAX} that lie inside it"
        )
    entries = _parse(read_at(8, length), length)
    metadata = _metadata(entries.pop("__metadata__", {}))
    if not 1 <= len(entries) <= TENSORS_MAX:
        raise BadModelFile(f"found {len(entries)} tensors, expected 1 to {TENSORS_MAX}")
    spans: list[tuple[int, int, str]] = []
    parameters = 0
    for name, entry in entries.items():
        begin, end, elements = _tensor(name, entry)
        spans.append((begin, end, name))
        parameters += elements
    _fill(sorted(spans), file_size - 8 - length)
    return SafetensorsHeader(
        tensors=len(entries),
        parameters=parameters,
        metadata=metadata,
        data_offset=8 + length,
        starts=tuple(sorted(8 + length + begin for begin, _, _ in spans)),
    )


def _parse(raw: bytes, length: int) -> dict[str, Any]:
    if len(raw) < length:
        raise BadModelFile("the file ended inside its safetensors header")
    if raw[:1] != b"{" or not _bounded_json(raw):
        raise BadModelFile("found a safetensors header that is no JSON object, or nests too deep")
    try:
        found = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise BadModelFile("found a safetensors header that is not JSON in UTF-8") from error
    if not isinstance(found, dict):
        raise BadModelFile("found a safetensors header that is no JSON object")
    return found


def _bounded_json(raw: bytes) -> bool:
    """Whether it nests no deeper than a header does: an object of objects that hold lists."""
    if raw.count(b"[") + raw.count(b"{") > 3 * TENSORS_MAX + 2:
        return False
    # Texts first: a bracket in a name opens nothing.
    outside = b"".join(raw.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')[::2])
    for _ in range(_DEPTH):
        inner = outside.translate(_SQUARE, _OTHER).replace(b"[]", b"")
        if not inner:
            return True
        outside = inner
    return False


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def _metadata(found: Any) -> dict[str, str]:
    whole = isinstance(found, dict) and len(found) <= _METADATA_MAX
    if not whole or not all(isinstance(value, str) for value in found.values()):
        raise BadModelFile(f"found a __metadata__ that is no object of at most {_METADATA_MAX} texts")
    return {str(key): str(value) for key, value in found.items()}


def _tensor(name: str, entry: Any) -> tuple[int, int, int]:
    """Where a tensor begins and ends in the data, and its elements."""
    label = repr(name[:80])
    if (
        len(name) > _NAME_MAX
        or not isinstance(entry, dict)
        or set(entry) != {"dtype", "shape", "data_offsets"}
    ):
        raise BadModelFile(f"found the tensor {label}, expected dtype, shape and data_offsets of it")
    bits = _BITS.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if bits is None:
        raise BadModelFile(f"found the type {str(entry['dtype'])[:20]!r} of {label}, which we do not know")
    shape = _integers(entry["shape"], label)
    if len(shape) > _DIMENSIONS_MAX:
        raise BadModelFile(f"found {len(shape)} dimensions of {label}, expected at most {_DIMENSIONS_MAX}")
    elements = 1
    for size in shape:
        elements *= size
        if elements > _ELEMENTS_MAX:
            raise BadModelFile(f"found more than {_ELEMENTS_MAX} elements of {label}")
    offsets = _integers(entry["data_offsets"], label)
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise BadModelFile(
            f"found the offsets {str(offsets[:3])[:80]} of {label}, expected a begin and an end"
        )
    if (offsets[1] - offsets[0]) * 8 != elements * bits:
        raise BadModelFile(
            f"found {offsets[1] - offsets[0]} bytes of {label}, expected {elements * bits / 8:g} for its shape"
        )
    return offsets[0], offsets[1], elements


def _integers(found: Any, label: str) -> list[int]:
    whole = isinstance(found, list) and len(found) <= 64
    if not whole or not all(type(one) is int and 0 <= one < 2**63 for one in found):
        raise BadModelFile(f"found a shape or offsets of {label} that are no list of whole numbers")
    return list(found)


def _fill(spans: list[tuple[int, int, str]], size: int) -> None:
    position = 0
    for begin, end, name in spans:
        if begin != position:
            kind = "overlaps the one before it" if begin < position else "leaves a hole before it"
            raise BadModelFile(f"the tensor {name[:80]!r} {kind}, at byte {begin} of the data")
        position = end
    if position != size:
        raise BadModelFile(
            f"found {size} bytes of data, expected {position} for its tensors: cut off, or something is appended"
        )
