"""The corpus as data: complete, balanced, without personal data, and without leaks across the hold-out."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest
import yaml

from pipelines import coinage
from pipelines.compose import CORPUS, HELD_OUT, NEUTRAL, Composer, Corpus
from pipelines.tickets import redact
from router.article import slots_in

PERSONAS = ("leadership", "knowledge_worker", "field", "admin", "new_hire")
REGISTERS = {"chat", "ticket", "mail", "voicemail", "nonnative", "typos", "caps"}
TOPICS = sorted(p.stem for p in (CORPUS / "articles").glob("*.md"))


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return Corpus(CORPUS, PERSONAS)


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (CORPUS / name).read_text(encoding="utf-8").splitlines()]


def words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z0-9]+", text.lower()))


def test_there_are_at_least_150_topics():
    assert len(TOPICS) >= 150


@pytest.mark.parametrize("topic", TOPICS)
def test_every_article_is_complete(corpus, topic):
    article = corpus.articles[topic]
    assert 4 <= len(article.steps) <= 7
    assert all(s.short and s.full for s in article.steps)
    assert len(article.symptoms) >= 6
    assert article.cause
    assert article.escalate
    assert set(article.order) == set(article.notes) == set(PERSONAS)
    assert 2 <= len(article.order["leadership"]) <= 4
    text = (CORPUS / "articles" / f"{topic}.md").read_text(encoding="utf-8")
    assert slots_in(text) <= set(article.slots) | set(corpus.slots), "a slot that nobody declares"
    assert slots_in(text), "an article that varies nothing teaches copying from memory"


@pytest.mark.parametrize("topic", TOPICS)
def test_every_topic_has_enough_prompts_of_everybody(corpus, topic):
    mine = [p for p in corpus.prompts if p.topic == topic]
    assert len(mine) >= 30
    assert min(Counter(p.persona for p in mine)[x] for x in PERSONAS) >= 6
    assert {p.register for p in mine} <= REGISTERS
    assert sum(p.held_out for p in mine) >= 4


@pytest.mark.parametrize("topic", TOPICS)
def test_every_topic_has_phrases_of_its_own(topic):
    lines = (CORPUS / "phrases" / f"{topic}.txt").read_text(encoding="utf-8").splitlines()
    assert len(set(lines)) == len(lines) >= 100


def test_no_two_topics_share_a_phrase():
    seen = Counter(line for topic in TOPICS for line in (CORPUS / "phrases" / f"{topic}.txt").read_text(encoding="utf-8").splitlines())
    assert [line for line, n in seen.items() if n > 1] == []


def test_every_register_and_persona_is_well_represented(corpus):
    assert min(Counter(p.register for p in corpus.prompts)[r] for r in REGISTERS) >= 200
    counts = Counter(p.persona for p in corpus.prompts)
    assert max(counts.values()) < 1.1 * min(counts.values())


def test_no_text_names_a_persona_by_its_id(corpus):
    for prompt in corpus.prompts:
        assert not re.search(r"knowledge_worker|new_hire|\bleadership\b", prompt.text), prompt.text


def test_no_personal_data(corpus):
    """Addresses and numbers of people; a service desk's example.com names in articles are no one's."""
    texts = [p.text for p in corpus.prompts]
    texts += [
        r["text"] for name in ("out_of_domain", "neutral", "profiles", "persona", "uncovered", "odd_requests") for r in rows(f"router/{name}.jsonl")
    ]
    texts += [r["text"] for r in rows("router/two_requests.jsonl")]
    texts += [m["content"] for name in ("conversations", "talks") for r in rows(f"router/{name}.jsonl") for m in r["messages"]]
    found = [t for t in texts if re.search(r"\[(MAIL|IBAN|PHONE)\]", redact(t)) and "[MAIL]" not in t]
    assert not found, found[:5]


def test_no_prompt_twice_and_none_nearly_twice_across_the_hold_out(corpus):
    """Near: the same words up to one in five. A leak here would make every held-out figure a lie."""
    exact = Counter(" ".join(p.text.lower().split()) for p in corpus.prompts)
    assert [t for t, n in exact.items() if n > 1] == []
    trained: dict[str, list[frozenset[str]]] = {}
    for prompt in corpus.prompts:
        if not prompt.held_out:
            trained.setdefault(prompt.topic, []).append(words(prompt.text))
    near = []
    for prompt in (p for p in corpus.prompts if p.held_out):
        mine = words(prompt.text)
        near += [prompt.text for other in trained[prompt.topic] if len(mine & other) >= 0.8 * len(mine | other)]
    assert near == []


@pytest.mark.parametrize("persona", [*PERSONAS, NEUTRAL])
def test_every_manner_has_enough_parts(corpus, persona):
    manner = corpus.manner[persona]
    least = 40 if persona != NEUTRAL else 20
    assert len(manner.openers) >= least
    assert len(manner.closers) >= least
    for part in (manner.openers, manner.closers, manner.handover, manner.still, manner.thanks):
        assert len(set(part)) == len(part)
        known = set(corpus.slots) | {"subject"}
        assert all(slots_in(text) <= known for text in part)


def test_manners_share_no_part(corpus):
    """An opener that two personas share would blur what a blind reader tells apart."""
    seen = Counter(t for p in PERSONAS for t in {*corpus.manner[p].openers, *corpus.manner[p].closers})
    assert [t for t, n in seen.items() if n > 1] == []


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("out_of_domain", 600),
        ("neutral", 400),
        ("profiles", 600),
        ("conversations", 150),
        ("two_requests", 150),
        ("persona", 1500),
        ("uncovered", 1200),
        ("odd_requests", 250),
    ],
)
def test_router_files_are_complete(corpus, name, least):
    found = rows(f"router/{name}.jsonl")
    assert len(found) >= least
    assert any(r["voice"].startswith(HELD_OUT) for r in found)
    if name == "persona":
        counts = Counter(r["persona"] for r in found) + Counter(p.persona for p in corpus.prompts if p.tells)
        assert min(counts[p] for p in PERSONAS) >= 400
        assert sum(r.get("decoy", False) for r in found) >= 400
    if name == "two_requests":
        assert all(part["text"] in r["text"] and part["persona"] in PERSONAS for r in found for part in r["parts"])
    if name == "conversations":
        assert all(r["messages"][-1]["role"] == "user" for r in found)


def test_titles_belong_to_one_persona_each():
    data = yaml.safe_load((CORPUS / "router" / "titles.yaml").read_text(encoding="utf-8"))
    assert set(data["titles"]) == set(PERSONAS)
    assert min(len(set(t)) for t in data["titles"].values()) >= 150
    seen = Counter(title.lower() for titles in data["titles"].values() for title in titles)
    assert [t for t, n in seen.items() if n > 1] == []


def test_composition_is_repeatable_and_grounded(corpus):
    """Every step of an article's answer stands in its document, word for word, and no slot is left open."""
    one, two = Composer(corpus, 3), Composer(corpus, 3)
    for i in range(200):
        example = one.example(i)
        assert example == two.example(i)
        assert not slots_in(example.answer), example.answer
        if example.kind == "article":
            steps = [line.split(". ", 1)[1] for line in example.document.splitlines() if line[0].isdigit()]
            assert sum(step in example.answer for step in steps) >= min(2, len(steps))


