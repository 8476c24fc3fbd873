"""Tickets, feedback and the built-in corpus -> samples to train on and to judge by, split by requester and time.

A dataset is a folder; its manifest.json is written last, so that a folder with a manifest is complete. Knows nothing of tokens or models.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from persona_models.errors import TicketError
from persona_models.protocol import Message
from pipelines.compose import Composer, Corpus
from pipelines.tickets import Ticket, TicketReport, redact
from router.article import handover_document
from router.feedback import Rating
from router.knowledge import KnowledgeBase

VALIDATION_SHARE = 0.15
# Below this a held-out share says nothing and a fine-tune learns nothing.
MIN_TICKETS = 20


@dataclass(frozen=True)
class Sample:
    """One answer to learn or to judge by."""

    messages: tuple[Message, ...]
    document: str
    answer: str
    source: str  # corpus | ticket | feedback
    topic: str = ""


@dataclass(frozen=True)
class Dataset:
    """A persona's samples, and what is known of them."""

    persona: str
    train: tuple[Sample, ...]
    validation: tuple[Sample, ...]
    folder: Path
    digest: str
    facts: Mapping[str, Any]


def corpus_samples(corpus: Corpus, persona: str, n: int, *, seed: int, held_out: bool) -> list[Sample]:
    """n composed samples of a persona; the held-out ones come from authors that no training example has."""
    composer = Composer(corpus, seed, held_out=held_out)
    examples = (composer.example(i, persona) for i in range(n))
    return [Sample(e.messages, e.document, e.answer, "corpus", e.topic) for e in examples]


def ticket_samples(tickets: Sequence[Ticket], persona: str, knowledge: KnowledgeBase, values: Mapping[str, str]) -> list[Sample]:
    """Tickets as samples, each with the article that serving would show."""
    return [Sample((Message("user", t.prompt),), _document(t.prompt, persona, knowledge, values), t.answer, "ticket") for t in tickets]


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
            samples.append(Sample(messages, _document(prompt, persona, knowledge, values), redact(answer), "feedback"))
    return samples


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


def tickets_of(tickets: Sequence[Ticket], persona: str) -> list[Ticket]:
    """The tickets of a persona and those that name none. Raises TicketError where they are too few."""
    own = [t for t in tickets if t.persona in (None, persona)]
    if len(own) < MIN_TICKETS:
        raise TicketError(f"only {len(own)} usable tickets of the persona {persona}; at least {MIN_TICKETS} are needed, 200 and more are worth it")
    return own


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def build_dataset(
    persona: str,
    out: Path,
    *,
    corpus: Corpus,
    knowledge: KnowledgeBase,
    values: Mapping[str, str],
    tickets: Sequence[Ticket] | None,
    ticket_report: TicketReport | None,
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
    train = feedback_samples(ratings, persona, knowledge, values)
    n_feedback = len(train)
    if tickets is None:
        train += corpus_samples(corpus, persona, corpus_train, seed=seed, held_out=False)
        validation = corpus_samples(corpus, persona, corpus_validation, seed=seed, held_out=True)
    else:
        own = [t for t in tickets if t.persona in (None, persona)]
        if len(own) < MIN_TICKETS:
            raise TicketError(
                f"only {len(own)} usable tickets of the persona {persona}; at least {MIN_TICKETS} are needed, 200 and more are worth it"
            )
        early, late = split_tickets(own)
        if not early or not late:
            raise TicketError(
                "no ticket can be held out to judge by: all come from one requester, or all ask the same; export tickets of several people"
            )
        train += ticket_samples(early, persona, knowledge, values)
        train += corpus_samples(corpus, persona, len(train), seed=seed, held_out=False)
        validation = ticket_samples(late, persona, knowledge, values)
    rng.shuffle(train)
    facts = {
        "persona": persona,
        "train": len(train),
        "validation": len(validation),
        "feedback": n_feedback,
        "tickets": str(ticket_report) if ticket_report else None,
        "seed": seed,
    }
    digest = _write(out, train, validation, ticket_report.quarantine if ticket_report else [], facts)
    return Dataset(persona, tuple(train), tuple(validation), out, digest, facts)


def _document(prompt: str, persona: str, knowledge: KnowledgeBase, values: Mapping[str, str]) -> str:
    match = knowledge.best(prompt)
    return match.article.render(persona, values=values) if match else handover_document(values)


def _redacted(row: Any) -> Any:
    """Text anywhere in a quarantined row without personal data."""
    if isinstance(row, str):
        return redact(row)
    if isinstance(row, dict):
        return {k: _redacted(v) for k, v in row.items()}
    return [_redacted(v) for v in row] if isinstance(row, list) else row


def _write(out: Path, train: Sequence[Sample], validation: Sequence[Sample], quarantine: Sequence[Any], facts: Mapping[str, Any]) -> str:
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    files = {
        "train.jsonl": [asdict(s) for s in train],
        "validation.jsonl": [asdict(s) for s in validation],
        "quarantine.jsonl": [_redacted(q) for q in quarantine],
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
