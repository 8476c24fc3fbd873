"""The files of the router's artefact: arrays and texts, read only where they are what the manifest beside them lists. Knows nothing of what they say."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from persona_models.errors import ConfigError
from router.text_space import Arrays

MANIFEST = "manifest.json"


def read_arrays(path: Path) -> tuple[Arrays, dict[str, Any], str]:
    """Arrays, description and digest of one safetensors file of the artefact. Raises ConfigError when it is missing or damaged."""
    try:
        version = digest(read_checked(path))
        with safe_open(path, framework="np") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            about = json.loads((file.metadata() or {})["deskroute"])
    except OSError as e:
        raise ConfigError(f"router: cannot read {path}: {e.strerror or e}; run `deskroute retrain router`") from None
    except (SafetensorError, KeyError, ValueError) as e:
        raise ConfigError(f"router: {path} is damaged or no router artefact ({e}); run `deskroute retrain router`") from None
    if not isinstance(about, dict):
        raise ConfigError(f"router: {path} is no router artefact; run `deskroute retrain router`")
    return arrays, about, version


def read_checked(path: Path) -> bytes:
    """The bytes of one file of the artefact. Raises ConfigError where they are not those that the manifest beside it lists; OSError where missing."""
    data = path.read_bytes()
    manifest = path.with_name(MANIFEST)
    if manifest.exists():
        try:
            listed = json.loads(manifest.read_text(encoding="utf-8"))["files"].get(path.name)
        except (ValueError, KeyError, AttributeError, TypeError) as e:
            raise ConfigError(f"router: {manifest} is damaged ({e}); run `deskroute retrain router`") from None
        if listed != hashlib.sha256(data).hexdigest():
            raise ConfigError(f"router: {path} is damaged: it is not the file that {MANIFEST} lists; run `deskroute retrain router`")
    return data


def digest(data: bytes) -> str:
    """A short name for exactly these bytes."""
    return hashlib.sha256(data).hexdigest()[:12]
