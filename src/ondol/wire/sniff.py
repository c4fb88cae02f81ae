"""What kind of model a file is, by its content alone; its name proves nothing.

Only what is known to hold weights and no code is let in: GGUF, ONNX and safetensors.  A pickle is refused in every
wrapping that PyTorch's own loader would open, also where an archive hides behind the end of another file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import msgspec

from ondol.core.chunks import Format
from ondol.errors import BadModelFile
from ondol.wire import gguf, onnx_header, safetensors

ReadAt = Callable[[int, int], bytes]

HEAD_BYTES: Final = 512
TAIL_BYTES: Final = 22 + 65_535
"""A ZIP archive is found by its end, which lies within so many bytes of the file's."""

_TORCH_LEGACY: Final = bytes.fromhex("8a0a6cfc9c46f9206aa85019")
"""The magic number of PyTorch's older saves, as pickle writes that integer."""
_END_OF_ZIP: Final = b"PK\x05\x06"
_KINDS: Final = (
    (b"PK\x03\x04", "a ZIP archive (PyTorch saves are; loading one can run code)"),
    (b"PK\x05\x06", "a ZIP archive"),
    (b"PK\x07\x08", "a ZIP archive"),
    (b"\x1f\x8b", "a gzip file; unpack it first"),
    (b"\xfd7zXZ", "an xz file; unpack it first"),
    (b"7z\xbc\xaf", "a 7z archive"),
    (b"\x89HDF", "HDF5 (Keras saves are; they can hold code)"),
    (b"\x93NUMPY", "a NumPy array, which can hold a pickle"),
    (b"lmgg", "the GGML format before GGUF; convert it"),
    (b"fmgg", "the GGML format before GGUF; convert it"),
    (b"tjgg", "the GGML format before GGUF; convert it"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file it points to"),
    (b"\x7fELF", "a program"),
    (b"MZ", "a program"),
    (b"#!", "a script"),
)
_ONNX_FIRST: Final = frozenset(b"\x08\x12\x1a\x22\x28\x32\x3a\x42")
"""The tags of the fields 1 to 8 of an ONNX model: one of them comes first."""
_WANTED: Final = "expected GGUF, ONNX or safetensors"


class ModelFile(msgspec.Struct, frozen=True, kw_only=True):
    """A file that passed: its format, where its tensors begin (ascending), the elements of all of them."""

    format: Format
    starts: tuple[int, ...]
    parameters: int


def sniff(head: bytes, size: int, tail: bytes = b"") -> Format:
    """The format of a file of `size` bytes with these first bytes (512 are enough) and these last ones.

    Raises:
        BadModelFile: it is none of the three, or hides an archive; the message says what it is.
    """
    refuse_pickle(head)
    for magic, words in _KINDS:
        if head.startswith(magic):
            raise BadModelFile(f"found {words}; {_WANTED}")
    if head[257:262] == b"ustar":
        raise BadModelFile(f"found a tar archive; {_WANTED}")
    _refuse_appended(tail, size)
    if head.startswith(gguf.MAGIC):
        return "gguf"
    if size > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size:
        return "safetensors"
    if head[:HEAD_BYTES].lstrip()[:1] == b"<":
        raise BadModelFile(f"found a web page; {_WANTED} (does the address ask for a login?)")
    if head[:1] and head[0] in _ONNX_FIRST:
        return "onnx"
    raise BadModelFile(f"found an unknown format that starts with {head[:4].hex() or 'nothing'}; {_WANTED}")


def refuse_pickle(head: bytes) -> None:
    """Refuse what starts as a Python pickle does, of every protocol that says so.

    Raises:
        BadModelFile: it is one.
    """
    if head[:1] == b"\x80" and head[1:2] and head[1] <= 5:
        legacy = _TORCH_LEGACY in head[:32]
        kind = "an older PyTorch save" if legacy else "a Python pickle"
        raise BadModelFile(f"found {kind}, which runs code when it is loaded; {_WANTED}")


def _refuse_appended(tail: bytes, size: int) -> None:
    """A loader of ZIP files reads from the end: whatever stands before it, that is what it would open."""
    at = tail.rfind(_END_OF_ZIP)
    while at >= 0:
        record = tail[at : at + 22]
        if len(record) == 22:
            length, offset, comment = (
                int.from_bytes(record[12:16], "little"),
                int.from_bytes(record[16:20], "little"),
                int.from_bytes(record[20:22], "little"),
            )
            where = size - len(tail) + at
            if at + 22 + comment <= len(tail) and length + min(offset, where) <= where:
                pickled = b"data.pkl" in tail[:at].lower()
                raise BadModelFile(
                    f"found a ZIP archive{' with a pickle' if pickled else ''} behind the model; {_WANTED}"
                )
        at = tail.rfind(_END_OF_ZIP, 0, at)


def read_model(read_at: ReadAt, size: int) -> ModelFile:
    """Decide the format and read the header, under the limits of each.

    Raises:
        BadModelFile: it is no model that native code may see, or needs other files beside it.
    """
    tail_bytes = min(TAIL_BYTES, size)
    kind = sniff(read_at(0, min(HEAD_BYTES, size)), size, read_at(size - tail_bytes, tail_bytes))
    if kind == "gguf":
        found = gguf.read_header(read_at, size)
        if found.parts > 1:
            raise BadModelFile(
                f"found one of {found.parts} parts of a model, expected a whole one; join them with llama.cpp's"
                " gguf-split --merge"
            )
        return ModelFile(format=kind, starts=found.starts, parameters=found.parameters)
    if kind == "safetensors":
        tensors = safetensors.read_header(read_at, size)
        return ModelFile(format=kind, starts=tensors.starts, parameters=tensors.parameters)
    onnx = onnx_header.read_header(read_at, size)
    if onnx.external:
        raise BadModelFile(
            f"found an ONNX model with its data in other files ({', '.join(onnx.external[:3])[:120]}); expected one "
            "file: save it with all tensors inside"
        )
    return ModelFile(format=kind, starts=onnx.starts, parameters=onnx.parameters)
