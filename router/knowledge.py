"""Articles -> the one that matches a request; a company's own Markdown folder joins or replaces the built-in ones without training.

An article is one vector and one offset: its own text and, for a built-in one, the prompts people wrote about it and what tells them from prompts about
other articles. A match is the product of the request's TF-IDF with that vector. What it takes to be a match is learnt in pipelines/train_knowledge.py:
one weight per term, shared by all articles (so a new article profits too), one more vector for "no article covers this", and the probability that
the best product is the right article. This file knows nothing of personas' scores, models or HTTP.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save
from scipy import sparse

from persona_models.errors import ArticleError, ConfigError
from router.artefact import digest, read_arrays, read_checked
from router.article import Article, Step, fill, read_article
from router.classifier import sigmoid
from router.text_space import TextSpace

FILE = "knowledge.safetensors"
ARTICLES_FILE = "knowledge.json"
FORMAT = 3
# An article's own text against the prompts written about it.
OWN_TEXT = 0.5
MIN_PROMPTS = 3


@dataclass(frozen=True)
class Match:
    """An article and the probability, 0 to 1, that it is what the request is about."""

    article: Article
    score: float


@dataclass(frozen=True)
class Calibration:
    """Products of a request with the articles -> scores: sigmoid(bias + slope * product + lead * (product - best other product) - none * surplus).

    The surplus is how much more a request sounds like one without an article than requests with one do. `threshold` is the score a match needs;
    `own_text_gain` and `own_text_offset` lift the products of articles without example prompts to those of the others.
    """

    bias: float = -2.0
    slope: float = 12.0
    lead: float = 6.0
    none: float = 0.0
    threshold: float = 0.3
    own_text_gain: float = 1.0
    own_text_offset: float = 0.0

    def scores(self, products: np.ndarray, surplus: float = 0.0) -> np.ndarray:
        """Products (A,) -> scores (A,); keeps their order."""
        if len(products) < 2:
            other = np.full_like(products, self.own_text_offset)  # what an article has that shares nothing with the request
        else:
            first, second = np.partition(products, -2)[[-1, -2]]
            other = np.where(products == first, second, first)
        return sigmoid(self.bias + self.slope * products + self.lead * (products - other) - self.none * surplus)


@dataclass(frozen=True)
class Learned:
    """What prompts taught beyond the articles' words: vectors (A + 1, F) and offsets (A + 1,), added to the articles'; the last is "no article"."""

    vectors: np.ndarray
    offsets: np.ndarray


class KnowledgeBase:
    """The articles and their index; with_articles() makes another one and leaves this one as it is."""

    def __init__(
        self,
        articles: Sequence[Article],
        space: TextSpace,
        vectors: np.ndarray,
        term_weights: np.ndarray,
        calibration: Calibration | None = None,
        values: Mapping[str, str] | None = None,
        version: str = "unsaved",
        *,
        offsets: np.ndarray | None = None,
        none: np.ndarray | None = None,
    ) -> None:
        """vectors: (A, F), term weights included; term_weights: (F,); values: the global {slots} and what they are filled with by default.

        offsets: (A,), added to the products, not a number for an article that has no example prompts (None: none has any);
        none: (F + 1,), vector and offset of "no article covers this".
        """
        _check_ids([(a.id, "the list of articles") for a in articles])
        if vectors.shape != (len(articles), len(space)) or term_weights.shape != (len(space),):
            raise ConfigError(f"knowledge: vectors {vectors.shape} do not fit {len(articles)} articles and {len(space)} terms")
        self.articles = tuple(articles)
        self.space = space
        self.term_weights = term_weights
        self.offsets = np.full(len(articles), np.nan, dtype=np.float32) if offsets is None else offsets.astype(np.float32)
        self.none = np.zeros(len(space) + 1, dtype=np.float32) if none is None else none.astype(np.float32)
        self.calibration = calibration or Calibration()
        self.values = dict(values or {})
        self.version = version
        # One row per term, since a request has few of them: its products are a sum of a few hundred rows of (A + 1,).
        self._by_term = np.column_stack([vectors.T, self.none[:-1]]).astype(np.float32, order="C")
        self._shift = np.append(np.where(np.isnan(self.offsets), self.calibration.own_text_offset, self.offsets), self.none[-1])

    @property
    def vectors(self) -> np.ndarray:
        """(A, F)"""
        return self._by_term[:, :-1].T

    @classmethod
    def build(
        cls,
        articles: Sequence[Article],
        example_prompts: Mapping[str, Sequence[str]],
        *,
        values: Mapping[str, str] | None = None,
        space: TextSpace | None = None,
        term_weights: np.ndarray | None = None,
        calibration: Calibration | None = None,
        learned: Learned | None = None,
    ) -> KnowledgeBase:
        """Index articles by their text, by the prompts in `example_prompts` (article id -> prompts; an id may be missing) and by what they taught."""
        values = dict(values or {})
        calibration = calibration or Calibration()
        own = [text_of(a, values) for a in articles]
        if space is None:
            everything = own + [p for a in articles for p in example_prompts.get(a.id, ())]
            space = TextSpace.fit(everything, min_words=1, min_grams=1 if len(everything) < 1000 else 2)
        if term_weights is None:
            term_weights = np.ones(len(space), dtype=np.float32)
        vectors = article_vectors(articles, example_prompts, space, values, calibration.own_text_gain).multiply(term_weights).toarray()
        offsets = none = None
        if learned is not None:
            vectors += learned.vectors[:-1]
            offsets, none = learned.offsets[:-1], np.append(learned.vectors[-1], learned.offsets[-1])
        return cls(articles, space, vectors, term_weights, calibration, values, offsets=offsets, none=none)

    def with_articles(self, articles: Sequence[Article], *, instead: bool = False) -> KnowledgeBase:
        """The base with a company's articles added, or in place of all of its own.

        An article with the id of a built-in one replaces it. What the present articles score changes only where a request also uses words that
        were in no article before.
        """
        _check_ids([(a.id, "the company's articles") for a in articles])
        fresh = {a.id for a in articles}
        kept = [] if instead else [i for i, a in enumerate(self.articles) if a.id not in fresh]
        space = self.space.grown([text_of(a, self.values) for a in articles])
        # A word that no prompt and no built-in article ever used names this company's matter; it weighs as much as the average term.
        weights = np.concatenate([self.term_weights, np.ones(len(space) - len(self.space), dtype=np.float32)])
        added = KnowledgeBase.build(articles, {}, values=self.values, space=space, term_weights=weights, calibration=self.calibration)
        old = np.pad(self.vectors[kept], ((0, 0), (0, len(space) - len(self.space))))
        vectors = np.concatenate([old, added.vectors])
        version = digest((self.version + json.dumps([asdict(a) for a in added.articles]) + str(instead)).encode())
        return KnowledgeBase(
            [*(self.articles[i] for i in kept), *articles],
            space,
            vectors,
            weights,
            self.calibration,
            self.values,
            version,
            offsets=np.concatenate([self.offsets[kept], added.offsets]),
            none=np.concatenate([self.none[:-1], np.zeros(len(space) - len(self.space)), self.none[-1:]]),
        )

    def match(self, text: str, k: int = 3) -> list[Match]:
        """The k likeliest articles, best first, equal scores in the order of the articles; none for a text without a known word."""
        found = self.measure(text)
        if found is None:
            return []
        products, surplus = found
        scores = self.calibration.scores(products, surplus)
        return [Match(self.articles[i], float(scores[i])) for i in np.argsort(-products, kind="stable")[:k]]

    def best(self, text: str) -> Match | None:
        """The matching article, or None where no article is likely enough."""
        found = self.match(text, 1)
        return found[0] if found and found[0].score >= self.calibration.threshold else None

    def measure(self, text: str) -> tuple[np.ndarray, float] | None:
        """What scores are made of; None for a text without a known word.

        Returns the request's product with every article, offsets included, (A,), and its surplus: how much more it sounds like a request that no
        article covers than covered ones do. The surplus is 0 where the best match is an article without example prompts: nothing learnt knew of it.
        """
        columns, values, _ = self.space.row(text)
        if not len(columns) or not self.articles:
            return None
        # Words and n-grams are two blocks of length 1 each.
        sums: np.ndarray = (values / np.sqrt(2.0)).astype(np.float32) @ self._by_term[columns] + self._shift
        products = sums[:-1]
        return products, 0.0 if np.isnan(self.offsets[int(products.argmax())]) else float(sums[-1])

    def save(self, folder: Path) -> str:
        """Write index and articles into an existing folder and return the version, a digest of both."""
        about = {"format": FORMAT, "articles": len(self.articles), "calibration": asdict(self.calibration)}
        # A term's largest weight is 127 steps of 8 bits.
        scale = np.abs(self.vectors).max(axis=0, initial=1e-6).astype(np.float32) / 127
        arrays = self.space.arrays() | {
            "term_weights": self.term_weights.astype(np.float16),
            "vectors": np.round(self.vectors / scale).astype(np.int8, order="C"),
            "scale": scale,
            "offsets": self.offsets,
            "none": self.none.astype(np.float16),
        }
        index = save(arrays, metadata={"deskroute": json.dumps(about)})
        texts = json.dumps({"values": self.values, "articles": [asdict(a) for a in self.articles]}, ensure_ascii=False, indent=1).encode()
        (folder / FILE).write_bytes(index)
        (folder / ARTICLES_FILE).write_bytes(texts)
        self.version = digest(index + texts)
        return self.version

    @classmethod
    def load(cls, folder: Path) -> KnowledgeBase:
        """Load an artefact. Raises ConfigError when a file is missing or damaged, or comes from another format."""
        arrays, about, _ = read_arrays(folder / FILE)
        path = folder / ARTICLES_FILE
        try:
            if about["format"] != FORMAT:
                raise ConfigError(f"knowledge: {folder} is of format {about['format']}, this version reads {FORMAT}; run `deskroute retrain router`")
            texts = read_checked(path)
            data = json.loads(texts)
            articles = [_article(row) for row in data["articles"]]
            space = TextSpace.from_arrays(arrays)
            if arrays["vectors"].shape != (len(articles), len(space)):
                raise ValueError(f"vectors of {arrays['vectors'].shape} for {len(articles)} articles and {len(space)} terms")
            version = digest((folder / FILE).read_bytes() + texts)
            values = {str(k): str(v) for k, v in data["values"].items()}
            return cls(
                articles,
                space,
                arrays["vectors"] * arrays["scale"],
                arrays["term_weights"].astype(np.float32),
                Calibration(**about["calibration"]),
                values,
                version,
                offsets=arrays["offsets"],
                none=arrays["none"],
            )
        except OSError as e:
            raise ConfigError(f"knowledge: cannot read {path}: {e.strerror or e}; run `deskroute retrain router`") from None
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise ConfigError(f"knowledge: the artefact in {folder} is damaged ({e}); run `deskroute retrain router`") from None


def load_folder(path: Path, personas: Sequence[str] = ()) -> list[Article]:
    """Read every article (*.md, README.md left out) of a folder and of the folders in it, in the order of their paths.

    Raises ConfigError where the folder is missing or holds no article, ArticleError for a bad file or an id that occurs twice.
    """
    if not path.is_dir():
        raise ConfigError(f"knowledge: {path} is no folder; give a folder of Markdown articles")
    files = sorted(f for f in path.rglob("*.md") if f.is_file() and f.name.lower() != "readme.md")
    if not files:
        raise ConfigError(f"knowledge: {path} holds no *.md file; put one Markdown article per topic into it")
    articles = []
    for file in files:
        try:
            articles.append(read_article(file, tuple(personas)))
        except OSError as e:
            raise ArticleError(f"{file}: cannot be read: {e.strerror or e}") from None
    _check_ids([(a.id, str(f)) for a, f in zip(articles, files, strict=True)])
    return articles


def article_vectors(
    articles: Sequence[Article],
    example_prompts: Mapping[str, Sequence[str]],
    space: TextSpace,
    values: Mapping[str, str],
    own_text_gain: float = 1.0,
) -> sparse.csr_matrix:
    """Articles -> (A, F), before term weights: own text and example prompts in one vector of length 1.

    An article with fewer than MIN_PROMPTS prompts is its own text alone, times `own_text_gain`.
    """
    rows = unit(space.rows([text_of(a, values) for a in articles]))
    mixed = []
    for i, article in enumerate(articles):
        prompts = example_prompts.get(article.id, ())
        if len(prompts) >= MIN_PROMPTS:
            mixed.append(unit(OWN_TEXT * rows[i] + (1 - OWN_TEXT) * unit(sparse.csr_matrix(space.rows(prompts).sum(axis=0)))))
        else:
            mixed.append(rows[i] * own_text_gain)
    return sparse.vstack(mixed, format="csr", dtype=np.float32) if mixed else sparse.csr_matrix((0, len(space)), dtype=np.float32)


def text_of(article: Article, values: Mapping[str, str]) -> str:
    """The text an article is indexed by, {slots} filled."""
    return fill(article.search_text(), dict(values) | {name: options[0] for name, options in article.slots.items()})


def unit(rows: sparse.csr_matrix) -> sparse.csr_matrix:
    """Rows scaled to length 1; an empty row stays empty."""
    length = np.sqrt(np.asarray(rows.multiply(rows).sum(axis=1)).ravel())
    return sparse.csr_matrix(sparse.diags(1.0 / np.maximum(length, 1e-12)) @ rows)


def _check_ids(found: Sequence[tuple[str, str]]) -> None:
    seen: dict[str, str] = {}
    for name, where in found:
        if name in seen:
            raise ArticleError(f"{where}: the article id {name!r} is taken by {seen[name]}; give one of them another `id:` in its front matter")
        seen[name] = where


def _article(row: Mapping[str, Any]) -> Article:
    article = Article(**row)
    return replace(
        article,
        symptoms=tuple(article.symptoms),
        steps=tuple(Step(**s) for s in row["steps"]),
        order={p: tuple(n) for p, n in article.order.items()},
        slots={name: tuple(options) for name, options in article.slots.items()},
    )
