"""Texts -> TF-IDF features: words, pairs of neighbouring words, and the character n-grams inside words.

Terms that are in no vocabulary still count towards a text's length, so that a text of strange words gets small values instead of a few large ones.
This file knows nothing of profiles, personas, articles or models.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

import numpy as np
from scipy import sparse

from persona_models.errors import ConfigError
from router.query import words_of
from router.spelling import Speller

Arrays = dict[str, np.ndarray]


def char_grams(word: str) -> list[str]:
    """Character 3- to 5-grams of one word with a space on either side, as scikit-learn's `char_wb` makes them."""
    padded = f" {word} "
    grams = []
    for n in (3, 4, 5):
        if len(padded) <= n:
            grams.append(padded)
            break
        grams += [padded[i : i + n] for i in range(len(padded) - n + 1)]
    return grams


@dataclass(frozen=True)
class Reading:
    """A text's n words and what a space knows of them."""

    words: list[str]
    columns: np.ndarray  # (n,), -1 for an unknown word
    pairs: np.ndarray  # (known pairs, 2): place of its first word, column
    grams: np.ndarray  # columns of the known n-grams, word after word
    n_grams: np.ndarray  # (n,) how many known ones a word has
    missing: np.ndarray  # (n,) how many unknown ones


_NO_NUMBERS = np.zeros(0, dtype=np.int64)
_NOTHING = Reading([], _NO_NUMBERS, _NO_NUMBERS.reshape(0, 2), _NO_NUMBERS, _NO_NUMBERS, _NO_NUMBERS)


