"""A `deskroute serve` in a process of its own, for the tests of this folder. Only processes started here are stopped."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def descendants(pid: int) -> set[int]:
    """Process ids below a process, read from /proc."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
            parents[int(stat.parent.name)] = int(fields[1])
        except OSError:
            continue
    found, frontier = set(), {pid}
    while frontier:
        frontier = {p for p, parent in parents.items() if parent in frontier} - found
        found |= frontier
    return found


def listening(pids: set[int]) -> set[tuple[str, int]]:
    """Local addresses, as /proc writes them (hexadecimal), and ports of the TCP sockets on which processes listen."""
    inodes = set()
    for pid in pids:
        for fd in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                inodes.add(os.readlink(fd))
            except OSError:
                continue
    sockets = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                address, port = fields[1].rsplit(":", 1)
                sockets.add((address, int(port, 16)))
    return sockets


class Server:
    def __init__(self, folder: Path, *, config: str = "") -> None:
        self.port = free_port()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "deskroute.yaml").write_text(config)
        env = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_", "DESKROUTE_"))}
        self.log = folder / "log"
        command = [sys.executable, "-m", "pipelines.cli", "serve", "--port", str(self.port)]
        env |= {"PYTHONPATH": str(ROOT), "DESKROUTE_HOME": str(folder / "state")}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)

    def wait(self) -> str:
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline:
            text = self.log.read_text()
            if "ready in" in text:
                return text
            assert self.process.poll() is None, text
            time.sleep(0.3)
        raise AssertionError(f"not ready: {self.log.read_text()}")

    def stop(self) -> float:
        began = time.monotonic()
        # As a terminal does: Ctrl-C reaches every process of the group.
        os.killpg(self.process.pid, signal.SIGINT)
        self.process.wait(60)
        return time.monotonic() - began

    def stop_as_a_supervisor(self) -> None:
        """As Docker does, and systemd with KillMode=mixed: SIGTERM, to the one process."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)

    @property
    def scratch(self) -> set[Path]:
        """The temporary folders that the processes below the server name in their command lines."""
        said = [Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace") for pid in descendants(self.process.pid)]
        return {Path(found) for line in said for found in re.findall(r"[^\0=]*/deskroute-\w+(?=/)", line)}
