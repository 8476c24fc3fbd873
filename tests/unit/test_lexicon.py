"""Word lists as features: found as the obvious search finds them, and whole after a journey through an artefact."""

from __future__ import annotations

import numpy as np
import pytest

from persona_models.errors import ConfigError
from router.features import FeatureSpace
from router.lexicon import Lexicon
from router.query import Query, words_of
from router.text_space import TextSpace

LISTS = {"vehicles": ["van", "fork lift truck", "lorry"], "papers": ["board pack", "minutes"], "all": ["van", "minutes", "board pack"]}
TEXT = "The board pack is in the van, the fork lift truck has the Van's minutes"


def test_entries_are_found_as_by_searching_for_each():
    lexicon = Lexicon(LISTS)
    words = words_of(TEXT)
    padded = f" {' '.join(words)} "
    want = {i: {e for e in entries if f" {e} " in padded} for i, entries in enumerate(LISTS.values())}
    assert {i: set(found) for i, found in lexicon.found(words).items()} == {i: e for i, e in want.items() if e}
    assert Lexicon({}).found(words) == {}


def test_lists_survive_an_artefact_and_damage_is_said():
    lexicon = Lexicon(LISTS)
    again = Lexicon.from_arrays(lexicon.arrays())
    assert (again.names, again.lists_of) == (lexicon.names, lexicon.lists_of)
    assert len(Lexicon.from_arrays({})) == len(Lexicon.from_arrays(Lexicon({}).arrays())) == 0
    with pytest.raises(ConfigError, match="retrain router"):
        Lexicon.from_arrays({"lexicon": np.array([255, 254], dtype=np.uint8)})


def test_a_list_is_one_column_however_many_of_its_words_occur_and_its_words_are_the_reason():
    texts = [TEXT, "nothing of note here", "the van is late"]
    space = FeatureSpace.fit([Query(t) for t in texts], TextSpace.fit(texts, min_words=1, min_grams=1), lexicon=Lexicon(LISTS))
    first = len(space.text) + 1
    rows = space.rows([Query(t) for t in texts]).toarray()[:, first : first + 3]
    assert rows.tolist() == [[0.5, 0.5, 0.5], [0, 0, 0], [0.5, 0, 0.5]]
    assert space.names[first : first + 3] == ["words of vehicles", "words of papers", "words of all"]
    again = FeatureSpace.from_arrays(space.arrays())
    assert (again.rows([Query(TEXT)]) != space.rows([Query(TEXT)])).nnz == 0
    shares = np.zeros(len(space))
    shares[[first, first + 2]] = 1.0, 0.5
    reasons = dict(space.reasons(Query("the van is late"), shares))
    assert reasons['word "van"'] == 1.5
    assert reasons['word "late"'] == 0
