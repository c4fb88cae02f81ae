"""The header of a GGUF file, read under hard limits before any native code sees the file.

Native loaders have had integer overflows in exactly these fields (counts, lengths, dimensions, padding), so
everything is checked here with Python's integers: a file that passes has a header of bounded size, and
every tensor lies inside the file.  Weights are never read.  The one invariant: whatever the bytes,
`read_header` returns a `GgufHeader` or raises `BadModelFile`, and holds less than 2 MiB of them at a time
beyond the strings that it keeps.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3).
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, Final

import msgspec

from ondol.errors import BadModelFile

ReadAt = Callable[[int, int], bytes]
"""`read_at(offset, size)` gives at most `size` bytes; fewer only at the end of the file."""

MAGIC: Final = b"GGUF"


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds on a header.  The defaults are several times what the largest public models need."""

    metadata_bytes: int = 64 * 1024 * 1024
    keys: int = 16_384
    key_bytes: int = 1024
    string_bytes: int = 1024 * 1024
    array_items: int = 4 * 1024 * 1024
    tensors: int = 65_536
    tensor_name_bytes: int = 64
    dimensions: int = 4
    alignment: int = 1024 * 1024


class GgufHeader(msgspec.Struct, frozen=True, kw_only=True):
    """What a header says.  Absent text is None.

    `parameters` counts the elements of all tensors.  `parts` is more than 1 where the model is split over
    several files, of which this is one.  `starts` is where each tensor's data begins in the file, ascending.
    """

    version: int
    architecture: str
    name: str | None
    context_tokens: int | None
    embedding_length: int | None
    parameters: int
    tensors: int
    quantisation: str
    chat_template: str | None
    licence: str | None
    languages: tuple[str, ...]
    parts: int
    data_offset: int
    starts: tuple[int, ...] = ()

    @property
    def has_tools(self) -> bool:
        """Whether the chat template renders tools: only then do `tools` reach the model at all."""
        return self.chat_template is not None and "tools" in self.chat_template


DEFAULT_LIMITS: Final = Limits()


def parse_header(data: bytes, *, file_size: int | None = None, limits: Limits = DEFAULT_LIMITS) -> GgufHeader:
    """The header of a file whose first bytes are `data`; `file_size` is the whole file's size.

    Raises:
        BadModelFile: as `read_header`.
    """
    size = len(data) if file_size is None else file_size
    return read_header(lambda offset, count: data[offset : offset + count], size, limits=limits)


def read_header(read_at: ReadAt, file_size: int, *, limits: Limits = DEFAULT_LIMITS) -> GgufHeader:
    """The header of a file of `file_size` bytes that `read_at` reads.

    Cost: linear in the header, about 0.1 s for a vocabulary of 150,000 tokens.

    Raises:
        BadModelFile: not GGUF, an unknown version, a bound passed, or a tensor outside the file.
    """
    cursor = _Cursor(read_at, file_size, limits)
    magic = cursor.take(4, "the magic number")
    if magic != MAGIC:
        raise BadModelFile(f"found {magic!r} at the start, expected {MAGIC!r}: this is no GGUF file")
    version = cursor.u32("the version")
    if version not in (2, 3):
        raise BadModelFile(
            f"found GGUF version {version}, expected 2 or 3"
            + (" (the file is big-endian; convert it)" if version in (0x0200_0000, 0x0300_0000) else "")
        )
    tensors = _bounded(cursor.u64("the number of tensors"), 1, limits.tensors, "tensors")
    keys = _bounded(cursor.u64("the number of metadata keys"), 1, limits.keys, "metadata keys")
    metadata = _read_metadata(cursor, keys, limits)
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or not architecture:
        raise BadModelFile("found no text under general.architecture, expected the model's architecture")
    alignment = _integer(metadata, "general.alignment")
    alignment = 32 if alignment is None else alignment
    if not 1 <= alignment <= limits.alignment or alignment & (alignment - 1):
        raise BadModelFile(
            f"found general.alignment {alignment}, expected a power of two up to {limits.alignment}"
        )
    parameters, largest, ends, offsets = _read_tensors(cursor, tensors, alignment, limits)
    data_offset = -(-cursor.position // alignment) * alignment
    if data_offset + ends > file_size:
        raise BadModelFile(
            f"found a file of {file_size} bytes, expected at least {data_offset + ends}"
            " for its tensors: it is cut off; fetch it again"
        )
    file_type = _integer(metadata, "general.file_type")
    languages = metadata.get("general.languages")
    parts = _integer(metadata, "split.count")
    return GgufHeader(
        version=version,
        architecture=architecture,
        name=_text(metadata, "general.name"),
        context_tokens=_integer(metadata, f"{architecture}.context_length"),
        embedding_length=_integer(metadata, f"{architecture}.embedding_length"),
        parameters=parameters,
        tensors=tensors,
        quantisation=largest if file_type is None else _FILE_TYPES.get(file_type, largest),
        chat_template=_text(metadata, "tokenizer.chat_template"),
        licence=_text(metadata, "general.license"),
        languages=languages if isinstance(languages, tuple) else (),
        parts=parts if parts is not None and parts > 0 else 1,
        data_offset=data_offset,
        starts=tuple(data_offset + one for one in offsets),
    )


_WINDOW: Final = 256 * 1024
_SCALARS: Final = {0: "B", 1: "b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "?", 10: "<Q", 11: "<q",
                   12: "<d"}  # fmt: skip
_STRUCTS: Final = {code: struct.Struct(form) for code, form in _SCALARS.items()}
_STRING: Final = 8
_ARRAY: Final = 9
_U32: Final = struct.Struct("<I")
_U64: Final = struct.Struct("<Q")
_LANGUAGES_MAX: Final = 256
# Far above any tensor, and small enough that sizes in bytes stay within native 64-bit integers.
_ELEMENTS_MAX: Final = 2**48

# ggml type -> (name, elements a block, bytes a block).  Source: ggml.h and ggml-common.h of llama.cpp.
_TENSOR_TYPES: Final[dict[int, tuple[str, int, int]]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 36), 10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8),
    28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
}  # fmt: skip

