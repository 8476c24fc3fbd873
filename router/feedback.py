"""The feedback store: every route without its text, and every rating with it.

The text of a request waits in memory; only a rating of it writes it down, so that what nobody rated never reaches the disk. While a challenger runs
in the shadow, both answers to a request are written down, redacted; `feedback.keep_text: never` keeps them out too. SQLite by default,
Postgres by URL. Knows nothing of HTTP.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import JSON, Column, DateTime, Float, Integer, MetaData, String, Table, Text, create_engine, event, insert, select
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import QueuePool

from persona_models.errors import ConfigError, UnknownRequestError, WorkError
from persona_models.protocol import Message
from router.redaction import redact
from router.schema import DeskrouteBlock

SCHEMA_VERSION = 1

_meta = MetaData()
_version = Table("deskroute_schema", _meta, Column("version", Integer, primary_key=True))
_routes = Table(
    "routes",
    _meta,
    Column("request_id", String(100), primary_key=True),
    Column("created", DateTime(timezone=True), nullable=False, index=True),
    Column("user", String(512)),
    Column("decision", String(20), nullable=False),
    Column("persona", String(100)),
    Column("confidence", Float, nullable=False),
    Column("in_domain", Float, nullable=False),
    Column("scores", JSON, nullable=False),
    Column("mix", JSON, nullable=False),
    Column("sources", JSON, nullable=False),
    Column("versions", JSON, nullable=False),
    Column("router_version", String(100), nullable=False),
    Column("profile", JSON, nullable=False),
)
_ratings = Table(
    "ratings",
    _meta,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("request_id", String(100), nullable=False, index=True),
    Column("created", DateTime(timezone=True), nullable=False),
    Column("user", String(512)),
    Column("rating", String(10), nullable=False),
    Column("comment", Text),
    Column("correct_persona", String(100)),
    Column("better_answer", Text),
    Column("messages", JSON),
    Column("answer", Text),
)
# How an answer went; its route is in `routes`.
_answers = Table(
    "answers",
    _meta,
    Column("request_id", String(100), primary_key=True),
    Column("finish_reason", String(20)),
    Column("tokens", Integer, nullable=False),
    Column("seconds", Float, nullable=False),
)
# What a challenger would have said, beside what the champion did say.
_shadows = Table(
    "shadows",
    _meta,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("request_id", String(100), nullable=False, index=True),
    Column("created", DateTime(timezone=True), nullable=False),
    Column("persona", String(100), nullable=False, index=True),
    Column("champion", String(100), nullable=False),
    Column("challenger", String(100), nullable=False),
    Column("finish_reason", String(20)),
    Column("tokens", Integer, nullable=False),
    Column("seconds", Float, nullable=False),
    Column("likeness", Float, nullable=False),
    Column("champion_answer", Text),
    Column("challenger_answer", Text),
)


@dataclass
class VersionResults:
    """How a version's answers fared: shares in 0..1 of its answers. likeness: of its shadow answers to the champion's, None where there are none."""

    version: str
    answers: int = 0
    up: int = 0
    down: int = 0
    ended: int = 0
    tokens: int = 0
    seconds: float = 0.0
    shadows: int = 0
    likeness: float | None = None

    def __str__(self) -> str:
        n = max(1, self.answers)
        said = f"version {self.version}: {self.answers} answers, {self.up} liked, {self.down} disliked"
        if self.answers:
            said += f", {self.ended / n:.0%} ended by themselves, {self.tokens / n:.0f} tokens each, {1000 * self.seconds / max(1, self.tokens):.1f} ms a token"
        if self.shadows:
            said += f"; {self.shadows} in the shadow, likeness to the champion's {self.likeness:.2f}"
        return said


@dataclass(frozen=True)
class Rating:
    """A rating as the pipelines read it; messages and answer are None where their text was no longer in memory."""

    request_id: str
    created: datetime
    user: str | None
    rating: Literal["up", "down"]
    comment: str | None
    correct_persona: str | None
    better_answer: str | None
    persona: str | None
    profile: dict[str, Any]
    messages: tuple[Message, ...] | None
    answer: str | None


class FeedbackStore:
    """Routes, answers and ratings. Calls block; use a thread from async code. Raises ConfigError for a URL that cannot be opened."""

    def __init__(self, url: str, *, remember: int = 10_000, keep_text: bool = True) -> None:
        self.keep_text = keep_text
        self._remember = remember if keep_text else 0
        self._texts: OrderedDict[str, tuple[tuple[Message, ...], str]] = OrderedDict()
        self._lock = threading.Lock()
        try:
            target = make_url(url)
            if target.get_backend_name() == "sqlite" and target.database:
                Path(target.database).parent.mkdir(parents=True, exist_ok=True)
            # A database in memory lives in one connection, which threads have in turn; a larger pool would give every thread an empty one of its own.
            memory = target.get_backend_name() == "sqlite" and not target.database
            one = {"poolclass": QueuePool, "pool_size": 1, "max_overflow": 0, "connect_args": {"check_same_thread": False}}
            self._engine = create_engine(target, **(one if memory else {"pool_pre_ping": True}))
            if target.get_backend_name() == "sqlite":
                event.listen(self._engine, "connect", _fast_sqlite)
            _meta.create_all(self._engine)
            with self._engine.begin() as db:
                found = db.execute(select(_version.c.version)).scalar()
                if found is None:
                    db.execute(insert(_version).values(version=SCHEMA_VERSION))
        except (SQLAlchemyError, OSError, ModuleNotFoundError) as e:
            raise ConfigError(f"feedback.url: cannot open {_shown(url)}: {str(e).splitlines()[0]}") from None
        if found is not None and found > SCHEMA_VERSION:
            raise ConfigError(
                f"feedback.url: {_shown(url)} was written by a newer deskroute (schema {found}, this one knows {SCHEMA_VERSION}); upgrade deskroute"
            )

    def add_route(self, block: DeskrouteBlock, *, user: str | None, profile: dict[str, str]) -> None:
        """Record a decision; holds no text."""
        row = block.model_dump(
            include={"request_id", "decision", "persona", "confidence", "in_domain", "scores", "mix", "versions", "router_version"}
        )
        row |= {"created": datetime.now(UTC), "user": user, "sources": [s.model_dump() for s in block.sources], "profile": profile}
        with self._engine.begin() as db:
            db.execute(insert(_routes).values(row))

    def add_answer(self, request_id: str, *, finish_reason: str | None, tokens: int, seconds: float) -> None:
        """Record how an answer went; holds no text. finish_reason is None where the reader left or the model failed."""
        row = {"request_id": request_id, "finish_reason": finish_reason, "tokens": tokens, "seconds": seconds}
        with self._engine.begin() as db:
            db.execute(insert(_answers).values(row))

    def add_shadow(self, request_id: str, persona: str, *, texts: tuple[str, str], **facts: Any) -> None:
        """Record what a challenger would have said. texts: the champion's answer and the challenger's, stored redacted, or not at all by keep_text."""
        kept = [redact(t) for t in texts] if self.keep_text else [None, None]
        row = {"request_id": request_id, "persona": persona, "created": datetime.now(UTC), "champion_answer": kept[0], "challenger_answer": kept[1]}
        with self._engine.begin() as db:
            db.execute(insert(_shadows).values(row | facts))

    def results(self, persona: str, *, beside: str | None = None) -> dict[str, VersionResults]:
        """Version -> how its answers fared, for the requests that this persona answered alone.

        beside: counts from this version's first answer on, so that what was answered before it was tried is compared with nothing.
        """
        found: dict[str, VersionResults] = {}
        query = (
            select(_routes.c.versions, _answers.c.finish_reason, _answers.c.tokens, _answers.c.seconds, _routes.c.request_id)
            .join(_answers, _answers.c.request_id == _routes.c.request_id)
            .where(_routes.c.persona == persona)
            .order_by(_routes.c.created)
        )
        by_request: dict[str, VersionResults] = {}
        with self._engine.connect() as db:
            begun = beside is None
            for versions, reason, tokens, seconds, request_id in db.execute(query):
                begun = begun or versions.get(persona) == beside
                if list(versions) != [persona] or not begun:
                    continue
                of = found.setdefault(versions[persona], VersionResults(versions[persona]))
                of.answers, of.ended = of.answers + 1, of.ended + (reason == "stop")
                of.tokens, of.seconds = of.tokens + tokens, of.seconds + seconds
                by_request[request_id] = of
            # Of several ratings by one person the last one counts.
            last = {
                (r, u): rating
                for r, u, rating in db.execute(select(_ratings.c.request_id, _ratings.c.user, _ratings.c.rating).order_by(_ratings.c.id))
            }
            for (request_id, _), rating in last.items():
                if of_rated := by_request.get(request_id):
                    setattr(of_rated, rating, getattr(of_rated, rating) + 1)
            shadowed = select(_shadows.c.challenger, _shadows.c.likeness).where(_shadows.c.persona == persona)
            for challenger, likeness in db.execute(shadowed):
                of = found.setdefault(challenger, VersionResults(challenger))
                of.likeness = ((of.likeness or 0.0) * of.shadows + likeness) / (of.shadows + 1)
                of.shadows += 1
        return found

    def remember(self, request_id: str, messages: Sequence[Message], answer: str) -> None:
        """Keep a text in memory in case it is rated."""
        if not self._remember:
            return
        with self._lock:
            self._texts[request_id] = (tuple(messages), answer)
            while len(self._texts) > self._remember:
                self._texts.popitem(last=False)

    def rate(
        self,
        request_id: str,
        rating: Literal["up", "down"],
        *,
        comment: str | None = None,
        correct_persona: str | None = None,
        better_answer: str | None = None,
        user: str | None = None,
    ) -> bool:
        """Store a rating; returns whether the text of the request is stored with it. Raises UnknownRequestError."""
        with self._lock:
            messages, answer = self._texts.get(request_id, (None, None))
        with self._engine.begin() as db:
            if db.execute(select(_routes.c.request_id).where(_routes.c.request_id == request_id)).scalar() is None:
                raise UnknownRequestError(
                    f"no request {request_id!r} was answered here; use the request_id of the answer's deskroute block", param="request_id"
                )
            row = {"request_id": request_id, "created": datetime.now(UTC), "user": user, "rating": rating, "comment": comment}
            row |= {"correct_persona": correct_persona, "better_answer": better_answer, "answer": answer}
            row["messages"] = [asdict(m) for m in messages] if messages else None
            db.execute(insert(_ratings).values(row))
        return messages is not None

    def ratings(self) -> Iterator[Rating]:
        """Every rating, oldest first, with the persona and profile of its route."""
        query = (
            select(_ratings, _routes.c.persona, _routes.c.profile)
            .join(_routes, _routes.c.request_id == _ratings.c.request_id)
            .order_by(_ratings.c.id)
        )
        with self._engine.connect() as db:
            for row in db.execute(query).mappings():
                data = {k: row[k] for k in Rating.__dataclass_fields__}
                # A stored NULL of a JSON column reads as None, a JSON list as a list.
                data["messages"] = tuple(Message(**m) for m in row["messages"]) if row["messages"] else None
                yield Rating(**data)

    def close(self) -> None:
        self._engine.dispose()


def open_for_reading(url: str) -> FeedbackStore | None:
    """The store if anything was ever stored there, else None; pipelines read ratings from it."""
    try:
        target = make_url(url)
    except SQLAlchemyError as e:
        raise ConfigError(f"feedback.url: {_shown(url)} is no database URL: {str(e).splitlines()[0]}") from None
    if target.get_backend_name() == "sqlite" and not Path(target.database or "").is_file():
        return None
    try:
        return FeedbackStore(url)
    except ConfigError as e:
        raise WorkError(e.message) from None


def _shown(url: str) -> str:
    """The URL without its password."""
    try:
        return make_url(url).render_as_string(hide_password=True)
    except SQLAlchemyError:
        return "the value given"


def _fast_sqlite(connection: Any, _record: Any) -> None:
    # A write-ahead log lets a pipeline read while the endpoint writes.
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=NORMAL")
    cursor.close()
