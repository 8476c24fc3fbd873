"""Tickets, feedback and the built-in corpus -> samples to train on and to judge by, split by requester and time.

A dataset is a folder; its manifest.json is written last, so that a folder with a manifest is complete. Knows nothing of tokens or models.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from persona_models.errors import TicketError
from persona_models.protocol import Message
from pipelines.compose import Composer, Corpus
from pipelines.imports import Imported
from pipelines.tickets import Ticket
from router.article import handover_document
from router.feedback import Rating
from router.knowledge import KnowledgeBase
from router.redaction import redact

VALIDATION_SHARE = 0.15
# Below this a held-out share says nothing and a fine-tune learns nothing.
MIN_TICKETS = 20
# Requesters count as new for this long.
NEW_DAYS = 90


@dataclass(frozen=True)
class Sample:
    """One answer to learn or to judge by."""

    messages: tuple[Message, ...]
    document: str
    answer: str
    source: str  # corpus | ticket | feedback
    topic: str = ""
    # What kind of request it is, for figures by kind: register, tenure, length.
    traits: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Dataset:
    """A persona's samples, and what is known of them."""

    persona: str
    train: tuple[Sample, ...]
    validation: tuple[Sample, ...]
    folder: Path
    digest: str
    facts: Mapping[str, Any]
    # Of the people in `train`, the newest: they tell when to stop, so that `validation` judges what never saw it.
    watch: tuple[Sample, ...] = ()


def corpus_samples(corpus: Corpus, persona: str, n: int, *, seed: int, held_out: bool) -> list[Sample]:
    """n composed samples of a persona; the held-out ones come from authors that no training example has."""
    composer = Composer(corpus, seed, held_out=held_out)
    examples = (composer.example(i, persona) for i in range(n))
    return [Sample(e.messages, e.document, e.answer, "corpus", e.topic, {"register": e.register} | _length(e.messages)) for e in examples]


def ticket_samples(tickets: Sequence[Ticket], persona: str, knowledge: KnowledgeBase, values: Mapping[str, str]) -> list[Sample]:
    """Tickets as samples, each with the article that serving would show."""
    samples = []
    for t in tickets:
        document, topic = _document(t.prompt, persona, knowledge, values)
        messages = (Message("user", t.prompt),)
        tenure = {} if t.profile.tenure_days is None else {"tenure": "new" if t.profile.tenure_days < NEW_DAYS else "settled"}
        samples.append(Sample(messages, document, t.answer, "ticket", topic, tenure | _length(messages)))
    return samples


def _length(messages: Sequence[Message]) -> dict[str, str]:
    words = sum(len(m.content.split()) for m in messages if m.role == "user")
    return {"length": "short" if words <= 8 else "medium" if words <= 25 else "long"}


def feedback_samples(ratings: Sequence[Rating], persona: str, knowledge: KnowledgeBase, values: Mapping[str, str]) -> list[Sample]:
    """What people said of answers, redacted: a better answer that they wrote, else a liked answer as it was; disliked ones teach nothing here."""
    samples = []
    for rating in ratings:
        if not rating.messages or (rating.correct_persona or rating.persona) != persona:
            continue
        kept = rating.answer if rating.rating == "up" and rating.correct_persona in (None, rating.persona) else None
        answer = rating.better_answer or kept
        if answer:
            messages = tuple(Message(m.role, redact(m.content)) for m in rating.messages)
            prompt = " ".join(m.content for m in messages if m.role == "user")
            document, topic = _document(prompt, persona, knowledge, values)
            samples.append(Sample(messages, document, redact(answer), "feedback", topic, _length(messages)))
    return samples


def preferences(ratings: Sequence[Rating], persona: str) -> list[dict[str, Any]]:
    """Disliked answers with the better ones that people wrote, redacted: pairs for methods that learn from preferences."""
    return [
        {
            "messages": [{"role": m.role, "content": redact(m.content)} for m in r.messages],
            "chosen": redact(r.better_answer),
            "rejected": redact(r.answer),
        }
        for r in ratings
        if r.rating == "down" and r.messages and r.answer and r.better_answer and (r.correct_persona or r.persona) == persona
    ]


