"""The only reader of MLflow: alias -> version -> a verified local folder.

Serving reads aliases only. A registry that is empty, down or holds something broken never takes serving down: the caller gets a note and uses what ships.
MLflow is imported only when there is a registry to read, since that import takes seconds.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from persona_models.errors import RegistryError
from persona_models.lineup import Lineup, Pinned, Trial

CHAMPION, CHALLENGER, PREVIOUS = "champion", "challenger", "previous"
ROUTER_MODEL = "deskroute-router"
# Tag on a registered version: folder_digest of what was registered.
DIGEST_TAG = "deskroute.digest"
# Tag on a registered model whose challenger is on trial: "shadow", or "canary 10" for ten percent of the requests.
TRIAL_TAG, SHADOW = "deskroute.trial", "shadow"


@dataclass(frozen=True)
class Registered:
    """A version that an alias points to, downloaded and verified."""

    model: str
    version: str
    folder: Path


@dataclass(frozen=True)
class VersionFacts:
    """A registered version as `deskroute compare` shows it; created in milliseconds since 1970."""

    version: str
    run_id: str | None
    created: int
    metrics: dict[str, float]
    description: str


def read_lineup(reader: RegistryReader, personas: Sequence[str], state: Path, *, since_ms: int = 0) -> tuple[Lineup, str | None]:
    """What is in force, and a note where the registry could not be asked: then the lineup that was in force last, or what ships. Never raises.

    since_ms: when the server started; a lineup that it has written down since is what its other replicas have, whatever the registry says now.
    """
    last = Lineup.load(state)
    if since_ms and last and last.read_ms >= since_ms:
        return last, None
    try:
        return reader.lineup(personas), None
    except RegistryError as e:
        return last or Lineup(time.time_ns() // 1_000_000), f"{e.message}; serving " + (
            "the versions that were in force last" if last else "what ships"
        )


def model_name(persona: str) -> str:
    """The registered model of a persona."""
    return f"deskroute-{persona}"


def folder_digest(folder: Path) -> str:
    """sha256 over the names and contents of a folder's files."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(str(path.relative_to(folder)).encode() + b"\0")
        digest.update(path.read_bytes())
    return digest.hexdigest()


