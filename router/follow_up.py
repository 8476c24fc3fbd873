"""A turn behind an answer -> whether it says thanks, says that it did not help, or asks for something else.

A logistic model of words and pairs of words; its weights are a part of the router's artefact, fitted in pipelines/train_follow_ups.py. A router that
was trained without it has none: then nothing is told apart. Knows nothing of personas or articles.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from persona_models.errors import ConfigError
from router.artefact import read_checked
from router.query import words_of

FILE = "follow_ups.json"
THANKS, STILL, REQUEST = KINDS = ("thanks", "still", "request")
# From which probability on a turn is taken for a complaint.
SURE = 0.9
# Of a longer turn, the words that are looked at.
MAX_WORDS = 60


def terms(text: str) -> list[str]:
    """What of a turn is looked at, each once: its words, pairs of neighbours, the first and the last word, and how long it is."""
    words = words_of(text)[:MAX_WORDS]
    length = sum(len(words) > n for n in (1, 3, 6, 12, 25))
    found = [*words, *(f"{a} {b}" for a, b in pairwise(words)), f"length {length}"]
    if words:
        found += [f"^{words[0]}", f"{words[-1]}$"]
    return list(dict.fromkeys(found + [mark for mark in "!?" if mark in text]))


class FollowUps:
    """weights: term -> a number for each kind; bias: a number for each kind; sure: from which probability on a turn is taken for thanks."""

    def __init__(self, weights: Mapping[str, Sequence[float]], bias: Sequence[float], sure: float) -> None:
        self.weights, self.bias, self.sure = weights, bias, sure

    def probabilities(self, text: str) -> dict[str, float]:
        """Kind -> probability; they sum to 1."""
        found = [self.weights[t] for t in terms(text) if t in self.weights]
        scores = [b + sum(w[k] for w in found) for k, b in enumerate(self.bias)]
        powers = [math.exp(s - max(scores)) for s in scores]
        return {kind: p / sum(powers) for kind, p in zip(KINDS, powers, strict=True)}

    def says_thanks(self, text: str) -> bool:
        return self.probabilities(text)[THANKS] >= self.sure

    def says_still(self, text: str) -> bool:
        """Whether a turn says that it did not help."""
        return self.probabilities(text)[STILL] >= SURE

    def goes_on(self, text: str) -> bool:
        """Whether a turn is about the answer before it, and no request by itself."""
        return self.probabilities(text)[REQUEST] < 0.5

    def save(self, folder: Path) -> bytes:
        """Write it into a folder; returns the bytes."""
        facts: dict[str, Any] = {"sure": self.sure, "bias": list(self.bias), "weights": {t: list(w) for t, w in sorted(self.weights.items())}}
        data = (json.dumps(facts, ensure_ascii=False, separators=(",", ":")) + "\n").encode()
        (folder / FILE).write_bytes(data)
        return data

    @classmethod
    def load(cls, folder: Path) -> FollowUps | None:
        """What a router's folder has; None for one that was trained without. Raises ConfigError where it is damaged."""
        if not (folder / FILE).exists():
            return None
        try:
            facts = json.loads(read_checked(folder / FILE))
            return cls(facts["weights"], facts["bias"], float(facts["sure"]))
        except (OSError, KeyError, TypeError, ValueError) as e:
            raise ConfigError(f"router: {folder / FILE} is damaged ({e}); run `deskroute retrain router`") from None
