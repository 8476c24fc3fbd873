"""router/features.py: words, n-grams and profiles as numbers; scikit-learn is the slow, obvious reference."""

import numpy as np
import pytest
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer

from persona_models.errors import ConfigError, InputError
from persona_models.protocol import Message
from router.features import FeatureSpace, profile_terms
from router.query import MAX_CHARS, Profile, Query, beginning, query_of, words_of
from router.text_space import TextSpace, char_grams

TEXTS = [
    "The payroll system locks me out again",
    "vpn keeps dropping on the customer's site, site has poor network",
    "my first week: where do I find the payroll folder?",
    "VPN drops whenever I open the payroll system from home",
]


def test_profile_reads_its_keys_and_ignores_the_rest():
    profile = Profile.from_metadata({" Title ": " Field engineer", "Tenure-Days": " 12 ", "department": "", "cost_centre": "7"})
    assert profile == Profile(title="Field engineer", tenure_days=12)
    assert Profile.from_metadata({"tenure days": 40}).tenure_days == 40
    assert Profile.from_metadata({"tenure_days": "-3"}).tenure_days == -3
    assert not Profile.from_metadata({"tenure_days": " ", "ticket": "1"})


@pytest.mark.parametrize("days", ["soon", "1.5", "1_000", "12 days", "9" * 5000, "\u0664\u0662"])
def test_profile_names_key_and_value_of_a_bad_tenure(days):
    with pytest.raises(InputError, match="tenure_days") as caught:
        Profile.from_metadata({"tenure_days": days})
    assert days[:10] in caught.value.message
    assert caught.value.param == "metadata.tenure_days"
    assert len(caught.value.message) < 300


@pytest.mark.parametrize(
    ("days", "name"),
    [(-5, "< 30"), (29, "< 30"), (30, "30-44"), (45, "45-89"), (89, "45-89"), (90, "90-364"), (364, "90-364"), (365, "1 year or more")],
)
def test_tenure_falls_into_one_bucket(days, name):
    terms = profile_terms(Profile(tenure_days=days))
    assert len(terms) == 1
    assert name in terms[0]


def test_a_tenure_of_zero_days_is_a_profile():
    assert Profile(tenure_days=0)
    assert profile_terms(Profile()) == ["no profile"]


def test_query_is_the_last_user_turn():
    messages = [
        Message("system", "payroll payroll"),
        Message("user", "The printer on floor two eats every page"),
        Message("assistant", "Open the tray. Say more about your VPN."),
        Message("user", "Different matter: my docking station does not charge the laptop"),
    ]
    last = "Different matter: my docking station does not charge the laptop"
    assert query_of(messages) == Query(last, turns=(last, "The printer on floor two eats every page"))
    assert query_of(messages[-1:]) == Query(last)


def test_a_turn_that_says_too_little_brings_the_turns_before_it_but_never_our_own_words():
    messages = [
        Message("user", "The printer on floor two eats every page"),
        Message("user", "it is the invoice printer"),
        Message("assistant", "Did you call the plumber?"),
        Message("user", "yes please, same thing again!"),
    ]
    text = query_of(messages, Profile(title="Clerk")).text
    assert text.splitlines() == ["yes please, same thing again!", "it is the invoice printer", "The printer on floor two eats every page"]
    assert query_of(messages, Profile(title="Clerk")).profile.title == "Clerk"


def test_query_keeps_head_and_tail_of_a_long_mail_and_never_grows_past_the_cap():
    mail = "Printer broken. " + "x" * 10_000 + " Kind regards, the chairman's office"
    text = query_of([Message("user", mail)]).text
    assert len(text) == MAX_CHARS
    assert text.startswith("Printer broken.")
    assert text.endswith("chairman's office")
    assert len(query_of([Message("user", "y" * 9_000), Message("user", "z" * 9_000), Message("user", "again")]).text) <= MAX_CHARS


def test_query_needs_a_user_turn():
    with pytest.raises(InputError, match="no user turn"):
        query_of([Message("system", "be nice")])