class RegistryReader:
    """Reads one registry. `cache` keeps downloaded versions by model and version."""

    def __init__(self, uri: str, cache: Path) -> None:
        self.uri, self.cache = uri, cache
        self._client: Any = None

    @property
    def empty(self) -> bool:
        """True for a local store that nobody has written to yet; costs no import."""
        return self.uri.startswith("sqlite:///") and not Path(self.uri.removeprefix("sqlite:///")).is_file()

    def fetch(self, model: str, alias: str = CHAMPION) -> Registered | None:
        """The version behind an alias as a local folder, or None where model or alias does not exist.

        Raises RegistryError when the registry cannot be reached, or when what it holds is not what was registered.
        """
        if self.empty:
            return None
        found = self._found(lambda client: client.get_model_version_by_alias(model, alias))
        return self.fetch_version(model, _pinned(found)) if found else None

    def fetch_version(self, model: str, pinned: Pinned) -> Registered:
        """A version as a local folder whose digest is that of what was registered. Asks the registry only for what is not in the cache.

        Raises RegistryError as `fetch` does.
        """
        folder = self.cache / model / pinned.version
        # A copy that differs was damaged, or is of a registry that has been made anew since: it is fetched again, once.
        for _ in range(2):
            if not folder.is_dir():
                self._download(model, pinned.version, folder)
            if pinned.digest is None or folder_digest(folder) == pinned.digest:
                return Registered(model, pinned.version, folder)
            shutil.rmtree(folder, ignore_errors=True)
        raise RegistryError(f"{model} version {pinned.version} is not what was registered (its digest differs); register it anew or roll back")

    def pin(self, model: str, version: str) -> Pinned | None:
        """A version with its digest; None where it does not exist."""
        found = None if self.empty else self._found(lambda client: client.get_model_version(model, version))
        return _pinned(found) if found else None

    def lineup(self, personas: Sequence[str]) -> Lineup:
        """What the registry says is in force now. Raises RegistryError when it cannot be reached."""
        read_ms = time.time_ns() // 1_000_000
        if self.empty:
            return Lineup(read_ms)
        champions, trials = {}, {}
        for persona in personas:
            facts = self._model(model_name(persona))
            if facts is None:
                continue
            if version := facts.aliases.get(CHAMPION):
                champions[persona] = self.pin(model_name(persona), str(version)) or Pinned(str(version))
            how, version = facts.tags.get(TRIAL_TAG, ""), facts.aliases.get(CHALLENGER)
            # A tag in no known form, set by hand, is no trial.
            canary = re.fullmatch(r"canary (\d+(?:\.\d+)?)", how)
            if version and (canary or how == SHADOW):
                pinned = self.pin(model_name(persona), str(version)) or Pinned(str(version))
                trials[persona] = Trial(pinned, min(1.0, float(canary[1]) / 100)) if canary else Trial(pinned, shadow=True)
        facts = self._model(ROUTER_MODEL)
        version = facts.aliases.get(CHAMPION) if facts else None
        router = (self.pin(ROUTER_MODEL, str(version)) if version else None) or Pinned()
        return Lineup(read_ms, champions, trials, router)

    def warm_up(self) -> None:
        """Import MLflow and open the registry, where there is one, so that the first reload need not."""
        if not self.empty:
            self._found(lambda client: client.get_registered_model(ROUTER_MODEL))

    def aliases(self, model: str) -> dict[str, str]:
        """Alias -> version of a registered model; empty where the model does not exist."""
        found = None if self.empty else self._model(model)
        return {k: str(v) for k, v in found.aliases.items()} if found else {}

    def description(self, model: str, version: str) -> str:
        """What was written about a version when it was registered. Raises RegistryError."""
        try:
            return str(self._open().get_model_version(model, version).description or "")
        except Exception as e:
            raise self._unreadable(e) from None

    def trial(self, model: str) -> str | None:
        """How the challenger of a model is on trial, "canary 10" or "shadow"; None where it is not."""
        found = None if self.empty else self._model(model)
        return str(found.tags.get(TRIAL_TAG) or "") or None if found else None

    def _model(self, model: str) -> Any:
        """The registered model, None where it does not exist."""
        return self._found(lambda client: client.get_registered_model(model))

    def _found(self, look: Callable[[Any], Any]) -> Any:
        """What a look into the registry finds, None where it is not there. Raises RegistryError."""
        from mlflow.exceptions import MlflowException

        try:
            return look(self._open())
        except MlflowException as e:
            # A missing alias is INVALID_PARAMETER_VALUE, a missing model or version RESOURCE_DOES_NOT_EXIST.
            if e.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise self._unreadable(e) from None
        except Exception as e:
            raise RegistryError(f"the registry at {self.uri} cannot be reached: {_first_line(e)}") from None

    def versions(self, model: str) -> dict[str, VersionFacts]:
        """Version -> what is known of it, newest first; empty where the model does not exist."""
        if self.empty:
            return {}
        client = self._open()
        try:
            found = client.search_model_versions(f"name = '{model}'")
            rows = {}
            for v in sorted(found, key=lambda v: -int(v.version)):
                metrics = dict(client.get_run(v.run_id).data.metrics) if v.run_id else {}
                rows[str(v.version)] = VersionFacts(str(v.version), v.run_id, int(v.creation_timestamp), metrics, v.description or "")
            return rows
        except Exception as e:
            raise self._unreadable(e) from None

    def experiment_id(self, name: str) -> str | None:
        """Id of an experiment, for links into the UI."""
        found = None if self.empty else self._open().get_experiment_by_name(name)
        return str(found.experiment_id) if found else None

    def _open(self) -> Any:
        if self._client is None:
            os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
            # MLflow's own patience, 7 retries of 120 s, would keep a server from starting for minutes while its registry is down.
            os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
            os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
            # An adapter is fetched in a blink.
            os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
            from mlflow import MlflowClient

            self._client = MlflowClient(self.uri, self.uri)
        return self._client

    def _unreadable(self, error: Exception) -> RegistryError:
        return RegistryError(f"the registry at {self.uri} cannot be read: {_first_line(error)}")

    def _download(self, model: str, version: str, folder: Path) -> None:
        import mlflow

        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
                uri = self._open().get_model_version_download_uri(model, version)
                got = Path(mlflow.artifacts.download_artifacts(uri, dst_path=scratch, tracking_uri=self.uri))
                # In a folder of this process alone: several replicas start at once, and the first to finish wins.
                ready = Path(scratch) / "ready"
                shutil.copytree(got, ready, ignore=shutil.ignore_patterns("MLmodel", "ready"))
                try:
                    ready.rename(folder)
                except OSError:
                    if not folder.is_dir():
                        raise
        except Exception as e:
            raise RegistryError(f"{model} version {version} cannot be fetched from {self.uri}: {_first_line(e)}") from None


def _pinned(version: Any) -> Pinned:
    return Pinned(str(version.version), version.tags.get(DIGEST_TAG))


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
