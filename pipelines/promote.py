"""Gates as data -> a verdict; and the commands that move aliases and have the server follow. Knows nothing of training."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from persona_models.deployment import NO_ADAPTER
from persona_models.errors import ConfigError, DeskrouteError, InputError, WorkError
from persona_models.protocol import BUILTIN
from persona_models.registry import CHALLENGER, CHAMPION, PREVIOUS, ROUTER_MODEL, SHADOW, RegistryReader, model_name
from pipelines.endpoint import Endpoint, Reply
from pipelines.tracking import Tracker
from router.config import Config, Section
from router.feedback import VersionResults, open_for_reading

# How the description of a version that failed a gate begins, and the tag with the reason of one that was promoted all the same.
FAILED = "Failed gates: "
FORCED_TAG = "deskroute.forced"
GATES_FILE = Path(__file__).parent.parent / "mlflow" / "promotion.yaml"


class Gate(Section):
    """One bound on one metric; see mlflow/promotion.yaml."""

    metric: str
    slice: Literal["register", "tenure", "length"] | None = None
    against: Literal["base", "champion"] | None = None
    at_most: float | None = None
    at_least: float | None = None

    @model_validator(mode="after")
    def _one_bound(self) -> Self:
        if (self.at_most is None) == (self.at_least is None):
            raise ValueError(f"the gate on {self.metric} needs exactly one of at_most and at_least")
        if self.slice and self.metric != "eval/loss":
            raise ValueError(f"the gate on {self.metric} has a slice, and only eval/loss is measured by kind of request")
        return self

    def fault(self, metrics: Mapping[str, float], rivals: Mapping[str, Mapping[str, float]]) -> str | None:
        """Why the gate is shut, or None where it is open. One by slice is shut where it is for any kind of request that was measured."""
        if self.slice:
            kinds = sorted(m for m in metrics if m.startswith(f"slice/{self.slice}_"))
            return "; ".join(f for f in (self._fault(m, metrics, rivals) for m in kinds) if f) or None
        return self._fault(self.metric, metrics, rivals)

    def _fault(self, metric: str, metrics: Mapping[str, float], rivals: Mapping[str, Mapping[str, float]]) -> str | None:
        if metric not in metrics:
            return f"{metric} was not measured"
        value, shown = metrics[metric], metric
        if self.against:
            other = rivals.get(self.against, {}).get(metric)
            if other is None:
                return None
            value, shown = value / other if other else float("inf"), f"{metric} / {self.against}'s"
        if self.at_most is not None and not value <= self.at_most:
            return f"{shown} is {value:.4g}, may be at most {self.at_most:g}"
        if self.at_least is not None and not value >= self.at_least:
            return f"{shown} is {value:.4g}, must be at least {self.at_least:g}"
        return None


class TrialRule(Section):
    """What a canary must show to be promoted; see mlflow/promotion.yaml."""

    min_answers: int = Field(20, ge=1)
    max_more_disliked: float = Field(0.05, ge=0, le=1)
    max_fewer_ended: float = Field(0.05, ge=0, le=1)

    def fault(self, champion: VersionResults, challenger: VersionResults) -> str | None:
        """Why the challenger is withdrawn, or None where it has proved itself."""
        if challenger.answers < self.min_answers:
            return f"it has given {challenger.answers} answers, needs {self.min_answers}"

        def share(of: VersionResults, n: int) -> float:
            return n / max(1, of.answers)

        more = share(challenger, challenger.down) - share(champion, champion.down)
        if more > self.max_more_disliked:
            return f"{share(challenger, challenger.down):.0%} of its answers are disliked, the champion's {share(champion, champion.down):.0%}"
        fewer = share(champion, champion.ended) - share(challenger, challenger.ended)
        if champion.answers and fewer > self.max_fewer_ended:
            return f"{share(challenger, challenger.ended):.0%} of its answers end by themselves, the champion's {share(champion, champion.ended):.0%}"
        return None


class Gates(Section):
    persona: tuple[Gate, ...] = Field((), description="for the five persona models")
    router: tuple[Gate, ...] = Field((), description="for the router")
    trial: TrialRule = Field(default_factory=lambda: TrialRule(), description="for a canary whose time is over")


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


def verdict_on(failed: list[str]) -> str:
    """What a version's description says of its gates."""
    return FAILED + "; ".join(failed) if failed else "Passed every gate."


def check_export(out: Path, names: list[str]) -> None:
    """Refuse to replace a folder that holds no artefact. Raises InputError."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"--export: {out} cannot be made ({e.strerror}); give a folder that can be written to") from None
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


@dataclass(frozen=True)
class Moved:
    """What a command did to a model's versions. `before` and `now` are registry versions or "builtin"; reply is None where no server runs."""

    name: str
    what: str
    before: str
    now: str
    reply: Reply | None

    @property
    def live(self) -> str:
        """Where it is live, in words; empty where no server runs."""
        return f"live on {self.reply.acknowledged(self.name)} at {self.reply.url}" if self.reply else ""

    def __str__(self) -> str:
        if self.reply is None:
            return f"{self.what}; no server runs on this state folder, and `deskroute serve` uses it from its next start (--server URL names one elsewhere)"
        return f"{self.what}; {self.live}"


