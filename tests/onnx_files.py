"""ONNX files by hand: the fields of a protocol buffer, as a writer would put them."""

from __future__ import annotations


def varint(value: int) -> bytes:
    out = bytearray()
    while True:
        byte, value = value & 0x7F, value >> 7
        out.append(byte | (0x80 if value else 0))
        if not value:
            return bytes(out)


def num(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value)


def sub(field: int, value: bytes | str) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return varint(field << 3 | 2) + varint(len(data)) + data


def tensor(name: str = "w", dims: tuple[int, ...] = (2, 3), kind: int = 1, raw: bytes | None = None) -> bytes:
    size = 1
    for one in dims:
        size *= one
    data = bytes(size * 4) if raw is None else raw
    return b"".join(num(1, one) for one in dims) + num(2, kind) + sub(8, name) + sub(9, data)


def external(location: str, *more: tuple[str, str]) -> bytes:
    entries = [("location", location), *more]
    return num(1, 4) + num(2, 1) + sub(8, "w") + b"".join(sub(13, sub(1, k) + sub(2, v)) for k, v in entries) + num(14, 1)  # fmt: skip


def node(op: str = "MatMul", domain: str = "", attribute: bytes | None = None) -> bytes:
    return sub(1, "x") + sub(2, "y") + sub(4, op) + (sub(5, attribute) if attribute else b"") + (sub(7, domain) if domain else b"")  # fmt: skip


def onnx(
    *, nodes: tuple[bytes, ...] = (node(),), tensors: tuple[bytes, ...] = (tensor(),), more: bytes = b"",
    opsets: tuple[str, ...] = ("",), graphs: int = 1, ir: int = 9,
) -> bytes:  # fmt: skip
    graph = b"".join(sub(1, one) for one in nodes) + sub(2, "g") + b"".join(sub(5, one) for one in tensors)
    sets = b"".join(sub(8, (sub(1, one) if one else b"") + num(2, 17)) for one in opsets)
    return num(1, ir) + sub(2, "tests") + sub(7, graph) * graphs + sets + more