def split_tickets(tickets: Sequence[Ticket], share: float = VALIDATION_SHARE) -> tuple[list[Ticket], list[Ticket]]:
    """(train, validation): whole requesters are held out, those whose newest ticket is newest first, until the share is reached.

    Nobody is on both sides, and neither is a prompt; a ticket without a requester stands for itself, one without a time is the oldest. Both sides have
    somebody where there are two requesters at all.
    """
    groups: dict[str, list[int]] = {}
    for i, ticket in enumerate(tickets):
        groups.setdefault(ticket.requester or f"#{_plain(ticket.prompt)}", []).append(i)
    oldest = datetime.min.replace(tzinfo=UTC)
    newest = {name: max((tickets[i].created or oldest, i) for i in rows) for name, rows in groups.items()}
    held: set[int] = set()
    for name in sorted(groups, key=lambda n: newest[n], reverse=True)[: len(groups) - 1]:
        # A requester who would overshoot by much is left in training, unless nobody is held out yet.
        if not held or len(held) + len(groups[name]) <= 1.5 * share * len(tickets):
            held.update(groups[name])
        if len(held) >= share * len(tickets):
            break
    train = [t for i, t in enumerate(tickets) if i not in held]
    seen = {_plain(t.prompt) for t in train}
    return train, [t for i, t in enumerate(tickets) if i in held and _plain(t.prompt) not in seen]


def check_tickets(tickets: Sequence[Ticket], persona: str) -> None:
    """Refuse too few tickets, and ones of which none can be held out. Raises TicketError."""
    if len(tickets) < MIN_TICKETS:
        raise TicketError(
            f"only {len(tickets)} usable tickets of the persona {persona}; at least {MIN_TICKETS} are needed, 200 and more are worth it"
        )
    if not all(split_tickets(tickets)):
        raise TicketError("no ticket can be held out to judge by: all come from one requester, or all ask the same; export tickets of several people")


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def build_dataset(
    persona: str,
    out: Path,
    *,
    corpus: Corpus,
    knowledge: KnowledgeBase,
    values: Mapping[str, str],
    tickets: Imported | None,
    ratings: Sequence[Rating],
    corpus_train: int,
    corpus_validation: int,
    seed: int,
) -> Dataset:
    """Assemble and write a persona's dataset.

    Without tickets: the built-in corpus and the feedback. With tickets: the tickets and the feedback, and as many built-in samples again, so that a
    small base does not unlearn its manner. Raises TicketError for too few tickets of the persona.
    """
    rng = random.Random(seed)
    watch: list[Sample] = []
    train = feedback_samples(ratings, persona, knowledge, values)
    n_feedback = len(train)
    if tickets is None:
        train += corpus_samples(corpus, persona, corpus_train, seed=seed, held_out=False)
        validation = corpus_samples(corpus, persona, corpus_validation, seed=seed, held_out=True)
    else:
        own = tickets.of(persona)
        check_tickets(own, persona)
        early, late = split_tickets(own)
        early, watched = split_tickets(early)
        watch = ticket_samples(watched, persona, knowledge, values)
        train += ticket_samples(early, persona, knowledge, values)
        train += corpus_samples(corpus, persona, len(train), seed=seed, held_out=False)
        validation = ticket_samples(late, persona, knowledge, values)
    rng.shuffle(train)
    facts = {
        "persona": persona,
        "train": len(train),
        "watch": len(watch),
        "validation": len(validation),
        "feedback": n_feedback,
        "tickets": str(tickets) if tickets else None,
        "tickets_digest": tickets.digest if tickets else None,
        "seed": seed,
    }
    digest = _write(out, train, validation, watch, preferences(ratings, persona), facts)
    return Dataset(persona, tuple(train), tuple(validation), out, digest, facts, tuple(watch))


def _document(prompt: str, persona: str, knowledge: KnowledgeBase, values: Mapping[str, str]) -> tuple[str, str]:
    """What the model will read with a prompt, and the article's id."""
    match = knowledge.best(prompt)
    return (match.article.render(persona, values=values), match.article.id) if match else (handover_document(values), "")


def _write(
    out: Path, train: Sequence[Sample], validation: Sequence[Sample], watch: Sequence[Sample], pairs: Sequence[Any], facts: Mapping[str, Any]
) -> str:
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    files = {
        "train.jsonl": [asdict(s) for s in train],
        "validation.jsonl": [asdict(s) for s in validation],
        "watch.jsonl": [asdict(s) for s in watch],
        "preferences.jsonl": pairs,
    }
    digests = {}
    for name, rows in files.items():
        data = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows).encode()
        (partial / name).write_bytes(data)
        digests[name] = hashlib.sha256(data).hexdigest()
    digest = hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()[:16]
    manifest = {"digest": digest, "files": digests, **facts}
    (partial / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)
    return digest
