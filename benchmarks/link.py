"""A slow link between two network namespaces of this machine, gone afterwards."""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from features.errors import UnavailableError

ADDRESSES = ("10.231.77.1", "10.231.77.2")


@contextmanager
def slow_link(mbit: int) -> Iterator[list[list[str]]]:
    """The two commands that run another command at either end of a link of `mbit` Mbit/s each way.

    In it the machine's name is that end's address, to which Horovod's ranks bind.

    Raises
    ------
    UnavailableError : this user can't make namespaces or shape a link
    """
    spaces = [f"penstock-{os.getpid()}-{end}" for end in (0, 1)]
    with tempfile.TemporaryDirectory(prefix="penstock-link-") as folder:
        try:
            for space in spaces:
                _run("ip", "netns", "add", space)
            _run(*f"ip link add v0 netns {spaces[0]} type veth peer name v1 netns {spaces[1]}".split())
            for end, (space, address) in enumerate(zip(spaces, ADDRESSES, strict=True)):
                _run("ip", "-n", space, "addr", "add", f"{address}/30", "dev", f"v{end}")
                for device in ("lo", f"v{end}"):
                    _run("ip", "-n", space, "link", "set", device, "up")
                limit = f"tbf rate {mbit}mbit burst 64kb latency 50ms"
                _run("tc", "-n", space, "qdisc", "add", "dev", f"v{end}", "root", *limit.split())
                Path(folder, space).write_text(f"127.0.0.1 localhost\n{address} {socket.gethostname()}\n")
            named = 'mount --bind "$0" /etc/hosts && exec "$@"'  # `ip netns exec` has given it mounts of its own
            yield [["ip", "netns", "exec", space, "sh", "-c", named, str(Path(folder, space))] for space in spaces]
        finally:
            for space in spaces:
                subprocess.run(["ip", "netns", "del", space], check=False, capture_output=True)


def _run(*command: str) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise UnavailableError(f"{command[0]} is not installed (Debian: iproute2)") from None
    except subprocess.CalledProcessError as error:
        raise UnavailableError(f"`{' '.join(command)}`: {error.stderr.strip()}") from None
