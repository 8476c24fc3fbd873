"""Config -> the router artefact and the knowledge base: the registry's champion, a folder of one's own, or what ships. Knows nothing of Ray."""

from __future__ import annotations

from pathlib import Path

from persona_models.errors import ConfigError, RegistryError
from persona_models.protocol import BUILTIN
from persona_models.registry import ROUTER_MODEL, RegistryReader
from router.classifier import PersonaClassifier
from router.config import Config
from router.knowledge import KnowledgeBase, load_folder
from router.telemetry import log

SHIPPED = Path(__file__).parent.parent / "persona_models" / "builtin" / "router"


def artefact(config: Config) -> tuple[Path, str]:
    """The folder of the router artefact in force, and its version: a registry version, "builtin", or the folder's name."""
    if config.router != BUILTIN:
        return Path(config.router), Path(config.router).name
    try:
        found = RegistryReader(config.registry_uri, config.state / "cache").fetch(ROUTER_MODEL)
        if found:
            return found.folder, found.version
    except RegistryError as e:
        log.warning("router: %s; serving the one that ships", e.message)
    return SHIPPED, BUILTIN


def load_classifier(config: Config) -> PersonaClassifier:
    """The classifier in force. Raises ConfigError for a missing or damaged artefact, or one made for other personas."""
    folder, version = artefact(config)
    classifier = PersonaClassifier.load(folder, tuple(p.id for p in config.catalogue()))
    classifier.version = version if version == BUILTIN or version.isdigit() else classifier.version
    return classifier


def load_knowledge(config: Config) -> KnowledgeBase:
    """The built-in articles, a company's own beside them, or instead. Raises ConfigError, ArticleError."""
    folder, _ = artefact(config)
    base = KnowledgeBase.load(folder)
    if config.knowledge.folder:
        own = load_folder(config.knowledge.folder, tuple(p.id for p in config.catalogue()))
        return base.with_articles(own, instead=not config.knowledge.builtin)
    if not config.knowledge.builtin:
        raise ConfigError("knowledge.builtin is false and knowledge.folder is not set: there would be no articles; set a folder of Markdown files")
    return base
