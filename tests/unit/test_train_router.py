"""pipelines/train_router.py on a tiny corpus written here: it learns, measures on held-out voices, and writes whole artefacts only."""

import hashlib
import json

import numpy as np
import pytest
from scipy import sparse
from unit.corpora import PERSONAS, TROUBLE, write_corpus, write_rows

from persona_models.errors import WorkError
from pipelines import train_knowledge
from pipelines import train_router as module
from pipelines.router_corpus import Labelled, Titles, folds, read_router_corpus
from pipelines.train_router import _profiles, fit_classifier, train_router
from router.artefact import MANIFEST
from router.classifier import PersonaClassifier
from router.knowledge import Calibration, KnowledgeBase
from router.query import Profile, Query


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus")


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "router"
    return out, train_router(corpus, out, PERSONAS, seed=1)


def test_corpus_is_read_with_topics_profiles_and_kinds(corpus):
    data = read_router_corpus(corpus, PERSONAS)
    assert [a.id for a in data.articles] == ["password", "printer", "vpn"]
    assert data.values == {"desk_phone": "4357"}
    assert len(data.prompts) == 3 * 48
    assert {r.topic for r in data.prompts} == set(TROUBLE)
    assert sum(r.held_out for r in data.prompts) == 36
    assert data.personal[0].profile == Profile("Director", "", 0, "Lyon")
    assert {r.kind for r in data.out_of_domain} == {"smalltalk"}


def test_a_rival_is_measured_on_the_same_held_out_voices(corpus, trained, tmp_path):
    folder, before = trained
    report = train_router(corpus, tmp_path / "again", PERSONAS, seed=2, rival=folder)
    # Times differ from one run to the next.
    steady = [name for name in before.metrics if not name.endswith("_ms")]
    assert {n: report.rival[n] for n in steady} == {n: before.metrics[n] for n in steady}
    assert before.rival is None


def test_a_router_of_other_labels_is_no_rival(corpus, trained, tmp_path):
    labels = ("vpn", "printer", "password")
    rows = [Labelled(f"{text} {i}", voice=f"v{i}", persona=topic) for topic, texts in TROUBLE.items() for text in texts for i in range(8)]
    report = train_router(corpus, tmp_path / "out", labels, prompts=rows, own_personas=PERSONAS, rival=trained[0])
    assert report.rival is None


