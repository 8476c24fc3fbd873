"""A company's own labelled prompts (CSV, JSONL, Parquet) -> rows for the router, whatever their labels; a share of the people is held out.

Knows nothing of features or models.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from persona_models.errors import InputError, TicketError
from persona_models.personas import Persona
from pipelines.compose import HELD_OUT
from pipelines.router_corpus import Labelled
from router.query import Profile

TEXT = ("text", "prompt", "message", "question", "description", "short_description", "subject", "body")
LABEL = ("persona", "label", "group", "assignment_group", "category", "queue", "team", "class")
WHO = ("requester", "user", "voice", "author", "caller")
HELD_OUT_SHARE = 0.15
# Of each label; with fewer nothing can be held out of it, and little be learnt.
MIN_ROWS = 20
# For the catalogue that is proposed: distinct, and readable on white.
COLOURS = ("#7b3294", "#2166ac", "#1b7837", "#b35806", "#c51b7d", "#01665e", "#8c510a", "#4d4d4d", "#35978f", "#762a83", "#b2182b", "#5aae61")


def read_prompts(path: Path) -> list[Labelled]:
    """The rows of a file; `persona` is the label as an id, `voice` who wrote it, with HELD_OUT before it where it is held out.

    Raises TicketError that names the file and what is wrong: no such columns, no usable row, fewer than two labels, a label with fewer than MIN_ROWS.
    """
    import pandas

    readers = {".csv": pandas.read_csv, ".tsv": lambda p, **k: pandas.read_csv(p, sep="\t", **k), ".parquet": pandas.read_parquet}
    try:
        if path.suffix.lower() in (".jsonl", ".ndjson"):
            table = pandas.DataFrame([json.loads(line) for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()])
        elif path.suffix.lower() in readers:
            table = readers[path.suffix.lower()](path, **({} if path.suffix.lower() == ".parquet" else {"dtype": str, "keep_default_na": False}))
        else:
            raise TicketError(f"{path}: is none of .csv, .tsv, .jsonl, .parquet")
    except OSError as e:
        raise TicketError(f"{path}: cannot be read ({e.strerror or e})") from None
    except (ValueError, UnicodeDecodeError) as e:
        raise TicketError(f"{path}: cannot be read ({str(e).splitlines()[0]})") from None
    names = {re.sub(r"[\s-]+", "_", str(c).strip().lower()): c for c in table.columns}
    text, label = (_column(path, names, wanted, what) for wanted, what in ((TEXT, "texts"), (LABEL, "labels")))
    who = next((names[n] for n in WHO if n in names), None)
    known = [n for n in Profile.__dataclass_fields__ if n in names]
    rows = []
    for i, row in enumerate(table.to_dict("records"), 1):
        said, of = str(row[text] or "").strip(), label_id(str(row[label] or ""))
        if not said or not of:
            continue
        try:
            profile = Profile.from_metadata({n: row[names[n]] for n in known})
        except InputError as e:
            raise TicketError(f"{path}, row {i}: {e.message}") from None
        voice = (
            str(row[who]).strip() if who and str(row[who]).strip() else hashlib.sha1(said.lower().encode(), usedforsecurity=False).hexdigest()[:12]
        )
        rows.append(Labelled(said, voice, of, profile=profile))
    counts = Counter(r.persona for r in rows)
    if len(counts) < 2:
        raise TicketError(
            f"{path}: a router tells labels apart, and this file has {'only ' + repr(next(iter(counts))) if counts else 'no usable row'}"
        )
    if few := [f"{name} ({n})" for name, n in counts.items() if n < MIN_ROWS]:
        raise TicketError(f"{path}: fewer than {MIN_ROWS} rows of {', '.join(few)}; add some, or give them another label")
    return [replace(r, voice=f"{HELD_OUT}{r.voice}") if _held_out(r.voice) else r for r in rows]


def label_id(label: str) -> str:
    """A label as a persona's id: `Network & VPN` -> `network_vpn`."""
    plain = re.sub(r"[^a-z0-9]+", "_", label.strip().lower()).strip("_")[:31]
    return plain if not plain or plain[0].isalpha() else f"group_{plain}"[:31]


def check_labels(rows: Sequence[Labelled], catalogue: Sequence[Persona], proposal: Path) -> None:
    """Refuse labels that are no personas of the catalogue, or personas without rows, and write a catalogue that fits. Raises InputError."""
    labels = list(dict.fromkeys(r.persona for r in rows))
    known = [p.id for p in catalogue]
    if set(labels) == set(known):
        return
    strangers, missing = [x for x in labels if x not in known], [x for x in known if x not in labels]
    if not strangers:
        raise InputError(f"--prompts: there are no rows of {', '.join(missing)}; add some, or take them out of the catalogue that `personas:` names")
    made: list[dict[str, Any]] = [
        {
            "id": x,
            "title": x.replace("_", " ").capitalize(),
            "who": f"requests of the group {x}",
            "manner": "You are the IT service desk.",
            "colour": c,
        }
        for x, c in zip(sorted(labels), [COLOURS[i % len(COLOURS)] for i in range(len(labels))], strict=True)
    ]
    proposal.parent.mkdir(parents=True, exist_ok=True)
    proposal.write_text(yaml.safe_dump(made, sort_keys=False, allow_unicode=True), encoding="utf-8")
    raise InputError(
        f"--prompts: {', '.join(strangers)} {'is' if len(strangers) == 1 else 'are'} no personas of the catalogue ({', '.join(known)}). "
        f"A catalogue of the file's labels is written to {proposal}: set `personas: {proposal}` in deskroute.yaml and run this again"
    )


def _column(path: Path, names: dict[str, Any], wanted: Sequence[str], what: str) -> Any:
    for name in wanted:
        if name in names:
            return names[name]
    raise TicketError(f"{path}: has no column with the {what}; name it one of {', '.join(wanted)}. It has {', '.join(map(str, names.values()))}")


def _held_out(voice: str) -> bool:
    """By the writer's name, so that a file that grows keeps the same people apart."""
    return int(hashlib.sha1(voice.encode(), usedforsecurity=False).hexdigest()[:8], 16) < HELD_OUT_SHARE * 2**32
