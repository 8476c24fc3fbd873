"""Config and lineup -> the router artefact and the knowledge base: the registry's champion, a folder of one's own, or what ships. Knows nothing of Ray."""

from __future__ import annotations

import contextlib
from pathlib import Path

from persona_models.errors import ConfigError, RegistryError
from persona_models.lineup import Lineup, Pinned
from persona_models.protocol import BUILTIN
from persona_models.registry import ROUTER_MODEL, RegistryReader, model_name, read_lineup
from router.classifier import PersonaClassifier
from router.config import Config
from router.follow_up import FollowUps
from router.knowledge import KnowledgeBase, load_folder
from router.matters import Matters
from router.telemetry import log

SHIPPED = Path(__file__).parent.parent / "persona_models" / "builtin" / "router"


def lineup_in_force(config: Config, *, since_ms: int = 0) -> Lineup:
    """What the registry, or a server that has been running since then, has in force. Never raises."""
    reader = RegistryReader(config.registry_uri, config.state / "cache")
    lineup, note = read_lineup(reader, tuple(p.id for p in config.catalogue()), config.state, since_ms=since_ms)
    if note:
        log.warning("%s", note)
    return lineup


def settle_lineup(config: Config) -> Lineup:
    """Read what is in force, once for a whole server, and write it down with its versions beside it: its replicas need not ask the registry again.

    A version that cannot be fetched is left to the replicas, which say so and serve what ships. Never raises.
    """
    lineup = lineup_in_force(config)
    reader = RegistryReader(config.registry_uri, config.state / "cache")
    wanted = [(model_name(p.id), v) for p in config.catalogue() for v in lineup.wanted(p.id)] + [(ROUTER_MODEL, lineup.router)]
    for model, pinned in wanted:
        if pinned.version != BUILTIN:
            with contextlib.suppress(RegistryError):
                reader.fetch_version(model, pinned)
    lineup.save(config.state)
    return lineup


def artefact(config: Config, pinned: Pinned) -> tuple[Path, str]:
    """The folder of a router version, and its version: a registry version, "builtin", or the name of the configured folder. Raises RegistryError."""
    if config.router.artefact != BUILTIN:
        return Path(config.router.artefact), Path(config.router.artefact).name
    if pinned.version == BUILTIN:
        return SHIPPED, BUILTIN
    found = RegistryReader(config.registry_uri, config.state / "cache").fetch_version(ROUTER_MODEL, pinned)
    return found.folder, found.version


def load_router(config: Config, pinned: Pinned) -> tuple[PersonaClassifier, KnowledgeBase]:
    """A version of the router. Raises ConfigError for a damaged artefact or one made for other personas, ArticleError, RegistryError."""
    folder, version = artefact(config, pinned)
    classifier = PersonaClassifier.load(folder, tuple(p.id for p in config.catalogue()), config.router.encoder)
    if config.router.encoder and classifier.space.encoder is None:
        log.warning("router.encoder: the router in force was trained without one; run `deskroute retrain router` to have one that uses it")
    classifier.follow_ups, classifier.matters = FollowUps.load(folder), Matters.load(folder)
    classifier.version = version if version == BUILTIN or version.isdigit() else classifier.version
    return classifier, _knowledge(config, folder)


def router_in_force(config: Config, lineup: Lineup | None = None) -> tuple[PersonaClassifier, KnowledgeBase]:
    """The router of a lineup, or the one that ships where that cannot be had. Raises ConfigError, ArticleError where neither can be used."""
    pinned = (lineup or lineup_in_force(config)).router
    try:
        return load_router(config, pinned)
    except (RegistryError, ConfigError) as e:
        if pinned.version == BUILTIN or config.router.artefact != BUILTIN:
            raise
        log.warning("router: %s; serving the one that ships", e.message)
        return load_router(config, Pinned())


def load_classifier(config: Config) -> PersonaClassifier:
    """The classifier in force. Raises ConfigError, ArticleError."""
    return router_in_force(config)[0]


def load_knowledge(config: Config) -> KnowledgeBase:
    """The articles in force. Raises ConfigError, ArticleError."""
    pinned = lineup_in_force(config).router if config.router.artefact == BUILTIN else Pinned()
    try:
        return _knowledge(config, artefact(config, pinned)[0])
    except (RegistryError, ConfigError) as e:
        if pinned.version == BUILTIN:
            raise
        log.warning("router: %s; using the articles that ship", e.message)
        return _knowledge(config, SHIPPED)


def _knowledge(config: Config, folder: Path) -> KnowledgeBase:
    base = KnowledgeBase.load(folder)
    if config.knowledge.folder:
        own = load_folder(config.knowledge.folder, tuple(p.id for p in config.catalogue()))
        return base.with_articles(own, instead=not config.knowledge.builtin)
    if not config.knowledge.builtin:
        raise ConfigError("knowledge.builtin is false and knowledge.folder is not set: there would be no articles; set a folder of Markdown files")
    return base