def test_router_files_may_be_missing(tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    for file in (corpus / "router").iterdir():
        file.unlink()
    data = read_router_corpus(corpus, PERSONAS)
    assert (data.personal, data.neutral, data.out_of_domain) == ((), (), ())
    report = train_router(corpus, tmp_path / "out", PERSONAS)
    assert report.metrics["accuracy_text"] > 0.3
    assert "in_domain_auroc" not in report.metrics
    # Without strangers to learn from nothing is declined.
    assert all(s.in_domain >= s.min_in_domain for s in PersonaClassifier.load(tmp_path / "out").score([Query("a poem"), Query("")]))


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("{broken", "prompts/vpn.jsonl:2"),
        ('["list"]', "prompts/vpn.jsonl:2"),
        ('{"text": "no persona"}', "persona"),
        ('{"text": " ", "persona": "field"}', "empty text"),
        ('{"text": "x", "persona": "pilot"}', "pilot"),
        ('{"text": "x", "persona": "field", "profile": {"tenure_days": "long"}}', "long"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, line, fault):
    corpus = write_corpus(tmp_path / "corpus")
    path = corpus / "prompts" / "vpn.jsonl"
    path.write_text(path.read_text().splitlines()[0] + "\n" + line + "\n")
    with pytest.raises(WorkError, match=fault):
        read_router_corpus(corpus, PERSONAS)


def test_an_empty_corpus_and_a_persona_without_prompts_are_named(tmp_path, corpus):
    with pytest.raises(WorkError, match="nothing to train"):
        read_router_corpus(tmp_path, PERSONAS)
    with pytest.raises(WorkError, match="new_hire"):
        fit_classifier(read_router_corpus(corpus), (*PERSONAS, "new_hire"))


def test_it_learns_from_text_from_profiles_and_what_is_no_request(trained):
    out, report = trained
    classifier = PersonaClassifier.load(out, PERSONAS)
    scores = classifier.score([
        Query("pages never come out before the board meeting of the directors"),
        Query("vpn tunnel drops in the van on the road to the customer's site"),
        Query("vpn tunnel drops again", Profile(title="Payroll clerk")),
        Query("a poem about the moon"),
    ])  # fmt: skip
    best = [max(s.personas, key=s.personas.__getitem__) for s in scores[:3]]
    assert best == ["leadership", "field", "admin"]
    assert scores[3].in_domain < min(s.in_domain for s in scores[:3])
    assert any(r.feature.startswith("title") for r in scores[2].reasons)
    assert KnowledgeBase.load(out).match("my printer makes stripes", 1)[0].article.id == "printer"
    assert report.metrics["accuracy_profile"] > report.metrics["accuracy_profile_text_only"]


def test_report_counts_the_held_out_voices_and_nothing_else(trained):
    _, report = trained
    held = 36  # prompts; the texts that came with a profile tell nothing without it
    assert report.confusion.sum() == held
    assert report.reliability["count"].sum() == held
    assert np.trace(report.confusion) / held == pytest.approx(report.metrics["accuracy_text"])
    assert sum(e["kind"] == "persona" for e in report.errors) == held - np.trace(report.confusion)
    assert sum(n for _, _, n in report.retrieval_confusions) == sum(e["kind"] == "article" for e in report.errors)
    expected = {
        "accuracy_text", "macro_f1_text", "ece_text", "brier_text", "fallback_of_known", "accuracy_at_threshold", "accuracy_at_80", "accuracy_profile",
        "in_domain_auroc", "false_decline_rate", "retrieval_top1", "retrieval_top3", "article_lost", "no_article_uncovered",
        "no_article_out_of_domain", "latency_p50_ms", "latency_p95_ms",
    }  # fmt: skip
    assert expected <= set(report.metrics)
    shares = {k: v for k, v in report.metrics.items() if not k.startswith(("latency", "brier"))}
    assert all(0 <= v <= 1 for v in shares.values())


def test_held_out_voices_are_never_trained_on(tmp_path, corpus, trained):
    """Garbage in the held-out voices must not move a single weight."""
    poisoned = write_corpus(tmp_path / "corpus")
    for path in [*(poisoned / "prompts").iterdir(), *(poisoned / "router").iterdir()]:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        write_rows(path, [r | {"text": "leak leak leak"} if r["voice"].startswith("held_") else r for r in rows])
    report = train_router(poisoned, tmp_path / "out", PERSONAS, seed=1)
    assert report.version == trained[1].version


def test_the_artefact_is_whole_and_says_so_last(trained):
    out, report = trained
    manifest = json.loads((out / MANIFEST).read_text())
    assert set(manifest["files"]) == {p.name for p in out.iterdir()} - {MANIFEST}
    for name, expected in manifest["files"].items():
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == expected
    assert manifest["personas"] == list(PERSONAS)
    assert manifest["version"] == report.version
    assert [p.name for p in out.parent.iterdir()] == ["router"]


def test_a_failed_run_leaves_the_old_artefact_and_no_rest(tmp_path, corpus, monkeypatch):
    out = tmp_path / "router"
    train_router(corpus, out, PERSONAS)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    train_router(corpus, out, PERSONAS)  # in place of an old one
    assert [p.name for p in tmp_path.iterdir()] == ["router"]

    def full_disk(*_):
        raise OSError("disk full")

    monkeypatch.setattr(KnowledgeBase, "save", full_disk)
    with pytest.raises(WorkError, match="disk full"):
        train_router(corpus, out, PERSONAS)
    assert [p.name for p in tmp_path.iterdir()] == ["router"]
    assert {p.name for p in out.iterdir()} == set(before)


def test_folds_keep_voices_whole_and_cover_every_row_once():
    voices = [f"v{n % 11}" for n in range(60)]
    parts = list(folds(voices, seed=0))
    assert np.sum(parts, axis=0).tolist() == [1] * 60
    for fold in parts:
        inside = {v for v, chosen in zip(voices, fold, strict=True) if chosen}
        assert inside.isdisjoint({v for v, chosen in zip(voices, fold, strict=True) if not chosen})


def test_calibration_withholds_no_more_right_articles_than_allowed():
    random = np.random.default_rng(0)
    products = random.uniform(0, 0.3, size=(400, 5))
    label = random.integers(0, 5, size=400)
    products[np.arange(400), label] += 0.3
    surplus = random.normal(size=400) * 0.1
    absent = (random.uniform(0, 0.3, size=(50, 5)), random.normal(size=50) * 0.1 + 0.3, 0.5)
    found = train_knowledge._calibrate(Calibration(), products, surplus, label, [absent])
    right = products.argmax(axis=1) == label
    best = np.array([found.scores(p, s).max() for p, s in zip(products[right], surplus[right], strict=True)])
    assert (best < found.threshold).mean() <= train_knowledge.MAX_LOST_ARTICLES
    assert min(found.slope, found.lead) >= 0
    assert found.none > 0
    kept = np.array([found.scores(p, s).max() for p, s in zip(*absent[:2], strict=True)])
    assert (kept >= found.threshold).mean() < 0.5


def test_scores_are_calibrated_on_plain_authors_where_there_are_enough():
    plain, other = Labelled("vpn", "v", kind=train_knowledge.PLAIN), Labelled("vpn", "w")
    many, few = [plain] * train_knowledge.MIN_PLAIN, [plain] * (train_knowledge.MIN_PLAIN - 1)
    assert train_knowledge._plain([*many, other]).tolist() == [True] * len(many) + [False]
    assert train_knowledge._plain([*few, other]).all()
    assert train_knowledge._plain([]).shape == (0,)


def test_term_weights_gradient_is_the_slope_of_the_loss(monkeypatch):
    """The analytic gradient against finite differences, read off through a minimiser that only evaluates."""
    random = np.random.default_rng(0)
    x = sparse.random(12, 7, 0.6, format="csr", rng=random)
    vectors = sparse.random(3, 7, 0.7, format="csr", rng=random)
    fold = np.arange(12) % 2 == 0
    seen = {}

    class Done:
        x = np.zeros(8)

    def only_evaluate(loss, start, **_):
        point = random.normal(size=8) * 0.3
        seen["exact"] = loss(point)[1]
        step = np.eye(8) * 1e-5
        seen["slope"] = np.array([(loss(point + s)[0] - loss(point - s)[0]) / 2e-5 for s in step])
        return Done

    monkeypatch.setattr(train_knowledge, "minimize", only_evaluate)
    train_knowledge._term_weights(x, random.integers(0, 3, 12), [(fold, vectors), (~fold, vectors * 0.5)])
    np.testing.assert_allclose(seen["exact"], seen["slope"], atol=1e-4)


def test_temperature_undoes_a_known_sharpening():
    random = np.random.default_rng(1)
    logits = random.normal(size=(4000, 3)) * 2
    label = np.array([random.choice(3, p=p) for p in module.softmax(logits)])
    assert module._temperature(logits * 2.5, label) == pytest.approx(2.5, rel=0.15)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("titles: [", "must hold"),
        ("- a list", "must hold"),
        ("titles: {field: [Driver]}\n", "must hold"),
        ("titles: {field: [Driver]}\ndepartments: {}\nnewcomers: {persona: field, first_days: soon, except: []}\n", "must hold"),
        (
            "titles: {pilots: [Captain]}\ndepartments: {}\nnewcomers: {persona: field, first_days: 30, except: []}\n",
            "pilots: no persona of the catalogue",
        ),
    ],
)
def test_malformed_titles_are_named(tmp_path, text, why):
    write_corpus(tmp_path)
    path = tmp_path / "router" / "titles.yaml"
    path.write_text(text)
    with pytest.raises(WorkError, match=why) as caught:
        read_router_corpus(tmp_path, PERSONAS)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("first_days", [0, 1, 45, 900])
