"""Word lists -> what kinds of work a text speaks of: one feature per list, however many of its words occur.

A list says what its words have in common (places outdoors, papers of a board), so that a word which no training text held still counts. Knows nothing of
personas or models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from persona_models.errors import ConfigError

MAX_WORDS = 3


class Lexicon:
    """Lists of words and of phrases of up to MAX_WORDS words, in lower case. An entry may stand in several lists."""

    def __init__(self, lists: Mapping[str, Sequence[str]]) -> None:
        self.names = list(lists)
        self.lists_of: dict[str, tuple[int, ...]] = {}
        for i, entries in enumerate(lists.values()):
            for entry in dict.fromkeys(entries):
                self.lists_of[entry] = (*self.lists_of.get(entry, ()), i)
        # The words that were looked at last, and what was found: features, reasons and segments ask one after the other.
        self._last: tuple[Sequence[str], list[tuple[int, str, tuple[int, ...]]]] = ([], [])
        # What longer entries begin with, word by word.
        words_in = (entry.split(" ") for entry in self.lists_of)
        self._begins = {" ".join(words[:n]) for words in words_in for n in range(1, len(words))}

    def __len__(self) -> int:
        return len(self.names)

    def places(self, words: Sequence[str]) -> list[tuple[int, str, tuple[int, ...]]]:
        """Where the entries stand: (index of the first word, entry, its lists)."""
        last, found = self._last
        if last == words:
            return found
        begins, get = self._begins, self.lists_of.get
        found = []
        for i, entry in enumerate(words):
            if lists := get(entry):
                found.append((i, entry, lists))
            for word in words[i + 1 : i + MAX_WORDS] if entry in begins else ():
                entry = f"{entry} {word}"
                if lists := get(entry):
                    found.append((i, entry, lists))
                if entry not in begins:
                    break
        self._last = list(words), found
        return found

    def found(self, words: Sequence[str]) -> dict[int, list[str]]:
        """List -> its entries among the words of a text."""
        found: dict[int, list[str]] = {}
        for _, entry, lists in self.places(words):
            for at in lists:
                found.setdefault(at, []).append(entry)
        return found

    def arrays(self) -> dict[str, np.ndarray]:
        """As arrays, for an artefact: a line per list, its name and its entries."""
        lines = [[name] for name in self.names]
        for entry, lists in self.lists_of.items():
            for i in lists:
                lines[i].append(entry)
        text = "\n".join("\t".join(line) for line in lines)
        return {"lexicon": np.frombuffer(text.encode(), dtype=np.uint8).copy()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Lexicon:
        """The lexicon that `arrays` described; empty for an artefact that has none. Raises ConfigError where it is damaged."""
        if "lexicon" not in arrays:
            return cls({})
        try:
            lines = arrays["lexicon"].tobytes().decode().split("\n")
        except UnicodeDecodeError as e:
            raise ConfigError(f"the word lists are damaged ({e}); run `deskroute retrain router`") from None
        return cls({name: entries for name, *entries in (line.split("\t") for line in lines) if name})
