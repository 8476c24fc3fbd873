"""A ticket export -> a folder of checked tickets: personas assigned, near-duplicates left out, what cannot be used beside it with the reason.

    tickets.jsonl   quarantine.jsonl   report.json (written last, with digests)

Row by row, so that the size of an export does not matter. Knows nothing of models.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from persona_models.errors import TicketError, WorkError
from persona_models.protocol import Message
from pipelines.tickets import ColumnMap, Ticket, TicketFile, TicketReport
from router.classifier import PersonaClassifier
from router.config import Config
from router.loading import load_classifier
from router.policy import decide
from router.query import Profile, query_of

TICKETS, QUARANTINE, REPORT = "tickets.jsonl", "quarantine.jsonl", "report.json"
ROUTED_AT_ONCE = 256
# Two tickets are the same case where their words overlap by this much (Jaccard, runs of three words).
SAME = 0.85


class Imported:
    """An imported export. Its tickets are read from the folder again and again, so that not all of them need fit into memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.facts: dict[str, Any] = json.loads((folder / REPORT).read_text(encoding="utf-8"))
        except (OSError, ValueError) as e:
            raise WorkError(f"{folder}: is no finished import ({e}); run `deskroute tickets` again") from None

    def __str__(self) -> str:
        return str(self.facts["summary"])

    @property
    def digest(self) -> str:
        return str(self.facts["digest"])

    def of(self, persona: str) -> list[Ticket]:
        """The persona's tickets, in the order of the export."""
        return [t for t in self if t.persona == persona]

    def __iter__(self) -> Iterator[Ticket]:
        with (self.folder / TICKETS).open(encoding="utf-8") as file:
            for line in file:
                row = json.loads(line)
                created = datetime.fromisoformat(row["created"]) if row["created"] else None
                yield Ticket(row["prompt"], row["answer"], row["persona"], row["requester"], created, Profile(**row["profile"]))


def import_tickets(
    path: Path,
    out: Path,
    config: Config,
    *,
    columns: ColumnMap | None = None,
    encoding: str | None = None,
    region: str | None = None,
    all_of: str | None = None,
) -> Imported:
    """Read an export into a folder, which appears only when it is complete.

    A ticket that names no persona gets the one its router would have answered by, from its text and profile; with all_of it gets that one. Raises
    TicketError as TicketFile does, and where no row can be used; the quarantined rows are then left at `out` to be looked at.
    """
    personas = tuple(p.id for p in config.catalogue())
    file = TicketFile(path, personas, columns=columns, encoding=encoding, region=region)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    seen = NearDuplicates()
    router = None if all_of else _Router(config)
    with (partial / TICKETS).open("w", encoding="utf-8") as kept, (partial / QUARANTINE).open("w", encoding="utf-8") as aside:

        def put_aside(entry: dict[str, Any]) -> None:
            aside.write(json.dumps(entry, ensure_ascii=False, default=str) + "\n")

        report = TicketReport(put_aside)
        rows = iter(tqdm(file.tickets(report), desc=f"tickets from {path.name}", unit="row", dynamic_ncols=True))
        while group := list(islice(rows, ROUTED_AT_ONCE)):
            for number, ticket in _assigned(group, router, all_of, report):
                if seen.seen(f"{ticket.prompt}\n{ticket.answer}"):
                    report.set_aside(number, "is a near-duplicate of an earlier row", None)
                    continue
                kept.write(json.dumps(vars(ticket) | {"profile": vars(ticket.profile)}, ensure_ascii=False, default=str) + "\n")
                report.used += 1
    digests = {name: file_digest(partial / name) for name in (TICKETS, QUARANTINE)}
    facts = {
        "digest": digests[TICKETS][:16],
        "files": digests,
        "source": {"name": path.name, "sha256": file_digest(path)},
        "rows": report.rows,
        "used": report.used,
        "kept_aside": dict(report.reasons),
        "redacted": dict(report.redacted),
        "routed": dict(report.routed),
        "summary": str(report),
    }
    (partial / REPORT).write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)
    if not report.used:
        raise TicketError(f"{path}: none of its {report.rows} rows can be used; {report}. The rows with their reasons: {out / QUARANTINE}")
    return Imported(out)


class _Router:
    """The router in force, for tickets: several at once, and by the same rules as a request."""

    def __init__(self, config: Config) -> None:
        self._config, self.policy, self.fallback = config, config.policy, config.fallback_model

    @cached_property
    def classifier(self) -> PersonaClassifier:
        """An export that names every persona needs none, and the one in force may be unreadable."""
        return load_classifier(self._config)

    def personas(self, tickets: Sequence[Ticket]) -> list[str | None]:
        """A persona for each; None where it is no helpdesk request."""
        scored = self.classifier.score([query_of((Message("user", t.prompt),), t.profile) for t in tickets])
        routes = [decide(s, self.policy) for s in scored]
        return [None if r.decision == "decline" else r.persona or self.fallback for r in routes]


def _assigned(group: Sequence[tuple[int, Ticket]], router: _Router | None, all_of: str | None, report: TicketReport) -> Iterable[tuple[int, Ticket]]:
    """The tickets with a persona each."""
    unnamed = [ticket for _, ticket in group if ticket.persona is None]
    found = iter(router.personas(unnamed) if router and unnamed else [all_of] * len(unnamed))
    for number, ticket in group:
        if ticket.persona is not None:
            yield number, ticket
            continue
        persona = next(found)
        if persona is None:
            report.set_aside(number, "is no helpdesk request, as the router sees it", None)
            continue
        if router:
            report.routed[persona] += 1
        yield number, Ticket(ticket.prompt, ticket.answer, persona, ticket.requester, ticket.created, ticket.profile)


class NearDuplicates:
    """Remembers texts by MinHash (datasketch), and tells whether one like it was there before."""

    def __init__(self) -> None:
        from datasketch import MinHash, MinHashLSH

        self._empty, self._index, self._n = MinHash(num_perm=64, seed=1), MinHashLSH(threshold=SAME, num_perm=64), 0
        self._exact: set[bytes] = set()

    def seen(self, text: str) -> bool:
        words = text.lower().split()
        exact = hashlib.sha1(" ".join(words).encode(), usedforsecurity=False).digest()
        if exact in self._exact:
            return True
        self._exact.add(exact)
        # Of very few words a single other one makes another case.
        if len(words) < 8:
            return False
        signature = self._empty.copy()
        signature.update_batch([" ".join(words[i : i + 3]).encode() for i in range(len(words) - 2)])
        if any(True for _ in self._index.query(signature)):
            return True
        self._n += 1
        self._index.insert(str(self._n), signature)
        return False


def file_digest(path: Path) -> str:
    """sha256 of a file of any size."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
