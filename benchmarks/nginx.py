"""nginx with its own prefix: as the instant upstream, and as the reverse proxy to compare with.

One worker each.  The upstream gives one fixed completion without reading a file.
"""

from __future__ import annotations

import os
import resource
import shutil
from pathlib import Path

from benchmarks.processes import Process, StartFailed
from benchmarks.target import completion

_FRAME = """\
{user}worker_processes 1;
daemon off;
pid nginx.pid;
error_log stderr warn;
worker_rlimit_nofile {files};
events {{ worker_connections {connections}; multi_accept on; }}
http {{
    access_log off;
    client_body_temp_path body;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
    client_body_buffer_size 64k;
    keepalive_requests 100000000;
    keepalive_timeout 300s;
    tcp_nodelay on;
{body}
}}
"""

_INSTANT = """\
    default_type application/json;
    server {{
        {listens}
        location / {{ return 200 '{answer}'; }}
    }}
"""

_PROXY = """\
    upstream instant {{ server 127.0.0.1:{instant}; keepalive 64; keepalive_requests 100000000; }}
    upstream paced {{ server 127.0.0.1:{paced}; keepalive 64; keepalive_requests 100000000; }}
    proxy_http_version 1.1;
    proxy_set_header Connection "";
    server {{
        listen 127.0.0.1:{port} backlog=8192;
        location = /healthz {{ return 200 'ok'; }}
        location /stream/ {{ proxy_pass http://paced/; proxy_buffering off; proxy_read_timeout 300s; }}
        location / {{ proxy_pass http://instant; }}
    }}
"""


def instant_upstream(directory: Path, ports: list[int]) -> Process:
    """Nginx that answers anything on `ports` with the fixed completion."""
    listens = " ".join(f"listen 127.0.0.1:{port} backlog=8192;" for port in ports)
    body = _INSTANT.format(listens=listens, answer=completion().decode())
    return _start(directory, body)


def reverse_proxy(directory: Path, *, port: int, instant: int, paced: int) -> Process:
    """Nginx in front of the two upstreams, as one would set it up for this."""
    return _start(directory, _PROXY.format(port=port, instant=instant, paced=paced))


def _start(directory: Path, body: str) -> Process:
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
    if program is None:
        raise StartFailed("nginx is not installed (Debian and Ubuntu: apt-get install nginx-light)")
    directory.mkdir(parents=True)
    files = min(_open_files_max(), 65_536)
    user = "user root;\n" if os.geteuid() == 0 else ""  # else the worker may not enter the directory
    text = _FRAME.format(user=user, files=files, connections=files // 2, body=body)
    (directory / "nginx.conf").write_text(text)
    command = [program, "-p", str(directory), "-c", "nginx.conf", "-e", "stderr"]
    return Process(command, log=directory / "nginx.log", serving="children")


def _open_files_max() -> int:
    return resource.getrlimit(resource.RLIMIT_NOFILE)[1]
