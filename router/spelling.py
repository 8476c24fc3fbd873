"""Words that nobody used before -> the known word they are a slip away from: one letter lost, doubled, exchanged, or two swapped.

A word of a slip shares with the right one what is left of either without one letter (Garbe's symmetric deletes), so that looking takes a few dictionary
look-ups. Knows nothing of features or texts.
"""

from __future__ import annotations

from collections.abc import Iterable

# In shorter words a slip makes another word too easily.
MIN_LETTERS = 5
REMEMBERED = 50_000


class Speller:
    """Knows words, the more frequent first; of two that a slip could come from, the more frequent one is meant."""

    def __init__(self, words: Iterable[str]) -> None:
        self._words = dict.fromkeys(words)
        self._without: dict[str, str] = {}
        for word in self._words:
            if len(word) >= MIN_LETTERS and word.isalpha():
                for left in _deletes(word):
                    self._without.setdefault(left, word)
        self._fixed: dict[str, str] = {}

    def fix(self, word: str) -> str:
        """The word that is meant; the word itself where it is known, short, no word, or too far from any."""
        if len(word) < MIN_LETTERS or word in self._words or not word.isalpha():
            return word
        found = self._fixed.get(word)
        if found is None:
            found = self._meant(word)
            if len(self._fixed) >= REMEMBERED:
                self._fixed.clear()
            self._fixed[word] = found
        return found

    def _meant(self, word: str) -> str:
        if lost := self._without.get(word):
            return lost
        left = _deletes(word)
        known = self._words
        for one in left:
            if len(one) >= MIN_LETTERS - 1 and one in known:
                return one
        return next((w for one in left if (w := self._without.get(one)) and abs(len(w) - len(word)) <= 1), word)


def _deletes(word: str) -> list[str]:
    """The word without each of its letters, each result once."""
    return list(dict.fromkeys(word[:i] + word[i + 1 :] for i in range(len(word))))
