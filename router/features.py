"""Messages and profile -> features: the same code for training and for serving.

A text becomes TF-IDF values of its words, its pairs of neighbouring words and the character n-grams inside its words; a profile becomes one column
per word of title, department and location, plus the time with the company. Terms that are in no vocabulary still count towards a text's length, so
that a text of strange words gets small values instead of a few large ones. This file knows nothing of personas, articles or models.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import nlargest
from itertools import chain, pairwise

import numpy as np
from scipy import sparse

from persona_models.errors import ConfigError, InputError
from persona_models.protocol import Message
from router.lexicon import Lexicon
from router.spelling import Speller

Arrays = dict[str, np.ndarray]

# What is scored of one request, in characters. A longer text keeps its head and its tail: a mail's signature often names the sender's job.
MAX_CHARS = 4000
TAIL_CHARS = 1000
# A last turn with fewer telling words than this ("same thing again") is read together with the turns before it.
MIN_TELLING_WORDS = 4
# User turns that are looked at; what was said before them is long past.
MAX_TURNS = 8
# Longer runs without a space are no words; their n-grams would only cost time.
MAX_WORD_CHARS = 40
# A word list's column, against words that together have length 1.
LEXICON_WEIGHT = 0.5
# How much of a title's or department's word stands for its relatives.
STEM_CHARS = 5

_WORD = re.compile(r"\w+(?:['-]\w+)*")
_WHOLE_NUMBER = re.compile(r"[+-]?[0-9]{1,7}")
_NEUTRAL_WORDS = """
a about actually again ah all already also always am an and another any anyone anything are as ask at back be been before but by bye can
cannot can't check cheers come could day dear desk did didn't do does doesn't doing don't done earlier ever exactly fine first for from get
getting give go going good got great guys had happen happened happening happens has have he hello help helped helpdesk helping hey hi hmm how
i i'm i've if in is isn't issue it it's its just know last later let like look many maybe me mine more morning much my need never next no nope
not nothing now of off ok okay old on once one or other our out over please pls problem quite really right same second see sent she should so
some someone something sorry still such sure team thank thanks that that's the their them then there these they thing things think this those
though thx till time to today tomorrow too tried try trying two u up us very was we week well were what when where which while who why will
wish with without won't work worked working works would wrong yeah yep yes yesterday yet you you're your
"""
_NEUTRAL = frozenset(_NEUTRAL_WORDS.split())
# (days below, name); a start date in the future counts as the first days.
_TENURE = ((30, "tenure < 30 days"), (90, "tenure 30-89 days"), (365, "tenure 90-364 days"))
_TENURE_LONG = "tenure 1 year or more"
_NO_PROFILE = "no profile"
UNKNOWN_WORDS = "unknown words"


@dataclass(frozen=True)
class Profile:
    """What is known of the requester; an empty profile is a normal case."""

    title: str = ""
    department: str = ""
    tenure_days: int | None = None
    location: str = ""

    @staticmethod
    def from_metadata(metadata: Mapping[str, object]) -> Profile:
        """Read the profile keys of a request's metadata; other keys belong to someone else and are ignored.

        Key case, spaces and hyphens do not matter ("Tenure days" = "tenure_days"); empty values count as absent. Raises InputError where
        tenure_days is not a whole number of days.
        """
        known = {}
        for key, value in metadata.items():
            name = re.sub(r"[\s-]+", "_", str(key).strip().lower())
            if name in Profile.__dataclass_fields__ and value is not None and str(value).strip():
                known[name] = str(value).strip()
        days = known.get("tenure_days")
        if days is not None and not _WHOLE_NUMBER.fullmatch(days):
            raise InputError(f"tenure_days is {days[:80]!r}; give the days since joining as a whole number, such as 12", param="metadata.tenure_days")
        return Profile(
            title=known.get("title", ""),
            department=known.get("department", ""),
            tenure_days=None if days is None else int(days),
            location=known.get("location", ""),
        )

    def __bool__(self) -> bool:
        return bool(self.title or self.department or self.location) or self.tenure_days is not None


@dataclass(frozen=True)
class Query:
    """What is scored: the user's words and the user's profile.

    text: the last turn, with earlier ones where it says too little by itself; turns: all user turns, the latest first, where there are several.
    """

    text: str
    profile: Profile = field(default_factory=Profile)
    turns: tuple[str, ...] = ()


def query_of(messages: Sequence[Message], profile: Profile | None = None) -> Query:
    """The query of a conversation: its last user turn, and the turns before it.

    A last turn that says too little by itself ("yes please") is followed in `text` by the earlier user turns, latest first, up to MAX_CHARS. What the
    system or the assistant said is never scored: the words of our own answers would decide the next route. Raises InputError without a user turn.
    """
    turns = [m.content for m in messages if m.role == "user"]
    if not turns:
        raise InputError("messages: there is no user turn to route", param="messages")
    text = _cut(turns[-1])
    if telling_words(text) < MIN_TELLING_WORDS:
        for turn in reversed(turns[:-1]):
            if (room := MAX_CHARS - len(text) - 1) <= 0:
                break
            text = f"{text}\n{turn[:room]}"
    return Query(text, profile or Profile(), tuple(turns[: -MAX_TURNS - 1 : -1]) if len(turns) > 1 else ())


def telling_words(text: str) -> int:
    """How many different words say something about the matter, greetings and "still not working" left out."""
    return len({w for w in words_of(text) if len(w) > 1 and w not in _NEUTRAL})


def words_of(text: str) -> list[str]:
    """The words of a text, case folded and in one Unicode form."""
    folded = unicodedata.normalize("NFKC", _cut(text)).casefold().replace("\u2019", "'")
    return [w[:MAX_WORD_CHARS] for w in _WORD.findall(folded)]


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


def _cut(text: str) -> str:
    return text if len(text) <= MAX_CHARS else text[: MAX_CHARS - TAIL_CHARS - 1] + "\n" + text[-TAIL_CHARS:]


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
        self._grams: dict[str, tuple[tuple[int, ...], int]] = {}

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
        found = words_of(text)
        return [self.speller.fix(w) for w in found] if self.speller else found

    def mend(self, more: Iterable[str] = ()) -> None:
        """From now on read slips as the words of the vocabulary, or of `more`, that they come from."""
        known = sorted((i for i, t in enumerate(self.terms) if not t.startswith("#") and " " not in t), key=lambda i: float(self.idf[i]))
        self.speller = Speller([*(self.terms[i] for i in known), *more])

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
        grams: Counter[int] = Counter()
        unknown_grams = 0
        for word, count in Counter(in_text).items():
            known, missing = self.grams_of(word)
            unknown_grams += missing
            if count == 1:
                grams.update(known)
            else:
                for column in known:
                    grams[column] += count
        # Unknown pairs do not count: nearly every pair of words is new, and a long text would fade for it.
        blocks = [
            self._scaled(words, self.weights[0], sum((1.0 + float(np.log(n))) ** 2 for n in unknown.values())),
            self._scaled(grams, self.weights[1], float(unknown_grams)),
        ]
        return np.concatenate([c for c, _ in blocks]), np.concatenate([v for _, v in blocks]), share

    def rows(self, texts: Iterable[str]) -> sparse.csr_matrix:
        """Texts -> (N, F) CSR, float32."""
        return csr([self.row(text)[:2] for text in texts], len(self))

    def credit(self, text: str, shares: np.ndarray) -> dict[str, float]:
        """Word or pair of the text -> its part of a score; shares (F or more,): what each column has added to it.

        Character n-grams are credited to the words they stand in, each time they occur alike.
        """
        in_text = self.words(text)
        grams = [self.grams_of(word)[0] for word in in_text]
        columns = np.fromiter(chain.from_iterable(grams), dtype=np.int64)
        token = np.repeat(np.arange(len(in_text)), [len(g) for g in grams])
        times = np.bincount(columns)[columns] if len(columns) else np.ones(0)
        of_grams = np.bincount(token, shares[columns] / times, minlength=len(in_text))
        credited: dict[str, float] = {}
        for word, share in zip(in_text, of_grams.tolist(), strict=True):
            credited[word] = credited.get(word, 0.0) + share
        for word in credited:
            if (own := self.columns.get(word)) is not None:
                credited[word] += float(shares[own])
        for pair in map(" ".join, pairwise(in_text)):
            if (both := self.columns.get(pair)) is not None:
                credited[pair] = float(shares[both])
        return credited

    def grams_of(self, word: str) -> tuple[tuple[int, ...], int]:
        """Columns of a word's known n-grams and the number of unknown ones; remembered, because people use the same words."""
        found = self._grams.get(word)
        if found is None:
            columns = [self.columns.get("#" + g) for g in char_grams(word)]
            found = tuple(c for c in columns if c is not None), columns.count(None)
            if len(self._grams) >= 50_000:
                self._grams.clear()
            self._grams[word] = found
        return found

    def _scaled(self, counts: Counter[int], weight: float, unknown: float) -> tuple[np.ndarray, np.ndarray]:
        columns = np.fromiter(counts.keys(), dtype=np.int64, count=len(counts))
        tf = 1.0 + np.log(np.fromiter(counts.values(), dtype=np.float32, count=len(counts)))
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
    """Queries -> (N, F): the text's columns, the share of unknown words, a column per word list (0 or `lexicon_weight`), then the profile's columns,
    each 0 or `profile_weight`."""

    def __init__(
        self,
        text: TextSpace,
        profile_terms: Sequence[str],
        profile_weight: float = 1.0,
        lexicon: Lexicon | None = None,
        lexicon_weight: float = LEXICON_WEIGHT,
    ) -> None:
        self.text = text
        self.lexicon = lexicon or Lexicon({})
        self.lexicon_weight = float(lexicon_weight)
        text.mend(word for entry in self.lexicon.lists_of for word in entry.split())
        self.profile_terms = list(profile_terms)
        self.profile_weight = float(profile_weight)
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
    ) -> FeatureSpace:
        """Learn the vocabulary of texts (unless `text` brings it) and of profiles (terms of at least `min_profiles` queries)."""
        counts = Counter(term for q in queries for term in profile_terms(q.profile))
        fixed = [*(name for _, name in _TENURE), _TENURE_LONG, _NO_PROFILE]
        terms = [*fixed, *sorted(t for t, n in counts.items() if n >= min_profiles and t not in fixed)]
        return cls(text or TextSpace.fit([q.text for q in queries]), terms, profile_weight, lexicon)

    def __len__(self) -> int:
        return self.n_text + len(self.profile_terms)

    @property
    def n_text(self) -> int:
        """Columns that come from the text alone; they stand first."""
        return len(self.text) + 1 + len(self.lexicon)

    @property
    def names(self) -> list[str]:
        """A readable name per column: 'word "payroll"', 'title "director"', 'tenure < 30 days'."""
        return [*map(_readable, self.text.terms), UNKNOWN_WORDS, *(f"words of {name}" for name in self.lexicon.names), *self.profile_terms]

    def row(self, query: Query) -> tuple[np.ndarray, np.ndarray]:
        """One query's text and profile as columns (n,) int64 and values (n,) float32."""
        columns, values = self.text_row(query.text)
        profile = [c for t in profile_terms(query.profile) if (c := self._profile.get(t)) is not None]
        columns = np.concatenate([columns, np.array(profile, dtype=np.int64)])
        values = np.concatenate([values, np.full(len(profile), self.profile_weight, dtype=np.float32)])
        return columns, values

    def text_row(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """A text alone as columns (n,) int64 and values (n,) float32."""
        columns, values, unknown = self.text.row(text)
        lists = [len(self.text) + 1 + i for i in self.lexicon.found(self.text.words(text))]
        columns = np.concatenate([columns, np.array([len(self.text), *lists], dtype=np.int64)])
        values = np.concatenate([values, np.array([unknown, *[self.lexicon_weight] * len(lists)], dtype=np.float32)])
        return columns, values

    def rows(self, queries: Iterable[Query]) -> sparse.csr_matrix:
        """Queries -> (N, F) CSR, float32."""
        return csr([self.row(q) for q in queries], len(self))

    def reasons(self, query: Query, shares: np.ndarray, most: int | None = None) -> list[tuple[str, float]]:
        """What in the query spoke for a class, or against it: (readable feature, its part of the score), largest first; at most the `most` strongest.

        shares (F,): value times weight of every column of the query's row, 0 elsewhere. Those of n-grams are added to the words they stand in, those
        of word lists to their words.
        """
        by_term = self.text.credit(query.text, shares)
        for at, entries in self.lexicon.found(self.text.words(query.text)).items():
            for entry in entries:
                by_term[entry] = by_term.get(entry, 0.0) + float(shares[len(self.text) + 1 + at]) / len(entries)
        found = [(term, w, True) for term, w in by_term.items()]
        found += [(t, float(shares[self._profile[t]]), False) for t in profile_terms(query.profile) if t in self._profile and t != _NO_PROFILE]
        if most is not None:
            found = nlargest(most, found, key=lambda reason: (abs(reason[1]), reason[0]))
        readable = [(_readable(term) if of_text else term, w) for term, w, of_text in found]
        return sorted(readable, key=lambda reason: (-reason[1], reason[0]))

    def arrays(self) -> Arrays:
        """The space as arrays, for an artefact."""
        profile = np.frombuffer("\n".join(self.profile_terms).encode(), dtype=np.uint8).copy()
        scales = {"profile_weight": np.array([self.profile_weight]), "lexicon_weight": np.array([self.lexicon_weight])}
        return self.text.arrays() | self.lexicon.arrays() | {"profile_terms": profile} | scales

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> FeatureSpace:
        """The space that `arrays` described. Raises ConfigError where they do not fit together."""
        try:
            return cls(
                TextSpace.from_arrays(arrays),
                arrays["profile_terms"].tobytes().decode().split("\n"),
                float(arrays["profile_weight"].reshape(-1)[0]),
                Lexicon.from_arrays(arrays),
                float(arrays["lexicon_weight"].reshape(-1)[0]) if "lexicon_weight" in arrays else LEXICON_WEIGHT,
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