class Promoter:
    """Moves aliases and has the running server follow. Where a replica cannot, the aliases are put back."""

    def __init__(self, config: Config, server: str | None = None) -> None:
        self.config = config
        self.reader = RegistryReader(config.registry_uri, config.state / "cache")
        self.tracker = Tracker(config.registry_uri, config.state / "artifacts")
        self.endpoint = Endpoint.find(config, server)

    def promote(self, name: str, version: str, *, forced: str | None = None) -> Moved:
        """Make a version the champion. Raises InputError for one that does not exist or failed its gates, RegistryError for one that was tampered with."""
        model = registered_model(self.config, name)
        self._check(name, model, version, forced)
        before = self.reader.aliases(model).get(CHAMPION)
        with self._put_back(model):
            self.tracker.end_trial(model)
            self.tracker.promote(model, version, before)
            reply = self._follow(name, version)
        if forced:
            self.tracker.tag_version(model, version, FORCED_TAG, forced)
        return Moved(name, f"{name}: version {version} is champion (before: {before or BUILTIN})", before or BUILTIN, version, reply)

    def begin_trial(self, name: str, version: str, how: str, *, forced: str | None = None) -> Moved:
        """Put a version on trial as challenger: how is "shadow", or "canary 10" for ten percent of the persona's requests."""
        model = registered_model(self.config, name)
        if name == "router":
            raise InputError("a trial is of a persona's version; the router is promoted whole, and rolled back in seconds")
        self._check(name, model, version, forced)
        champion = self.reader.aliases(model).get(CHAMPION)
        if champion == version:
            raise InputError(f"{name}: version {version} is the champion already; put another one on trial")
        with self._put_back(model):
            self.tracker.begin_trial(model, version, how)
            reply = self._follow(name, champion or BUILTIN, trial=version)
        if forced:
            self.tracker.tag_version(model, version, FORCED_TAG, forced)
        share = "the shadow" if how == SHADOW else f"{how.removeprefix('canary ')} % of the requests"
        return Moved(name, f"{name}: version {version} is on trial with {share}", champion or BUILTIN, champion or BUILTIN, reply)

    def end_canary(self, name: str, version: str, rule: TrialRule, *, forced: str | None = None) -> tuple[Moved, str]:
        """Promote a canary that has proved itself, withdraw it otherwise; with the reason in words."""
        store = open_for_reading(self.config.feedback_url)
        results = store.results(name, beside=version) if store else {}
        champion = self.reader.aliases(registered_model(self.config, name)).get(CHAMPION, BUILTIN)
        ours, theirs = (results.get(v, VersionResults(v)) for v in (version, champion))
        fault = rule.fault(theirs, ours)
        moved = self.roll_back(name) if fault else self.promote(name, version, forced=forced)
        return moved, f"{ours}\n{theirs}\n" + (f"withdrawn: {fault}" if fault else "promoted: it did as well as the champion")

    def roll_back(self, name: str) -> Moved:
        """End a trial, else go back to the champion before. Raises InputError where there is nothing to take back."""
        model = registered_model(self.config, name)
        aliases = self.reader.aliases(model)
        champion, previous = aliases.get(CHAMPION), aliases.get(PREVIOUS)
        if self.reader.trial(model):
            with self._put_back(model):
                self.tracker.end_trial(model)
                reply = self._follow(name, champion or BUILTIN)
            what = f"{name}: the trial of version {aliases.get(CHALLENGER)} is over, {champion or BUILTIN} answers alone"
            return Moved(name, what, champion or BUILTIN, champion or BUILTIN, reply)
        if not champion:
            raise InputError(f"{model} has no champion to roll back from; the one that ships is in force")
        with self._put_back(model):
            self.tracker.roll_back(model, champion, previous)
            reply = self._follow(name, previous or BUILTIN)
        return Moved(name, f"{name}: version {champion} is withdrawn, {previous or BUILTIN} is in force", champion, previous or BUILTIN, reply)

    def _check(self, name: str, model: str, version: str, forced: str | None) -> None:
        pinned = self.reader.pin(model, version) if version.isdigit() else None
        if pinned is None:
            known = self.reader.versions(model)
            raise InputError(f"{model} has no version {version}; it has {', '.join(known) or f'none yet: run `deskroute retrain {name}`'}")
        description = self.reader.description(model, version)
        if description.startswith(FAILED) and not forced:
            verdict = description.splitlines()[0]
            raise InputError(f"{name}: version {version} {verdict[0].lower()}{verdict[1:]}. Have it all the same with --force REASON")
        # Downloaded and compared with what was registered before anything is moved.
        self.reader.fetch_version(model, pinned)

    def _follow(self, name: str, version: str, trial: str | None = None) -> Reply | None:
        """Have the server take up the registry's state; raises WorkError where it stays on another version than `version`."""
        if self.endpoint is None:
            return None
        reply = self.endpoint.reload()
        fault = reply.faults.get(name)
        if trial and reply.trials.get(name, {}).get("version") != trial:
            raise WorkError(f"{name}: version {trial} cannot be tried: {fault or 'the server did not take it up'}")
        missing = [str(r["replica"]) for r in reply.replicas if name in r["versions"] and r["versions"][name] not in (version, NO_ADAPTER)]
        if reply.version_of(name) != version or missing:
            raise WorkError(f"{name}: version {version} is not live: {fault or 'not acknowledged by ' + ', '.join(missing or [reply.url])}")
        return reply

    @contextlib.contextmanager
    def _put_back(self, model: str) -> Iterator[None]:
        """On any failure the model's aliases and trial are what they were, in the registry and in the server."""
        aliases, trial = self.reader.aliases(model), self.reader.trial(model)
        try:
            yield
        except BaseException as e:
            self.tracker.restore(model, aliases, trial)
            after = "the aliases are as they were"
            if self.endpoint:
                try:
                    self.endpoint.reload()
                except DeskrouteError as again:
                    after += f" ({again.message})"
            if isinstance(e, DeskrouteError):
                raise type(e)(f"{e.message}; {after}") from None
            raise
