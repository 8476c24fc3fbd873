"""Queries -> features: the same code for training and for serving.

To a text's TF-IDF values come the share of its words that no vocabulary holds, a column per word list, and an encoder's vector where there is one; a
profile becomes one column per word of title, department and location and per n-gram inside those of title and department, plus the time with the
company. This file knows nothing of personas, articles or models.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, pairwise

import numpy as np
from scipy import sparse

from persona_models.encoder import SentenceEncoder
from persona_models.errors import ConfigError
from router.lexicon import Lexicon
from router.query import Profile, Query, words_of
from router.text_space import Arrays, TextSpace, char_grams, csr

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
                float(arrays["lexicon_weight"].reshape(-1)[0]),
                float(arrays["grams_weight"].reshape(-1)[0]),
                encoder,
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


def _readable(term: str) -> str:
    if term.startswith("#"):
        return f'letters "{term[1:]}"'
    return f'words "{term}"' if " " in term else f'word "{term}"'