def test_composed_profiles_keep_the_rule_for_newcomers(first_days):
    titles = Titles({"admin": ("Clerk", "Buyer") * 40, "new_hire": ("Intern",)}, {"admin": ("Finance",)}, "new_hire", first_days, ())
    rows = _profiles(titles, 3)
    settled = [r for r in rows if r.profile.title != "Intern"]
    for row in settled:
        new = row.profile.tenure_days is not None and row.profile.tenure_days < first_days
        assert row.persona == ("new_hire" if new else "admin")
    assert any(r.persona == "new_hire" for r in settled) is (first_days > 0)
    assert any(not r.profile.title and r.profile.department == "Finance" for r in rows)


def test_the_model_of_all_topics_tells_classes_apart_and_says_nothing_of_one_without_texts():
    random = np.random.default_rng(4)
    label = np.repeat([0, 1, 3], 40)
    own = np.eye(4)[label] @ np.eye(4, 12) * 2
    x = sparse.csr_matrix((own + random.random((120, 12))) / 10)
    weights, biases = train_knowledge._fit_together(train_knowledge._Texts(x, label), 4)
    logits = train_knowledge._apply((weights, biases), x)
    assert (logits[:, [0, 1, 3]].argmax(axis=1) == np.repeat([0, 1, 2], 40)).mean() > 0.95
    assert not weights[2].any()
    assert biases[2] == 0
    np.testing.assert_allclose(logits.sum(axis=1), 0, atol=1e-3)
    both = train_knowledge._fit_margins(train_knowledge._Texts(x, label), 4)
    each = train_knowledge._fit_each(train_knowledge._Texts(x, label), 4)
    np.testing.assert_allclose(both[0], each[0].toarray() + train_knowledge.LOGIT_SHARE * weights, atol=1e-6)
    two = label < 2
    assert not train_knowledge._fit_together(train_knowledge._Texts(x[two], label[two]), 4)[0].any()


