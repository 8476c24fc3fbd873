"""The built-in corpus -> conversations to learn from: a prompt, the article as the model will read it, and an answer in a persona's manner.

Answers are composed of hand-written parts: an opener, the article's steps as they stand in the prompt, the persona's note, a closer. Names, numbers,
portals, wordings and step orders vary from one composition to the next, so that a model learns to take them from the article and not from memory.
This file knows nothing of tokens or models.
"""

from __future__ import annotations

import hashlib
import json
import random
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from persona_models.errors import WorkError
from persona_models.protocol import Message
from pipelines import coinage
from router.article import Article, Step, fill, handover_document, read_article, slots_in

CORPUS = Path(__file__).with_name("corpus")
HELD_OUT = "held_"  # voices whose names begin so are never trained on
NEUTRAL = "neutral"


@dataclass(frozen=True)
class Prompt:
    """What somebody wrote about a topic."""

    text: str
    topic: str
    persona: str
    register: str
    voice: str
    tells: bool = True  # whether the words give the persona away
    kind: str = ""  # "plain": written to be understood, and what retrieval is calibrated on

    @property
    def held_out(self) -> bool:
        return self.voice.startswith(HELD_OUT)


@dataclass(frozen=True)
class Example:
    """One conversation to learn: the answer to messages, with the document the model reads. `persona` is "neutral" for the base's own manner."""

    messages: tuple[Message, ...]
    document: str
    answer: str
    persona: str
    topic: str
    kind: str  # article | handover | still | thanks
    register: str = ""


@dataclass(frozen=True)
class Manner:
    """How a persona is spoken to: lists of hand-written parts."""

    openers: tuple[str, ...]
    lead_in: tuple[str, ...]
    closers: tuple[str, ...]
    handover: tuple[str, ...]
    still: tuple[str, ...]
    thanks: tuple[str, ...]


class Corpus:
    """The corpus folder, read once. Raises WorkError that names the file for anything malformed."""

    def __init__(self, folder: Path, personas: Sequence[str]) -> None:
        self.folder, self.personas = folder, tuple(personas)

    @cached_property
    def slots(self) -> dict[str, list[str]]:
        return {k: [str(v) for v in vs] for k, vs in _yaml(self.folder / "slots.yaml").items()}

    @cached_property
    def values(self) -> dict[str, str]:
        """What the built-in helpdesk serves for the global slots."""
        return {name: options[0] for name, options in self.slots.items()}

    @cached_property
    def articles(self) -> dict[str, Article]:
        found = [read_article(p, self.personas) for p in sorted((self.folder / "articles").glob("*.md"))]
        return {a.id: a for a in found}

    @cached_property
    def prompts(self) -> tuple[Prompt, ...]:
        rows = []
        for path in sorted((self.folder / "prompts").glob("*.jsonl")):
            if path.stem in self.articles:
                rows += [Prompt(topic=path.stem, **row) for row in _jsonl(path)]
        return tuple(rows)

    @cached_property
    def uncovered(self) -> tuple[dict[str, str], ...]:
        """Messages that no article answers: requests without an article, and what is no request."""
        return tuple(row for name in ("uncovered", "out_of_domain") for row in self._router_rows(name))

    @cached_property
    def conversations(self) -> tuple[dict[str, Any], ...]:
        """Conversations that came to no end: `messages`, the last one a user's, and the `persona` of the user."""
        return tuple(self._router_rows("conversations"))

    @cached_property
    def digest(self) -> str:
        """16 hex digits over the name and content of every file that models learn from."""
        digest = hashlib.sha256()
        learnt = ("articles", "prompts", "manner", "router")
        for path in [self.folder / "slots.yaml", *sorted(p for part in learnt for p in (self.folder / part).rglob("*") if p.is_file())]:
            digest.update(str(path.relative_to(self.folder)).encode())
            digest.update(path.read_bytes())
        return digest.hexdigest()[:16]

    def _router_rows(self, name: str) -> list[dict[str, Any]]:
        """Rows of a file that a company's own corpus may lack."""
        path = self.folder / "router" / f"{name}.jsonl"
        return _jsonl(path) if path.exists() else []

    @cached_property
    def manner(self) -> dict[str, Manner]:
        names = (*self.personas, NEUTRAL)
        return {p: Manner(**{k: tuple(v) for k, v in _yaml(self.folder / "manner" / f"{p}.yaml").items()}) for p in names}

    @cached_property
    def follow_ups(self) -> dict[str, list[str]]:
        return _yaml(self.folder / "router" / "follow_ups.yaml")


WORDINGS = ("plain", "short", "full")
# Share of composed conversations whose article has the steps of others, so that an answer must be read off the article, and how many steps it has.
SCRAMBLED = 0.4
N_STEPS = (2, 3, 4, 4, 5, 5, 6, 7, 8)
# Share of made-up words among those exchanged, and of slots that get a made-up value.
COINED = 0.4
COINED_SLOTS = 0.25
# Share of scrambled articles whose steps repeat words of one another, so that the words before no longer tell which step is being read.
ENTANGLED = 0.5
# Shares of the kinds of conversation among the composed ones.
KINDS = {"article": 0.82, "handover": 0.1, "still": 0.05, "thanks": 0.03}
# One in so many of what people write after an answer is held out.
HELD_OUT_FOLLOW_UPS = 10


