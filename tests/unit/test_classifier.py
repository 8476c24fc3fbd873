"""router/classifier.py: the artefact's arithmetic against plain dense numpy, its reasons, and what a bad artefact says."""

import json

import numpy as np
import pytest

from persona_models.errors import ConfigError
from router.artefact import MANIFEST
from router.classifier import FILE, MAX_REASONS, MIN_REASON, PersonaClassifier, Tells, sigmoid, softmax
from router.features import FeatureSpace
from router.query import Profile, Query
from router.text_space import TextSpace

PERSONAS = ("leadership", "field", "admin")
QUERIES = [
    Query("the board paper is locked", Profile("Director", "Executive office", 900)),
    Query("tablet dead on the customer site", Profile("Service engineer", "Field", 200)),
    Query("payroll run fails, the invoices are waiting"),
    Query(""),
    Query("zzz qqq"),
]


@pytest.fixture
def classifier() -> PersonaClassifier:
    space = FeatureSpace.fit(QUERIES, TextSpace.fit([q.text for q in QUERIES], min_words=1, min_grams=1), min_profiles=1)
    random = np.random.default_rng(3)
    return PersonaClassifier(space, PERSONAS, random.normal(size=(len(space), 4)), random.normal(size=4), temperature=1.7, min_in_domain=0.25)


def test_scores_are_the_softmax_by_hand(classifier):
    dense = classifier.space.rows(QUERIES).toarray().astype(np.float64)
    for scores, x in zip(classifier.score(QUERIES), dense, strict=True):
        logits = [float(x @ classifier.weights[:, p]) + float(classifier.bias[p]) for p in range(3)]
        powers = [np.exp(z / 1.7) for z in logits]
        assert list(scores.personas) == list(PERSONAS)
        assert list(scores.personas.values()) == pytest.approx([p / sum(powers) for p in powers], abs=1e-5)
        assert sum(scores.personas.values()) == pytest.approx(1.0)
        inside = float(x @ classifier.weights[:, 3]) + float(classifier.bias[3])
        assert scores.in_domain == pytest.approx(1 / (1 + np.exp(-inside)), abs=1e-5)
        assert scores.min_in_domain == 0.25


def test_probabilities_are_those_of_score_and_may_be_of_nothing(classifier):
    personas, inside = classifier.probabilities(QUERIES)
    for row, p, s in zip(classifier.score(QUERIES), personas, inside, strict=True):
        assert list(row.personas.values()) == pytest.approx(list(p))
        assert row.in_domain == pytest.approx(s)
    personas, inside = classifier.probabilities([])
    assert personas.shape == (0, 3)
    assert inside.shape == (0,)
    assert classifier.score([]) == []


def test_reasons_name_words_of_the_winner_largest_first(classifier):
    for query, scores in zip(QUERIES, classifier.score(QUERIES), strict=True):
        best = max(scores.personas, key=scores.personas.__getitem__)
        weights = [r.weight for r in scores.reasons]
        assert len(weights) <= MAX_REASONS
        assert weights == sorted(weights, reverse=True)
        # The strongest of all, for or against.
        strength = sorted((abs(r.weight) for r in classifier.explain(query)), reverse=True)
        assert sorted(map(abs, weights), reverse=True) == [w for w in strength if w >= MIN_REASON][:MAX_REASONS]
        assert {r.persona for r in scores.reasons} <= {best}
        for reason in scores.reasons:
            words = reason.feature.split('"')[1].split() if reason.feature.startswith("word") else []
            assert all(w in query.text for w in words)


def test_a_planted_word_is_the_reason():
    space = FeatureSpace.fit(QUERIES, TextSpace.fit([q.text for q in QUERIES], min_words=1, min_grams=1), min_profiles=1)
    weights = np.zeros((len(space), 4))
    weights[space.names.index('word "payroll"'), 2] = 9.0
    weights[space.names.index('title "director"'), 0] = 9.0
    planted = PersonaClassifier(space, PERSONAS, weights, np.zeros(4), 1.0, 0.5)
    assert [r.feature for r in planted.score([QUERIES[2]])[0].reasons] == ['word "payroll"']
    assert [r.feature for r in planted.score([QUERIES[0]])[0].reasons] == ['title "director"']
    # Signed: what speaks for one persona speaks against another.
    for_it, against = (planted.explain(QUERIES[2], p) for p in (PERSONAS[2], PERSONAS[0]))
    assert (for_it[0].feature, for_it[0].persona) == ('word "payroll"', PERSONAS[2])
    assert for_it[0].weight > 0
    assert (against[-1].feature, against[-1].persona) == ('word "payroll"', PERSONAS[0])
    assert against[-1].weight < 0


def test_saved_and_loaded_gives_identical_scores(classifier, tmp_path):
    before = classifier.score(QUERIES)
    version = classifier.save(tmp_path)
    loaded = PersonaClassifier.load(tmp_path, PERSONAS)
    assert loaded.score(QUERIES) == before
    assert loaded.version == version
    assert len(version) == 12
    assert classifier.save(tmp_path) == version


