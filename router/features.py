"""Queries -> features: the same code for training and for serving.

A text becomes TF-IDF values of its words, its pairs of neighbouring words and the character n-grams inside its words; a profile becomes one column
per word of title, department and location and per n-gram inside those of title and department, plus the time with the company. Terms that are in no
vocabulary still count towards a text's length, so that a text of strange words gets small values instead of a few large ones. This file knows nothing
of personas, articles or models.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import chain, pairwise

import numpy as np
from scipy import sparse

from persona_models.encoder import SentenceEncoder
from persona_models.errors import ConfigError
from router.lexicon import Lexicon
from router.query import Profile, Query, words_of
from router.spelling import Speller

Arrays = dict[str, np.ndarray]

# A word list's column, against words that together have length 1.
LEXICON_WEIGHT = 0.5
# Length of all n-grams of a profile together, against 2 for each of its words.
PROFILE_GRAMS_WEIGHT = 4.0
# Length of a sentence encoder's vector.
ENCODER_WEIGHT = 3.0
# How much of a title's or department's word stands for its relatives.
STEM_CHARS = 5

# (days below, name); a start date in the future counts as the first days.
_TENURE = ((30, "tenure < 30 days"), (45, "tenure 30-44 days"), (90, "tenure 45-89 days"), (365, "tenure 90-364 days"))
_TENURE_LONG = "tenure 1 year or more"
_NO_PROFILE = "no profile"
UNKNOWN_WORDS = "unknown words"
_MEANING = "meaning of the text"


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


class FeatureSpace:
    """Queries -> (N, F): the text's columns, the share of unknown words, a column per word list (0 or `lexicon_weight`), the vector of a sentence
    encoder if there is one (its length is ENCODER_WEIGHT), then the profile's columns: `profile_weight` for a term that it has, and for its n-grams
    values that together have the length `grams_weight`."""

    def __init__(
        self,
        text: TextSpace,
        profile_terms: Sequence[str],
        profile_weight: float = 1.0,
        lexicon: Lexicon | None = None,
        lexicon_weight: float = LEXICON_WEIGHT,
        grams_weight: float = PROFILE_GRAMS_WEIGHT,
        encoder: SentenceEncoder | None = None,
    ) -> None:
        self.text = text
        self.encoder = encoder
        self.lexicon = lexicon or Lexicon({})
        self.lexicon_weight = float(lexicon_weight)
        text.mend(word for entry in self.lexicon.lists_of for word in entry.split())
        self.profile_terms = list(profile_terms)
        self.profile_weight = float(profile_weight)
        self.grams_weight = float(grams_weight)
        self._profile = {term: self.n_text + i for i, term in enumerate(self.profile_terms)}

    @classmethod
    def fit(
        cls,
        queries: Sequence[Query],
        text: TextSpace | None = None,
        *,
        min_profiles: int = 2,
        profile_weight: float = 1.0,
        lexicon: Lexicon | None = None,
        encoder: SentenceEncoder | None = None,
    ) -> FeatureSpace:
        """Learn the vocabulary of texts (unless `text` brings it) and of profiles (terms of at least `min_profiles` queries)."""
        counts = Counter(term for q in queries for term in (*profile_terms(q.profile), *set(chain.from_iterable(profile_grams(q.profile).values()))))
        fixed = [*(name for _, name in _TENURE), _TENURE_LONG, _NO_PROFILE]
        terms = [*fixed, *sorted(t for t, n in counts.items() if n >= min_profiles and t not in fixed)]
        return cls(text or TextSpace.fit([q.text for q in queries]), terms, profile_weight, lexicon, encoder=encoder)

    def __len__(self) -> int:
        return self.n_text + len(self.profile_terms)

    @property
    def n_text(self) -> int:
        """Columns that come from the text alone; they stand first."""
        return self.dense.stop

    @property
    def dense(self) -> slice:
        """The columns of the encoder's vector; every text has a value in each."""
        first = len(self.text) + 1 + len(self.lexicon)
        return slice(first, first + (self.encoder.dim if self.encoder else 0))

    @property
    def names(self) -> list[str]:
        """A readable name per column: 'word "payroll"', 'title "director"', 'tenure < 30 days'."""
        lists = (f"words of {name}" for name in self.lexicon.names)
        dense = (f"{_MEANING}, {i}" for i in range(self.dense.stop - self.dense.start))
        return [*map(_readable, self.text.terms), UNKNOWN_WORDS, *lists, *dense, *self.profile_terms]

    def row(self, query: Query) -> tuple[np.ndarray, np.ndarray]:
        """One query's text and profile as columns (n,) int64 and values (n,) float32."""
        columns, values = self.text_row(query.text)
        profile = [c for t in profile_terms(query.profile) if (c := self._profile.get(t)) is not None]
        inside = list(dict.fromkeys(chain.from_iterable(profile_grams(query.profile).values())))
        grams = [c for g in inside if (c := self._profile.get(g)) is not None]
        each = self.grams_weight / np.sqrt(len(inside)) if inside else 0.0
        columns = np.concatenate([columns, np.array([*profile, *grams], dtype=np.int64)])
        values = np.concatenate([values, np.array([*[self.profile_weight] * len(profile), *[each] * len(grams)], dtype=np.float32)])
        return columns, values

    def text_row(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """A text alone as columns (n,) int64 and values (n,) float32."""
        columns, values, unknown = self.text.row(text)
        lists = [len(self.text) + 1 + i for i in self.lexicon.found(self.text.words(text))]
        columns = np.concatenate([columns, np.array([len(self.text), *lists], dtype=np.int64)])
        values = np.concatenate([values, np.array([unknown, *[self.lexicon_weight] * len(lists)], dtype=np.float32)])
        if self.encoder:
            columns = np.concatenate([columns, np.arange(self.dense.start, self.dense.stop)])
            values = np.concatenate([values, ENCODER_WEIGHT * self.encoder.encode(text)])
        return columns, values

    def rows(self, queries: Iterable[Query]) -> sparse.csr_matrix:
        """Queries -> (N, F) CSR, float32."""
        return csr([self.row(q) for q in queries], len(self))

    def reasons(self, query: Query, shares: np.ndarray, most: int | None = None) -> list[tuple[str, float]]:
        """What in the query spoke for a class, or against it: (readable feature, its part of the score), largest first; at most the `most` strongest.

        shares (F,): value times weight of every column of the query's row, 0 elsewhere. Those of n-grams are added to the words they stand in, those
        of word lists to their words.
        """
        terms, weights = self.text.credit(query.text, shares)
        of_profile = self._credit_profile(query.profile, shares)
        if self.encoder:
            of_profile[_MEANING] = float(shares[self.dense].sum())
        of_lists: dict[str, float] = {}
        for at, entries in self.lexicon.found(self.text.words(query.text)).items():
            for entry in entries:
                of_lists[entry] = of_lists.get(entry, 0.0) + float(shares[len(self.text) + 1 + at]) / len(entries)
        for i, term in enumerate(terms):
            if term in of_lists:
                weights[i] += of_lists.pop(term)
        names = [*terms, *of_lists, *of_profile]
        weights = np.concatenate([weights, [*of_lists.values(), *of_profile.values()]])
        of_text = len(terms) + len(of_lists)
        order = np.argsort(-np.abs(weights), kind="stable")[:most]
        found = [(_readable(names[i]) if i < of_text else names[i], float(weights[i])) for i in order]
        return sorted(found, key=lambda reason: (-reason[1], reason[0]))

    def _credit_profile(self, profile: Profile, shares: np.ndarray) -> dict[str, float]:
        """Readable term -> its part of a score; what words share, each of them gets a part of."""
        credited = {t: float(shares[self._profile[t]]) for t in profile_terms(profile) if t in self._profile and t != _NO_PROFILE}
        inside = profile_grams(profile)
        times = Counter(chain.from_iterable(set(grams) for grams in inside.values()))
        for word, grams in inside.items():
            share = sum(float(shares[self._profile[g]]) / times[g] for g in set(grams) if g in self._profile)
            credited[word] = credited.get(word, 0.0) + share
        return credited

    def arrays(self) -> Arrays:
        """The space as arrays, for an artefact."""
        profile = np.frombuffer("\n".join(self.profile_terms).encode(), dtype=np.uint8).copy()
        scales = {name: np.array([getattr(self, name)]) for name in ("profile_weight", "lexicon_weight", "grams_weight")}
        probe = {"encoder_probe": self.encoder.probe} if self.encoder else {}
        return self.text.arrays() | self.lexicon.arrays() | {"profile_terms": profile} | scales | probe

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], encoder: SentenceEncoder | None = None) -> FeatureSpace:
        """The space that `arrays` described. Raises ConfigError where they do not fit together, or belong to another encoder."""
        if encoder and not ("encoder_probe" in arrays and encoder.is_like(arrays["encoder_probe"])):
            raise ConfigError(
                f"router.encoder: {encoder.name!r} is not the encoder that the router was trained with; give that one, or run `deskroute retrain router`"
            )
        try:
            return cls(
                TextSpace.from_arrays(arrays),
                arrays["profile_terms"].tobytes().decode().split("\n"),
                float(arrays["profile_weight"].reshape(-1)[0]),
                Lexicon.from_arrays(arrays),
                # Older artefacts have neither.
                lexicon_weight=float(arrays["lexicon_weight"].reshape(-1)[0]) if "lexicon_weight" in arrays else 0.0,
                grams_weight=float(arrays["grams_weight"].reshape(-1)[0]) if "grams_weight" in arrays else 0.0,
                encoder=encoder,
            )
        except (KeyError, UnicodeDecodeError, IndexError) as e:
            raise ConfigError(f"the profile features are damaged ({e}); run `deskroute retrain router`") from None


