"""router/knowledge.py: matching against brute force, a company's folder, and what a bad folder or artefact says."""

import json
from dataclasses import asdict

import numpy as np
import pytest

from persona_models.errors import ArticleError, ConfigError
from router.article import Article, Step, parse_article
from router.knowledge import ARTICLES_FILE, FILE, Calibration, KnowledgeBase, Learned, load_folder, text_of


def article(name: str, title: str, *symptoms: str, step: str = "Restart it.", **more) -> Article:
    return Article(name, title, f"the {name}", symptoms=symptoms, steps=(Step(step, short="Restart."),), **more)


ARTICLES = [
    article("vpn", "VPN does not connect", "tunnel drops at home", "gateway not reachable", step="Quit {vpn_client} and choose {gateway}.",
            slots={"gateway": ("Main gateway", "Other")}, order={"field": (1,)}, notes={"field": "Use the hotspot."}),
    article("printer", "Printer queue is stuck", "pages never come out", "paper jam that is none"),
    article("payroll", "Payroll system refuses the sign-in", "salary run blocked", "payroll says no licence"),
]  # fmt: skip
PROMPTS = {
    "vpn": ["no tunnel from the hotel", "vpn gone again after lunch", "cannot reach the servers from home", "globe icon stays grey"],
    "printer": ["nothing comes out of the big machine by the window", "my pages vanish", "jam in tray two, but no paper there", "stuck queue"],
    "payroll": ["wages are due and I am locked out", "salary screen empty", "payroll kicks me out", "cannot open the pay run"],
}
OWN = {
    "forklift_scanner": "# Forklift scanner loses its pairing\n\n- Hold the yellow trigger for ten seconds.\n- Scan the pairing code on the mast.\n",
    "greenhouse_sensors": "# Greenhouse humidity sensors show nothing\n\n## Symptoms\n- tomato house shows no moisture\n\n## Steps\n1. Reseat the probe.\n",
    "choir_booking": "# Booking the rehearsal room for the choir\n\nOpen the rehearsal calendar. Pick an evening. The organ key is at the lodge.\n",
}


@pytest.fixture(scope="module")
def base() -> KnowledgeBase:
    return KnowledgeBase.build(ARTICLES, PROMPTS, values={"vpn_client": "the tunnel app", "desk_phone": "4357"})


def test_match_is_brute_force_cosine(base):
    """Every vector written out densely: mean of own text and prompts, length 1, times the request's vector."""

    def unit(v):
        return v / np.linalg.norm(v) if v.any() else v

    for text in ["my vpn tunnel is gone", "pages vanish in the queue", "salary run is blocked, I am locked out", "paper"]:
        query = unit(base.space.rows([text]).toarray()[0]) * np.linalg.norm(base.space.rows([text]).toarray()[0]) / np.sqrt(2)
        products = []
        for a in ARTICLES:
            own = unit(base.space.rows([text_of(a, base.values)]).toarray()[0])
            prompts = unit(base.space.rows(PROMPTS[a.id]).toarray().sum(axis=0))
            products.append(float(unit((own + prompts) / 2) @ query))
        np.testing.assert_allclose(base.measure(text)[0], products, atol=1e-5)
        best = int(np.argmax(products))
        lead = products[best] - sorted(products)[-2]
        c = base.calibration
        match = base.match(text, 1)[0]
        assert match.article == ARTICLES[best]
        assert match.score == pytest.approx(1 / (1 + np.exp(-(c.bias + c.slope * products[best] + c.lead * lead))), abs=1e-5)


def test_matches_are_ordered_bounded_and_as_many_as_asked(base):
    found = base.match("the printer queue is stuck, payroll waits")
    assert found[0].article.id == "printer"
    assert len(found) == 3
    assert [m.score for m in found] == sorted((m.score for m in found), reverse=True)
    assert all(0 <= m.score <= 1 for m in found)
    assert len(base.match("printer", 2)) == 2


def test_every_example_prompt_finds_its_article(base):
    for name, prompts in PROMPTS.items():
        for prompt in prompts:
            assert base.match(prompt, 1)[0].article.id == name


@pytest.mark.parametrize("text", ["", "   ", "?!", "qqq zzz xxx"])
def test_nothing_matches_nothing(base, text):
    assert base.match(text) == []
    assert base.best(text) is None


