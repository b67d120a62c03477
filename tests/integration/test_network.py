"""A whole cell with `tracking=offline` opens no connection beyond this machine.

Python's own sockets are watched from inside. Other programs that a cell starts, such as the service
of W&B, are sent through a proxy of this test, which nobody may call, and where `strace` is
installed the system calls of all processes are read as well.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WATCH = """
import os, socket
def watched(name, original):
    def call(*arguments, **options):
        address = arguments[0] if name == "getaddrinfo" else arguments[1]
        here = isinstance(address, (str, bytes)) and name != "getaddrinfo"  # a Unix socket
        host = address if isinstance(address, (str, bytes)) or address is None else address[0]
        if not here and host not in (None, "localhost", "127.0.0.1", "::1", socket.gethostname()):
            with open(os.environ["WATCHED"], "a") as file:
                file.write(f"{name} {address}\\n")
        return original(*arguments, **options)
    return call
for name in ("connect", "connect_ex"):
    setattr(socket.socket, name, watched(name, getattr(socket.socket, name)))
socket.getaddrinfo = watched("getaddrinfo", socket.getaddrinfo)
"""
CELL = ["method=rtn", "bits=w4a4", "evaluation.limit=4", "calibration.samples=4", "threads=1"]
STRACE = shutil.which("strace")


@pytest.fixture
def proxy() -> Iterator[tuple[str, list[str]]]:
    """The address of a proxy, and the first line of every request that it got."""
    server = socket.create_server(("127.0.0.1", 0))
    requests: list[str] = []

    def listen() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(5)
                requests.append(connection.recv(1024).decode(errors="replace").split("\r\n")[0])

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.getsockname()[1]}", requests
    server.shutdown(socket.SHUT_RDWR)
    server.close()
    thread.join()


@pytest.fixture
def environment(tmp_path: Path, proxy: tuple[str, list[str]]) -> dict[str, str]:
    """No account, no setting that already forbids the network, and the watch in every Python."""
    (tmp_path / "watch").mkdir()
    (tmp_path / "watch" / "sitecustomize.py").write_text(WATCH)
    forbidden = re.compile(r"WANDB_|HF_|TRANSFORMERS_|(?i:.*_proxy$)")
    kept = {name: value for name, value in os.environ.items() if not forbidden.match(name)}
    kept |= dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "https_proxy"), proxy[0])
    kept |= {"HOME": str(tmp_path), "WATCHED": str(tmp_path / "watched"), "OMP_NUM_THREADS": "1"}
    return kept | {"PYTHONPATH": os.pathsep.join([str(tmp_path / "watch"), str(ROOT)])}


def outside(trace: str) -> list[str]:
    """The calls of a trace that address another machine."""
    calls = [line for line in trace.splitlines() if re.search(r"sa_family=AF_INET6?\b", line)]
    return [line for line in calls if not re.search(r'"127\.|"::1"|"::ffff:127\.', line)]


def test_an_offline_cell_makes_no_network_call(
    tmp_path: Path, environment: dict[str, str], proxy: tuple[str, list[str]]
) -> None:
    command = [sys.executable, str(ROOT / "run.py"), *CELL, "tracking=offline"]
    if STRACE:
        calls = ["-e", "trace=connect,sendto,sendmsg", "-o", str(tmp_path / "trace")]
        command = [STRACE, "-f", "-qq", *calls, *command]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    if STRACE and "ptrace" in done.stderr:  # a sandbox that forbids it
        done = subprocess.run(
            command[command.index(sys.executable) :],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
    assert list((tmp_path / "results" / "wandb").glob("offline-run-*"))
    assert not (tmp_path / "watched").exists(), (tmp_path / "watched").read_text()
    assert proxy[1] == []
    if (tmp_path / "trace").exists():
        assert outside((tmp_path / "trace").read_text()) == []


def test_the_watch_sees_calls(
    tmp_path: Path, environment: dict[str, str], proxy: tuple[str, list[str]]
) -> None:
    """Both watches work: Python's sockets and W&B's service, which telemetry makes call."""
    script = """
import socket, sys, urllib.request, wandb
for call in (lambda: socket.getaddrinfo("example.invalid", 80),
             lambda: socket.create_connection(("192.0.2.1", 9), timeout=0.01),
             lambda: urllib.request.urlopen("http://192.0.2.1/", timeout=5)):
    try:
        call()
    except OSError:
        pass
"""
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, check=True)
    watched = (tmp_path / "watched").read_text()
    assert "getaddrinfo example.invalid" in watched
    assert "connect ('192.0.2.1', 9)" in watched
    assert proxy[1] == ["GET http://192.0.2.1/ HTTP/1.1"]
    trace = '1 connect(3, {sa_family=AF_INET, sin_port=htons(53), sin_addr=inet_addr("10.0.0.1")}'
    assert outside(trace) == [trace]
    assert outside(trace.replace("10.0.0.1", "127.0.0.1")) == []
