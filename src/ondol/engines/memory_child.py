"""The process that embeds questions and finds the nearest ones seen before.  Run by `ondol.engines.child`.

After the ready line it speaks frames on stdin and stdout: 4 bytes of length (big-endian), then MessagePack.  In:
`Ask`.  Out: one `Told` for each, in order.  It holds vectors and keys, never a text after it was encoded.

Of all namespaces together at most `entries_max` entries are held: the oldest are given up first.
"""

from __future__ import annotations

import os
import queue
import struct
import threading
import time
from typing import TYPE_CHECKING, Any, Final

import msgspec

from ondol.engines.encoder_child import load_encoder, read_exactly, write_all
from ondol.engines.lifeline import prepare, read_config, say

if TYPE_CHECKING:
    from ondol.engines.memory_index import Memory, Recall

FRAME_BYTES_MAX: Final = 4 * 1024 * 1024
LENGTH: Final = struct.Struct(">I")


class Ask(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """What to do: `search` (the `k` nearest of `text`), `add`, `remove` (keys), `compare` (`text` with `other`).

    `add` takes `text`, or where that is empty the vector of the request `vector_of`, if it is still remembered.
    """

    number: int
    what: str
    namespace: bytes = b""
    text: str = ""
    other: str = ""
    k: int = 0
    keys: tuple[int, ...] = ()
    vector_of: int = 0


class Told(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """`keys` with their cosines, most similar first; `gone` are keys given up since the last answer.

    `error` is a sentence.  `entries` counts all that is held, of all namespaces.
    """

    number: int
    keys: tuple[int, ...] = ()
    similarities: tuple[float, ...] = ()
    gone: tuple[int, ...] = ()
    entries: int = 0
    width: int = 0
    encode_us: int = 0
    search_us: int = 0
    error: str = ""


def answer(ask: Ask, memory: Memory, recall: Recall, encoder: Any) -> Told:
    """Do what was asked."""
    begun = time.perf_counter_ns()
    vector = recall.take(ask.vector_of) if ask.vector_of else None
    if vector is None and ask.text:
        try:
            vectors = encoder.encode([ask.text, ask.other] if ask.other else [ask.text])
            vector = vectors[0]
        except (ValueError, IndexError, MemoryError, ArithmeticError) as error:
            # The kind only: the message of some of these quotes the text.
            return Told(number=ask.number, error=f"the encoder failed on a text ({type(error).__name__})")
        if not bool(abs(vectors.sum()) < 1e9):
            return Told(number=ask.number, error="the encoder gave numbers that are not finite")
    encoded = time.perf_counter_ns()
    keys: tuple[int, ...] = ()
    similarities: tuple[float, ...] = ()
    gone: tuple[int, ...] = ()
    match ask.what:
        case "search" if vector is not None:
            keys, similarities = memory.search(ask.namespace, vector, ask.k)
            recall.put(ask.number, vector)
        case "add" if vector is not None and ask.keys:
            gone = memory.add(ask.namespace, ask.keys[0], vector)
        case "remove":
            for key in ask.keys:
                memory.remove(key)
        case "compare" if vector is not None and ask.other:
            similarities = (float(vectors[0] @ vectors[1]),)
        case _:
            return Told(number=ask.number, entries=len(memory), error="there is no vector for this request")
    return Told(
        number=ask.number,
        keys=keys,
        similarities=similarities,
        gone=gone,
        entries=len(memory),
        width=0 if vector is None else len(vector),
        encode_us=(encoded - begun) // 1000,
        search_us=(time.perf_counter_ns() - encoded) // 1000,
    )


def main() -> None:
    """Load, say so, answer until stdin closes."""
    answers = prepare()
    config = read_config()
    threads = str(int(config["threads"]))
    # Read by the linear algebra library when it is loaded, so before the import.
    for variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"):
        os.environ[variable] = threads
    asked: queue.SimpleQueue[Ask] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(asked,), name="stdin", daemon=True).start()
    begun = time.monotonic()
    try:
        from ondol.engines.memory_index import EXACT_MAX, Memory, Recall

        encoder, _ = load_encoder(int(config["threads"]))
        width = len(encoder.encode(["ready"])[0])
    except (ImportError, OSError, KeyError, ValueError) as error:
        say(answers, {"error": f"the sentence encoder did not load: {type(error).__name__}: {error}"})
        return
    say(answers, {"load_ms": round((time.monotonic() - begun) * 1000), "width": width})
    memory = Memory(width, int(config["entries_max"]), int(config.get("exact_max", EXACT_MAX)))
    recall = Recall()
    encode = msgspec.msgpack.Encoder().encode
    while True:
        body = encode(answer(asked.get(), memory, recall, encoder))
        write_all(answers, LENGTH.pack(len(body)) + body)


def _read(asked: queue.SimpleQueue[Ask]) -> None:
    """What stdin brought; ends the process when stdin closes."""
    decoder = msgspec.msgpack.Decoder(Ask)
    while (head := read_exactly(LENGTH.size)) is not None:
        (length,) = LENGTH.unpack(head)
        body = read_exactly(length) if length <= FRAME_BYTES_MAX else None
        if body is None:
            break
        asked.put(decoder.decode(body))
    os._exit(0)


if __name__ == "__main__":
    main()
