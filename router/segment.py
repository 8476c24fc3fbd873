"""One message -> the requests in it, each of its own persona, in order.

Where a sentence, a line or a connective like "also" begins, the text may fall into two requests. A small logistic model decides from what the persona
classifier says of either side; its weights are part of the router's artefact and fitted in pipelines/train_segments.py. Scoring every possible cut anew
would cost more than routing itself, so the evidence of each piece is summed up once. Knows nothing of articles or answers.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise, repeat
from typing import Any

import numpy as np

from persona_models.errors import ConfigError
from router.classifier import PersonaClassifier, sigmoid, softmax
from router.policy import PolicySettings, Route, decide
from router.query import MAX_CHARS, Query, words_of

# What all breaks begin with; of a run of spaces only the first one, since each other would look through the rest of the run once more.
BEGINS = r"(?=[,;.\"')\]]|(?<!\s)\s)"
# Places where another request may begin: blank and new lines, ends of sentences, dashes, semicolons, connectives.
_BREAKS = re.compile(
    BEGINS + r"(?:"
    r"(?P<line>\s*\n\s*)"
    r"|(?P<sentence>(?<=[.!?…])[\"')\]]*\s+)"
    r"|(?P<stop>\s*;\s+|\s+[-–—]{1,2}\s+|\s*\.{3}\s*|\s+(?:[+&|]|/{1,2})\s+|\s+(?=\(?[2-4b]\)))"
    r"|(?P<comma>,\s+)"
    r"|(?P<word>\s+(?=(?:and|also|plus|oh|ps|p\.s\.|separately|meanwhile|additionally|besides|second|secondly|another|then|while|whilst|btw|n|my|our)\b)))",
    re.IGNORECASE,
)
KINDS = ("line", "sentence", "stop", "comma", "word")
# What only joins the first request to the second.
_JOINING = re.compile(r"(?<![\s,;–—-])(?:[\s,;–—-]+(?:and|plus|oh|then))?[\s,;–—-]*$", re.IGNORECASE)
_WORD_START = re.compile(r"\b\w")
# How the second request often begins.
CUE = re.compile(
    r"(?:\W*(?:and|oh|but|then)\W+)?(?:also|another|second|2\b|two\b|next|others?|separately|p\.?\s?s\b|while|plus|besides|one more|unrelated|on top"
    r"|in addition|additionally|meanwhile|furthermore|for me|mine|me,|my own|me:|different|completely|whilst|same (?:time|call)"
    r"|(?:he|she|they|our|the new)\b)",
    re.IGNORECASE,
)
FEATURES = (
    "gain",
    "least",
    "behind the best",
    "inside before",
    "inside after",
    "tells before",
    "tells after",
    "both tell",
    *KINDS,
    "cue",
    "cue and gain",
    "shorter side",
    "pieces",
)
# A side of fewer words is no request.
MIN_WORDS = 3
MAX_PIECES = 24
# Words that are looked at on either side of a cut.
WORDS_BEFORE, WORDS_AFTER = 3, 8
MAX_SEGMENTS = 4
# More than two requests are rare: each further cut must be likelier than not.
FURTHER_CUTS = 0.5


@dataclass(frozen=True)
class Cut:
    """A place in a text where another request may begin: the head ends at `end`, the tail begins at `start`."""

    end: int
    start: int
    kind: str


def cuts(text: str, most: int = MAX_PIECES) -> list[Cut]:
    """The first possible cuts, from left to right; none within the first or the last few words, and none in what is longer than is scored at all."""
    if len(text) > MAX_CHARS:
        return []
    starts = [m.start() for m in _WORD_START.finditer(text)]
    found = []
    for m in _BREAKS.finditer(text):
        before = bisect_left(starts, m.end())
        if before >= MIN_WORDS and len(starts) - before >= MIN_WORDS:
            found.append(Cut(m.start(), m.end(), str(m.lastgroup)))
    return found[:most]


def halves(text: str, cut: Cut) -> tuple[str, str]:
    """What stands before and after a cut, without the space around it and what only joined the two."""
    return _JOINING.sub("", text[: cut.end]).strip(), text[cut.start :].strip()


def pieces_of(text: str, places: Sequence[Cut]) -> list[list[str]]:
    """The words between one cut and the next, from the beginning of the text to its end."""
    bounds = [0, *(c.start for c in places), len(text)]
    return [words_of(text[a:b]) for a, b in pairwise(bounds)]


def words_around(pieces: Sequence[Sequence[str]]) -> list[set[str]]:
    """For every cut between two pieces the words near it: those after it (s), the first of them (f), those before it (h), each also in pairs."""
    text = list(chain.from_iterable(pieces))
    at, around = 0, []
    for piece in pieces[:-1]:
        at += len(piece)
        before, after = text[max(0, at - WORDS_BEFORE) : at], text[at : at + WORDS_AFTER]
        around.append(
            {
                f"f:{' '.join(after[:1])}",
                f"f:{' '.join(after[:2])}",
                f"f:{' '.join(after[:3])}",
                *(f"s:{w}" for w in after),
                *(f"s:{a} {b}" for a, b in pairwise(after)),
                *(f"h:{w}" for w in before),
                *(f"h:{a} {b}" for a, b in pairwise(before)),
            }
        )
    return around


class Segmenter:
    """Decides which cut is one; `weights` (D,) in the order of FEATURES, `words` of what words_around gives."""

    def __init__(self, weights: np.ndarray, bias: float, threshold: float, words: Mapping[str, float]) -> None:
        if np.shape(weights) != (len(FEATURES),):
            raise ConfigError(f"router: the segmenter has {np.shape(weights)} weights, {len(FEATURES)} are wanted; run `deskroute retrain router`")
        self.weights, self.bias, self.threshold = np.asarray(weights, dtype=np.float64), float(bias), float(threshold)
        self.words = dict(words)

    def split(self, classifier: PersonaClassifier, text: str) -> list[str]:
        """The requests in a message, in order; one for most. Each is a piece of the text without the space around it."""
        segments = [text.strip()]
        while len(segments) < MAX_SEGMENTS:
            needs = self.threshold if len(segments) == 1 else max(self.threshold, FURTHER_CUTS)
            for i, segment in enumerate(segments):
                found = self._best(classifier, segment, needs)
                if found:
                    segments[i : i + 1] = halves(segment, found)
                    break
            else:
                break
        return segments

    def _best(self, classifier: PersonaClassifier, text: str, needs: float) -> Cut | None:
        places = cuts(text)
        if not places:
            return None
        pieces, get = pieces_of(text, places), self.words.get
        said = np.array([sum(map(get, around, repeat(0.0))) for around in words_around(pieces)])
        probability = sigmoid(features(classifier, text, places, pieces) @ self.weights + said + self.bias)
        best = int(probability.argmax())
        return places[best] if probability[best] >= needs else None

    def facts(self) -> dict[str, Any]:
        """The numbers, for an artefact."""
        return {"weights": [float(w) for w in self.weights], "bias": self.bias, "threshold": self.threshold, "words": self.words}

    @classmethod
    def from_facts(cls, facts: Any) -> Segmenter | None:
        """From `facts`; None for an artefact that has none. Raises ConfigError where they are damaged."""
        if facts is None:
            return None
        try:
            return cls(np.array(facts["weights"], dtype=np.float64), float(facts["bias"]), float(facts["threshold"]), facts["words"])
        except (KeyError, TypeError, ValueError) as e:
            raise ConfigError(f"router: the segmenter is damaged ({e}); run `deskroute retrain router`") from None


def features(classifier: PersonaClassifier, text: str, places: Sequence[Cut], pieces: Sequence[Sequence[str]]) -> np.ndarray:
    """(N, D): what speaks for each of N cuts; pieces: the N + 1 lists of words between them."""
    evidence = Evidence(classifier, pieces)
    heads, tails = evidence.sides()
    a, b = heads[:, :-2] / classifier.temperature, tails[:, :-2] / classifier.temperature
    # How much better two personas explain the text than one does: the best pair of different ones.
    pair = (a[:, :, None] - a[:, None, :]) + (b[:, None, :] - b[:, :, None])  # (N, P, P)
    p, q = np.unravel_index(pair.reshape(len(places), -1).argmax(axis=1), pair.shape[1:])
    each = np.arange(len(places))
    log_a, log_b = np.log(softmax(np.stack([a, b])) + 1e-9)
    gain = log_a[each, p] + log_b[each, q] - (log_a + log_b).max(axis=1)
    least = np.minimum(a[each, p] - a[each, q], b[each, q] - b[each, p])
    cue = np.array([bool(CUE.match(text, c.start)) for c in places], dtype=np.float64)
    tells = np.stack([heads[:, -1], tails[:, -1]]).clip(-4, 4)
    before = evidence.words.cumsum()[:-1]
    return np.column_stack(
        [
            gain,
            least.clip(-4, 4),
            gain - gain.max(),
            heads[:, -2].clip(-4, 4),
            tails[:, -2].clip(-4, 4),
            *tells,
            tells.min(axis=0),
            np.array([KINDS.index(c.kind) for c in places])[:, None] == np.arange(len(KINDS)),
            cue,
            cue * gain,
            np.log(np.minimum(before, evidence.words.sum() - before)),
            np.full(len(places), np.log(len(places) + 1)),
        ]
    )


class Evidence:
    """Raw scores of every run of pieces of a text, from one pass over it.

    A run's score is what the classifier gives to its text, but that repeated words count in full and not by their logarithm, and that pairs of words
    across pieces and a sentence encoder's vector are left out.
    """

    def __init__(self, classifier: PersonaClassifier, pieces: Sequence[Sequence[str]]) -> None:
        """pieces: the words of each."""
        weights, self.bias = classifier.columns[0], classifier.silence
        self.unknown_weight = weights[len(classifier.space.text)].astype(np.float64)
        space, n = classifier.space.text, len(pieces)
        first, of_list = len(space) + 1, len(classifier.space.lexicon)
        self._weights = space.weights
        self._list_weights = weights[first : first + of_list].astype(np.float64) * classifier.space.lexicon_weight
        self.words = np.array([max(1, len(p)) for p in pieces], dtype=np.float64)
        read = space.read_words(list(chain.from_iterable(pieces)))
        # The piece that each word is of.
        piece = np.repeat(np.arange(n), [len(p) for p in pieces])
        known, within = read.columns >= 0, read.pairs[piece[read.pairs[:, 0]] == piece[read.pairs[:, 0] + 1]]
        self._unknown = np.bincount(piece[~known], minlength=n).astype(np.float64)
        strange = self._unknown, np.bincount(piece, read.missing, minlength=n)
        terms = np.concatenate([read.columns[known], within[:, 1]]), read.grams
        of = np.concatenate([piece[known], piece[within[:, 0]]]), np.repeat(piece, read.n_grams)
        sums, squares = np.zeros((2, n + 1, weights.shape[1])), np.zeros((2, n + 1))
        for block in range(2):
            idf = space.idf[terms[block]].astype(np.float64)
            # One row per piece, with a one where a term is of it: a small product instead of a loop.
            rows = (of[block] == np.arange(n)[:, None]).astype(np.float64)
            sums[block, 1:] = rows @ (idf[:, None] * weights[terms[block]])
            squares[block, 1:] = rows @ (idf * idf) + strange[block] * space.unknown_idf**2
        lists = np.zeros((n + 1, of_list))
        last, of_word = np.cumsum([len(p) for p in pieces]).tolist(), piece.tolist()
        found = [(of_word[i], named) for i, entry, named in classifier.space.lexicon.places(read.words) if i + entry.count(" ") < last[of_word[i]]]
        lists[[i + 1 for i, named in found for _ in named], [at for _, named in found for at in named]] = 1
        self._sums, self._squares, self._lists = sums.cumsum(axis=1), squares.cumsum(axis=1), lists.cumsum(axis=0)

    def sides(self) -> tuple[np.ndarray, np.ndarray]:
        """Scores (N, P + 2) of what stands before and after each of the N places between pieces."""
        last = slice(1, -1)
        words, unknown = self.words.cumsum()[:-1], self._unknown.cumsum()[:-1]

        def scores(sums: np.ndarray, squares: np.ndarray, lists: np.ndarray, share: np.ndarray) -> np.ndarray:
            scale = np.array(self._weights)[:, None] / np.sqrt(np.maximum(squares, 1e-12))
            made: np.ndarray = (
                self.bias + (sums * scale[:, :, None]).sum(axis=0) + (lists > 0) @ self._list_weights + share[:, None] * self.unknown_weight
            )
            return made

        sums, squares, lists = self._sums, self._squares, self._lists
        heads = scores(sums[:, last], squares[:, last], lists[last], unknown / words)
        rest = self._unknown.sum() - unknown, self.words.sum() - words
        return heads, scores(sums[:, -1:] - sums[:, last], squares[:, -1:] - squares[:, last], lists[-1] - lists[last], rest[0] / rest[1])

    def raw(self, first: int, last: int) -> np.ndarray:
        """Scores (P + 2,) of the pieces first .. last - 1 as one text without a profile, in the order of PersonaClassifier.columns."""
        total = self.bias.copy()
        for block in range(2):
            square = self._squares[block, last] - self._squares[block, first]
            if square > 0:
                total += (self._sums[block, last] - self._sums[block, first]) * (self._weights[block] / np.sqrt(square))
        total += ((self._lists[last] - self._lists[first]) > 0) @ self._list_weights
        return total + self.unknown_weight * (self._unknown[first:last].sum() / self.words[first:last].sum())


def requests_in(classifier: PersonaClassifier, segmenter: Segmenter | None, query: Query, settings: PolicySettings) -> list[tuple[str, Route]]:
    """The requests in a query's last turn with their routes, in order, where they are several of different personas; otherwise none."""
    pieces = segmenter.split(classifier, query.turns[0] if query.turns else query.text) if segmenter else []
    if len(pieces) < 2:
        return []
    # That a piece is somebody else's than the one beside it is known; it need not tell as much as a message of its own.
    settings = settings.model_copy(update={"min_known": 0.0})
    found: list[tuple[str, Route]] = []
    for piece, scores in zip(pieces, classifier.score([Query(piece, query.profile) for piece in pieces]), strict=True):
        route = decide(scores, settings)
        if route.persona is None:
            # A piece that is no request of anybody's was cut off from one.
            return []
        if found and found[-1][1].persona == route.persona:
            found[-1] = (f"{found[-1][0]} {piece}", found[-1][1])
        else:
            found.append((piece, Route("persona", route.persona, route.confidence, reason=route.reason)))
    return found if len(found) > 1 else []
