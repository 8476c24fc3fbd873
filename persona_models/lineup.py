"""Which versions are in force: the champions, the challengers on trial, the router. Plain records that cross processes and lie in a file.

A lineup is what the registry says at one moment. The front door names its versions in every request, so that a replica that came up a moment earlier
or later answers with the same ones. Knows nothing of MLflow or engines.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from persona_models.protocol import BUILTIN

LINEUP_FILE = "lineup.json"


@dataclass(frozen=True)
class Pinned:
    """A registered version and the digest of what was registered; `builtin` is what ships."""

    version: str = BUILTIN
    digest: str | None = None


@dataclass(frozen=True)
class Trial:
    """A challenger that gets a share of a persona's requests (0..1), or answers them all in the shadow of the champion, unseen."""

    pinned: Pinned
    share: float = 0.0
    shadow: bool = False


@dataclass(frozen=True)
class Lineup:
    """read_ms: when it was read, milliseconds since 1970. A persona that is not in `champions` is served by what ships."""

    read_ms: int = 0
    champions: Mapping[str, Pinned] = field(default_factory=dict)
    trials: Mapping[str, Trial] = field(default_factory=dict)
    router: Pinned = Pinned()

    def champion(self, persona: str) -> Pinned:
        return self.champions.get(persona, Pinned())

    def wanted(self, persona: str) -> tuple[Pinned, ...]:
        """The versions of a persona that a replica holds: the champion first, then the one on trial."""
        trial = self.trials.get(persona)
        return (self.champion(persona), *((trial.pinned,) if trial else ()))

    def version_for(self, persona: str, whose: str) -> str:
        """The version that answers a request: the challenger's for its share. The same user, by `whose`, always gets the same one."""
        trial = self.trials.get(persona)
        if trial and not trial.shadow:
            draw = int.from_bytes(hashlib.sha256(f"{persona}/{trial.pinned.version}/{whose}".encode()).digest()[:8], "big") / 2**64
            if draw < trial.share:
                return trial.pinned.version
        return self.champion(persona).version

    def without_trials(self) -> Lineup:
        return replace(self, trials={})

    def save(self, folder: Path) -> None:
        """Write it down, so that a server that starts while the registry is down comes up on the same versions."""
        folder.mkdir(parents=True, exist_ok=True)
        # Several front doors may write at once; each writes a file of its own and the last rename wins.
        partial = folder / f"{LINEUP_FILE}.{os.getpid()}"
        partial.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        partial.replace(folder / LINEUP_FILE)

    @classmethod
    def load(cls, folder: Path) -> Lineup | None:
        """The lineup that was written down last; None where there is none that can be read."""
        try:
            raw = json.loads((folder / LINEUP_FILE).read_text(encoding="utf-8"))
            return cls(
                raw["read_ms"],
                {p: Pinned(**v) for p, v in raw["champions"].items()},
                {p: Trial(Pinned(**t.pop("pinned")), **t) for p, t in raw["trials"].items()},
                Pinned(**raw["router"]),
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None


@dataclass(frozen=True)
class Ack:
    """What a replica says after it was told of a lineup: by persona the version in force, all held ones, and why it could not do with a version."""

    replica: str
    current: Mapping[str, str]
    held: Mapping[str, tuple[str, ...]]
    faults: Mapping[str, Mapping[str, str]]
