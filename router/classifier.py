"""Query -> calibrated persona probabilities, how sure it is a helpdesk request, and the words that decided.

Two linear models share one feature space: a softmax over the personas, its temperature fitted on scores the model gave to prompts it had not seen,
and a logistic model for "is this an IT helpdesk request at all". The artefact is plain arrays; fitting lives in pipelines/train_router.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from safetensors.numpy import save

from persona_models.encoder import SentenceEncoder, load_encoder
from persona_models.errors import ConfigError
from router.artefact import digest, read_arrays
from router.features import FeatureSpace
from router.query import Query

if TYPE_CHECKING:
    from router.follow_up import FollowUps

FILE = "classifier.safetensors"
FORMAT = 2
MAX_REASONS = 5
# What a profile counts as a text that tells, in log-odds.
PROFILE_TELLS = 3.0
# Contributions below this, in log-odds, decide nothing and would read as noise.
MIN_REASON = 0.05


class Splitter(Protocol):
    """What tells the matters of a message apart, see matters.Matters."""

    def split(self, knowledge: Any, segmenter: Any, text: str) -> list[str]:
        """The matters in a message, in order; none where it holds one."""
        ...


@dataclass(frozen=True)
class Reason:
    """A feature that spoke for a persona, or against it (weight below 0); weight is its share of the score in log-odds against the mean over personas."""

    feature: str
    persona: str
    weight: float


@dataclass(frozen=True)
class Scores:
    """One query's scores. `personas` is in catalogue order and sums to 1; a query with in_domain below min_in_domain is no helpdesk request.

    known: how likely it is that text or profile give the sender away at all; below min_known the personas' scores are a guess.
    """

    personas: dict[str, float]
    in_domain: float
    reasons: tuple[Reason, ...] = ()
    min_in_domain: float = 0.5
    known: float = 1.0
    min_known: float = 0.0


@dataclass(frozen=True)
class Tells:
    """A linear model of whether a text gives its sender away, weights (F,); with the leading persona's log-odds it makes a probability:
    sigmoid(lead * log-odds + own * score + shift). Below `least` nobody is picked."""

    weights: np.ndarray
    bias: float
    lead: float
    own: float
    shift: float
    least: float

    def known(self, leading: np.ndarray, score: np.ndarray) -> np.ndarray:
        """leading: probability of the leading persona (N,); score: of the linear model (N,)."""
        p = np.clip(leading, 1e-6, 1 - 1e-6)
        return sigmoid(self.lead * np.log(p / (1 - p)) + self.own * score + self.shift)


@dataclass(frozen=True)
class _Turn:
    """One turn's features and what they say; weight: its part in the conversation's scores."""

    query: Query
    columns: np.ndarray
    values: np.ndarray
    personas: np.ndarray  # (P,)
    known: float
    weight: float = 1.0


def _mixed(turns: Sequence[_Turn]) -> np.ndarray:
    """Persona probabilities (P,) of a conversation."""
    mixed: np.ndarray = sum((turn.weight * turn.personas for turn in turns), np.zeros(len(turns[0].personas)))
    return mixed


class PersonaClassifier:
    """The router's scorer."""

    def __init__(
        self,
        space: FeatureSpace,
        personas: Sequence[str],
        weights: np.ndarray,
        bias: np.ndarray,
        temperature: float,
        min_in_domain: float,
        version: str = "unsaved",
        *,
        trust: float = 2.0,
        segments: Mapping[str, Any] | None = None,
        tells: Tells | None = None,
    ) -> None:
        """weights: (F, P + 1), bias: (P + 1,); the last column is the in-domain model, its own calibration already multiplied in.

        tells: without it every sender counts as known, and only the last turn counts; trust: a turn's part in a conversation is how likely it tells,
        to this power; segments: the numbers of router/segment.py, if it was fitted.
        """
        if weights.shape != (len(space), len(personas) + 1) or bias.shape != (len(personas) + 1,):
            raise ConfigError(f"router: weights {weights.shape} and bias {bias.shape} do not fit {len(space)} features and {len(personas)} personas")
        if not (np.isfinite(weights).all() and np.isfinite(bias).all()) or not temperature > 0:
            raise ConfigError("router: the classifier's numbers are not finite or its temperature is not above 0; run `deskroute retrain router`")
        self.space = space
        self.personas = tuple(personas)
        self.weights = np.ascontiguousarray(weights, dtype=np.float32)
        self.bias = np.asarray(bias, dtype=np.float32)
        self.temperature = float(temperature)
        self.min_in_domain = float(min_in_domain)
        self.version = version
        self.trust = float(trust)
        self.segments = segments
        self.tells = tells
        # Set by whoever loads the whole artefact.
        self.follow_ups: FollowUps | None = None
        self.matters: Splitter | None = None

    def score(self, queries: Sequence[Query]) -> list[Scores]:
        """Score queries, each by itself; about a third of a millisecond a query."""
        return [self._score(query) for query in queries]

    def probabilities(self, queries: Sequence[Query]) -> tuple[np.ndarray, np.ndarray]:
        """Persona probabilities (N, P) and in-domain probabilities (N,), without reasons."""
        if not queries:
            return np.zeros((0, len(self.personas))), np.zeros(0)
        read = [self._read(query) for query in queries]
        return np.stack([_mixed(turns) for turns, _ in read]), np.array([inside for _, inside in read])

    def _read(self, query: Query) -> tuple[list[_Turn], float]:
        """What each turn that is looked at says, the latest first, and how likely the query is a helpdesk request.

        A conversation's turns are looked at one by one: a later one counts as far as it tells who is writing, and leaves the rest to those before it.
        Whether it is a request is a matter of the last turn, with earlier ones where that says too little.
        """
        if not query.turns or not self.tells:
            turn, inside = self._turn(Query(query.text, query.profile))
            return [turn], inside
        turns = [self._turn(Query(text, query.profile))[0] for text in query.turns]
        weights = np.array([turn.known for turn in turns]) ** self.trust
        # The first turn takes what all later ones left.
        weights[-1] = 1.0
        left = np.concatenate([[1.0], np.cumprod(1 - weights[:-1])])
        inside = float(sigmoid(self.raw(*self.space.text_row(query.text))[-1:])[0])
        return [replace(turn, weight=float(w)) for turn, w in zip(turns, weights * left, strict=True)], inside

    def _turn(self, query: Query) -> tuple[_Turn, float]:
        columns, values = self.space.row(query)
        weights, bias = self.columns
        raw = values.astype(np.float64) @ weights[columns].astype(np.float64) + bias
        personas = softmax(raw[:-2] / self.temperature)
        known = 1.0
        if self.tells:
            score = float(raw[-1])
            if query.profile.title or query.profile.department or query.profile.tenure_days is not None:
                score = max(score, PROFILE_TELLS)
            known = float(self.tells.known(personas.max(keepdims=True), np.array([score]))[0])
        return _Turn(query, columns, values, personas, known), float(sigmoid(raw[-2:-1])[0])

    def raw(self, columns: np.ndarray, values: np.ndarray) -> np.ndarray:
        """A feature row -> scores (P + 1,) in log-odds, before temperature; the last is that of being a request."""
        raw: np.ndarray = values.astype(np.float64) @ self.weights[columns].astype(np.float64) + self.bias
        return raw

    def _score(self, query: Query) -> Scores:
        turns, inside = self._read(query)
        personas = _mixed(turns)
        telling = max(turns, key=lambda t: t.weight)
        return Scores(
            personas={p: float(s) for p, s in zip(self.personas, personas, strict=True)},
            in_domain=inside,
            reasons=tuple(r for r in self._reasons(telling, int(personas.argmax()), MAX_REASONS) if abs(r.weight) >= MIN_REASON),
            min_in_domain=self.min_in_domain,
            known=max(turn.known for turn in turns),
            min_known=self.tells.least if self.tells else 0.0,
        )

    @cached_property
    def columns(self) -> tuple[np.ndarray, np.ndarray]:
        """All linear models side by side: weights (F, P + 2) and bias (P + 2,); the last is what tells, zeros where there is no such model."""
        own = self.tells.weights if self.tells else np.zeros(len(self.space), dtype=np.float32)
        return np.column_stack([self.weights, own]), np.append(self.bias, self.tells.bias if self.tells else 0.0).astype(np.float64)

    @cached_property
    def _against_mean(self) -> np.ndarray:
        """Persona weights (F, P) less their mean over the personas."""
        weights = self.weights[:, :-1]
        return weights - weights.mean(axis=1, keepdims=True)

    @cached_property
    def silence(self) -> np.ndarray:
        """What all linear models say of an empty text without a profile (P + 2,)."""
        (weights, bias), (columns, values) = self.columns, self.space.row(Query(""))
        said: np.ndarray = bias + values.astype(np.float64) @ weights[columns].astype(np.float64)
        return said

    def explain(self, query: Query, persona: str | None = None) -> list[Reason]:
        """Every word, phrase and profile field with what it says for a persona (the leading one), in log-odds; negative: against it.

        Of a conversation, those of the turn that decided.
        """
        turns, _ = self._read(query)
        at = int(_mixed(turns).argmax()) if persona is None else self.personas.index(persona)
        return self._reasons(max(turns, key=lambda t: t.weight), at)

    def _reasons(self, turn: _Turn, persona: int, most: int | None = None) -> list[Reason]:
        shares = turn.values * self._against_mean[turn.columns, persona] / self.temperature
        by_column = np.zeros(len(self.space))
        by_column[turn.columns] = shares
        found = self.space.reasons(turn.query, by_column, most)
        return [Reason(name, self.personas[persona], round(w, 4)) for name, w in found]

    def save(self, folder: Path) -> str:
        """Write the artefact into an existing folder and return its version, a digest of its bytes."""
        about = {
            "format": FORMAT,
            "personas": self.personas,
            "temperature": self.temperature,
            "min_in_domain": self.min_in_domain,
            "trust": self.trust,
            "encoder": self.space.encoder.name if self.space.encoder else None,
            "segments": self.segments,
            "tells": None if self.tells is None else {k: v for k, v in vars(self.tells).items() if k != "weights"},
        }
        # One metadata key only: safetensors writes several in no fixed order, and the version is a digest of the bytes.
        arrays = self.space.arrays() | {"weights": self.weights, "bias": self.bias}
        if self.tells:
            arrays["tells"] = self.tells.weights
        data = save(arrays, metadata={"deskroute": json.dumps(about)})
        (folder / FILE).write_bytes(data)
        self.version = digest(data)
        return self.version

    @classmethod
    def load(cls, folder: Path, personas: Sequence[str] = (), encoder: str | None = None) -> PersonaClassifier:
        """Load an artefact; `personas`, where given, is the catalogue it must have been trained for.

        encoder: the sentence encoder that it was trained with, as the configuration names it; no matter for an artefact that has none.
        Raises ConfigError when a file is missing or damaged, comes from another format, was trained for other personas or with another encoder.
        """
        arrays, about, version = read_arrays(folder / FILE)
        try:
            if about["format"] != FORMAT:
                raise ConfigError(f"router: {folder} is of format {about['format']}, this version reads {FORMAT}; run `deskroute retrain router`")
            trained = tuple(str(p) for p in about["personas"])
            parts = arrays["weights"], arrays["bias"], float(about["temperature"]), float(about["min_in_domain"])
            trust, segments, numbers = float(about["trust"]), about["segments"], about["tells"]
            tells = Tells(arrays["tells"], **{k: float(v) for k, v in numbers.items()}) if numbers else None
            if tells and tells.weights.shape != (arrays["weights"].shape[0],):
                raise ValueError(f"{tells.weights.shape[0]} weights of what tells for {arrays['weights'].shape[0]} features")
        except (KeyError, TypeError, ValueError) as e:
            raise ConfigError(f"router: {folder / FILE} is damaged ({e}); run `deskroute retrain router`") from None
        if personas and trained != tuple(personas):
            raise ConfigError(
                f"router: {folder} was trained for the personas {', '.join(trained)}, the catalogue has {', '.join(personas)}; "
                "run `deskroute retrain router` after changing personas.yaml"
            )
        with_encoder = _encoder(about.get("encoder"), encoder)
        space = FeatureSpace.from_arrays(arrays, with_encoder)
        return cls(space, trained, *parts, version=version, trust=trust, segments=segments, tells=tells)


def _encoder(trained_with: str | None, configured: str | None) -> SentenceEncoder | None:
    """The encoder that an artefact needs. A folder is taken from where it was in training; a model of Hugging Face only if the configuration names it,
    since an artefact must not make a server fetch what nobody there asked for."""
    if trained_with is None:
        return None
    if configured is None and not Path(trained_with).is_dir():
        raise ConfigError(f"router: the artefact was trained with the sentence encoder {trained_with!r}; name it in router.encoder")
    return load_encoder(configured or trained_with)


def softmax(logits: np.ndarray) -> np.ndarray:
    """(..., P) -> (..., P), summing to 1 over the last axis."""
    exp = np.exp(logits - logits.max(axis=-1, keepdims=True))
    out: np.ndarray = exp / exp.sum(axis=-1, keepdims=True)
    return out


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Elementwise logistic function."""
    out: np.ndarray = 1.0 / (1.0 + np.exp(-np.clip(logits, -60.0, 60.0)))
    return out
