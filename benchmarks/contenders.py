"""What is compared: how each contender is started, and where its requests go.

Every one stands in front of the same instant upstream (nginx) and the same paced one (streams).
"""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

from benchmarks import nginx, peers
from benchmarks.processes import Process, StartFailed, free_port
from benchmarks.raw_http import Connection
from benchmarks.target import ANSWER, Target

ROOT = Path(__file__).resolve().parent.parent
HEALTH = Target(port=0, path="/healthz", method="GET")


class Upstreams(msgspec.Struct, frozen=True):
    """Ports: the instant one, its second listener that no request should reach, and the paced one."""

    instant: int
    idle: int
    paced: int


class Contender(msgspec.Struct, frozen=True, kw_only=True):
    """A server that runs, and the targets that measure it; None where it has no such thing."""

    name: str
    process: Process
    chat: Target
    stream: Target | None = None
    cached: Target | None = None
    health: Target | None = None
    version: str = ""


def check(contender: Contender) -> None:
    """See that the contender gives the right answer before it is measured.

    Raises:
        StartFailed: it answers something else; the message has the status and the beginning.
    """
    for target in (contender.chat, contender.cached):
        if target is None:
            continue
        with Connection(target.port) as connection:
            reply = connection.exchange(target.request())
        if reply.status != 200 or ANSWER.encode() not in reply.body:
            beginning = reply.body[:200].decode(errors="replace")
            raise StartFailed(
                f"{contender.name} answered {reply.status} instead of the completion: {beginning}"
            )


def stream_problem(contender: Contender) -> str | None:
    """None when a short stream comes through whole, else what came instead."""
    assert contender.stream is not None
    seen = b""
    with Connection(contender.stream.port, timeout_s=10.0) as connection:
        try:
            for _, data in connection.pieces(contender.stream.request("rate=100 tokens=3", stream=True)):
                seen += data
                if b"\r\n\r\n" in seen and not seen.startswith(b"HTTP/1.1 200"):
                    break
        except OSError as error:
            return f"the stream broke: {type(error).__name__}"
    if b"[DONE]" in seen:
        return None
    return f"a stream got {seen[9:12].decode('latin-1')}: {seen[-120:].decode('latin-1')}"


def answers(target: Target) -> bool:
    """Whether the target answers 200 now."""
    try:
        with Connection(target.port, timeout_s=5.0) as connection:
            return connection.exchange(target.request()).status == 200
    except OSError:
        return False


def ready(contender: Contender, timeout_s: float = 20.0) -> Contender:
    """Wait for the first right answer; a contender that fails is ended here.

    Raises:
        StartFailed: it ended, took too long, or answers something else.
    """
    try:
        contender.process.wait_until(
            lambda: answers(contender.chat), what=contender.name, timeout_s=timeout_s
        )
        check(contender)
    except BaseException:
        contender.process.end()
        raise
    return contender


def start_relay(directory: Path, upstreams: Upstreams) -> Contender:
    """The gateway's server with pyreqwest as client, without any pipeline."""
    return _start_relay(directory, upstreams, name="relay")


def start_own_relay(directory: Path, upstreams: Upstreams) -> Contender:
    """The gateway's server with the HTTP client of its own engines, without any pipeline."""
    return _start_relay(directory, upstreams, "--own-client", name="relay-own")


def _start_relay(directory: Path, upstreams: Upstreams, *options: str, name: str) -> Contender:
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.relay", "--port", str(port), *options]
    command += ["--instant", str(upstreams.instant), "--paced", str(upstreams.paced)]
    process = Process(command, log=directory / f"{name}.log", cwd=ROOT)
    health = msgspec.structs.replace(HEALTH, port=port)
    return ready(
        Contender(
            name=name,
            process=process,
            chat=Target(port=port),
            stream=Target(port=port, path="/stream/v1/chat/completions"),
            health=health,
        )
    )


def start_fixed(directory: Path, _: Upstreams) -> Contender:
    """Our own server with one answer, no upstream."""
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.relay", "--port", str(port), "--fixed"]
    process = Process(command, log=directory / "fixed.log", cwd=ROOT)
    return ready(Contender(name="fixed", process=process, chat=Target(port=port)))


def start_nginx(directory: Path, upstreams: Upstreams) -> Contender:
    """Nginx as a reverse proxy."""
    port = free_port()
    process = nginx.reverse_proxy(
        directory / "nginx-proxy", port=port, instant=upstreams.instant, paced=upstreams.paced
    )
    return ready(
        Contender(
            name="nginx",
            process=process,
            chat=Target(port=port),
            stream=Target(port=port, path="/stream/v1/chat/completions"),
            health=msgspec.structs.replace(HEALTH, port=port),
        )
    )


LITELLM_CONFIG = """\
model_list:
  - model_name: bench
    litellm_params: {{model: openai/bench, api_base: "http://127.0.0.1:{instant}/v1", api_key: none}}
  - model_name: paced
    litellm_params: {{model: openai/paced, api_base: "http://127.0.0.1:{paced}/v1", api_key: none}}
litellm_settings:
  telemetry: false
"""


def start_litellm(directory: Path, upstreams: Upstreams) -> Contender:
    """LiteLLM's proxy: one worker, no database, no keys, nothing looked up on the network."""
    program = peers.litellm()
    port = free_port()
    config = directory / "litellm.yaml"
    config.write_text(LITELLM_CONFIG.format(instant=upstreams.instant, paced=upstreams.paced))
    command = [str(program), "--config", str(config), "--host", "127.0.0.1", "--port", str(port)]
    environment = {
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LITELLM_TELEMETRY": "False",
        "LITELLM_LOG": "ERROR",
        "LITELLM_MODE": "PRODUCTION",
        "NO_PROXY": "127.0.0.1",
    }
    process = Process(
        [*command, "--num_workers", "1", "--telemetry", "False"],
        log=directory / "litellm.log",
        env=environment,
        cwd=directory,
    )
    target = Target(port=port)
    return ready(
        Contender(
            name="litellm",
            process=process,
            chat=target,
            stream=msgspec.structs.replace(target, model="paced"),
            version=peers.litellm_version(),
        ),
        timeout_s=120.0,
    )


def start_portkey(directory: Path, upstreams: Upstreams) -> Contender:
    """Portkey's open gateway on Node, pointed at the upstream by its headers."""
    node, script = peers.portkey()
    port = free_port()
    command = [str(node), str(script), f"--port={port}", "--headless"]
    process = Process(command, log=directory / "portkey.log", cwd=directory, env={"NODE_ENV": "production"})
    return ready(
        Contender(
            name="portkey",
            process=process,
            chat=Target(port=port, headers=_portkey_headers(upstreams.instant)),
            stream=Target(port=port, headers=_portkey_headers(upstreams.paced)),
            version=peers.portkey_version(),
        ),
        timeout_s=60.0,
    )


def _portkey_headers(port: int) -> tuple[tuple[str, str], ...]:
    return (
        ("x-portkey-provider", "openai"),
        ("x-portkey-custom-host", f"http://127.0.0.1:{port}/v1"),
        ("authorization", "Bearer none"),
    )
