"""A base from scratch, and one trained on from another."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from persona_models.errors import InputError
from pipelines.compose import CORPUS, Composer, Corpus
from pipelines.pretrain import ComposedBatches, PretrainSettings, pretrain, trained_on
from pipelines.training import pad, token_loss

PERSONAS = ("leadership", "knowledge_worker", "field", "admin", "new_hire")
SMALL = PretrainSettings(vocab=2000, hidden=64, layers=2, heads=2, mlp=64, steps=2, rows=2)


@pytest.fixture(scope="module")
def corpus():
    return Corpus(CORPUS, PERSONAS)


@pytest.fixture(scope="module")
def first(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrain")
    pretrain(corpus, folder / "base", folder / "work", SMALL)
    return folder / "base"


def test_training_on_begins_with_the_weights_and_the_tokenizer_of_the_base_before(corpus, first, tmp_path):
    settings = trained_on(first, PretrainSettings(steps=3, rows=2))
    report = pretrain(corpus, tmp_path / "base", tmp_path / "work", settings, first)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "base" / name).read_bytes() == (first / name).read_bytes()
    model = AutoModelForCausalLM.from_pretrained(first, dtype=torch.float32)
    with torch.no_grad():
        batch = ComposedBatches(Composer(corpus, settings.seed), AutoTokenizer.from_pretrained(first), 3, 2).batch(0)
        want = float(token_loss(model, *pad(batch, model.config.pad_token_id, model.device)))
    assert report.history.losses[0] == pytest.approx(want, abs=0.01)  # some CPUs train in bfloat16
    assert len(report.history.losses) == 3
    before, after = (json.loads((f / "training.json").read_text()) for f in (first, tmp_path / "base"))
    assert after["before"] == before
    assert after["tokens_seen"] == before["tokens_seen"] + report.history.tokens


def test_training_on_keeps_the_size_and_sees_other_examples(first):
    settings = trained_on(first, PretrainSettings(steps=5))
    assert (settings.hidden, settings.layers, settings.vocab, settings.steps) == (64, 2, 2000, 5)
    assert settings.seed != SMALL.seed
    assert settings.lr < SMALL.lr
    # The seed after a base's own is that of the held-out examples.
    assert settings.seed != SMALL.seed + 1


@pytest.mark.parametrize("text", [None, "{", "{}", '{"settings": {"colour": "red"}}'])
def test_what_is_no_base_of_ours_is_named(tmp_path, text):
    if text is not None:
        (tmp_path / "training.json").write_text(text)
    with pytest.raises(InputError, match="is no base that `pretrain` made; give the folder"):
        trained_on(tmp_path, SMALL)
