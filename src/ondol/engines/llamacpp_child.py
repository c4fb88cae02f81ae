"""The process that holds a GGUF model: llama.cpp's own HTTP server on loopback, behind a random key.

Run by `ondol.engines.child`; the only module that imports xllamacpp.  The configuration is that of
`LlamaCppEngine._config`.
"""

from __future__ import annotations

import threading
import time
from typing import Any
from urllib.parse import urlsplit

from ondol.engines.lifeline import end_with_stdin, prepare, read_config, say


def main() -> None:
    """Load, say the port, serve until stdin closes."""
    answers = prepare()
    config = read_config()
    end_with_stdin()
    begun = time.monotonic()
    try:
        server, port = _serve(config)
    except RuntimeError as error:
        # llama.cpp has said on stderr what it did not like; the parent keeps that.
        say(answers, {"error": f"llama.cpp did not load the model: {error}"})
        return
    say(answers, {"port": port, "load_ms": round((time.monotonic() - begun) * 1000)})
    # The server lives as long as its object; the life line ends the process.
    threading.Event().wait()
    del server


def _serve(config: dict[str, Any]) -> tuple[Any, int]:
    # Imported here, so that a missing library is an error line to the parent and not a traceback.
    try:
        import xllamacpp  # type: ignore[import-untyped]  # a Cython module without stubs
    except ImportError as error:
        raise RuntimeError(f"xllamacpp cannot be imported: {error}") from error
    params = xllamacpp.CommonParams()
    params.model.path = config["model_path"]
    # Without an alias, answers name the model by its path on our disk.
    params.model_alias = {config["alias"]}
    # llama.cpp divides the context among its slots.
    params.n_ctx = config["context_tokens"] * config["parallel"]
    params.n_parallel = config["parallel"]
    params.kv_unified = False
    params.cpuparams.n_threads = config["threads"]
    params.cpuparams_batch.n_threads = config["threads"]
    params.n_gpu_layers = config["gpu_layers"]
    # Without a device to fit, its search only costs start time.
    params.fit_params = config["gpu_layers"] != 0
    # Refuse what does not fit, rather than drop the oldest part of a prompt without a word.
    params.ctx_shift = False
    params.cache_ram_mib = config["cache_ram_mib"]
    params.use_jinja = True
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    params.api_keys = [config["api_key"]]
    params.n_threads_http = config["http_threads"]
    params.endpoint_slots = False
    params.endpoint_props = False
    params.endpoint_metrics = False
    params.ui = False
    params.ui_mcp_proxy = False
    params.server_tools = []
    params.mcp_servers_config = ""
    params.cors_origins = ""
    params.cors_credentials = False
    params.slot_save_path = ""
    params.offline = True
    # Errors only: at higher levels it writes parts of prompts.
    params.verbosity = 1
    server = xllamacpp.Server(params)
    port = urlsplit(server.listening_address).port
    if port is None:
        raise RuntimeError("it listens on no port")
    return server, port


if __name__ == "__main__":
    main()
