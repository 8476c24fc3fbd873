"""Texts -> TF-IDF features: words, pairs of neighbouring words, and the character n-grams inside words.

Terms that are in no vocabulary still count towards a text's length, so that a text of strange words gets small values instead of a few large ones.
This file knows nothing of profiles, personas, articles or models.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import pairwise

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
        # The text that was read last, and its words: several who look at a request read it one after the other.
        self._last: tuple[str, list[str]] = ("", [])
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
        last, found = self._last
        if last != text:
            found = self.mended(words_of(text))
            self._last = text, found
        return found

    def mended(self, words: Sequence[str]) -> list[str]:
        """Words as they are meant."""
        return [self.speller.fix(w) for w in words] if self.speller else list(words)

    def mend(self, more: Iterable[str] = ()) -> None:
        """From now on read slips as the words of the vocabulary, or of `more`, that they come from."""
        known = sorted((i for i, t in enumerate(self.terms) if not t.startswith("#") and " " not in t), key=lambda i: float(self.idf[i]))
        self.speller = Speller([*(self.terms[i] for i in known), *more])
        self._last = ("", [])

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
        in_text = self.words(text)
        columns, get = self.columns, self.columns.get
        words: Counter[int] = Counter()
        unknown: Counter[str] = Counter()
        for term in in_text:
            if (column := get(term)) is None:
                unknown[term] += 1
            else:
                words[column] += 1
        share = sum(unknown.values()) / max(len(in_text), 1)
        for left, right in pairwise(in_text):
            pair = f"{left} {right}"
            if pair in columns:
                words[columns[pair]] += 1
        by_word = [self.grams_of(word) for word in in_text]
        unknown_grams = sum({word: missing for word, (_, missing) in zip(in_text, by_word, strict=True)}.values())
        grams, times = np.unique(_joined([known for known, _ in by_word]), return_counts=True)
        # Unknown pairs do not count: nearly every pair of words is new, and a long text would fade for it.
        blocks = [
            self._scaled(_numbers(words), _numbers(words.values()), self.weights[0], sum((1.0 + float(np.log(n))) ** 2 for n in unknown.values())),
            self._scaled(grams, times, self.weights[1], float(unknown_grams)),
        ]
        return np.concatenate([c for c, _ in blocks]), np.concatenate([v for _, v in blocks]), share

    def rows(self, texts: Iterable[str]) -> sparse.csr_matrix:
        """Texts -> (N, F) CSR, float32."""
        return csr([self.row(text)[:2] for text in texts], len(self))

    def credit(self, text: str, shares: np.ndarray) -> tuple[list[str], np.ndarray]:
        """Words and pairs of the text, each once, and their parts (n,) of a score; shares (F or more,): what each column has added to it.

        Character n-grams are credited to the words they stand in, each time they occur alike.
        """
        in_text = self.words(text)
        word_at = {word: i for i, word in enumerate(dict.fromkeys(in_text))}
        grams = [self.grams_of(word)[0] for word in in_text]
        columns = _joined(grams)
        token = np.repeat([word_at[word] for word in in_text], [len(g) for g in grams]) if in_text else columns
        times = np.bincount(columns)[columns] if len(columns) else columns
        get = self.columns.get
        own = _numbers([get(word, -1) for word in word_at])
        credited = np.where(own >= 0, shares[own], 0.0)
        credited += np.bincount(token, shares[columns] / times, minlength=len(word_at)) if len(columns) else 0.0
        pairs = {pair: both for pair in map(" ".join, pairwise(in_text)) if (both := get(pair)) is not None}
        return [*word_at, *pairs], np.concatenate([credited, shares[_numbers(pairs.values())]])

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


def _joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype=np.int64)


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
