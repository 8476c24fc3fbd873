"""The router's corpus as data: prompts with persona and topic, profiles, neutral texts, what is no request, phrases.

Knows nothing of features or models.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from persona_models.errors import InputError, WorkError
from persona_models.protocol import Message
from pipelines.compose import HELD_OUT
from router.article import Article, read_article
from router.query import Profile, Query, words_of

FOLDS = 5


class _Voiced:
    """What somebody wrote; `voice` is who."""

    voice: str

    @property
    def held_out(self) -> bool:
        return self.voice.startswith(HELD_OUT)


@dataclass(frozen=True)
class Labelled(_Voiced):
    """One text to learn from or to measure on; what is not known of it is empty."""

    text: str
    voice: str
    persona: str = ""
    topic: str = ""
    register: str = ""
    kind: str = ""
    profile: Profile = field(default_factory=Profile)
    tells: bool = True  # whether text or profile give the persona away

    @property
    def query(self) -> Query:
        return Query(self.text, self.profile)

    @property
    def text_only(self) -> Query:
        return Query(self.text)


@dataclass(frozen=True)
class Talk(_Voiced):
    """A conversation whose last turn is a user's, and the persona of who wrote that turn."""

    messages: tuple[Message, ...]
    persona: str
    voice: str
    kind: str = ""  # follow_up: the last turn tells nothing; changed: it is of somebody else


@dataclass(frozen=True)
class Requests(_Voiced):
    """A message that holds one request or two of different personas: parts are pieces of its text with their personas."""

    text: str
    parts: tuple[tuple[str, str], ...]
    voice: str


@dataclass(frozen=True)
class Topical(_Voiced):
    """A message of one sender with one matter or two, by the articles that answer them, in order."""

    text: str
    topics: tuple[str, ...]
    voice: str


@dataclass(frozen=True)
class Titles:
    """Job titles and departments by persona. Who has been there for fewer than `first_days` is of `newcomers`, whatever the title, save `lasting`."""

    titles: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    departments: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    newcomers: str = ""
    first_days: int = 0
    lasting: tuple[str, ...] = ()


@dataclass(frozen=True)
class RouterData:
    """The router's corpus. `prompts` have a topic; `personal` have none, some of them a profile; `neutral` give nobody away."""

    articles: tuple[Article, ...]
    values: Mapping[str, str]
    prompts: tuple[Labelled, ...]
    personal: tuple[Labelled, ...]
    neutral: tuple[Labelled, ...]
    out_of_domain: tuple[Labelled, ...]
    uncovered: tuple[Labelled, ...] = ()  # requests that no article covers; `topic` holds their subject
    odd: tuple[Labelled, ...] = ()  # requests that look like none
    titles: Titles = field(default_factory=Titles)
    phrases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # topic -> words and turns by which people speak of it
    lexicon: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # word lists by what their words have in common
    talks: tuple[Talk, ...] = ()
    requests: tuple[Requests, ...] = ()
    matters: tuple[Topical, ...] = ()
    follow_ups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # kind -> what people write behind an answer


def read_router_corpus(corpus_dir: Path, personas: Sequence[str] = ()) -> RouterData:
    """Read articles, prompts and the `router/` files; all but articles and prompts may be missing.

    Raises WorkError that names file and line for what is malformed, has an empty text or an unknown persona, and for a corpus without prompts.
    """
    articles = tuple(read_article(path, tuple(personas)) for path in sorted((corpus_dir / "articles").glob("*.md")))
    known = {a.id for a in articles}
    prompts = []
    for path in sorted((corpus_dir / "prompts").glob("*.jsonl")):
        if path.stem in known:
            prompts += [replace(row, topic=path.stem) for row in _rows(path, personas, needs_persona=True)]
    if not prompts:
        raise WorkError(f"{corpus_dir}: no prompts/<topic>.jsonl with an article of the same name; there is nothing to train the router on")
    router = corpus_dir / "router"
    personal = [*_rows(router / "persona.jsonl", personas, needs_persona=True), *_rows(router / "profiles.jsonl", personas, needs_persona=True)]
    return RouterData(
        articles=articles,
        values=_first_values(corpus_dir / "slots.yaml"),
        prompts=tuple(prompts),
        personal=tuple(personal),
        neutral=tuple(_rows(router / "neutral.jsonl", personas)),
        out_of_domain=tuple(_rows(router / "out_of_domain.jsonl", personas)),
        uncovered=tuple(_rows(router / "uncovered.jsonl", personas)),
        odd=tuple(_rows(router / "odd_requests.jsonl", personas)),
        titles=_titles(router / "titles.yaml", personas),
        lexicon=_lexicon(router / "lexicon"),
        talks=tuple(
            Talk(_messages(r), str(r["persona"]), str(r["voice"]), str(r.get("kind", "")))
            for name in ("conversations", "talks")
            for r in _objects(router / f"{name}.jsonl")
        ),
        requests=tuple(_requests(r) for r in _objects(router / "two_requests.jsonl")),
        matters=tuple(_topical(r, known) for r in _objects(router / "two_matters.jsonl")),
        follow_ups=_follow_ups(router / "follow_ups.yaml"),
        phrases={p.stem: _lines(p) for p in sorted((corpus_dir / "phrases").glob("*.txt")) if p.stem in known},
    )