class TextSpace:
    """TF-IDF over words, word pairs and character n-grams.

    A term is the word, "first pair" with a space, or "#" and the n-gram (no word holds a "#"). Term counts enter as 1 + ln(count). The words with
    the pairs, and the n-grams, are each scaled to length 1, unknown terms included, and then by `word_weight` and `char_weight`.
    """

    def __init__(self, terms: Sequence[str], idf: np.ndarray, unknown_idf: float, *, word_weight: float = 1.0, char_weight: float = 1.0) -> None:
        self.terms = list(terms)
        self.idf = np.asarray(idf, dtype=np.float32)  # (F,)
        self.unknown_idf = float(unknown_idf)
        self.weights = (float(word_weight), float(char_weight))
        self.columns = {term: i for i, term in enumerate(self.terms)}
        self.speller: Speller | None = None
        # What was read last: several who look at a request do so one after the other.
        self._last: tuple[str, Reading] = ("", _NOTHING)
        self._last_words: tuple[list[str], Reading] = ([], _NOTHING)
        self._grams: dict[str, tuple[np.ndarray, int]] = {}

    def __len__(self) -> int:
        return len(self.terms)

    @classmethod
    def fit(
        cls,
        texts: Sequence[str],
        *,
        min_words: int = 2,
        min_grams: int = 3,
        max_words: int = 20_000,
        max_grams: int = 20_000,
        word_weight: float = 1.0,
        char_weight: float = 1.0,
    ) -> TextSpace:
        """Learn the vocabulary: terms in at least `min_*` texts, of those the `max_*` found in most texts (ties by the alphabet)."""
        words: Counter[str] = Counter()
        grams: Counter[str] = Counter()
        for text in texts:
            in_text = words_of(text)
            words.update({*in_text, *map(" ".join, pairwise(in_text))})
            grams.update({"#" + g for w in set(in_text) for g in char_grams(w)})
        kept = [*_most_common(words, min_words, max_words), *_most_common(grams, min_grams, max_grams)]
        n = len(texts)
        df = np.array([words[t] or grams[t] for t in kept], dtype=np.float64)
        return cls(kept, _idf(df, n), float(_idf(np.array(1.0), n)), word_weight=word_weight, char_weight=char_weight)

    def words(self, text: str) -> list[str]:
        """The words of a text, slips mended where there is a speller."""
        return self.read(text).words

    def read(self, text: str) -> Reading:
        """What the space knows of a text's words."""
        last, found = self._last
        if last != text:
            found = self.read_words(words_of(text))
            self._last = text, found
        return found

    def read_words(self, words: list[str]) -> Reading:
        """The same of words that are found already, before slips are mended."""
        last, found = self._last_words
        if last == words:
            return found
        said = self.mended(words)
        get = self.columns.get
        own = [get(word, -1) for word in said]
        pairs = [(i, both) for i, pair in enumerate(map(" ".join, pairwise(said))) if (both := get(pair)) is not None]
        grams = [self.grams_of(word) for word in said]
        found = Reading(
            said,
            _numbers(own),
            np.fromiter(chain.from_iterable(pairs), dtype=np.int64, count=2 * len(pairs)).reshape(-1, 2),
            np.concatenate([known for known, _ in grams]) if grams else np.zeros(0, dtype=np.int64),
            _numbers([len(known) for known, _ in grams]),
            _numbers([missing for _, missing in grams]),
        )
        self._last_words = words, found
        return found

    def mended(self, words: Sequence[str]) -> list[str]:
        """Words as they are meant."""
        return [self.speller.fix(w) for w in words] if self.speller else list(words)

    def mend(self, more: Iterable[str] = ()) -> None:
        """From now on read slips as the words of the vocabulary, or of `more`, that they come from."""
        known = sorted((i for i, t in enumerate(self.terms) if not t.startswith("#") and " " not in t), key=lambda i: float(self.idf[i]))
        self.speller = Speller([*(self.terms[i] for i in known), *more])
        self._last, self._last_words = ("", _NOTHING), ([], _NOTHING)

    def grown(self, texts: Sequence[str]) -> TextSpace:
        """The same space with the unseen terms of `texts` at its end, each as rare as a term can be. Old columns keep their number and weight."""
        fresh: dict[str, None] = {}
        for text in texts:
            in_text = words_of(text)
            pairs = map(" ".join, pairwise(in_text))
            grams = ("#" + g for w in in_text for g in char_grams(w))
            fresh.update((t, None) for t in (*in_text, *pairs, *grams) if t not in self.columns)
        idf = np.concatenate([self.idf, np.full(len(fresh), self.unknown_idf, dtype=np.float32)])
        return TextSpace([*self.terms, *fresh], idf, self.unknown_idf, word_weight=self.weights[0], char_weight=self.weights[1])

    def row(self, text: str) -> tuple[np.ndarray, np.ndarray, float]:
        """One text as columns (n,) int64, values (n,) float32 and the share of its words that no vocabulary holds, 0 to 1."""
        read = self.read(text)
        strange = read.columns < 0
        unknown = Counter(word for word, is_strange in zip(read.words, strange.tolist(), strict=True) if is_strange)
        terms, times = np.unique(np.concatenate([read.columns[~strange], read.pairs[:, 1]]), return_counts=True)
        grams, often = np.unique(read.grams, return_counts=True)
        unknown_grams = sum(dict(zip(read.words, read.missing.tolist(), strict=True)).values())
        # Unknown pairs do not count: nearly every pair of words is new, and a long text would fade for it.
        blocks = [
            self._scaled(terms, times, self.weights[0], sum((1.0 + math.log(n)) ** 2 for n in unknown.values())),
            self._scaled(grams, often, self.weights[1], float(unknown_grams)),
        ]
        share = sum(unknown.values()) / max(len(read.words), 1)
        return np.concatenate([c for c, _ in blocks]), np.concatenate([v for _, v in blocks]), share

    def rows(self, texts: Iterable[str]) -> sparse.csr_matrix:
        """Texts -> (N, F) CSR, float32."""
        return csr([self.row(text)[:2] for text in texts], len(self))

    def credit(self, text: str, shares: np.ndarray) -> tuple[list[str], np.ndarray]:
        """Words and pairs of the text, each once, and their parts (n,) of a score; shares (F or more,): what each column has added to it.

        Character n-grams are credited to the words they stand in, each time they occur alike.
        """
        read = self.read(text)
        first: dict[str, int] = {}
        at = [first.setdefault(word, len(first)) for word in read.words]
        credited = np.zeros(len(first))
        own = read.columns >= 0
        credited[_numbers(at)[own]] = shares[read.columns[own]]
        times = np.bincount(read.grams)[read.grams] if len(read.grams) else read.grams
        credited += np.bincount(np.repeat(_numbers(at), read.n_grams), shares[read.grams] / times, minlength=len(first))
        pairs = {f"{read.words[i]} {read.words[i + 1]}": both for i, both in read.pairs.tolist()}
        return [*first, *pairs], np.concatenate([credited, shares[_numbers(pairs.values())]])

    def grams_of(self, word: str) -> tuple[np.ndarray, int]:
        """Columns of a word's known n-grams and the number of unknown ones; remembered, because people use the same words."""
        found = self._grams.get(word)
        if found is None:
            columns = [self.columns.get("#" + g) for g in char_grams(word)]
            found = np.array([c for c in columns if c is not None], dtype=np.int64), columns.count(None)
            if len(self._grams) >= 50_000:
                self._grams.clear()
            self._grams[word] = found
        return found

    def _scaled(self, columns: np.ndarray, counts: np.ndarray, weight: float, unknown: float) -> tuple[np.ndarray, np.ndarray]:
        tf = 1.0 + np.log(counts.astype(np.float32))
        values = tf * self.idf[columns]
        length = float(np.sqrt(float(values @ values) + unknown * self.unknown_idf**2))
        return columns, (values * (weight / length) if length else values).astype(np.float32)

    def arrays(self) -> Arrays:
        """The space as arrays, for an artefact."""
        terms = np.frombuffer("\n".join(self.terms).encode(), dtype=np.uint8).copy()
        return {"terms": terms, "idf": self.idf, "scales": np.array([self.unknown_idf, *self.weights], dtype=np.float64)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> TextSpace:
        """The space that `arrays` described. Raises ConfigError where they do not fit together."""
        try:
            joined = arrays["terms"].tobytes().decode()
            terms = joined.split("\n") if joined else []
            unknown_idf, word_weight, char_weight = (float(x) for x in arrays["scales"])
            idf = arrays["idf"]
        except (KeyError, ValueError) as e:
            raise ConfigError(f"the text features are damaged ({e}); run `deskroute retrain router`") from None
        if idf.shape != (len(terms),):
            raise ConfigError(f"the text features are damaged ({len(terms)} terms, weights of shape {idf.shape}); run `deskroute retrain router`")
        return cls(terms, idf, unknown_idf, word_weight=word_weight, char_weight=char_weight)


def _numbers(values: Collection[int]) -> np.ndarray:
    return np.fromiter(values, dtype=np.int64, count=len(values))


def csr(rows: Sequence[tuple[np.ndarray, np.ndarray]], n_columns: int) -> sparse.csr_matrix:
    """Rows of (columns, values) -> (N, n_columns) CSR, float32."""
    starts = np.cumsum([0, *(len(c) for c, _ in rows)])
    columns = np.concatenate([c for c, _ in rows]) if rows else np.zeros(0, dtype=np.int64)
    values = np.concatenate([v for _, v in rows]) if rows else np.zeros(0, dtype=np.float32)
    return sparse.csr_matrix((values, columns, starts), shape=(len(rows), n_columns))


def _most_common(counts: Counter[str], least: int, most: int) -> list[str]:
    kept = sorted(((-n, term) for term, n in counts.items() if n >= least))[:most]
    return sorted(term for _, term in kept)


def _idf(df: np.ndarray, n_texts: int) -> np.ndarray:
    return np.asarray(np.log((1 + n_texts) / (1 + df)) + 1.0, dtype=np.float32)