def test_composed_articles_hold_names_that_no_corpus_holds(corpus):
    """What is written nowhere else can only be copied; a model that knew every word might recite it."""
    known = {w for path in CORPUS.rglob("*.*") if path.suffix in {".md", ".jsonl", ".yaml", ".txt"} for w in re.findall(r"\w+", path.read_text())}
    composer = Composer(corpus, 5)
    documents = [composer.example(i).document for i in range(300)]
    fresh = sum(any(w not in known for w in re.findall(r"\w+", d)) for d in documents)
    assert fresh >= 100
    words = [coinage.word(random.Random(i)) for i in range(300)]
    assert len(set(words)) > 290
    assert all(w == w.strip() and "\n" not in w and "{" not in w for w in words)


def test_a_corpus_without_uncovered_requests_and_conversations_still_composes(tmp_path):
    """A company's own corpus has the same form, but not every file; hand-overs are then about its prompts."""
    (tmp_path / "router").mkdir()
    for part in ("articles", "prompts", "manner", "slots.yaml", "router/follow_ups.yaml"):
        (tmp_path / part).symlink_to(CORPUS / part)
    own = Composer(Corpus(tmp_path, PERSONAS), 1)
    asked = {p.text for p in own.prompts}
    handovers = [e for e in (own.example(i) for i in range(200)) if e.kind == "handover"]
    assert handovers
    assert all(e.messages[0].content in asked for e in handovers)


def test_held_out_authors_are_never_composed_for_training(corpus):
    held = {p.text for p in corpus.prompts if p.held_out}
    composer = Composer(corpus, 1)
    assert not {composer.example(i).messages[0].content for i in range(1000)} & held


def said(row):
    """What users say in a row: its text, or their turns."""
    return [row["text"]] if "text" in row else [m["content"] for m in row["messages"] if m["role"] == "user"]


def test_the_evaluation_set_is_nobodys_training_text(corpus):
    """Neither word for word nor nearly; texts of fewer than six words ("is the wifi down?") may be alike, and "did that" is anybody's."""
    texts = [p.text for p in corpus.prompts]
    for name in (
        "persona",
        "profiles",
        "neutral",
        "out_of_domain",
        "uncovered",
        "odd_requests",
        "two_requests",
        "two_matters",
        "talks",
        "conversations",
    ):
        texts += [text for r in rows(f"router/{name}.jsonl") for text in said(r)]
    trained = {" ".join(text.lower().split()) for text in texts}
    by_word: dict[str, list[frozenset[str]]] = {}
    for text in texts:
        for word in words(text):
            by_word.setdefault(word, []).append(words(text))
    for path in sorted(Path(CORPUS / "evaluation").glob("*.jsonl")):
        asked = [text for line in path.read_text(encoding="utf-8").splitlines() for text in said(json.loads(line)) if len(text.split()) > 2]
        assert not {" ".join(text.lower().split()) for text in asked} & trained
        for text in asked:
            mine = words(text)
            if len(mine) >= 6:
                # A near copy shares at least one of the rarest words.
                rarest = sorted(mine, key=lambda w: len(by_word.get(w, ())))[: len(mine) // 5 + 1]
                near = [o for w in rarest for o in by_word.get(w, ()) if len(mine & o) >= 0.8 * len(mine | o)]
                assert not near, f"{path.name}: {text}"
