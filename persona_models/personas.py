"""The persona catalogue: who the helpdesk speaks to. Order matters: it is the order of scores, slots and table rows everywhere."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from persona_models.errors import ConfigError
from persona_models.protocol import BASE

SHIPPED = Path(__file__).with_name("personas.yaml")
_ID = re.compile(r"[a-z][a-z0-9_]{1,30}")
_RESERVED = {BASE, "auto", "router", "all"}


@dataclass(frozen=True)
class Persona:
    """One persona; `manner` is its system prompt, `colour` its colour in plots."""

    id: str
    title: str
    who: str
    manner: str
    colour: str


def read_personas(path: Path | None = None) -> tuple[Persona, ...]:
    """Read the catalogue (the shipped one by default). Raises ConfigError that names the file and the fault."""
    path = path or SHIPPED
    try:
        rows = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ConfigError(f"personas: cannot read {path}: {e.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise ConfigError(f"personas: {path} is not valid YAML: {str(e).splitlines()[0]}") from None
    if not isinstance(rows, list) or not rows:
        raise ConfigError(f"personas: {path} must be a list of personas, each with id, title, who, manner and colour")
    keys = set(Persona.__dataclass_fields__)
    personas = []
    for n, row in enumerate(rows, 1):
        if not isinstance(row, dict) or set(row) != keys:
            got = sorted(row) if isinstance(row, dict) else row
            raise ConfigError(f"personas: entry {n} of {path} must have exactly the keys {', '.join(sorted(keys))}; it has {got}")
        persona = Persona(**{k: str(v).strip() for k, v in row.items()})
        if not _ID.fullmatch(persona.id) or persona.id in _RESERVED:
            raise ConfigError(
                f"personas: {persona.id!r} in {path} cannot be an id; use lower-case letters, digits and _, and none of {sorted(_RESERVED)}"
            )
        personas.append(persona)
    if len({p.id for p in personas}) != len(personas):
        raise ConfigError(f"personas: an id occurs twice in {path}")
    return tuple(personas)
