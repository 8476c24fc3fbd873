"""deskroute.yaml -> one frozen object. Every key is optional; an unknown one is an error that names the file, the key and the nearest known key.

Environment variables carry only addresses and secrets and are read here, once: DESKROUTE_HOME, DESKROUTE_API_KEYS, DESKROUTE_REPORT_URL,
MLFLOW_TRACKING_URI.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from persona_models.errors import ConfigError
from persona_models.personas import Persona, read_personas
from persona_models.protocol import BASE, BUILTIN
from router.policy import PolicySettings

DEFAULT_FILE = Path("deskroute.yaml")
NO_REPEAT = 12


class Section(BaseModel):
    """Base of every section: frozen, unknown keys refused, defaults checked too."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class Knowledge(Section):
    """Which articles answers come from."""

    folder: Path | None = Field(None, description="a company's own Markdown articles")
    builtin: bool = Field(True, description="keep the built-in articles beside them")


class Router(Section):
    """Which router decides, and what a retraining gives it."""

    artefact: str = Field(BUILTIN, description="builtin (the registry's champion, else the one that ships), or the folder of a router artefact")
    encoder: str | None = Field(
        None,
        description="a sentence encoder beside the words, for `deskroute retrain router` and for serving what it made: a folder or a Hugging Face id",
    )


class Desk(Section):
    """How people reach the human service desk; replaces the built-in article's names of the same kind."""

    phone: str | None = None
    mail: str | None = None
    portal: str | None = None
    names: dict[str, str] = Field(default_factory=dict, description="values of further {slots} in articles, for example vpn_client: GlobalConnect")

    def values(self) -> dict[str, str]:
        """Slot name -> value, as articles use them."""
        given = {"desk_phone": self.phone, "desk_mail": self.mail, "desk_portal": self.portal}
        return self.names | {k: v for k, v in given.items() if v}


