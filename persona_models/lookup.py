"""What an answer is likely to say next, guessed from its own prompt: where its last tokens stood before, the same may follow again.

Answers copy their article, so most guesses are right, and the model reads several tokens in one step instead of one in each. A guess only saves time:
every token is still chosen from the model's own logits, and what comes behind a wrong guess is thrown away. (Products of several tokens round otherwise
than those of one, so that in bfloat16 two tokens as likely as each other may change places.) "Prompt lookup decoding" (Saxena 2023), a
form of speculative decoding (Leviathan et al. 2023). This file knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Sequence

# Tokens that must agree before their successor is a guess; longer ones are tried first.
CUES = (3, 2)
# Guesses are made while so large a share of the last ones was right. The share is a moving average; once it is too small, it rises by PATIENCE a step.
LEAST_TRUST, MEMORY, PATIENCE = 0.5, 0.9, 0.01
# How many tokens of each row are guessed in a step, by the rows there are, and the share of rows that must have a guess. A token that is tried costs
# about as much as one of a prompt; of one row's step that is little, of sixteen rows' a third.
GUESSES = ((2, 7), (8, 5), (32, 3), (1_000_000, 2))
GUESSING = 0.5


class Lookup:
    """The tokens of one row, prompt and answer, by the ones before them."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # cue -> where its first successor stands
        self._trust = 1.0
        self._guessed = 0
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Add tokens behind the others."""
        for token in tokens:
            end = len(self._tokens)
            for n in CUES:
                if end >= n:
                    self._after.setdefault(tuple(self._tokens[end - n :]), end)
            self._tokens.append(token)

    def guess(self, most: int) -> list[int]:
        """Up to `most` tokens that may come next."""
        guess: list[int] = []
        if self._trust < LEAST_TRUST:
            self._trust += PATIENCE
        else:
            at = next((at for n in CUES if (at := self._after.get(tuple(self._tokens[-n:]))) is not None), None)
            guess = [] if at is None else self._tokens[at : at + most]
        self._guessed = len(guess)
        return guess

    def judge(self, tried: int, right: int) -> None:
        """Say how many tokens of the last guess were tried, and how many of these came."""
        if tried := min(tried, self._guessed):
            self._trust = MEMORY * self._trust + (1 - MEMORY) * min(right, tried) / tried


def guesses(rows: Sequence[Lookup]) -> list[list[int]]:
    """Tokens to try behind the last one of every row, as many for each: where few rows have a guess, none, else anything for the others."""
    most = next(tokens for n, tokens in GUESSES if len(rows) <= n)
    found = [row.guess(most) for row in rows]
    enough = sorted(map(len, found), reverse=True)[int(GUESSING * (len(rows) - 1))]
    return [(guess + [0] * enough)[:enough] for guess in found]