# general.file_type -> name.  Source: enum llama_ftype in llama.h.
_FILE_TYPES: Final[dict[int, str]] = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S",
    12: "Q3_K_M", 13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K",
    19: "IQ2_XXS", 20: "IQ2_XS", 21: "Q2_K_S", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL",
    26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S", 29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16",
    36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4_MOE", 39: "NVFP4", 40: "Q1_0",
}  # fmt: skip


class _Cursor:
    """Reads forward through a header, a window at a time; owns the position."""

    def __init__(self, read_at: ReadAt, file_size: int, limits: Limits) -> None:
        self._read_at = read_at
        self._end = min(file_size, limits.metadata_bytes)
        self._whole_file = file_size <= limits.metadata_bytes
        self._window = b""
        self._start = 0
        self.position = 0

    def take(self, size: int, what: str) -> bytes:
        self._check(size, what)
        begin = self.position - self._start
        if begin + size > len(self._window):
            self._window = self._read_at(self.position, min(max(size, _WINDOW), self._end - self.position))
            self._start, begin = self.position, 0
            if len(self._window) < size:
                raise BadModelFile(f"the file ended inside {what}, at byte {self.position}")
        self.position += size
        return self._window[begin : begin + size]

    def skip(self, size: int, what: str) -> None:
        self._check(size, what)
        self.position += size

    def _check(self, size: int, what: str) -> None:
        if size > self._end - self.position:
            if self._whole_file:
                raise BadModelFile(f"the file ends inside {what}, at byte {self.position}: it is cut off")
            raise BadModelFile(f"the metadata passes its limit of {self._end} bytes, at {what}")

    def u32(self, what: str) -> int:
        value: int = _U32.unpack(self.take(4, what))[0]
        return value

    def u64(self, what: str) -> int:
        value: int = _U64.unpack(self.take(8, what))[0]
        return value

    def text(self, limit: int, what: str) -> str:
        size = _bounded(self.u64(what), 0, limit, f"bytes of {what}")
        try:
            return self.take(size, what).decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadModelFile(f"{what} is not UTF-8, at byte {self.position - size}") from error


def _read_metadata(cursor: _Cursor, keys: int, limits: Limits) -> dict[str, Any]:
    """The values that we use, by key; all others are checked and passed over."""
    wanted: dict[str, Any] = {}
    seen: set[str] = set()
    for _ in range(keys):
        key = cursor.text(limits.key_bytes, "a metadata key")
        if key in seen:
            raise BadModelFile(f"found the metadata key {key[:80]!r} twice, expected it once")
        seen.add(key)
        kind = cursor.u32(f"the type of {key[:80]}")
        value = _read_value(cursor, kind, key, limits)
        if value is not None:
            wanted[key] = value
    return wanted


