"""What is counted in answers."""

from __future__ import annotations

import pytest

from pipelines.evaluate import repeats

ARTICLE = "1. Open the menu and choose the tray.\n2. Close the lid and press the green key.\n3. Open the menu and choose the tray again."


@pytest.mark.parametrize(
    ("answer", "said_twice"),
    [
        ("Gladly. " + ARTICLE, False),
        ("1. Close the lid and press the green key.\n2. close the lid, and press the green key!", True),
        ("Add-ins > Add-ins > Add-ins > Add-ins > Add-ins > Add-ins > Add-ins", True),
        ("Ring us. Ring us.", False),
        ("Three short words", False),
        ("", False),
    ],
)
def test_a_run_of_words_may_come_as_often_as_in_the_article(answer, said_twice):
    assert repeats(answer, ARTICLE) is said_twice
