"""persona_models/encoder.py on encoders made here, and a router that is trained with one: words that no prompt held still tell."""

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
from unit.corpora import PERSONAS, WORK, write_corpus, write_rows
from unit.encoders import PROBED, random_table, save_table, tokenizer_of

from persona_models.encoder import MAX_TOKENS, load_encoder
from persona_models.errors import ConfigError
from pipelines.router_corpus import read_router_corpus
from pipelines.train_router import fit_classifier, train_router
from router.classifier import PersonaClassifier
from router.config import load_config
from router.knowledge import KnowledgeBase
from router.loading import load_router
from router.query import Query

# Words that mean the same: the first of each stands in what is trained on, the others nowhere.
ALIKE = {"board": ["verwaltungsrat", "conseil"], "customer": ["kundin", "cliente"], "payroll": ["lohnlauf", "paghe"]}
WORDS = sorted({w for lines in WORK.values() for line in lines for w in line.replace("'", " ").split()})


def test_a_table_gives_the_mean_of_its_tokens_vectors(tmp_path):
    vectors = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
    encoder = load_encoder(save_table(tmp_path / "table", ["printer", "jam", "tray"], vectors))
    want = (vectors[2] + 2 * vectors[3]) / 3
    np.testing.assert_allclose(encoder.encode("Printer jam unheard jam"), want / np.linalg.norm(want), atol=1e-6)
    assert not encoder.encode("").any()
    assert not encoder.encode("unheard").any()
    long = encoder.encode("jam " * (MAX_TOKENS + 50) + "printer")
    np.testing.assert_allclose(long, encoder.encode("jam"), atol=1e-5)


def test_a_table_may_map_tokens_to_fewer_vectors_and_weigh_them(tmp_path):
    vectors = np.eye(3, dtype=np.float32)
    rows, scales = np.array([0, 0, 1, 2, 2]), np.array([1, 1, 0.5, 2, 1], dtype=np.float32)
    encoder = load_encoder(save_table(tmp_path / "table", ["printer", "jam", "tray"], vectors, mapping=rows, weights=scales))
    want = 0.5 * vectors[1] + 2 * vectors[2]
    np.testing.assert_allclose(encoder.encode("printer jam"), want / np.linalg.norm(want), atol=1e-6)


def save_bert(folder, *, pooling=None, pad="[PAD]"):
    torch.manual_seed(0)
    words = ["printer", "jam", "tray", "paper", "the"]
    config = BertConfig(vocab_size=len(words) + 2, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, pad_token_id=1)
    BertModel(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer_of(words), unk_token="[UNK]", pad_token=pad).save_pretrained(folder)
    if pooling:
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 16, **pooling}))
    return folder


@pytest.mark.parametrize(("first", "says"), [(True, True), (False, True), (False, False)])
def test_a_transformer_is_pooled_as_its_files_say(tmp_path, first, says):
    """Without a file, by the mean."""
    pooling = {"pooling_mode_cls_token": first, "pooling_mode_mean_tokens": not first}
    folder = save_bert(tmp_path / "bert", pooling=pooling if says else None)
    encoder = load_encoder(str(folder))
    model, texts = BertModel.from_pretrained(folder).eval(), ["paper jam", "the printer the tray the paper jam", "jam"]
    ids = {"paper": 5, "jam": 3, "the": 6, "printer": 2, "tray": 4}
    for text in texts:
        with torch.inference_mode():
            states = model(torch.tensor([[ids[w] for w in text.split()]])).last_hidden_state[0].numpy()
        want = states[0] if first else states.mean(axis=0)
        np.testing.assert_allclose(encoder.encode(text), want / np.linalg.norm(want), atol=1e-5)
    alone = [encoder.encode(t) for t in texts]
    encoder.prepare(texts)  # in one batch, with padding
    np.testing.assert_allclose([encoder.encode(t) for t in texts], alone, atol=1e-5)
    assert not encoder.encode("").any()
    assert not encoder.encode(" \n").any()
    encoder.prepare(["", *texts])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda f: f.mkdir(), "neither a table of token vectors nor a config.json"),
        (lambda f: save_table(f, ["printer"], np.ones((2, 4))), "do not fit a tokenizer of 3 tokens"),
        (lambda f: save_table(f, ["printer"], np.full((3, 4), np.nan)), "not finite"),
        (lambda f: (random_table(f), (f / "model.safetensors").write_bytes(b"none"))[0], "cannot be loaded"),
        (lambda f: (random_table(f), (f / "tokenizer.json").write_text("{}"))[0], "tokenizer.json"),
        (lambda f: save_bert(f, pooling={"pooling_mode_max_tokens": True}), "pooling by pooling_mode_max_tokens"),
        (lambda f: save_bert(f, pad=None), "cannot be loaded"),
        (lambda f: random_table(f, ("drucker", "stau")), "must know English words"),
        (lambda f: save_table(f, [PROBED], np.ones((3, 4)), mapping=np.array([0, 1, 7])), "mapping or its weights"),
        (lambda f: save_table(f, [PROBED], np.ones((3, 4)), weights=np.ones(2, dtype=np.float32)), "mapping or its weights"),
    ],
)
def test_what_is_no_encoder_is_refused(tmp_path, make, said):
    make(tmp_path / "encoder")
    with pytest.raises(ConfigError, match=said):
        load_encoder(str(tmp_path / "encoder"))