class Pool(Section):
    """Replicas that hold the base and the adapters of some personas."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_-]{0,30}$")
    personas: Literal["all"] | tuple[str, ...] = "all"
    replicas: int = Field(1, ge=1, le=64)
    gpus: Literal["auto"] | float = Field("auto", description="GPUs per replica; auto: one if Ray sees any, else none")
    cpus: float = Field(1, ge=0, description="CPUs that Ray reserves per replica")
    threads: int | None = Field(None, ge=1, description="torch threads per replica on a CPU; None: the machine's cores shared by the replicas")
    rows: int = Field(16, ge=1, le=512, description="requests in one batch")
    queue: int = Field(64, ge=0, le=10_000, description="requests that may wait for a row; further ones get 503")
    merge: bool = Field(False, description="a pool of one persona: its adapter is added to the base's weights, and costs nothing per token")

    @field_validator("gpus")
    @classmethod
    def _not_negative(cls, value: Literal["auto"] | float) -> Literal["auto"] | float:
        if value != "auto" and value < 0:
            raise ValueError("must be auto or a number from 0")
        return value


class Http(Section):
    """The endpoint."""

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=1, le=65535)
    max_body_bytes: int = Field(1_000_000, ge=1000)
    replicas: int = Field(
        1,
        ge=1,
        le=16,
        description="copies of the front door; each remembers only its own answers, so with several a rating may lack its text",
    )


class Generation(Section):
    """Defaults where a request does not say."""

    max_tokens: int = Field(512, ge=1)
    temperature: float = Field(0.0, ge=0, le=2)
    no_repeat: int | None = Field(
        None,
        ge=0,
        le=1000,
        description="a run of so many tokens does not come twice in an answer; 0: no such rule; None: 12 for the built-in base, else 0",
    )
    prefix_cache_mb: int = Field(
        256, ge=0, description="memory of a replica for prompts already read, so that what begins alike is read once; 0: none"
    )
    lookup: bool = Field(
        True,
        description="try several tokens a step where an answer repeats its prompt, its persona's training or other answers, of which the last 32,768 "
        "tokens are kept in memory; false: none are kept. What an answer says stays the same, up to rounding",
    )
    engine: Literal["model", "fake"] = Field("model", description="fake: a deterministic stand-in without weights, for trying clients")


class Feedback(Section):
    """What is kept of requests and ratings."""

    url: str | None = Field(None, description="SQLAlchemy URL; None: feedback.db in the state folder")
    keep_text: Literal["rated", "never"] = Field("rated", description="rated: the text of a request is stored only with a rating of it")
    remember: int = Field(10_000, ge=0, description="recent requests whose text waits in memory for a rating")


class Registry(Section):
    """Where models are registered."""

    uri: str | None = Field(None, description="MLflow tracking URI; None: MLFLOW_TRACKING_URI, else mlflow.db in the state folder")


class Training(Section):
    """Fine-tuning of one persona; `deskroute retrain` flags override these."""

    method: str = Field("lora", description="a PEFT method by name; what it learns is served as LoRA factors")
    rank: int = Field(16, ge=1, le=256)
    alpha: int = Field(32, ge=1)
    target_modules: Literal["residual", "all-linear"] | tuple[str, ...] = Field(
        "residual", description="residual: the projections back into the residual stream, at half of all-linear's cost per token"
    )
    lr: float = Field(4e-3, gt=0)
    steps: int = Field(120, ge=1, description="optimizer steps on the built-in corpus; on tickets `epochs` counts")
    epochs: float = Field(2, gt=0)
    patience: int = Field(3, ge=0, description="on tickets: looks, every 20 steps, without a better loss before training stops; 0 never stops early")
    rows: int = Field(8, ge=1, description="examples per step")
    max_tokens: int = Field(1024, ge=32, description="longer examples are cut")
    seed: int = 11


class Nightly(Section):
    """`deskroute nightly`; its flags override these."""

    tickets: Path | None = Field(None, description="the export to learn from; None: the built-in corpus")
    prompts: Path | None = Field(
        None, description="labelled prompts for the router, beside the corpus or, with a catalogue of your own, instead of it"
    )
    map: str | None = Field(None, description="which columns carry what: servicenow, jira, zendesk, or a YAML file")
    encoding: str | None = Field(None, description="of the export, where it is not UTF-8")
    region: str | None = Field(None, description="country of phone numbers without a country code, for example DE")
    report_url: str | None = Field(
        None, repr=False, description="where the report is posted; set by DESKROUTE_REPORT_URL, since such addresses often are secrets"
    )


class Config(Section):
    """Everything, with defaults that run on a laptop."""

    base: str = Field(BUILTIN, description="builtin, a folder, or a Hugging Face id of any causal language model")
    dtype: str = "auto"
    personas: Path | None = Field(None, description="a personas.yaml of your own")
    corpus: Path | None = Field(None, description="a corpus of your own, in the form of pipelines/corpus; training learns from it")
    router: Router = Router()
    knowledge: Knowledge = Knowledge()
    desk: Desk = Desk()
    policy: PolicySettings = PolicySettings()
    fallback: str | None = Field(
        None, description="who answers when no persona can be told: base or a persona; None: admin where there is one, else base"
    )
    pools: tuple[Pool, ...] = (Pool(name="personas"),)
    http: Http = Http()
    generation: Generation = Generation()
    feedback: Feedback = Feedback()
    registry: Registry = Registry()
    training: Training = Training()
    nightly: Nightly = Nightly()
    state: Path = Field(Path(".deskroute"), description="state folder; DESKROUTE_HOME overrides it")
    api_keys: tuple[str, ...] = Field(
        (), repr=False, description="set by DESKROUTE_API_KEYS (comma-separated), not in the file; empty: no key is needed"
    )

    @field_validator("knowledge", mode="before")
    @classmethod
    def _folder_alone(cls, value: Any) -> Any:
        return {"folder": value} if isinstance(value, str) else value

    @field_validator("router", mode="before")
    @classmethod
    def _artefact_alone(cls, value: Any) -> Any:
        return {"artefact": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _pools_fit(self) -> Self:
        known = tuple(p.id for p in self.catalogue())
        names = [p.name for p in self.pools]
        if len(set(names)) != len(names):
            raise ValueError(f"pools: the name {max(names, key=names.count)!r} occurs twice")
        for pool in self.pools:
            for persona in () if pool.personas == "all" else pool.personas:
                if persona not in known:
                    raise ValueError(f"pools: {pool.name} names the persona {persona!r}; known are {', '.join(known)}")
            if pool.merge and len(self.personas_of(pool)) != 1:
                raise ValueError(f"pools: {pool.name} has merge: true, which takes one persona; give it a list of one")
        if all(pool.merge for pool in self.pools):
            raise ValueError("pools: every pool has merge: true, and none could answer as the base; leave one without it")
        served = {p for pool in self.pools for p in self.personas_of(pool)}
        if missing := [p for p in known if p not in served]:
            raise ValueError(f"pools: no pool serves {', '.join(missing)}; add them to a pool, or use `personas: all`")
        if self.fallback not in (None, BASE, *known):
            raise ValueError(f"fallback: {self.fallback!r} is neither base nor a persona; known are {', '.join(known)}")
        return self

    def catalogue(self) -> tuple[Persona, ...]:
        """The personas, in order."""
        return read_personas(self.personas)

    def personas_of(self, pool: Pool) -> tuple[str, ...]:
        """The persona ids a pool serves, in catalogue order."""
        return tuple(p.id for p in self.catalogue() if pool.personas == "all" or p.id in pool.personas)

    @property
    def fallback_model(self) -> str:
        """Who answers when no persona can be told: a persona id or "base". The plainest manner suits somebody unknown best."""
        return self.fallback or ("admin" if any(p.id == "admin" for p in self.catalogue()) else BASE)

    @property
    def no_repeat(self) -> int:
        """Tokens of a run that must not come twice in an answer; 0: no such rule. The built-in base is small enough to begin a step anew."""
        given = self.generation.no_repeat
        return (NO_REPEAT if self.base == BUILTIN else 0) if given is None else given

    @property
    def registry_uri(self) -> str:
        """The MLflow tracking URI in force."""
        return self.registry.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(self.state / 'mlflow.db').absolute()}"

    @property
    def feedback_url(self) -> str:
        return self.feedback.url or f"sqlite:///{(self.state / 'feedback.db').absolute()}"


def load_config(path: Path | None = None, **overrides: Any) -> Config:
    """Read a configuration.

    path: None takes ./deskroute.yaml if it is there, else the defaults. Overrides are dotted keys with double underscores, for example http__port=9000;
    None values are ignored. Raises ConfigError that names file, key, value and the way out.
    """
    source = path or DEFAULT_FILE
    raw: dict[str, Any] = {}
    if path is not None or source.is_file():
        raw = _read(source)
    where = str(source) if raw or path else "defaults"
    if "api_keys" in raw:
        raise ConfigError(f"{where}: api_keys is a secret and does not belong in a file; set DESKROUTE_API_KEYS=key1,key2 in the environment")
    # Paths in the file are meant relative to the file, wherever the command is run.
    _anchor(raw, source.parent)
    if keys := os.environ.get("DESKROUTE_API_KEYS"):
        raw["api_keys"] = tuple(k.strip() for k in keys.split(",") if k.strip())
    if home := os.environ.get("DESKROUTE_HOME"):
        raw["state"] = home
    if url := os.environ.get("DESKROUTE_REPORT_URL"):
        overrides["nightly__report_url"] = url
    for dotted, value in overrides.items():
        if value is None:
            continue
        *parents, leaf = dotted.split("__")
        at = raw
        for key in parents:
            # A section left empty in the file reads as None.
            at[key] = at.get(key) or {}
            at = at[key]
        at[leaf] = value
    raw = {k: v for k, v in raw.items() if v is not None}
    try:
        config = Config.model_validate(raw)
    except ValidationError as e:
        raise ConfigError("\n".join(_say(where, err) for err in e.errors())) from None
    return config.model_copy(update={"state": config.state.absolute()})


def _read(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as e:
        raise ConfigError(f"{path}: cannot be read ({e.strerror}); give another file with --config, or none for the defaults") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8 text; save it as UTF-8") from None
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}:{line} is not valid YAML ({getattr(e, 'problem', e)})") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: must be 'key: value' lines, not {type(raw).__name__}")
    return raw


def _anchor(raw: dict[str, Any], folder: Path) -> None:
    for key in ("personas", "state", "knowledge", "corpus"):
        if isinstance(raw.get(key), str):
            raw[key] = str(folder / raw[key])
    for section, key in (("knowledge", "folder"), ("nightly", "tickets"), ("nightly", "prompts")):
        if isinstance(raw.get(section), dict) and isinstance(raw[section].get(key), str):
            raw[section][key] = str(folder / raw[section][key])
    router = raw["router"] if isinstance(raw.get("router"), dict) else {}
    for at, key in ((raw, "base"), (raw, "router"), (router, "artefact"), (router, "encoder")):
        value = at.get(key)
        if isinstance(value, str) and value.startswith(("./", "../")):
            at[key] = str(folder / value)


def _say(where: str, error: Any) -> str:
    key = ".".join(str(p) for p in error["loc"] if p not in ("tuple[str, ...]", "float", "literal['all']", "literal['auto']"))
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(error["loc"][-1]), _keys_at(error["loc"][:-1]), n=1, cutoff=0.6)
        return f"{where}: unknown key {key!r}" + (
            f"; did you mean {near[0]!r}?" if near else f"; known here: {', '.join(_keys_at(error['loc'][:-1]))}"
        )
    message = error["msg"].removeprefix("Value error, ")
    if not key:
        return f"{where}: {message}"
    shown = repr(error.get("input"))
    return f"{where}: {key} is {shown[:80]}: {message[0].lower() + message[1:]}"


def _keys_at(loc: tuple[Any, ...]) -> list[str]:
    model: Any = Config
    for part in loc:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        if part == "pools":
            annotation = Pool
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return [k for k in model.model_fields if k != "api_keys"]