def test_best_needs_the_threshold():
    strict = KnowledgeBase.build(ARTICLES, PROMPTS, calibration=Calibration(threshold=1.0))
    assert strict.match("printer queue stuck")
    assert strict.best("printer queue stuck") is None
    assert KnowledgeBase.build(ARTICLES, PROMPTS, calibration=Calibration(threshold=0.0)).best("printer").article.id == "printer"


def test_one_article_needs_no_more_than_one_of_two():
    """A company's only article, and the same beside one that has nothing to do with the request."""
    calibration = Calibration(slope=3.0, lead=2.5, own_text_gain=14.0, own_text_offset=-0.8)
    both = KnowledgeBase.build(ARTICLES[:2], {}, calibration=calibration)
    alone = KnowledgeBase.build(ARTICLES[:1], {}, space=both.space, calibration=calibration)
    text = "the tunnel drops"
    assert alone.match(text)[0].score == pytest.approx(both.match(text)[0].score, abs=0.02)


def test_slots_are_indexed_by_the_names_people_see(base):
    assert base.match("the tunnel app is frozen", 1)[0].article.id == "vpn"
    assert "vpn_client" not in base.space.columns
    assert base.values["desk_phone"] == "4357"


def test_company_articles_without_examples_are_found_and_the_built_in_ones_keep_their_prompts(base):
    own = [parse_article(text, name, source=name) for name, text in OWN.items()]
    both = base.with_articles(own)
    assert [a.id for a in both.articles] == ["vpn", "printer", "payroll", *OWN]
    for text, name in [
        ("the scanner on my forklift lost its pairing again", "forklift_scanner"),
        ("no moisture reading in the tomato greenhouse since this morning", "greenhouse_sensors"),
        ("how do I book the rehearsal room? the choir meets on tuesday", "choir_booking"),
    ]:
        assert both.match(text, 1)[0].article.id == name
    for name, prompts in PROMPTS.items():
        assert all(both.match(p, 1)[0].article.id == name for p in prompts)
    assert len(base.articles) == 3
    assert both.version != base.version


def test_company_articles_instead_of_the_built_in_ones(base):
    own = [parse_article(text, name, source=name) for name, text in OWN.items()]
    alone = base.with_articles(own, instead=True)
    assert [a.id for a in alone.articles] == list(OWN)
    assert alone.match("forklift pairing", 1)[0].article.id == "forklift_scanner"


def test_a_company_article_replaces_the_built_in_one_of_the_same_id(base):
    new = article("vpn", "How we do VPN here", "the vpn of our house")
    merged = base.with_articles([new])
    assert [a.id for a in merged.articles] == ["printer", "payroll", "vpn"]
    assert merged.match("vpn", 1)[0].article.title == "How we do VPN here"
    with pytest.raises(ArticleError, match="vpn"):
        base.with_articles([new, new])


def test_saved_and_loaded_gives_the_same_matches(base, tmp_path):
    version = base.save(tmp_path)
    loaded = KnowledgeBase.load(tmp_path)
    assert loaded.articles == base.articles
    assert (loaded.values, loaded.calibration, loaded.version) == (base.values, base.calibration, version)
    assert loaded.articles[0].render("field", values=loaded.values) == ARTICLES[0].render("field", values=base.values)
    for prompt in [p for prompts in PROMPTS.values() for p in prompts]:
        for ours, theirs in zip(base.match(prompt), loaded.match(prompt), strict=True):
            assert ours.article.id == theirs.article.id
            assert ours.score == pytest.approx(theirs.score, abs=2e-3)  # stored in 8 bits
    # What was stored once is stored again without loss.
    again = tmp_path / "again"
    again.mkdir()
    assert loaded.save(again) == version


def test_missing_or_damaged_artefact(base, tmp_path):
    with pytest.raises(ConfigError, match="retrain router"):
        KnowledgeBase.load(tmp_path / "nowhere")
    base.save(tmp_path)
    whole = (tmp_path / ARTICLES_FILE).read_text()
    for broken in ("{", "[]", json.dumps({"values": {}, "articles": [{"id": "x"}]}), json.dumps({"values": {}, "articles": []})):
        (tmp_path / ARTICLES_FILE).write_text(broken)
        with pytest.raises(ConfigError, match="knowledge"):
            KnowledgeBase.load(tmp_path)
    (tmp_path / ARTICLES_FILE).unlink()
    with pytest.raises(ConfigError, match="cannot read"):
        KnowledgeBase.load(tmp_path)
    (tmp_path / ARTICLES_FILE).write_text(whole)
    (tmp_path / FILE).write_bytes(b"junk")
    with pytest.raises(ConfigError, match="damaged"):
        KnowledgeBase.load(tmp_path)