def test_words_are_folded_and_joined_words_stay_whole():
    assert words_of("CAN\u2019T open \uff36\uff30\uff2e e-mail, stra\u00dfe 0x80070005!") == [
        "can't",
        "open",
        "vpn",
        "e-mail",
        "strasse",
        "0x80070005",
    ]


def test_char_grams_are_those_of_scikit_learn():
    reference = CountVectorizer(analyzer="char_wb", ngram_range=(3, 5)).build_analyzer()
    for word in ["a", "to", "vpn", "payroll", "banana"]:
        assert sorted(char_grams(word)) == sorted(reference(word))


def test_values_are_those_of_scikit_learn():
    """Words and n-grams of known texts, each block against a TfidfVectorizer over the same tokens."""
    space = TextSpace.fit(TEXTS, min_words=1, min_grams=1, word_weight=1.0, char_weight=0.5)
    ours = space.rows(TEXTS).toarray()
    common = {"sublinear_tf": True, "lowercase": False}
    words = TfidfVectorizer(analyzer=lambda t: [*words_of(t), *map(" ".join, zip(words_of(t), words_of(t)[1:], strict=False))], **common)
    grams = TfidfVectorizer(analyzer=lambda t: ["#" + g for w in words_of(t) for g in char_grams(w)], **common)
    for vectorizer, weight in ((words, 1.0), (grams, 0.5)):
        reference = weight * vectorizer.fit_transform(TEXTS).toarray()
        columns = [space.columns[term] for term in vectorizer.get_feature_names_out()]
        np.testing.assert_allclose(ours[:, columns], reference, atol=1e-6)


def test_unknown_words_shrink_the_known_ones():
    space = TextSpace.fit(TEXTS, min_words=1, min_grams=1)
    column = space.columns["vpn"]
    alone, strange = space.rows(["vpn", "vpn zygote quixotry"]).toarray()[:, column]
    assert alone > 0.99
    assert 0 < strange < alone
    assert space.row("zygote quixotry")[2] == 1.0
    assert space.row("")[2] == 0.0
    assert space.rows(["", "?!"]).nnz == 0


def test_grown_space_keeps_its_columns_and_learns_new_words():
    space = TextSpace.fit(TEXTS, min_words=1, min_grams=1)
    grown = space.grown(["the zygote scanner", "zygote"])
    assert grown.terms[: len(space)] == space.terms
    assert "zygote" in grown.columns
    assert len(set(grown.terms)) == len(grown.terms)
    assert grown.row("zygote")[2] == 0.0
    np.testing.assert_allclose(grown.rows([TEXTS[0]]).toarray()[0, : len(space)], space.rows([TEXTS[0]]).toarray()[0], atol=1e-6)


def test_vocabulary_limits_hold():
    space = TextSpace.fit(TEXTS, min_words=2, min_grams=2, max_words=3, max_grams=5)
    assert len(space) == 8
    assert "payroll" in space.columns
    assert "dropping" not in TextSpace.fit(TEXTS, min_words=2).columns


def queries() -> list[Query]:
    return [
        Query(TEXTS[0], Profile("Payroll officer", "Finance", 400, "Lyon")),
        Query(TEXTS[1], Profile("Service engineer", "Field", 90, "Lyon")),
        Query(TEXTS[2], Profile("Payroll trainee", "Finance", 4)),
        Query(TEXTS[3]),
    ]


def test_feature_names_are_readable_and_profiles_have_their_columns():
    space = FeatureSpace.fit(queries(), TextSpace.fit(TEXTS, min_words=1, min_grams=1), min_profiles=2)
    names = space.names
    assert len(names) == len(space) == space.rows(queries()).shape[1]
    assert {'word "payroll"', 'words "payroll system"', 'title "payroll"', 'department "finance"', "tenure < 30 days", "no profile"} <= set(names)
    assert 'title "trainee"' not in names  # one profile only
    row = dict(zip(names, space.rows(queries()).toarray()[2], strict=True))
    assert row['title "payroll"'] == row["tenure < 30 days"] == 1.0
    assert row["no profile"] == 0.0
    assert dict(zip(names, space.rows(queries()).toarray()[3], strict=True))["no profile"] == 1.0