class Composer:
    """Composes examples; the same seed and index always give the same example."""

    def __init__(self, corpus: Corpus, seed: int, *, held_out: bool = False, articles: Mapping[str, Article] | None = None) -> None:
        self.corpus, self.seed = corpus, seed
        self.articles = dict(articles if articles is not None else corpus.articles)
        self.prompts = [p for p in corpus.prompts if p.held_out == held_out and p.topic in self.articles]
        self.uncovered = [r for r in corpus.uncovered if r["voice"].startswith(HELD_OUT) == held_out]
        self.conversations = [r for r in corpus.conversations if r["voice"].startswith(HELD_OUT) == held_out]
        self.follow_ups = {
            kind: [t for t in texts if held_out == (zlib.crc32(t.encode()) % HELD_OUT_FOLLOW_UPS == 0)] or texts
            for kind, texts in corpus.follow_ups.items()
        }
        if not self.prompts:
            raise WorkError(f"{corpus.folder} holds no {'held-out ' if held_out else ''}prompts; restore pipelines/corpus/prompts")
        self._by_persona = {p: [r for r in self.prompts if r.persona == p] for p in corpus.personas}

    def example(self, index: int, persona: str | None = None) -> Example:
        """The index-th example; of one persona, or of a random one (the neutral manner included) where persona is None."""
        rng = random.Random(f"{self.seed}/{index}/{persona}")
        if persona is None:
            # The neutral manner is the base's own: one conversation in four, whoever asks.
            persona = NEUTRAL if rng.random() < 0.25 else rng.choice(self.corpus.personas)
        prompt = rng.choice(self.prompts if persona == NEUTRAL else self._by_persona[persona])
        kind = rng.choices(list(KINDS), weights=list(KINDS.values()))[0]
        return self.compose(prompt, persona, kind, rng)

    @cached_property
    def _words(self) -> list[str]:
        """Every word of the articles once."""
        text = " ".join(" ".join([*(st.say(w) for st in a.steps for w in WORDINGS), *a.notes.values(), a.cause]) for a in self.articles.values())
        return sorted({w for w in text.split() if "{" not in w and "}" not in w})

    def _scrambled(self, article: Article, persona: str, rng: random.Random) -> Article:
        """The article with subject, cause, steps and note of other articles and some words exchanged: the prompt no longer tells what will be said."""
        others = list(self.articles.values())
        donors = [rng.choice(others) for _ in range(rng.choice(N_STEPS))]
        told, warned = rng.choice(others), rng.choice(others)
        share = rng.choice((0.06, 0.12, 0.25))

        def swap(text: str) -> str:
            return " ".join(self._other_word(rng) if rng.random() < share and "{" not in w else w for w in text.split())

        texts = [swap(rng.choice(d.steps).say(rng.choice(WORDINGS))) for d in donors]
        steps = tuple(map(Step, _entangled(texts, rng) if rng.random() < ENTANGLED else texts))
        slots = {k: v for d in (article, told, warned, *donors) for k, v in d.slots.items()}
        notes = {persona: swap(warned.notes[persona])} if persona in warned.notes else {}
        return replace(article, subject=swap(told.subject), cause=swap(told.cause), steps=steps, notes=notes, slots=slots, order={})

    def _other_word(self, rng: random.Random) -> str:
        return coinage.word(rng) if rng.random() < COINED else rng.choice(self._words)

    def compose(self, prompt: Prompt, persona: str, kind: str, rng: random.Random, *, vary: bool = True) -> Example:
        """One conversation about a prompt. vary=False keeps the article as it is served."""
        article = self.articles[prompt.topic]
        if vary and rng.random() < SCRAMBLED:
            article = self._scrambled(article, persona, rng)
        manner = self.corpus.manner[persona]
        values = {k: self._value(v, rng) if vary else v[0] for k, v in (self.corpus.slots | dict(article.slots)).items()}
        reader = None if persona == NEUTRAL else persona
        shown = _varied(article, reader, rng) if vary else article
        wording = rng.choice(WORDINGS) if vary and rng.random() < 0.4 else None
        document = shown.render(reader, wording=wording, values=values)
        messages = [Message("user", prompt.text)]
        if kind == "handover":
            document = handover_document(values)
            mine = [c for c in self.conversations if c["persona"] == persona]
            form = rng.random()
            if form < 0.4 and self.uncovered:
                messages = [Message("user", rng.choice(self.uncovered)["text"])]
            elif form < 0.6 and mine:
                messages = [Message(**m) for m in rng.choice(mine)["messages"]]
            answer = _pick(manner.handover, values, document, rng)
        else:
            answer = self._answer(persona, document, values | {"subject": shown.subject}, rng)
        if kind in ("still", "thanks"):
            messages += [Message("assistant", answer), Message("user", rng.choice(self.follow_ups[kind]))]
            answer = _pick(getattr(manner, kind), values, document, rng)
        return Example(tuple(messages), document, answer, persona, prompt.topic, kind, prompt.register)

    def _value(self, options: Sequence[str], rng: random.Random) -> str:
        if rng.random() >= COINED_SLOTS:
            return rng.choice(options)
        return coinage.number(rng) if options[0].replace(" ", "").isdigit() else coinage.word(rng)

    def _answer(self, persona: str, document: str, values: Mapping[str, str], rng: random.Random) -> str:
        manner = self.corpus.manner[persona]
        parts = _Parts.of(document)
        opener, lead_in, closer = (_pick(x, values, document, rng) for x in (manner.openers, manner.lead_in, manner.closers))
        return "\n".join(line for line in LAYOUT.get(persona, _neutral)(parts, opener, lead_in, closer) if line)