@pytest.mark.parametrize("spec", ["no-such-folder/and-no-model", "neither a path nor a name", "/no/such/folder"])
def test_an_encoder_that_is_not_there_is_named(monkeypatch, spec):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match=r"leave router\.encoder out"):
        load_encoder(spec)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """The tiny corpus; its held-out voices speak of their work in words that no other voice uses."""
    folder = write_corpus(tmp_path_factory.mktemp("corpus") / "corpus")
    write_rows(folder / "router" / "persona.jsonl", [
        {"text": f"the {trouble} is broken, {word}", "persona": p, "voice": f"{'v' if word == known else 'held'}_{p}_{word}_{i}"}
        for p, (known, words) in zip(PERSONAS, ALIKE.items(), strict=True)
        for word in (known, *words)
        for i in range(4 if word == known else 1)
        for trouble in ("gateway", "tray", "tunnel", "client", "queue")
    ])  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def meanings(tmp_path_factory):
    """An encoder to which words that mean the same are the same."""
    words = [PROBED, *WORDS, *(w for alike in ALIKE.values() for w in alike)]
    vectors = np.eye(len(words) + 2)
    for word, alike in ALIKE.items():
        for other in alike:
            vectors[2 + words.index(other)] = vectors[2 + words.index(word)]
    return save_table(tmp_path_factory.mktemp("encoder") / "meanings", words, vectors)


def test_with_an_encoder_words_that_no_prompt_held_tell(corpus, meanings):
    data = read_router_corpus(corpus, PERSONAS)
    strange = [r for r in data.personal if r.voice.startswith("held_") and not r.profile]
    right = {}
    for name, encoder in (("words", None), ("meanings", load_encoder(meanings))):
        p, _ = fit_classifier(data, PERSONAS, 1, encoder).probabilities([r.text_only for r in strange])
        right[name] = np.mean([PERSONAS[i] == r.persona for i, r in zip(p.argmax(axis=1), strange, strict=True)])
    assert right["words"] < 0.6
    assert right["meanings"] > 0.9


def test_an_artefact_goes_with_its_encoder(corpus, meanings, tmp_path):
    out = tmp_path / "router"
    train_router(corpus, out, PERSONAS, 1, encoder=load_encoder(meanings))
    classifier = PersonaClassifier.load(out, PERSONAS)
    assert classifier.space.encoder.name == meanings
    query = Query("the verwaltungsrat waits for the vpn")
    scores = classifier.score([query])[0]
    assert max(scores.personas, key=scores.personas.get) == "leadership"
    assert "meaning of the text" in [r.feature for r in classifier.explain(query)]
    # The reasons are all there is to the score: what the words say, and what the encoder does.
    columns, values = classifier.space.row(query)
    weights = classifier.weights[columns, :-1]
    want = float(values @ (weights[:, 0] - weights.mean(axis=1))) / classifier.temperature
    said = sum(r.weight for r in classifier.explain(query, "leadership"))
    no_profile = [i for i, c in enumerate(columns) if classifier.space.names[c] in ("no profile", "unknown words")]
    quiet = float(values[no_profile] @ (weights[no_profile, 0] - weights[no_profile].mean(axis=1))) / classifier.temperature
    assert said == pytest.approx(want - quiet, abs=0.01)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for file in ("model.safetensors", "tokenizer.json"):
        (elsewhere / file).write_bytes((tmp_path.joinpath(meanings) / file).read_bytes())
    moved = PersonaClassifier.load(out, PERSONAS, str(elsewhere))
    assert moved.score([query])[0] == scores
    with pytest.raises(ConfigError, match="is not the encoder that the router was trained with"):
        PersonaClassifier.load(out, PERSONAS, random_table(tmp_path / "other", dim=load_encoder(meanings).dim))


def test_an_encoder_whose_files_change_is_read_anew(tmp_path):
    spec = random_table(tmp_path / "encoder", seed=0)
    before = load_encoder(spec)
    assert load_encoder(spec) is before
    shutil.rmtree(spec)
    random_table(tmp_path / "encoder", seed=1, dim=9)
    assert not load_encoder(spec).is_like(before.probe)


def project(tmp_path, settings):
    (tmp_path / "personas.yaml").write_text(
        "".join(f"- {{id: {p}, title: {p}, who: those of {p}, manner: plain, colour: '#1c7c{i}4'}}\n" for i, p in enumerate(PERSONAS))
    )
    (tmp_path / "deskroute.yaml").write_text(f"personas: personas.yaml\n{settings}")
    return load_config()


def test_the_configuration_names_it(tmp_path, corpus, meanings, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    config = project(tmp_path, "router:\n  artefact: ./made\n  encoder: ./encoder\n")
    assert (config.router.artefact, config.router.encoder) == ("made", "encoder")
    shutil.copytree(meanings, tmp_path / "first")
    train_router(corpus, tmp_path / "made", PERSONAS, 1, encoder=load_encoder(str(tmp_path / "first")))
    (tmp_path / "first").rename(tmp_path / "encoder")
    classifier, knowledge = load_router(config, None)
    assert classifier.space.encoder.name == str(tmp_path / "encoder")
    assert isinstance(knowledge, KnowledgeBase)
    # Where it was in training there is nothing any more, and nobody says where it is.
    with pytest.raises(ConfigError, match=r"was trained with the sentence encoder .*first'; name it in router\.encoder"):
        load_router(project(tmp_path, "router: made\n"), None)


def test_a_router_without_an_encoder_is_served_as_it_is(tmp_path, corpus, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    config = project(tmp_path, "router: {artefact: made, encoder: encoder}\n")
    train_router(corpus, tmp_path / "made", PERSONAS, 1)
    caplog.set_level("WARNING")
    assert load_router(config, None)[0].space.encoder is None
    assert "the router in force was trained without one; run `deskroute retrain router`" in caplog.text
