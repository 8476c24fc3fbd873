"""Ticket files -> checked, redacted tickets, row by row. A row that cannot be used is kept aside with the reason, never dropped silently.

CSV, JSONL and Parquet; which column carries what is data (ticket_maps.yaml). Knows nothing of models or splits.
"""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError

from persona_models.errors import ConfigError, InputError, TicketError
from router.config import Section
from router.query import Profile
from router.redaction import redact

MAPS_FILE = Path(__file__).with_name("ticket_maps.yaml")
REQUIRED = ("prompt", "answer")
PROFILE = ("title", "department", "tenure_days", "location")
MAX_CHARS = 20_000
PARQUET_ROWS = 1000


class ColumnMap(Section):
    """Which columns carry what; see ticket_maps.yaml."""

    prompt: tuple[str, ...]
    answer: tuple[str, ...]
    persona: tuple[str, ...] = ()
    requester: tuple[str, ...] = ()
    created: tuple[str, ...] = ()
    title: tuple[str, ...] = ()
    department: tuple[str, ...] = ()
    tenure_days: tuple[str, ...] = ()
    location: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    time: tuple[str, ...] = ()
    only: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    strip: str | None = None


@dataclass(frozen=True)
class Ticket:
    """One request with the answer it got; persona is None where neither the file nor the router says."""

    prompt: str
    answer: str
    persona: str | None = None
    requester: str = ""
    created: datetime | None = None
    profile: Profile = field(default_factory=Profile)


@dataclass
class TicketReport:
    """What happened to a file's rows. `aside` gets each row that is kept aside, with the reason."""

    aside: Callable[[dict[str, Any]], None]
    rows: int = 0
    used: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    redacted: Counter[str] = field(default_factory=Counter)
    routed: Counter[str] = field(default_factory=Counter)

    def set_aside(self, row: int, reason: str, data: Any) -> None:
        """Keep a row aside; what it held is redacted."""
        # Values in a reason would make every row's reason one of its own.
        self.reasons[re.sub(r"'[^']*'|\d+", "...", reason)] += 1
        self.aside({"row": row, "reason": reason, "data": redacted(data)})

    def __str__(self) -> str:
        parts = [f"{self.used} of {self.rows} rows used"]
        if n := sum(self.reasons.values()):
            parts.append(f"{n} kept aside ({', '.join(f'{k} {r}' for r, k in self.reasons.most_common(4))})")
        if self.redacted:
            parts.append("redacted " + ", ".join(f"{n} {k.lower()}" for k, n in self.redacted.most_common()))
        if self.routed:
            parts.append("personas by the router: " + ", ".join(f"{n} {k}" for k, n in self.routed.most_common()))
        return "; ".join(parts)


def read_map(name: str | None) -> ColumnMap:
    """A built-in column map by name, or one from a YAML file; None is the plain one. Raises ConfigError that names file, key and the way out."""
    maps = yaml.safe_load(MAPS_FILE.read_text(encoding="utf-8"))
    if name is None or name in maps:
        return ColumnMap.model_validate(maps[name or "plain"])
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"--map: {name!r} is neither a built-in map ({', '.join(maps)}) nor a .yaml file")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        return ColumnMap.model_validate({k: [v] if isinstance(v, str) and k != "strip" else v for k, v in raw.items()})
    except OSError as e:
        raise ConfigError(f"{path}: cannot be read ({e.strerror})") from None
    except (yaml.YAMLError, AttributeError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}: is no map of columns ({str(e).splitlines()[0]}); {MAPS_FILE.name} shows the form") from None
    except ValidationError as e:
        fault = e.errors()[0]
        where = ".".join(map(str, fault["loc"]))
        known = f"; known are {', '.join(ColumnMap.model_fields)}" if fault["type"] == "extra_forbidden" else ""
        raise ConfigError(f"{path}: {where}: {fault['msg'].removeprefix('Value error, ')}{known}") from None