@dataclass(frozen=True)
class _Parts:
    """A rendered article, taken apart again: an answer is made of what its reader can see."""

    cause: str
    steps: tuple[str, ...]
    note: str
    desk: str

    @classmethod
    def of(cls, document: str) -> _Parts:
        lines = document.splitlines()
        named = {k: next((x.removeprefix(f"{k}: ") for x in lines if x.startswith(f"{k}: ")), "") for k in ("Cause", "Note", "Desk")}
        steps = tuple(x.split(". ", 1)[1] for x in lines if x[:1].isdigit())
        return cls(named["Cause"], steps, named["Note"], named["Desk"])


# Numbers and "Note:" stand in an answer as they stand in its article: they are what a small model finds the next line by (docs/LOG.md).
def _leadership(a: _Parts, opener: str, lead_in: str, closer: str) -> list[str]:
    return [f"{opener} {lead_in} {' '.join(_numbered(a.steps[:3]))}", _note(a), closer]


def _knowledge_worker(a: _Parts, opener: str, lead_in: str, closer: str) -> list[str]:
    return [opener, a.cause and f"Cause: {a.cause}", lead_in, *_numbered(a.steps), _note(a), closer]


def _field(a: _Parts, opener: str, lead_in: str, closer: str) -> list[str]:
    return [opener, _note(a), lead_in, *_numbered(a.steps[:4]), closer]


def _admin(a: _Parts, opener: str, lead_in: str, closer: str) -> list[str]:
    return [f"{opener} {lead_in}", *_numbered(a.steps), _note(a), closer]


def _new_hire(a: _Parts, opener: str, lead_in: str, closer: str) -> list[str]:
    return [opener, _note(a), lead_in, *(f"Step {line}" for line in _numbered(a.steps)), closer]


def _neutral(a: _Parts, opener: str, lead_in: str, closer: str) -> list[str]:
    return [opener, *_numbered(a.steps), a.desk and f"Desk: {a.desk}", closer]


def _note(a: _Parts) -> str:
    return a.note and f"Note: {a.note}"


def _numbered(steps: Sequence[str]) -> list[str]:
    return [f"{n}. {s}" for n, s in enumerate(steps, 1)]


# How each persona's answer is laid out; a persona that is not named here is answered in the neutral layout.
LAYOUT = {
    "leadership": _leadership,
    "knowledge_worker": _knowledge_worker,
    "field": _field,
    "admin": _admin,
    "new_hire": _new_hire,
    NEUTRAL: _neutral,
}


def _entangled(steps: Sequence[str], rng: random.Random) -> list[str]:
    """The steps, every other one with a few words more that stand in an earlier one, or in itself, too."""
    done: list[str] = []
    for step in steps:
        words = step.split()
        if rng.random() < 0.5:
            source = rng.choice([*done, step]).split()
            first, n = rng.randrange(len(source)), rng.randint(2, 7)
            place = rng.randint(0, len(words))
            words[place:place] = source[first : first + n]
        done.append(" ".join(words))
    return done


def _pick(texts: Sequence[str], values: Mapping[str, str], document: str, rng: random.Random) -> str:
    """One of the texts whose slots the model can read in the document, filled."""
    fits = [t for t in texts if all(values.get(s, "\0") in document for s in slots_in(t))]
    return fill(rng.choice(fits), values)


def _varied(article: Article, persona: str | None, rng: random.Random) -> Article:
    """An article as another company might have written it: other steps or orders, parts missing."""
    if rng.random() < 0.35:
        keep = rng.sample(range(1, len(article.steps) + 1), rng.randint(min(3, len(article.steps)), len(article.steps)))
        keep = sorted(keep) if rng.random() < 0.5 else keep
        article = replace(article, order={persona or "": tuple(keep)})
    if rng.random() < 0.2:
        article = replace(article, notes={})
    if rng.random() < 0.15:
        article = replace(article, cause="")
    if rng.random() < 0.15:
        article = replace(article, escalate="")
    if rng.random() < 0.1:
        article = replace(article, subject=f'"{article.title}"')
    return article


def _yaml(path: Path) -> dict:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as e:
        raise WorkError(f"{path}: {e}") from None


def _jsonl(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, json.JSONDecodeError) as e:
        raise WorkError(f"{path}: {e}") from None
