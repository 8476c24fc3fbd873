"""What ships in persona_models/builtin: complete, safe to load, made for one another, and described truly."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from safetensors import safe_open

from persona_models.adapters import CARD, read_adapter
from persona_models.base_model import BUILTIN_FOLDER, load_base
from router.config import load_config
from router.loading import load_classifier, load_knowledge

PERSONAS = ("leadership", "knowledge_worker", "field", "admin", "new_hire")
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def base():
    return load_base("builtin", device="cpu")


def test_the_base_is_small_and_its_card_says_its_size(base):
    parameters = sum(p.numel() for p in base.model.parameters())
    facts = json.loads((BUILTIN_FOLDER / "base" / "training.json").read_text())
    assert parameters == facts["parameters"] <= 12_000_000
    assert (BUILTIN_FOLDER / "base" / "model.safetensors").stat().st_size <= 24_000_000
    card = (BUILTIN_FOLDER / "README.md").read_text()
    assert f"{parameters / 1e6:.1f} M parameters" in card


@pytest.mark.parametrize("persona", PERSONAS)
def test_every_adapter_is_made_for_this_base(base, persona):
    folder = BUILTIN_FOLDER / "adapters" / persona
    card = json.loads((folder / CARD).read_text())
    assert (card["persona"], card["base_digest"]) == (persona, base.digest)
    assert read_adapter(folder, base).rank >= 1


def test_router_and_articles_load():
    config = load_config()
    assert load_classifier(config).personas == PERSONAS
    assert len(load_knowledge(config).articles) >= 150


def test_nothing_that_ships_is_a_pickle_or_names_a_machine():
    for path in BUILTIN_FOLDER.rglob("*"):
        if not path.is_file():
            continue
        assert path.suffix in {".safetensors", ".json", ".jinja", ".md"}, path
        if path.suffix == ".safetensors":
            with safe_open(path, "np") as f:
                text = json.dumps(f.metadata() or {})
        else:
            text = path.read_text(encoding="utf-8")
        assert not re.search(r"/(home|root|work|tmp|Users)/", text), path


def test_the_shipped_articles_are_those_of_the_corpus():
    """The artefact must be rebuilt when the corpus changes, else answers come from old articles."""
    from pipelines.compose import CORPUS, Corpus

    corpus = Corpus(CORPUS, PERSONAS)
    shipped = {a.id: a for a in load_knowledge(load_config()).articles}
    assert shipped == corpus.articles
