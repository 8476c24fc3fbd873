"""Slips are read as the words they come from, as an exhaustive search would find them, and nothing else is touched."""

from __future__ import annotations

from random import Random

import pytest

from router.spelling import Speller

WORDS = ["password", "tablet", "payroll", "invoice", "printer", "scanner", "mailbox", "badge", "table", "board"]


def slips(word: str) -> set[str]:
    """Every slip of a word: the obvious way."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    lost = {word[:i] + word[i + 1 :] for i in range(len(word))}
    more = {word[:i] + x + word[i:] for i in range(len(word) + 1) for x in letters}
    other = {word[:i] + x + word[i + 1 :] for i in range(len(word)) for x in letters}
    swapped = {word[:i] + word[i + 1] + word[i] + word[i + 2 :] for i in range(len(word) - 1)}
    return (lost | more | other | swapped) - {word}


def test_every_slip_of_a_word_is_mended_to_a_word_it_may_come_from():
    speller = Speller(WORDS)
    for word in WORDS:
        for slip in slips(word):
            if len(slip) >= 5 and slip not in WORDS:
                meant = speller.fix(slip)
                assert meant in WORDS, slip
                assert slip in slips(meant)


@pytest.mark.parametrize("word", ["tablet", "vpn", "a", "", "xylophone", "49", "e-mail", "tab1et"])
def test_what_is_known_short_or_far_away_is_left_alone(word):
    assert Speller(WORDS).fix(word) == word


def test_the_more_frequent_word_is_meant():
    assert Speller(["tablet", "tables"]).fix("tablex") == "tablet"
    assert Speller(["tables", "tablet"]).fix("tablex") == "tables"


def test_no_word_is_changed_into_a_far_one():
    """Random strings: whatever comes back is a slip away."""
    speller, random = Speller(WORDS), Random(1)
    for _ in range(2000):
        word = "".join(random.choice("abdeiloprst") for _ in range(random.randint(5, 9)))
        assert speller.fix(word) == word or word in slips(speller.fix(word))