def test_the_version_changes_with_the_content(classifier, tmp_path):
    version = classifier.save(tmp_path)
    classifier.temperature = 1.8
    assert classifier.save(tmp_path) != version


def test_missing_artefact(tmp_path):
    with pytest.raises(ConfigError, match="retrain router"):
        PersonaClassifier.load(tmp_path / "nowhere")


@pytest.mark.parametrize("damage", [b"", b"not safetensors at all", None])
def test_damaged_artefact(classifier, tmp_path, damage):
    classifier.save(tmp_path)
    path = tmp_path / FILE
    path.write_bytes(path.read_bytes()[:-7] if damage is None else damage)
    with pytest.raises(ConfigError, match="damaged"):
        PersonaClassifier.load(tmp_path)


def test_a_changed_byte_is_noticed_by_the_manifest(classifier, tmp_path):
    classifier.save(tmp_path)
    (tmp_path / MANIFEST).write_text(json.dumps({"files": {FILE: "0" * 64}}))
    with pytest.raises(ConfigError, match="manifest"):
        PersonaClassifier.load(tmp_path)
    (tmp_path / MANIFEST).write_text("[]")
    with pytest.raises(ConfigError, match="manifest"):
        PersonaClassifier.load(tmp_path)


def test_artefact_for_other_personas(classifier, tmp_path):
    classifier.save(tmp_path)
    with pytest.raises(ConfigError, match="night_shift"):
        PersonaClassifier.load(tmp_path, ("leadership", "night_shift", "admin"))
    with pytest.raises(ConfigError, match="catalogue"):
        PersonaClassifier.load(tmp_path, ("field", "leadership", "admin"))


def test_numbers_that_do_not_fit_are_refused(classifier):
    with pytest.raises(ConfigError, match="do not fit"):
        PersonaClassifier(classifier.space, PERSONAS, classifier.weights[:-1], classifier.bias, 1.0, 0.5)
    with pytest.raises(ConfigError, match="finite"):
        PersonaClassifier(classifier.space, PERSONAS, classifier.weights * np.nan, classifier.bias, 1.0, 0.5)
    with pytest.raises(ConfigError, match="temperature"):
        PersonaClassifier(classifier.space, PERSONAS, classifier.weights, classifier.bias, 0.0, 0.5)


def test_large_logits_do_not_overflow():
    assert softmax(np.array([[1e4, 0.0]])).tolist() == [[1.0, 0.0]]
    assert sigmoid(np.array([-1e5, 1e5])).tolist() == pytest.approx([0.0, 1.0])


def telling(classifier, *, own: float) -> PersonaClassifier:
    """The classifier with a model of what tells: the word "payroll" and nothing else."""
    weights = np.zeros(len(classifier.space), dtype=np.float32)
    weights[classifier.space.names.index('word "payroll"')] = 40.0
    tells = Tells(weights, -4.0, 0.0, own, 0.0, 0.5)
    return PersonaClassifier(classifier.space, PERSONAS, classifier.weights, classifier.bias, 1.7, 0.25, tells=tells, trust=1.0)


def test_a_conversation_is_its_turns_each_as_far_as_it_tells(classifier):
    """Against the obvious way: from the first turn on, each takes its share of what went before."""
    made = telling(classifier, own=1.0)
    turns = ["the payroll run fails", "it says error 49", "payroll payroll again"]
    alone = [made.score([Query(t)])[0] for t in turns]
    mixed = np.array(list(alone[0].personas.values()))
    for scores in alone[1:]:
        mixed = scores.known * np.array(list(scores.personas.values())) + (1 - scores.known) * mixed
    query = Query(turns[-1], turns=tuple(reversed(turns)))
    assert list(made.score([query])[0].personas.values()) == pytest.approx(mixed, abs=1e-9)
    assert made.probabilities([query])[0][0] == pytest.approx(mixed, abs=1e-9)
    assert made.score([query])[0].known == max(s.known for s in alone)
    # A turn that tells nothing leaves the conversation as it was, and its reasons too.
    neutral = Query(turns[1], turns=(turns[1], turns[0]))
    assert alone[1].known < 0.05
    assert list(made.score([neutral])[0].personas.values()) == pytest.approx(list(alone[0].personas.values()), abs=0.05)
    assert made.score([neutral])[0].reasons == alone[0].reasons


def test_a_profile_tells_whatever_the_text_says(classifier):
    made = telling(classifier, own=1.0)
    assert made.score([Query("it says error 49")])[0].known < 0.05
    assert made.score([Query("it says error 49", Profile(title="Director"))])[0].known > 0.9
    assert made.score([Query("it says error 49", Profile(location="Lyon"))])[0].known < 0.05


def test_what_tells_is_kept_in_the_artefact(classifier, tmp_path):
    made = telling(classifier, own=1.0)
    made.segments = {"weights": [0.0], "bias": 0.0, "threshold": 0.5}
    before = made.score(QUERIES)
    made.save(tmp_path)
    loaded = PersonaClassifier.load(tmp_path, PERSONAS)
    assert loaded.score(QUERIES) == before
    assert (loaded.trust, loaded.segments) == (made.trust, made.segments)