def _read_value(cursor: _Cursor, kind: int, key: str, limits: Limits) -> Any:
    label = key[:80]
    if kind == _STRING:
        return _read_string(cursor, key, limits)
    if kind == _ARRAY:
        return _read_array(cursor, key, limits)
    scalar = _STRUCTS.get(kind)
    if scalar is None:
        raise BadModelFile(f"found the unknown type {kind} for {label!r}, expected 0 to 12")
    raw = cursor.take(scalar.size, label)
    if kind == 7 and raw not in (b"\x00", b"\x01"):
        raise BadModelFile(f"found the byte {raw[0]} for the truth value {label!r}, expected 0 or 1")
    return scalar.unpack(raw)[0]


_KEPT_TEXT: Final = frozenset(
    {"general.architecture", "general.name", "general.license", "tokenizer.chat_template"}
)


def _read_string(cursor: _Cursor, key: str, limits: Limits) -> str | None:
    label = key[:80]
    if key in _KEPT_TEXT:
        return cursor.text(limits.string_bytes, label)
    cursor.skip(_bounded(cursor.u64(label), 0, limits.string_bytes, f"bytes of {label}"), label)
    return None


def _read_array(cursor: _Cursor, key: str, limits: Limits) -> tuple[str, ...] | None:
    label = key[:80]
    kind = cursor.u32(f"the item type of {label}")
    count = _bounded(cursor.u64(f"the length of {label}"), 0, limits.array_items, f"items of {label}")
    if kind == _STRING:
        if key == "general.languages":
            _bounded(count, 0, _LANGUAGES_MAX, "languages")
            return tuple(cursor.text(limits.key_bytes, label) for _ in range(count))
        item = f"bytes of an item of {label}"
        for _ in range(count):
            cursor.skip(_bounded(cursor.u64(label), 0, limits.string_bytes, item), label)
        return None
    scalar = _STRUCTS.get(kind)
    if scalar is None:
        raise BadModelFile(f"found the item type {kind} for the array {label!r}, expected a scalar or text")
    cursor.skip(count * scalar.size, label)
    return None


def _read_tensors(
    cursor: _Cursor, count: int, alignment: int, limits: Limits
) -> tuple[int, str, int, list[int]]:
    """Elements of all tensors, the type that most bytes have, where the last one ends, where each begins."""
    parameters = 0
    ends = 0
    bytes_by_type: dict[str, int] = {}
    names: set[str] = set()
    offsets: list[int] = []
    for _ in range(count):
        name = cursor.text(limits.tensor_name_bytes, "a tensor's name")
        if name in names:
            raise BadModelFile(f"found the tensor {name!r} twice, expected it once")
        names.add(name)
        elements, row = _read_shape(cursor, name, limits)
        code = cursor.u32(f"the type of {name}")
        offset = cursor.u64(f"the offset of {name}")
        known = _TENSOR_TYPES.get(code)
        if known is None:
            raise BadModelFile(f"found the type {code} for the tensor {name!r}, which we do not know")
        label, block, block_bytes = known
        if row % block:
            raise BadModelFile(f"found rows of {row} in {name!r}, expected a multiple of {block} for {label}")
        if offset % alignment:
            raise BadModelFile(f"found the offset {offset} for {name!r}, expected a multiple of {alignment}")
        size_bytes = elements // block * block_bytes
        parameters += elements
        ends = max(ends, offset + size_bytes)
        offsets.append(offset)
        bytes_by_type[label] = bytes_by_type.get(label, 0) + size_bytes
    largest = max(bytes_by_type, key=lambda kind: (bytes_by_type[kind], kind))
    return parameters, largest, ends, sorted(offsets)


def _read_shape(cursor: _Cursor, name: str, limits: Limits) -> tuple[int, int]:
    """Elements of a tensor, and of one of its rows."""
    rank = cursor.u32(f"the number of dimensions of {name}")
    _bounded(rank, 1, limits.dimensions, f"dimensions of {name}")
    sizes = [cursor.u64(f"a dimension of {name}") for _ in range(rank)]
    elements = 1
    for size in sizes:
        elements *= _bounded(size, 1, _ELEMENTS_MAX, f"elements along an axis of {name}")
    return _bounded(elements, 1, _ELEMENTS_MAX, f"elements of {name}"), sizes[0]


def _bounded(value: int, lowest: int, highest: int, what: str) -> int:
    if not lowest <= value <= highest:
        raise BadModelFile(f"found {value} {what}, expected {lowest} to {highest}")
    return value


def _text(metadata: dict[str, Any], key: str) -> str | None:
    value = metadata.get(key)
    return value if isinstance(value, str) else None


def _integer(metadata: dict[str, Any], key: str) -> int | None:
    value = metadata.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) else None
