"""Ticket files -> checked, redacted tickets. Rows that cannot be used are kept aside with the reason, never dropped silently.

Knows nothing of models or splits.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from persona_models.errors import InputError, TicketError
from router.features import Profile

# Names under which exports carry what we need; the first one found wins.
COLUMNS: Mapping[str, tuple[str, ...]] = {
    "prompt": ("prompt", "question", "request", "description", "text", "body"),
    "answer": ("answer", "resolution", "reply", "response", "solution"),
    "persona": ("persona",),
    "requester": ("requester", "user", "user_id", "caller", "requester_id"),
    "created": ("created", "created_at", "opened_at", "date"),
    "title": ("title", "job_title"),
    "department": ("department",),
    "tenure_days": ("tenure_days",),
    "location": ("location",),
}
REQUIRED = ("prompt", "answer")
MAX_CHARS = 20_000

# Typed placeholders for what must not be learnt. Order matters: a mail address holds a host, a card number looks like a phone number.
_PERSONAL = {
    "MAIL": re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+"),
    "URL": re.compile(r"\bhttps?://\S+"),
    "SECRET": re.compile(r"(?i)\b(?:password|passwort|pwd|pin|token|secret|api[_ -]?key)\s*(?:is|=|:)\s*\S+"),
    "IBAN": re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){3,7}(?: ?[A-Z0-9]{1,3})?\b"),
    "CARD": re.compile(r"\b(?:\d[ -]?){13,16}\b"),
    "IP": re.compile(r"\b(?:\d{1,3}\.){3}\d{1,3}\b"),
    # Groups of digits with separators, or a plus sign and digits: build numbers and error codes have neither.
    "PHONE": re.compile(r"(?<![\w.])(?:\+\d[\d ()/-]{7,16}\d|\(?0\d{1,4}\)?(?:[ /-]\d{2,5}){2,4}|\(\d{3}\) ?\d{3}-\d{4})(?![\w.])"),
}


@dataclass(frozen=True)
class Ticket:
    """One request with the answer it got; persona is None where the file does not say."""

    prompt: str
    answer: str
    persona: str | None = None
    requester: str = ""
    created: datetime | None = None
    profile: Profile = field(default_factory=Profile)


@dataclass
class TicketReport:
    """What happened to a file's rows."""

    rows: int = 0
    used: int = 0
    quarantine: list[dict[str, Any]] = field(default_factory=list)
    redacted: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        parts = [f"{self.used} of {self.rows} rows used"]
        if self.quarantine:
            reasons = Counter(q["reason"] for q in self.quarantine)
            parts.append(f"{len(self.quarantine)} kept aside ({', '.join(f'{n} {r}' for r, n in reasons.most_common(3))})")
        if self.redacted:
            parts.append("redacted " + ", ".join(f"{n} {k.lower()}" for k, n in self.redacted.most_common()))
        return "; ".join(parts)


def redact(text: str, counts: Counter[str] | None = None) -> str:
    """Replace mail addresses, URLs, secrets, account and card numbers, IP addresses and phone numbers by typed placeholders such as [MAIL]."""
    for name, pattern in _PERSONAL.items():
        text, n = pattern.subn(f"[{name}]", text)
        if counts is not None and n:
            counts[name] += n
    return text


def read_tickets(path: Path, personas: Sequence[str], *, encoding: str | None = None) -> tuple[list[Ticket], TicketReport]:
    """Read a CSV or JSONL file of tickets.

    Columns: prompt and answer are required, persona, requester, created and the profile's are optional; COLUMNS lists the names that are understood.
    Raises TicketError, naming the file and the way out, for a file that is missing, empty, of another format or encoding, without the required columns,
    or without any usable row.
    """
    text = _decode(path, encoding)
    if not text.strip():
        raise TicketError(f"{path}: the file is empty; export tickets with the columns prompt and answer")
    rows = _csv_rows(path, text) if path.suffix.lower() == ".csv" else _json_rows(path, text)
    report, tickets = TicketReport(), []
    for number, row in rows:
        report.rows += 1
        reason = row if isinstance(row, str) else None
        ticket = None
        if isinstance(row, dict):
            try:
                ticket = _ticket(row, personas, report.redacted)
            except (TicketError, InputError) as e:
                reason = e.message
        if ticket:
            tickets.append(ticket)
        else:
            report.quarantine.append({"row": number, "reason": reason, "data": row if isinstance(row, dict) else None})
    report.used = len(tickets)
    if not tickets:
        raise TicketError(f"{path}: none of its {report.rows} rows can be used; {report}" if report.rows else f"{path}: has a heading but no rows")
    return tickets, report


