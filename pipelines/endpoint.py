"""The running server as the pipelines see it: found in the state folder or named, and asked to take up what the registry says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from persona_models.errors import NotReadyError
from router import whereabouts
from router.config import Config

# A reload waits for replicas that are just being replaced.
RELOAD_TIMEOUT_S = 150.0


@dataclass(frozen=True)
class Reply:
    """What a server said after a reload: versions in force, every replica with its versions, and by persona or "router" why one stays as it was."""

    url: str
    versions: Mapping[str, str]
    router_version: str
    trials: Mapping[str, Mapping[str, Any]]
    replicas: tuple[Mapping[str, Any], ...]
    front_doors: int
    faults: Mapping[str, str]

    def version_of(self, name: str) -> str | None:
        return self.router_version if name == "router" else self.versions.get(name)

    def acknowledged(self, name: str) -> str:
        """How many replicas have the version in force, in words."""
        if name == "router":
            return f"{self.front_doors} front door{'s' if self.front_doors != 1 else ''}"
        holders = sum(r["versions"].get(name) == self.versions.get(name) for r in self.replicas)
        return f"{holders} replica{'s' if holders != 1 else ''}"


class Endpoint:
    """One server. `find` gives None where none runs."""

    def __init__(self, url: str, key: str | None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._headers = {"authorization": f"Bearer {key}"} if key else {}

    @classmethod
    def find(cls, config: Config, url: str | None = None) -> Endpoint | None:
        """The server named by `url`, else the one that uses this state folder."""
        url = url or whereabouts.find(config.state)
        return cls(url, config.api_keys[0] if config.api_keys else None) if url else None

    def reload(self) -> Reply:
        """Have the server take up what the registry says now. Raises NotReadyError that says why it could not."""
        try:
            answer = httpx.post(f"{self.url}/v1/reload", headers=self._headers, timeout=RELOAD_TIMEOUT_S)
            body = answer.json()
        except (httpx.HTTPError, ValueError) as e:
            raise NotReadyError(f"the server at {self.url} does not answer ({type(e).__name__}); see its log, or start it anew") from None
        if answer.status_code != 200 or "versions" not in body:
            said = body.get("error", {}).get("message") if isinstance(body, dict) else None
            raise NotReadyError(f"the server at {self.url} did not reload: {said or f'HTTP {answer.status_code}'}")
        return Reply(
            self.url,
            body["versions"],
            body["router_version"],
            body["trials"],
            tuple(body["replicas"]),
            body["front_doors"],
            body["faults"],
        )
