"""Gates as data -> a verdict; and the two commands that move aliases by hand. Knows nothing of training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from persona_models.errors import ConfigError, InputError
from persona_models.registry import CHAMPION, PREVIOUS, ROUTER_MODEL, RegistryReader, model_name
from pipelines.tracking import Tracker
from router.config import Config, Section

GATES_FILE = Path(__file__).parent.parent / "mlflow" / "promotion.yaml"


class Gate(Section):
    """One bound on one metric; see mlflow/promotion.yaml."""

    metric: str
    against: Literal["base", "champion"] | None = None
    at_most: float | None = None
    at_least: float | None = None

    @model_validator(mode="after")
    def _one_bound(self) -> Self:
        if (self.at_most is None) == (self.at_least is None):
            raise ValueError(f"the gate on {self.metric} needs exactly one of at_most and at_least")
        return self

    def fault(self, metrics: Mapping[str, float], rivals: Mapping[str, Mapping[str, float]]) -> str | None:
        """Why the gate is shut, or None where it is open."""
        if self.metric not in metrics:
            return f"{self.metric} was not measured"
        value, shown = metrics[self.metric], self.metric
        if self.against:
            other = rivals.get(self.against, {}).get(self.metric)
            if other is None:
                return None
            value, shown = value / other if other else float("inf"), f"{self.metric} / {self.against}'s"
        if self.at_most is not None and not value <= self.at_most:
            return f"{shown} is {value:.4g}, may be at most {self.at_most:g}"
        if self.at_least is not None and not value >= self.at_least:
            return f"{shown} is {value:.4g}, must be at least {self.at_least:g}"
        return None


class Gates(Section):
    persona: tuple[Gate, ...] = Field((), description="for the five persona models")
    router: tuple[Gate, ...] = Field((), description="for the router")


def read_gates(path: Path | None = None) -> Gates:
    """Read the gates file. Raises ConfigError that names file, key and fault."""
    path = path or GATES_FILE
    try:
        return Gates.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")) or {})
    except OSError as e:
        raise ConfigError(f"{path}: cannot be read ({e.strerror}); give a gates file with --gates") from None
    except yaml.YAMLError as e:
        raise ConfigError(f"{path}: is not valid YAML: {str(e).splitlines()[0]}") from None
    except ValidationError as e:
        fault = e.errors()[0]
        raise ConfigError(f"{path}: {'.'.join(map(str, fault['loc']))}: {fault['msg'].removeprefix('Value error, ')}") from None


def faults(gates: tuple[Gate, ...], metrics: Mapping[str, float], rivals: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The reasons why a version may not be promoted; none: it may."""
    return [f for f in (gate.fault(metrics, rivals) for gate in gates) if f]


def check_export(out: Path, names: list[str]) -> None:
    """Refuse to replace a folder that holds no artefact. Raises InputError."""
    for name in [*names, "router"]:
        folder = out / name
        known = {"adapter_config.json", "manifest.json"}
        if folder.exists() and not (folder.is_dir() and (known & {p.name for p in folder.iterdir()} or not any(folder.iterdir()))):
            raise InputError(f"--export: {folder} holds something else than an artefact and would be replaced; give another folder")


def registered_model(config: Config, name: str) -> str:
    """`PERSONA|router` -> registered model. Raises InputError for another name."""
    known = [p.id for p in config.catalogue()]
    if name == "router":
        return ROUTER_MODEL
    if name not in known:
        raise InputError(f"{name!r} is neither router nor a persona; known are {', '.join(known)}")
    return model_name(name)


def promote(config: Config, name: str, version: str) -> str:
    """Move `champion` to a version. Returns the champion until now, or "builtin". Raises InputError for a version that does not exist."""
    model = registered_model(config, name)
    reader = RegistryReader(config.registry_uri, config.state / "cache")
    versions = reader.versions(model)
    if version not in versions:
        raise InputError(f"{model} has no version {version}; it has {', '.join(versions) or 'none yet: run `deskroute retrain ' + name + '`'}")
    champion = reader.aliases(model).get(CHAMPION)
    Tracker(config.registry_uri, config.state / "artifacts").promote(model, version, champion)
    return champion or "builtin"


def roll_back(config: Config, name: str) -> tuple[str, str]:
    """Back to the champion before. Returns (version withdrawn, version in force now). Raises InputError where there is nothing to roll back."""
    model = registered_model(config, name)
    aliases = RegistryReader(config.registry_uri, config.state / "cache").aliases(model)
    champion, previous = aliases.get(CHAMPION), aliases.get(PREVIOUS)
    if not champion:
        raise InputError(f"{model} has no champion to roll back from; the one that ships is in force")
    Tracker(config.registry_uri, config.state / "artifacts").roll_back(model, champion, previous)
    return champion, previous or "builtin"
