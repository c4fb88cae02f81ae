"""What an ONNX file holds, walked under hard limits before any native code sees it.

ONNX is one protocol-buffer message without a magic number.  The walk reads tags and lengths, follows only the
messages that can do harm or that we need, and passes over weights.  Refused: data in other files outside the folder,
operators of a library that we did not load, training, cached compiled graphs, and tensors whose bytes are not those
of their shape.  Whatever the bytes, `read_header` returns an `OnnxHeader` or raises `BadModelFile`.

Source: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto (field numbers), and the wire format of protocol
buffers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import msgspec

from ondol.errors import BadModelFile

ReadAt = Callable[[int, int], bytes]

FILE_BYTES_MAX: Final = 2**31 - 1
"""A protocol-buffer message cannot be larger."""
FIELDS_MAX: Final = 2_000_000
DEPTH_MAX: Final = 24
TEXT_MAX: Final = 4096
EXTERNAL_MAX: Final = 65_536
_WINDOW: Final = 256 * 1024
_ELEMENTS_MAX: Final = 2**48
DOMAINS: Final = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft", "com.microsoft.nchwc"})
"""Operator sets that ONNX Runtime has built in; every other one needs a library, unless the file defines it."""
_REFUSED_OPERATORS: Final = frozenset({"EPContext"})
"""Loads a compiled graph from a path that the model names."""

# message -> field -> the message within
_INSIDE: Final[dict[str, dict[int, str]]] = {
    "model": {7: "graph", 8: "opset", 20: "training", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "function": {7: "node", 9: "opset", 11: "attribute"},
    "tensor": {13: "entry"},
}
_ONCE: Final[dict[str, frozenset[int]]] = {
    "model": frozenset({7}),
    "attribute": frozenset({5, 6, 22}),
    "sparse": frozenset({1, 2}),
}
"""Written twice, a reader makes one message of both, which is then neither of the two that were judged."""
# TensorProto.DataType -> bits an element; texts have none.
_BITS: Final = {
    1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 14: 64, 15: 128, 16: 16,
    17: 8, 18: 8, 19: 8, 20: 8, 21: 4, 22: 4, 23: 4, 24: 8,
}  # fmt: skip
_TEXT_TYPE: Final = 8


class OnnxHeader(msgspec.Struct, frozen=True, kw_only=True):
    """What a file holds.  `external` are the other files of its folder that it needs, `starts` as in GGUF."""

    ir_version: int
    opsets: dict[str, int]
    operators: int
    tensors: int
    parameters: int
    external: tuple[str, ...]
    starts: tuple[int, ...]


def read_header(read_at: ReadAt, file_size: int) -> OnnxHeader:
    """The content of a file of `file_size` bytes that `read_at(offset, size)` reads.

    Cost: a microsecond a field; linear in the number of operators, not in the weights.

    Raises:
        BadModelFile: it is no ONNX file, a bound is passed, or it asks for what is refused.
    """
    if not 1 <= file_size <= FILE_BYTES_MAX:
        raise BadModelFile(f"found {file_size} bytes, expected 1 to {FILE_BYTES_MAX} of an ONNX file")
    walk = _Walk(read_at, file_size)
    walk.message("model", 0, file_size, 0)
    if walk.graphs != 1 or not walk.opsets or not 1 <= walk.ir_version <= 64:
        raise BadModelFile(
            f"found {walk.graphs} graphs, {len(walk.opsets)} operator sets and format version {walk.ir_version}; "
            "expected one graph, at least one operator set and a version: this is no ONNX file"
        )
    foreign = walk.domains - DOMAINS - walk.own_domains
    if foreign:
        raise BadModelFile(
            f"found operators of {', '.join(sorted(foreign))[:200]!r}, which need a library of native code; "
            f"expected only those of {', '.join(sorted(DOMAINS - {''}))}"
        )
    return OnnxHeader(
        ir_version=walk.ir_version, opsets=walk.opsets, operators=walk.operators, tensors=walk.tensors,
        parameters=walk.parameters, external=tuple(sorted(walk.external)), starts=tuple(sorted(walk.starts)),
    )  # fmt: skip


class _Tensor:
    """One tensor as its fields come, in whatever order."""

    __slots__ = ("dims", "elsewhere", "entries", "kind", "raw")

    def __init__(self) -> None:
        self.dims = 1
        self.kind = 0
        self.raw = -1
        self.elsewhere = 0
        self.entries: list[tuple[str, str]] = []


class _Walk:
    """Reads forward and into messages; owns the window and what was found."""

    def __init__(self, read_at: ReadAt, size: int) -> None:
        self._read_at = read_at
        self._size = size
        self._window = b""
        self._start = 0
        self._fields = 0
        self.graphs = 0
        self.ir_version = 0
        self.operators = 0
        self.tensors = 0
        self.parameters = 0
        self.opsets: dict[str, int] = {}
        self.domains: set[str] = set()
        self.own_domains: set[str] = set()
        self.external: set[str] = set()
        self.starts: list[int] = []
        self._texts: dict[int, str] = {}

    def message(self, kind: str, position: int, end: int, depth: int) -> None:
        """Walk one message from `position` to `end`, then judge it as a whole."""
        if depth > DEPTH_MAX:
            raise BadModelFile(f"found messages nested more than {DEPTH_MAX} deep, at byte {position}")
        inside = _INSIDE.get(kind, {})
        tensor = _Tensor() if kind == "tensor" else None
        texts: dict[int, str] = {}
        numbers: dict[int, int] = {}
        once = set(_ONCE.get(kind, ()))
        while position < end:
            tag, position = self._varint(position, end)
            field, wire = tag >> 3, tag & 7
            if not 1 <= field < 2**29:
                raise BadModelFile(
                    f"found the field number {field}, at byte {position}: this is no ONNX file"
                )
            self._count(position)
            if wire == 0:
                value, position = self._varint(position, end)
                numbers[field] = value
                if tensor is not None and field == 1:
                    tensor.dims = _times(tensor.dims, value)
                continue
            start, position = self._extent(wire, position, end)
            if wire != 2:
                continue
            if field in inside:
                if field in _ONCE.get(kind, ()) and field not in once:
                    raise BadModelFile(f"found the {inside[field]} of a {kind} twice, at byte {start}")
                once.discard(field)
                self._enter(inside[field], (start, position), depth, tensor)
            elif tensor is not None:
                self._tensor_field(tensor, field, start, position)
            elif field in _NAMED.get(kind, ()):
                texts[field] = self._text(start, position)
        self._close(kind, texts, numbers, tensor)

    def _enter(self, kind: str, span: tuple[int, int], depth: int, tensor: _Tensor | None) -> None:
        start, end = span
        if kind == "training":
            raise BadModelFile("found a graph for training, expected one for inference alone")
        if depth == 0 and kind == "graph":
            self.graphs += 1
        self.message(kind, start, end, depth + 1)
        if kind == "entry" and tensor is not None:
            tensor.entries.append((self._texts.get(1, ""), self._texts.get(2, "")))

    def _close(
        self, kind: str, texts: dict[int, str], numbers: dict[int, int], tensor: _Tensor | None
    ) -> None:
        match kind:
            case "model":
                self.ir_version = numbers.get(1, 0)
            case "opset":
                domain = texts.get(1, "")
                self.opsets[domain] = numbers.get(2, 0)
                self.domains.add(domain)
            case "node":
                self.operators += 1
                self.domains.add(texts.get(7, ""))
                if texts.get(4, "") in _REFUSED_OPERATORS:
                    raise BadModelFile(f"found the operator {texts[4]}, which loads code from another file")
            case "function":
                self.own_domains.add(texts.get(10, ""))
            case "entry":
                self._texts = texts
            case "tensor" if tensor is not None:
                tensor.kind = numbers.get(2, 0)
                tensor.elsewhere = numbers.get(14, 0)
                self._judge(tensor)
        if len(self.domains) > 256 or len(self.own_domains) > 256:
            raise BadModelFile("found more than 256 operator sets")

    def _tensor_field(self, tensor: _Tensor, field: int, start: int, end: int) -> None:
        if field == 1:
            position = start
            while position < end:
                value, position = self._varint(position, end)
                self._count(position)
                tensor.dims = _times(tensor.dims, value)
        elif field == 9:
            tensor.raw = end - start
            self.starts.append(start)

    def _judge(self, tensor: _Tensor) -> None:
        self.tensors += 1
        self.parameters += tensor.dims
        bits = _BITS.get(tensor.kind)
        if bits is None and tensor.kind != _TEXT_TYPE:
            raise BadModelFile(f"found the tensor type {tensor.kind}, which we do not know")
        if tensor.raw >= 0 and (bits is None or tensor.raw != -(-tensor.dims * bits // 8)):
            raise BadModelFile(
                f"found {tensor.raw} bytes of a tensor, expected {-(-tensor.dims * (bits or 0) // 8)} for its shape"
            )
        if tensor.elsewhere not in (0, 1) or (tensor.entries and tensor.elsewhere == 0):
            raise BadModelFile("found a tensor that says two things about where its data is")
        if tensor.elsewhere == 1:
            self._elsewhere(tensor)

    def _elsewhere(self, tensor: _Tensor) -> None:
        places = [value for key, value in tensor.entries if key == "location"]
        if len(places) != 1 or tensor.raw >= 0:
            raise BadModelFile(f"found {len(places)} locations of a tensor's data, expected one")
        for key, value in tensor.entries:
            if key in ("offset", "length") and not (value.isascii() and value.isdigit() and len(value) < 16):
                raise BadModelFile(f"found the {key} {value[:40]!r} of a tensor's data, expected a number")
        place = places[0]
        parts = place.split("/")
        inside = all(part not in ("", ".", "..") for part in parts) and not place.startswith("~")
        if not inside or "\\" in place or ":" in place or not place.isprintable():
            raise BadModelFile(
                f"found the data of a tensor at {place[:80]!r}, expected a file inside the model's own folder"
            )
        self.external.add(place)
        if len(self.external) > EXTERNAL_MAX:
            raise BadModelFile(f"found more than {EXTERNAL_MAX} other files")

    def _count(self, position: int) -> None:
        self._fields += 1
        if self._fields > FIELDS_MAX:
            raise BadModelFile(f"found more than {FIELDS_MAX} fields, at byte {position}")

    def _extent(self, wire: int, position: int, end: int) -> tuple[int, int]:
        """Where the value of a field begins and ends."""
        if wire == 2:
            length, position = self._varint(position, end)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise BadModelFile(f"found the wire type {wire}, at byte {position}: this is no ONNX file")
        if length > end - position:
            raise BadModelFile(f"a field of {length} bytes passes the end of its message, at byte {position}")
        return position, position + length

    def _varint(self, position: int, end: int) -> tuple[int, int]:
        value = shift = 0
        while True:
            if position >= end:
                raise BadModelFile(f"the file ends inside a number, at byte {position}: it is cut off")
            byte = self._byte(position)
            position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                break
            shift += 7
            if shift > 63:
                raise BadModelFile(f"found a number of more than ten bytes, at byte {position}")
        if value >= 2**64:
            raise BadModelFile(f"found a number of more than 64 bits, at byte {position}")
        return value, position

    def _byte(self, position: int) -> int:
        index = position - self._start
        if not 0 <= index < len(self._window):
            self._window = self._read_at(position, min(_WINDOW, self._size - position))
            self._start, index = position, 0
            if not self._window:
                raise BadModelFile(f"the file ended at byte {position}")
        return self._window[index]

    def _text(self, start: int, end: int) -> str:
        if end - start > TEXT_MAX:
            raise BadModelFile(f"found a name of {end - start} bytes, expected at most {TEXT_MAX}")
        try:
            return self._read_at(start, end - start).decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadModelFile(f"found a name that is not UTF-8, at byte {start}") from error


_NAMED: Final[dict[str, tuple[int, ...]]] = {
    "opset": (1,), "node": (4, 7), "function": (10,), "entry": (1, 2),
}  # fmt: skip
"""The texts that we look at: domains, operators, and where data is."""


def _times(product: int, size: int) -> int:
    product *= size
    if product > _ELEMENTS_MAX:
        raise BadModelFile(f"found more than {_ELEMENTS_MAX} elements of a tensor")
    return product