def profile_terms(profile: Profile) -> list[str]:
    """The features of a profile, by their readable names."""
    if not profile:
        return [_NO_PROFILE]
    terms = []
    for name, value in (("title", profile.title), ("department", profile.department), ("location", profile.location)):
        words = list(dict.fromkeys(words_of(value[:200])))
        terms += [f'{name} "{word}"' for word in words]
        if name != "location":
            # The beginning of a word is shared by what languages make of it: technician, Techniker, technicien.
            terms += dict.fromkeys(f'{name} "{word[:STEM_CHARS]}..."' for word in words if len(word) > STEM_CHARS)
        if name == "title":
            terms += [f'{name} "{left} {right}"' for left, right in pairwise(words)]
    if profile.tenure_days is not None:
        terms.append(next((name for below, name in _TENURE if profile.tenure_days < below), _TENURE_LONG))
    return terms


def profile_grams(profile: Profile) -> dict[str, list[str]]:
    """The n-grams inside the words of title and department, by the readable term of their word: kinds of work are told across languages and abbreviations."""
    return {
        f'{name} "{word}"': [f"{name} #{gram}" for gram in char_grams(word)]
        for name, value in (("title", profile.title), ("department", profile.department))
        for word in dict.fromkeys(words_of(value[:200]))
    }


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


def _readable(term: str) -> str:
    if term.startswith("#"):
        return f'letters "{term[1:]}"'
    return f'words "{term}"' if " " in term else f'word "{term}"'