class TicketFile:
    """A file of tickets, read row by row in bounded memory.

    Raises TicketError, naming the file and the way out, for one that is missing, empty, of another format or encoding, or without the mapped columns.
    """

    def __init__(
        self, path: Path, personas: Sequence[str], *, columns: ColumnMap | None = None, encoding: str | None = None, region: str | None = None
    ) -> None:
        self.path, self.personas, self.region = path, tuple(personas), region
        self.columns = columns or read_map(None)
        self.encoding = encoding
        if path.suffix.lower() not in (".csv", ".jsonl", ".parquet"):
            raise TicketError(f"{path}: tickets are read from .csv, .jsonl and .parquet files; export one of these")
        try:
            with path.open("rb") as file:
                head = file.read(4)
        except OSError as e:
            raise TicketError(f"{path}: cannot be read ({e.strerror})") from None
        if path.suffix.lower() != ".parquet":
            self.encoding = encoding or ("utf-16" if head[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
            self._check_encoding()

    def tickets(self, report: TicketReport) -> Iterator[tuple[int, Ticket]]:
        """The usable rows with their numbers; the others are told to the report."""
        kind = self.path.suffix.lower()
        rows = {".csv": self._csv_rows, ".jsonl": self._json_rows, ".parquet": self._parquet_rows}[kind]()
        for number, row in rows:
            report.rows += 1
            if isinstance(row, str):
                report.set_aside(number, row, None)
                continue
            try:
                yield number, self._ticket(row, report.redacted)
            except InputError as e:
                report.set_aside(number, e.message, row)

    def _check_encoding(self) -> None:
        """Decode the whole file once, in pieces: a wrong encoding is said before any row is used."""
        line, blank = 1, True
        try:
            with self.path.open(encoding=self.encoding, newline="") as file:
                while piece := file.read(1 << 20):
                    line += piece.count("\n")
                    blank = blank and not piece.strip()
        except LookupError:
            raise TicketError(f"{self.path}: the encoding {self.encoding!r} does not exist; use for example utf-8, cp1252 or utf-16") from None
        except UnicodeError:
            raise TicketError(self._decode_fault()) from None
        if blank:
            raise TicketError(f"{self.path}: the file is empty; export tickets with the columns prompt and answer")

    def _decode_fault(self) -> str:
        data = self.path.read_bytes()
        try:
            data.decode(self.encoding or "utf-8")
            place = ""
        except UnicodeDecodeError as e:
            newline = data[: e.start].count(b"\n") + 1
            place = f" (line {newline}, byte {e.start})"
        return f"{self.path}: is not {self.encoding} text{place}; save it as UTF-8, or say its encoding, for example --encoding cp1252"

    def _csv_rows(self) -> Iterator[tuple[int, dict[str, Any] | str]]:
        csv.field_size_limit(10_000_000)
        with self.path.open(encoding=self.encoding, newline="") as file:
            first = next((line for line in file if line.strip()), "")
            file.seek(0)
            try:
                dialect: Any = csv.Sniffer().sniff(first, delimiters=",;\t|")
            except csv.Error:
                dialect = csv.excel
            dialect.doublequote = True
            reader = csv.reader(file, dialect=dialect)
            try:
                heading = next((row for row in reader if any(c.strip() for c in row)), [])
                names = [c.strip().lower() for c in heading]
                self._check_columns(names)
                some = False
                for row in reader:
                    if not row:
                        continue
                    some = True
                    if len(row) > len(names):
                        yield reader.line_num, f"has more fields than the heading ({len(row)} instead of {len(names)})"
                        continue
                    # A column that occurs several times, as Jira's comments do, is what was said last.
                    found: dict[str, Any] = {}
                    for name, value in zip(names, row, strict=False):
                        if value.strip() or name not in found:
                            found[name] = value
                    yield reader.line_num, found
            except csv.Error as e:
                raise TicketError(f"{self.path}: line {reader.line_num} is not valid CSV ({e})") from None
        if not some:
            raise TicketError(f"{self.path}: has a heading but no rows")

    def _json_rows(self) -> Iterator[tuple[int, dict[str, Any] | str]]:
        checked = False
        # newline="\n": a JSON string may hold line separators that would be taken for line ends.
        with self.path.open(encoding=self.encoding, newline="\n") as file:
            for number, line in enumerate(file, 1):
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
                    self._check_columns(list(row))
                    checked = True
                yield number, row

    def _parquet_rows(self) -> Iterator[tuple[int, dict[str, Any] | str]]:
        from pyarrow import ArrowException, parquet

        try:
            with parquet.ParquetFile(self.path) as file:
                self._check_columns([n.strip().lower() for n in file.schema_arrow.names])
                if file.metadata.num_rows == 0:
                    raise TicketError(f"{self.path}: has columns but no rows")
                number = 0
                for batch in file.iter_batches(PARQUET_ROWS):
                    for row in batch.to_pylist():
                        number += 1
                        yield number, {str(k).strip().lower(): v for k, v in row.items()}
        except (ArrowException, OSError) as e:
            raise TicketError(f"{self.path}: is no Parquet file that can be read ({str(e).splitlines()[0]})") from None

    def _check_columns(self, found: Sequence[str]) -> None:
        """Refuse a file without the required columns."""
        for wanted in REQUIRED:
            options = getattr(self.columns, wanted)
            if not any(all(part.split(".")[0].strip() in found or part.strip() in found for part in o.lower().split(" + ")) for o in options):
                raise TicketError(
                    f"{self.path}: has no column {options[0]}" + (f" (or {', '.join(options[1:])})" if options[1:] else "")
                    + f", which would carry the {wanted}; its columns are {', '.join(c for c in found if c) or 'none'}. "
                    "Rename a column, or say which one it is with --map"
                )  # fmt: skip

    def _ticket(self, row: Mapping[str, Any], counts: Counter[str]) -> Ticket:
        columns = self.columns

        def cell(options: Sequence[str]) -> str:
            return next((text for o in options if (text := _joined(row, o))), "")

        for column, values in columns.only.items():
            state = _lookup(row, column)
            if state is not None and state not in values:
                raise TicketError(f"is not resolved ({column} is {state!r})")
        prompt, answer = cell(columns.prompt), cell(columns.answer)
        if columns.strip:
            answer = re.sub(rf"\A(?:{columns.strip})", "", answer).strip()
        if not prompt or not answer:
            raise TicketError("has no " + ("prompt" if not prompt else "answer"))
        if max(len(prompt), len(answer)) > MAX_CHARS:
            raise TicketError(f"is longer than {MAX_CHARS} characters")
        persona = cell(columns.persona) or None
        if persona is not None and persona not in self.personas:
            raise TicketError(f"names the persona {persona!r}; known are {', '.join(self.personas)}")
        profile = Profile.from_metadata({k: cell(getattr(columns, k)) for k in PROFILE})
        names = {text for o in columns.names if (text := _joined(row, o))}
        created = self._time(cell(columns.created))
        texts = [redact(t, counts, names=names, region=self.region) for t in (prompt, answer)]
        return Ticket(texts[0], texts[1], persona, cell(columns.requester), created, profile)

    def _time(self, text: str) -> datetime | None:
        if not text:
            return None
        when = None
        for form in (None, *self.columns.time):
            try:
                when = datetime.fromisoformat(text) if form is None else datetime.strptime(text, form)
                break
            except ValueError:
                continue
        if when is None:
            raise TicketError(f"has the time {text!r}; use ISO form, for example 2026-03-31T14:05:00, or name its form in the map's `time`")
        return when if when.tzinfo else when.replace(tzinfo=UTC)


def redacted(row: Any) -> Any:
    """Text anywhere in a row without personal data."""
    if isinstance(row, str):
        return redact(row)
    if isinstance(row, dict):
        return {k: redacted(v) for k, v in row.items()}
    return [redacted(v) for v in row] if isinstance(row, list) else row


def _joined(row: Mapping[str, Any], option: str) -> str:
    """The text of a column, or of several that are joined, each once."""
    parts = [text for part in option.split(" + ") if (text := _lookup(row, part.strip()))]
    return "\n".join(dict.fromkeys(parts))


def _lookup(row: Mapping[str, Any], column: str) -> str | None:
    """The text of a column by its whole name, else by a path of names and indices into what JSON holds; None where there is nothing."""
    value: Any = row.get(column.lower())
    if value is None and "." in column:
        value = row
        for part in column.split("."):
            if isinstance(value, Mapping):
                lowered = {str(k).lower(): v for k, v in value.items()} if value is not row else value
                value = lowered.get(part.lower())
            elif isinstance(value, list) and re.fullmatch(r"-?\d+", part):
                place = int(part)
                value = value[place] if -len(value) <= place < len(value) else None
            else:
                return None
    if value is None or isinstance(value, (dict, list)):
        return None
    return str(value).strip() or None