def _follow_ups(path: Path) -> dict[str, tuple[str, ...]]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else {}
        return {str(kind): tuple(map(str, texts)) for kind, texts in found.items()}
    except (OSError, yaml.YAMLError, AttributeError, TypeError) as e:
        raise WorkError(f"{path}: it must list what people write behind an answer, by kind ({e})") from None


def seen(rows: Sequence[Labelled]) -> list[Labelled]:
    """The rows of the training voices."""
    return [r for r in rows if not r.held_out]


def folds(groups: Sequence[str], seed: int) -> Iterator[np.ndarray]:
    """Masks (N,) of up to FOLDS disjoint parts, every group (a voice, a subject) whole in one of them."""
    names = sorted(set(groups))
    order = np.random.default_rng(seed).permutation(len(names))
    part = {name: int(order[i]) % min(FOLDS, len(names)) for i, name in enumerate(names)}
    parts = np.array([part[g] for g in groups])
    for n in range(min(FOLDS, len(names))):
        yield parts == n


def _rows(path: Path, personas: Sequence[str], *, needs_persona: bool = False) -> list[Labelled]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as e:
        raise WorkError(f"{path}: cannot be read: {e}") from None
    rows = []
    for n, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            text, persona = str(row["text"]).strip(), str(row["persona"]) if needs_persona else ""
            profile = Profile.from_metadata(row.get("profile") or {})
        except (ValueError, KeyError, TypeError, AttributeError, InputError) as e:
            raise WorkError(f"{path}:{n}: not a line of this file ({type(e).__name__}: {e})") from None
        if not text or (needs_persona and personas and persona not in personas):
            raise WorkError(f"{path}:{n}: empty text, or {persona!r} is no persona of the catalogue ({', '.join(personas)})")
        voice = str(row.get("voice") or f"{path.stem}_{n}")
        rows.append(
            Labelled(
                text,
                voice,
                persona,
                str(row.get("subject", "")),
                register=str(row.get("register", "")),
                kind=str(row.get("kind", "")),
                profile=profile,
                tells=bool(row.get("tells", True)),
            )
        )
    return rows


def _objects(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file that a corpus may lack, one a line, each with a voice."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        for n, row in enumerate(rows, 1):
            if not isinstance(row, dict) or not row.get("voice"):
                raise WorkError(f"{path}:{n}: must be an object with a voice")
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError, ValueError) as e:
        raise WorkError(f"{path}: cannot be read: {e}") from None
    return rows


def _messages(row: Mapping[str, Any]) -> tuple[Message, ...]:
    return tuple(Message(m["role"], m["content"]) for m in row["messages"])


def _requests(row: Mapping[str, Any]) -> Requests:
    parts = tuple((str(p["text"]), str(p["persona"])) for p in row["parts"])
    return Requests(str(row["text"]), parts, str(row["voice"]))


def _topical(row: Mapping[str, Any], known: Collection[str]) -> Topical:
    topics = tuple(map(str, row["topics"]))
    if strangers := set(topics) - set(known):
        raise WorkError(f"router/two_matters.jsonl: {', '.join(sorted(strangers))}: no article of that name")
    return Topical(str(row["text"]), topics, str(row["voice"]))


def _lines(path: Path) -> tuple[str, ...]:
    try:
        return tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as e:
        raise WorkError(f"{path}: cannot be read: {e}") from None


def _titles(path: Path, personas: Sequence[str]) -> Titles:
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        rule = raw["newcomers"]
        titles, departments = ({str(p): tuple(str(t) for t in found) for p, found in raw[key].items()} for key in ("titles", "departments"))
        read = Titles(titles, departments, str(rule["persona"]), int(rule["first_days"]), tuple(str(p) for p in rule["except"]))
    except FileNotFoundError:
        return Titles()
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError, LookupError, TypeError, ValueError) as e:
        raise WorkError(f"{path}: must hold `titles` and `departments` by persona and the rule for `newcomers` ({e})") from None
    if strangers := {*read.titles, *read.departments, read.newcomers, *read.lasting} - set(personas or read.titles):
        raise WorkError(f"{path}: {', '.join(sorted(strangers))}: no persona of the catalogue ({', '.join(personas)})")
    return read


def _lexicon(folder: Path) -> dict[str, tuple[str, ...]]:
    """The word lists of every file in a folder, their entries as words_of gives them, and one more of all that stand in a file. A corpus may have none."""
    lists: dict[str, tuple[str, ...]] = {}
    for path in sorted(folder.glob("*.yaml")):
        try:
            for name, entries in yaml.safe_load(path.read_text(encoding="utf-8")).items():
                plain = (" ".join(words_of(str(e))) for e in entries)
                lists[str(name)] = tuple(e for e in dict.fromkeys(plain) if e)
                lists[f"{path.stem} words"] = (*lists.get(f"{path.stem} words", ()), *lists[str(name)])
        except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError, TypeError) as e:
            raise WorkError(f"{path}: must hold lists of words by name ({e})") from None
    return lists


def _first_values(path: Path) -> dict[str, str]:
    try:
        slots = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        return {str(name): str(options[0]) for name, options in slots.items()}
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError, LookupError, TypeError) as e:
        raise WorkError(f"{path}: must map slot names to lists of values ({e})") from None
