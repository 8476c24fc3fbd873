"""The only reader of MLflow: alias -> version -> a verified local folder.

Serving reads aliases only. A registry that is empty, down or holds something broken never takes serving down: the caller gets a note and uses what ships.
MLflow is imported only when there is a registry to read, since that import takes seconds.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from persona_models.errors import RegistryError

CHAMPION, CHALLENGER, PREVIOUS = "champion", "challenger", "previous"
ROUTER_MODEL = "deskroute-router"
# Tag on a registered version: folder_digest of what was registered.
DIGEST_TAG = "deskroute.digest"


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
        found = self._version(model, alias)
        if found is None:
            return None
        folder = self.cache / model / str(found.version)
        digest = found.tags.get(DIGEST_TAG)
        if not folder.is_dir():
            self._download(model, str(found.version), folder)
        if digest and folder_digest(folder) != digest:
            shutil.rmtree(folder, ignore_errors=True)
            raise RegistryError(f"{model} version {found.version} is not what was registered (its digest differs); register it anew or roll back")
        return Registered(model, str(found.version), folder)

    def aliases(self, model: str) -> dict[str, str]:
        """Alias -> version of a registered model; empty where the model does not exist."""
        from mlflow.exceptions import MlflowException

        if self.empty:
            return {}
        try:
            return {k: str(v) for k, v in self._open().get_registered_model(model).aliases.items()}
        except MlflowException as e:
            if e.error_code == "RESOURCE_DOES_NOT_EXIST":
                return {}
            raise RegistryError(f"the registry at {self.uri} cannot be read: {_first_line(e)}") from None

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
            raise RegistryError(f"the registry at {self.uri} cannot be read: {_first_line(e)}") from None

    def experiment_id(self, name: str) -> str | None:
        """Id of an experiment, for links into the UI."""
        found = None if self.empty else self._open().get_experiment_by_name(name)
        return str(found.experiment_id) if found else None

    def _open(self) -> Any:
        if self._client is None:
            os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
            from mlflow import MlflowClient

            self._client = MlflowClient(self.uri, self.uri)
        return self._client

    def _version(self, model: str, alias: str) -> Any:
        from mlflow.exceptions import MlflowException

        try:
            return self._open().get_model_version_by_alias(model, alias)
        except MlflowException as e:
            # A missing alias is INVALID_PARAMETER_VALUE, a missing model RESOURCE_DOES_NOT_EXIST.
            if e.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise RegistryError(f"the registry at {self.uri} cannot be read: {_first_line(e)}") from None
        except Exception as e:
            raise RegistryError(f"the registry at {self.uri} cannot be reached: {_first_line(e)}") from None

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


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
