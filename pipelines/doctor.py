"""`deskroute doctor`: what is installed, found and loaded, and what to do about what is not."""

from __future__ import annotations

import importlib.metadata
import shutil
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from persona_models.errors import ConfigError, DeskrouteError
from router.config import Config, load_config

PACKAGES = ("ray", "torch", "transformers", "peft", "scikit-learn", "mlflow")


def examine(path: Path | None) -> bool:
    """Print one line per finding; returns whether everything needed is there."""
    fine = True

    def say(what: str, look: Callable[[], str]) -> None:
        nonlocal fine
        try:
            print(f"  ok  {what:<14} {look()}")
        except (DeskrouteError, importlib.metadata.PackageNotFoundError, OSError) as e:
            fine = False
            message = (
                e.message if isinstance(e, DeskrouteError) else f"{e} is not installed; run `make serve`" if isinstance(e, ImportError) else str(e)
            )
            print(f"  NO  {what:<14} {message}")

    for package in PACKAGES:
        say(package, lambda package=package: importlib.metadata.version(package))  # type: ignore[misc]
    try:
        config = load_config(path)
    except DeskrouteError as e:
        print(f"  NO  {'configuration':<14} {e.message}")
        return False
    say("configuration", lambda: f"state in {config.state}, registry {config.registry_uri}")
    say("GPU", _gpu)
    say("base", lambda: _base(config))
    say("router", lambda: _router(config))
    say("knowledge", lambda: _knowledge(config))
    say("adapters", lambda: _adapters(config))
    say("port", lambda: _port(config))
    say("disk", lambda: _disk(config))
    return fine


def _disk(config: Config) -> str:
    try:
        config.state.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=config.state):
            pass
    except OSError as e:
        raise ConfigError(f"the state folder {config.state} cannot be written to ({e.strerror}); set `state` or DESKROUTE_HOME") from None
    return f"{shutil.disk_usage(config.state).free / 2**30:.0f} GiB free for {config.state}"


def _gpu() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "none; everything runs on the CPU"


def _base(config: Config) -> str:
    from persona_models.base_model import load_base

    began = time.monotonic()
    base = load_base(config.base, device="cpu", dtype=config.dtype)
    n = sum(p.numel() for p in base.model.parameters())
    return f"{base.name}: {n / 1e6:.1f} M parameters, context {base.context_tokens} tokens, loaded in {time.monotonic() - began:.1f} s"


def _router(config: Config) -> str:
    from router.loading import artefact, lineup_in_force, load_classifier

    load_classifier(config)
    folder, version = artefact(config, lineup_in_force(config).router)
    return f"{version} ({folder})"


def _knowledge(config: Config) -> str:
    from router.loading import load_knowledge

    return f"{len(load_knowledge(config).articles)} articles"


def _adapters(config: Config) -> str:
    from persona_models.adapters import builtin_adapter
    from persona_models.protocol import BUILTIN
    from persona_models.registry import RegistryReader, model_name

    reader = RegistryReader(config.registry_uri, config.state / "cache")
    found = []
    for persona in config.catalogue():
        registered = reader.fetch(model_name(persona.id))
        found.append(
            f"{persona.id}={registered.version if registered else BUILTIN if builtin_adapter(persona.id) else 'none: deskroute retrain ' + persona.id}"
        )
    return ", ".join(found)


def _port(config: Config) -> str:
    with socket.socket() as probe:
        probe.settimeout(0.5)
        taken = probe.connect_ex((config.http.host, config.http.port)) == 0
    return f"{config.http.host}:{config.http.port} is {'taken: deskroute or something else runs there' if taken else 'free'}"