def test_reasons_add_up_to_the_score_of_the_text():
    """Character n-grams are credited to the words they stand in, nothing is lost or counted twice."""
    space = FeatureSpace.fit(queries(), TextSpace.fit(TEXTS, min_words=1, min_grams=1), min_profiles=1)
    weights = np.random.default_rng(0).normal(size=len(space))
    query = Query("payroll payroll system dropping again", Profile("Payroll trainee", "Finance", 4))
    columns, values = space.row(query)
    shares = np.zeros(len(space))
    shares[columns] = values * weights[columns]
    reasons = space.reasons(query, shares)
    strongest = sorted(reasons, key=lambda r: -abs(r[1]))[:3]
    assert space.reasons(query, shares, 3) == sorted(strongest, key=lambda r: -r[1])
    assert sum(w for _, w in reasons) == pytest.approx(float((space.rows([query]) @ weights)[0]), abs=1e-5)
    assert [w for _, w in reasons] == sorted((w for _, w in reasons), reverse=True)
    assert not any("letters" in name for name, _ in reasons)


def test_arrays_give_the_same_space_back():
    space = FeatureSpace.fit(queries(), TextSpace.fit(TEXTS), min_profiles=1, profile_weight=0.7)
    again = FeatureSpace.from_arrays(space.arrays())
    assert again.names == space.names
    assert (again.rows(queries()) != space.rows(queries())).nnz == 0


def test_damaged_arrays_are_refused():
    arrays = FeatureSpace.fit(queries(), TextSpace.fit(TEXTS)).arrays()
    with pytest.raises(ConfigError, match="damaged"):
        FeatureSpace.from_arrays(arrays | {"idf": arrays["idf"][:-1]})
    with pytest.raises(ConfigError, match="damaged"):
        FeatureSpace.from_arrays({k: v for k, v in arrays.items() if k != "terms"})
    with pytest.raises(ConfigError, match="damaged"):
        FeatureSpace.from_arrays({k: v for k, v in arrays.items() if k != "profile_terms"})


def test_titles_that_share_a_stem_share_columns():
    titles = ["Buchhalterin", "Finanzbuchhalter", "Monteur", "Servicemonteur"]
    space = FeatureSpace.fit([Query("", Profile(title=t, department="Werk")) for t in titles], TextSpace.fit(TEXTS))
    new = Query("", Profile(title="Lohnbuchhalterin"))
    columns, values = space.row(new)
    grams = [i for i, c in enumerate(columns) if space.names[c].startswith("title #")]
    assert {"title #buchh", "title #halt"} <= {space.names[columns[i]] for i in grams}
    assert not any("mont" in space.names[columns[i]] for i in grams)
    # All of a title's n-grams together have the length 4; those that no title had are missing from it.
    assert 2.0 < np.linalg.norm(values[grams]) < 4.0
    weights = np.zeros(len(space))
    weights[columns[grams]] = 1.0
    assert space.reasons(new, weights * np.bincount(columns, values, len(space))) == [
        ('title "lohnbuchhalterin"', pytest.approx(float(values[grams].sum()), abs=1e-5))
    ]


@pytest.mark.parametrize(
    ("text", "words", "begins"),
    [
        ("Hi. My VPN drops at 10.4.2 all day!\nRegards\nTom", 9, "Hi. My VPN drops at 10.4.2 all day!\nRegards"),
        ("Hi. My VPN drops at 10.4.2 all day!\nRegards\nTom", 4, "Hi. My VPN drops"),
        ("The VPN drops. It has done so since Monday morning", 6, "The VPN drops."),
        ("." * 30_000 + " x", 2, "." * 30_000 + " x"),
        ("one two three four", 3, "one two three"),
        ("  \n ", 3, ""),
        ("short", 60, "short"),
        ("x " * 3000, 3, "x x x"),
    ],
)
def test_a_texts_beginning_is_whole_sentences_or_enough_words(text, words, begins):
    assert beginning(text, words) == begins