def test_an_article_without_prompts_wins_its_own_requests_and_leaves_the_others():
    """Products with texts alone lie on another scale than the others'; the folds' topics are never among the rivals of their own prompts."""
    random = np.random.default_rng(6)
    n = 6
    label = np.repeat(np.arange(n), 80)
    at = np.arange(len(label))
    own = random.uniform(0, 0.1, size=(len(label), n))
    own[at, label] += 0.15
    combined = random.normal(0, 0.5, size=(len(label), n))
    combined[at, label] += 4
    topics = list(folds([str(t) for t in range(n)], 0))
    struck = random.normal(0, 0.5, size=(len(label), n))
    for out in topics:
        struck[np.ix_(out[label], out)] = -np.inf
    gain, offset = train_knowledge._own_scale(own, struck, combined, label, topics, 0)
    scaled = own * gain + offset
    for out in topics:
        theirs = out[label]
        assert (scaled[theirs][:, out].max(axis=1) > struck[theirs].max(axis=1)).mean() > 0.9
        assert (scaled[~theirs][:, out].max(axis=1) < combined[~theirs][:, ~out].max(axis=1)).mean() > 0.95
    alone = np.ones(n, dtype=bool)
    assert train_knowledge._own_scale(own, np.full_like(struck, -np.inf), combined, label, [alone], 0) == (
        pytest.approx(np.median(combined[at, label]) / np.median(own[at, label])),
        0.0,
    ), "no rival is left"