def test_empty_base_matches_nothing():
    empty = KnowledgeBase.build([], {})
    assert empty.match("vpn") == []
    assert empty.best("vpn") is None


def test_scores_keep_the_order_of_the_products():
    products = np.array([0.1, 0.4, 0.4, 0.0])
    scores = Calibration().scores(products)
    assert scores[1] == scores[2] > scores[0] > scores[3]
    assert Calibration().scores(np.array([0.3])).shape == (1,)


def test_folder_is_read_with_its_subfolders_and_without_its_readme(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "README.md").write_text("about this folder")
    (tmp_path / "b.md").write_text(OWN["forklift_scanner"])
    (tmp_path / "sub" / "a.md").write_text("---\norder:\n  field: [1]\n---\n# Title\n\n## Steps\n1. Do it.\n")
    (tmp_path / "notes.txt").write_text("no article")
    found = load_folder(tmp_path, ("field",))
    assert [a.id for a in found] == ["b", "a"]
    with pytest.raises(ArticleError, match="field"):
        load_folder(tmp_path, ("admin",))


def test_bad_folders_say_what_is_wrong(tmp_path):
    with pytest.raises(ConfigError, match="no folder"):
        load_folder(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"\.md"):
        load_folder(tmp_path)
    (tmp_path / "one.md").write_text("---\nid: same\n---\n# One\ntext\n")
    (tmp_path / "two.md").write_text("---\nid: same\n---\n# Two\ntext\n")
    with pytest.raises(ArticleError, match=r"two\.md.*'same'.*one\.md"):
        load_folder(tmp_path)
    (tmp_path / "two.md").write_bytes(b"# T\xff\n")
    with pytest.raises(ArticleError, match=r"two\.md.*UTF-8"):
        load_folder(tmp_path)


def test_articles_are_plain_data(base):
    assert json.loads(json.dumps(asdict(base.articles[0])))["id"] == "vpn"


def test_what_was_learnt_adds_vectors_offsets_and_a_surplus(base, tmp_path):
    """Against the sums written out: an article's vector and offset, the "no article" vector, and the one offset of articles without prompts."""
    random = np.random.default_rng(3)
    vectors = random.normal(size=(len(ARTICLES) + 1, len(base.space))) * 0.1
    offsets = np.array([-0.02, 0.01, 0.0, 0.3])
    calibration = Calibration(none=2.0, own_text_offset=-0.05)
    values = {"vpn_client": "the tunnel app", "desk_phone": "4357"}
    taught = KnowledgeBase.build(ARTICLES, PROMPTS, values=values, space=base.space, calibration=calibration, learned=Learned(vectors, offsets))
    text = "pages vanish in the queue"
    x = base.space.rows([text]).toarray()[0] / np.sqrt(2)
    products, surplus = taught.measure(text)
    np.testing.assert_allclose(products, base.measure(text)[0] + vectors[:-1] @ x + offsets[:-1], atol=1e-5)
    assert surplus == pytest.approx(float(vectors[-1] @ x) + 0.3, abs=1e-5)
    assert taught.match(text, 1)[0].score == pytest.approx(float(calibration.scores(products, surplus).max()), abs=1e-6)
    assert calibration.scores(products, surplus + 1).max() < calibration.scores(products, surplus).max()

    both = taught.with_articles([parse_article(t, name, source=name) for name, t in OWN.items()])
    np.testing.assert_allclose(both.measure(text)[0][:3], products, atol=1e-5)
    plain = base.with_articles([parse_article(t, name, source=name) for name, t in OWN.items()])
    np.testing.assert_allclose(both.measure("forklift pairing")[0][3:], plain.measure("forklift pairing")[0][3:] - 0.05, atol=1e-5)
    assert both.measure("the forklift scanner lost its pairing")[1] == 0.0, "nothing learnt knew of a company's article"

    taught.save(tmp_path)
    again = KnowledgeBase.load(tmp_path)
    np.testing.assert_allclose(again.measure(text)[0], products, atol=2e-3)
    assert again.measure(text)[1] == pytest.approx(surplus, abs=2e-3)
