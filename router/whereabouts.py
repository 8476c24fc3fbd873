"""Where the running server is: written into the state folder when it is ready, so that other commands find it, and removed when it ends."""

from __future__ import annotations

import json
import os
from pathlib import Path

FILE = "serving.json"


def announce(state: Path, url: str) -> None:
    """Write down that this process serves at `url`."""
    state.mkdir(parents=True, exist_ok=True)
    partial = state / f"{FILE}.{os.getpid()}"
    partial.write_text(json.dumps({"url": url, "pid": os.getpid()}) + "\n", encoding="utf-8")
    partial.replace(state / FILE)


def withdraw(state: Path) -> None:
    """Take it away again, unless another server has taken the place."""
    if _read(state).get("pid") == os.getpid():
        (state / FILE).unlink(missing_ok=True)


def find(state: Path) -> str | None:
    """The URL of a server on this machine that uses this state folder; None where none runs."""
    found = _read(state)
    try:
        # Signal 0 only asks whether the process is there: a server that was killed leaves its note behind.
        os.kill(int(str(found["pid"])), 0)
        return str(found["url"])
    except PermissionError:
        return str(found["url"])
    except (KeyError, ValueError, OSError):
        return None


def _read(state: Path) -> dict[str, object]:
    try:
        found = json.loads((state / FILE).read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}