def _decode(path: Path, encoding: str | None) -> str:
    if path.suffix.lower() not in (".csv", ".jsonl"):
        raise TicketError(f"{path}: tickets are read from .csv and .jsonl files; export one of these")
    try:
        data = path.read_bytes()
    except OSError as e:
        raise TicketError(f"{path}: cannot be read ({e.strerror})") from None
    guess = encoding or ("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    try:
        return data.decode(guess)
    except LookupError:
        raise TicketError(f"{path}: the encoding {encoding!r} does not exist; use for example utf-8, cp1252 or utf-16") from None
    except UnicodeDecodeError as e:
        line = data[: e.start].count(b"\n") + 1
        raise TicketError(
            f"{path}: is not {guess} text (line {line}, byte {e.start}); save it as UTF-8, or say its encoding, for example --encoding cp1252"
        ) from None


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    try:
        dialect: Any = csv.Sniffer().sniff(text.lstrip().split("\n", 1)[0], delimiters=",;\t|")
    except csv.Error:
        dialect = csv.excel
    dialect.doublequote = True
    csv.field_size_limit(10_000_000)
    reader = csv.DictReader(io.StringIO(text, newline=""), dialect=dialect)
    _check_columns(path, [(c or "").strip().lower() for c in reader.fieldnames or ()])
    try:
        for row in reader:
            if None in row:
                yield reader.line_num, f"has more fields than the heading ({len(row) + len(row[None]) - 1} instead of {len(row) - 1})"
            else:
                yield reader.line_num, {(k or "").strip().lower(): v for k, v in row.items()}
    except csv.Error as e:
        raise TicketError(f"{path}: line {reader.line_num} is not valid CSV ({e})") from None


def _json_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    checked = False
    # Not splitlines: a JSON string may hold line separators that it takes for line ends.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as e:
            yield number, f"is not valid JSON ({e})"
            continue
        if not isinstance(row, dict):
            yield number, "is not a JSON object"
            continue
        row = {str(k).strip().lower(): v for k, v in row.items()}
        if not checked:
            _check_columns(path, list(row))
            checked = True
        yield number, row


def _check_columns(path: Path, found: Sequence[str]) -> None:
    missing = [c for c in REQUIRED if not any(name in found for name in COLUMNS[c])]
    if missing:
        wanted = "; ".join(f"{c} (or {', '.join(COLUMNS[c][1:])})" for c in missing)
        raise TicketError(
            f"{path}: has no column {wanted}; its columns are {', '.join(c for c in found if c) or 'none'}. Rename a column or export it"
        )


def _ticket(row: Mapping[str, Any], personas: Sequence[str], counts: Counter[str]) -> Ticket:
    def cell(column: str) -> str:
        value = next((row[name] for name in COLUMNS[column] if row.get(name) not in (None, "")), "")
        return str(value).strip()

    prompt, answer = cell("prompt"), cell("answer")
    if not prompt or not answer:
        raise TicketError("has no " + ("prompt" if not prompt else "answer"))
    if max(len(prompt), len(answer)) > MAX_CHARS:
        raise TicketError(f"is longer than {MAX_CHARS} characters")
    persona = cell("persona") or None
    if persona is not None and persona not in personas:
        raise TicketError(f"names the persona {persona!r}; known are {', '.join(personas)}")
    profile = Profile.from_metadata({k: cell(k) for k in ("title", "department", "tenure_days", "location")})
    return Ticket(redact(prompt, counts), redact(answer, counts), persona, cell("requester"), _time(cell("created")), profile)


def _time(text: str) -> datetime | None:
    if not text:
        return None
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        raise TicketError(f"has the time {text!r}; use ISO form, for example 2026-03-31 or 2026-03-31T14:05:00") from None
    return when if when.tzinfo else when.replace(tzinfo=UTC)
