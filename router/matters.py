"""One message -> the matters in it, where they are of one sender and each has an article of its own.

Requests of different personas are told apart by segment.py. Here both sides of a place where another request may begin are looked up, and a small
logistic model decides whether they are two matters or one told at length; its weights are a part of the router's artefact, fitted in
pipelines/train_matters.py. A router that was trained without it has none. Knows nothing of personas or answers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from persona_models.errors import ConfigError
from router.artefact import read_checked
from router.knowledge import KnowledgeBase
from router.query import MAX_CHARS
from router.segment import CUE, KINDS, Cut, Segmenter, cuts, halves, pieces_of, words_around

FILE = "matters.json"
FEATURES = ("worse side", "better side", "whole", "whole is of neither", "cue", "words at the cut", "shorter side", "length", *KINDS)
# Cuts of a long message whose sides are looked up: those whose words speak for one most.
MOST_CUTS = 8
MOST_MATTERS = 4
# More than two are rare: in log-odds, how much surer each further cut must be.
FURTHER = 1.0


@dataclass(frozen=True)
class Pair:
    """A cut with different articles on its sides, first and second, and what speaks for it, in the order of FEATURES."""

    cut: Cut
    first: str
    second: str
    features: tuple[float, ...]


def pairs_in(
    knowledge: KnowledgeBase, segmenter: Segmenter, text: str, worth: Callable[[Sequence[Sequence[float]]], bool] | None = None
) -> list[Pair]:
    """The cuts of a message that could lie between two matters.

    worth: whether any of the features that a cut may turn out to have would be of use; where not, its sides are not looked up.
    """
    places = cuts(text, MAX_CHARS)
    whole = knowledge.match(text, 1) if places else []
    if not whole:
        return []
    said = [sum(segmenter.words.get(w, 0.0) for w in words) for words in words_around(pieces_of(text, places))]
    cues = [float(bool(CUE.match(text, c.start))) for c in places]
    found = []
    for i in sorted(range(len(places)), key=lambda i: -(said[i] + cues[i]))[:MOST_CUTS]:
        cut = places[i]
        sides = text[: cut.end], text[cut.start :]
        words = sorted(len(side.split()) for side in sides)
        known = (cues[i], said[i], *(float(np.log(max(1, n))) for n in (words[0], sum(words))), *(float(cut.kind == kind) for kind in KINDS))

        def features(one: float, other: float, neither: bool, known: tuple[float, ...] = known) -> tuple[float, ...]:
            return (*(_log_odds(s) for s in sorted((one, other))), _log_odds(whole[0].score), float(neither), *known)

        if worth and not worth([features(x, y, neither) for x, y in ((0, 0), (0, 1), (1, 1)) for neither in (False, True)]):
            continue
        first = knowledge.best(sides[0])
        if not first:
            continue
        if worth and not worth([features(first.score, x, neither) for x in (0, first.score, 1) for neither in (False, True)]):
            continue
        second = knowledge.best(sides[1])
        if second and first.article.id != second.article.id:
            neither = whole[0].article.id not in (first.article.id, second.article.id)
            found.append(Pair(cut, first.article.id, second.article.id, features(first.score, second.score, neither)))
    return found


def _log_odds(score: float) -> float:
    return float(np.log((score + 0.01) / (1.01 - score)))


class Matters:
    """weights (D,) in the order of FEATURES; a cut whose sum with `bias` is positive lies between two matters."""

    def __init__(self, weights: np.ndarray, bias: float) -> None:
        if np.shape(weights) != (len(FEATURES),):
            raise ConfigError(
                f"router: there are {np.shape(weights)} weights for matters, {len(FEATURES)} are wanted; run `deskroute retrain router`"
            )
        self.weights, self.bias = np.asarray(weights, dtype=np.float64), float(bias)

    def score(self, pair: Pair) -> float:
        """Log-odds that a cut lies between two matters."""
        return float(np.array(pair.features) @ self.weights + self.bias)

    def best(self, pairs: Sequence[Pair]) -> Pair | None:
        """The likeliest cut, if it is one."""
        found = max(pairs, key=self.score, default=None)
        return found if found and self.score(found) > 0 else None

    def split(self, knowledge: KnowledgeBase, segmenter: Segmenter, text: str) -> list[str]:
        """The matters in a message, in order, as pieces of its text, MOST_MATTERS at most; none where it holds one."""
        pieces, at = [text], 0
        while at < len(pieces) < MOST_MATTERS:
            needs = 0.0 if len(pieces) == 1 else FURTHER
            found = self.best(pairs_in(knowledge, segmenter, pieces[at], partial(self._any, needs=needs)))
            if found and self.score(found) > needs:
                pieces[at : at + 1] = halves(pieces[at], found.cut)
            else:
                at += 1
        return pieces if len(pieces) > 1 else []

    def _any(self, rows: Sequence[Sequence[float]], needs: float) -> bool:
        return bool((np.array(rows) @ self.weights + self.bias).max() > needs)

    def save(self, folder: Path) -> None:
        """Write it into a folder."""
        facts = {"weights": {name: round(float(w), 4) for name, w in zip(FEATURES, self.weights, strict=True)}, "bias": round(self.bias, 4)}
        (folder / FILE).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Matters | None:
        """What a router's folder has; None for one that was trained without. Raises ConfigError where it is damaged."""
        if not (folder / FILE).exists():
            return None
        try:
            facts = json.loads(read_checked(folder / FILE))
            return cls(np.array([facts["weights"][name] for name in FEATURES], dtype=np.float64), float(facts["bias"]))
        except (OSError, KeyError, TypeError, ValueError) as e:
            raise ConfigError(f"router: {folder / FILE} is damaged ({e}); run `deskroute retrain router`") from None
