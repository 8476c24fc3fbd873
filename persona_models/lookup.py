"""What an answer is likely to say next, guessed from its own prompt, from what its persona was trained to say, and from other answers: where its last
tokens stood before, the same may follow.

Answers copy their article and begin and end as their persona does, so most guesses are right, and the model reads several tokens in one step instead of
one in each. A guess only saves time: every token is still chosen from the model's own logits, and what comes behind a wrong guess is thrown away.
(Products of several tokens round otherwise than those of one, so that in bfloat16 two tokens as likely as each other may change places.) "Prompt lookup
decoding" (Saxena 2023) and, from texts beside the prompt, "REST" (He et al. 2023): forms of speculative decoding (Leviathan et al. 2023). This file knows
nothing of models.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

# Tokens that must agree before their successor is a guess; longer ones are tried first.
CUES = (3, 2)
# Of what was said in other answers, so many tokens are kept: of the built-in models some 160 answers, in 12 MB.
TOKENS_KEPT = 32_768
# A row guesses so many tokens that all of them come with at least this chance, as its last guesses came. A token that is tried costs about as much as
# one of a prompt, of a step's time with one row a twentieth, with sixteen a quarter of a row's share.
LEAST_CHANCE = 0.2
# What is known of a row's guesses at first, and how much of it is kept with each further one. Where it is less than LEAST_CHANCE nothing is guessed,
# and it rises by PATIENCE a step.
FIRST_CHANCE, MEMORY, PATIENCE = 0.9, 0.9, 0.005
# No row guesses more tokens than these, by the rows there are; the cache has room for no more (row_cache.SPARE). All rows of a step try as many: what
# the row has that stands this far down from the one that has most, the others with anything.
MOST_GUESSES = ((2, 15), (8, 9), (24, 7), (1_000_000, 5))
GUESSING = 0.8

Cue = tuple[int, ...]
Found = tuple[Sequence[int], int]  # tokens, and where among them stands what may come next
TOKEN_BITS = 21  # of the largest vocabulary; three tokens are one number of 64 bits


class Phrases:
    """What a persona's answers say often, phrases of tokens, the most useful first; by the tokens before. Takes 28 bytes a token."""

    def __init__(self, phrases: Iterable[Sequence[int]] = ()) -> None:
        self._phrases = [array("i", phrase) for phrase in phrases]
        self._cues: dict[int, tuple[array[int], array[int]]] = {}  # length -> the cues in order, and phrase and place of each one's successor
        for n in CUES:
            first: dict[int, int] = {}
            for which, phrase in enumerate(self._phrases):
                for end in range(n, len(phrase)):
                    first.setdefault(_number(phrase[end - n : end]), which << 32 | end)
            cues = sorted(first)
            self._cues[n] = array("q", cues), array("q", (first[cue] for cue in cues))

    def find(self, cue: Cue) -> Found | None:
        """The first phrase that says the cue, and where in it what follows stands."""
        cues, places = self._cues.get(len(cue), ((), ()))
        number = _number(cue)
        i = bisect_left(cues, number)
        if i == len(cues) or cues[i] != number:
            return None
        return self._phrases[places[i] >> 32], places[i] & 0xFFFF_FFFF


def _number(cue: Sequence[int]) -> int:
    number = 0
    for token in cue:
        number = number << TOKEN_BITS | token
    return number


@dataclass(eq=False)
class _Answer:
    """What a row said, and the cues that were remembered of it; `kept` until it is forgotten."""

    tokens: list[int] = field(default_factory=list)
    cues: list[Cue] = field(default_factory=list)
    kept: bool = True


class Said:
    """What the engine's answers said lately, by the tokens before: a persona's way to begin, to go on and to end comes again in others' answers.

    Holds at most `tokens` tokens; the answers begun longest ago go first. Used by the model's thread.
    """

    def __init__(self, tokens: int = TOKENS_KEPT) -> None:
        self._room = tokens
        self._answers: deque[_Answer] = deque()
        self._after: dict[Cue, tuple[_Answer, int]] = {}  # cue -> the answer that said it last, and where its successor stands

    def begin(self) -> _Answer:
        """An answer that has said nothing yet."""
        answer = _Answer()
        self._answers.append(answer)
        return answer

    def add(self, answer: _Answer, cues: Sequence[Cue], token: int) -> None:
        """Remember what an answer says next, behind these cues."""
        if not answer.kept:
            return
        for cue in cues:
            self._after[cue] = answer, len(answer.tokens)
        answer.cues += cues
        answer.tokens.append(token)
        self._room -= 1
        while self._room < 0:
            self._forget(self._answers.popleft())

    def find(self, cue: Cue) -> Found | None:
        """Tokens of the answer that said the cue last, and where among them its successor stands."""
        found = self._after.get(cue)
        return (found[0].tokens, found[1]) if found else None

    def _forget(self, answer: _Answer) -> None:
        for cue in answer.cues:
            if cue in self._after and self._after[cue][0] is answer:
                del self._after[cue]
        answer.kept = False
        self._room += len(answer.tokens)


class Lookup:
    """The tokens of one row, prompt and answer, by the ones before them; where its last three stood nowhere, what the persona's `phrases` and then what
    other rows `said` behind the same."""

    def __init__(self, prompt: Sequence[int], said: Said) -> None:
        self._tokens: list[int] = []
        self._said = said
        self._elsewhere: tuple[Phrases | Said, ...] = (said,)
        self._answer: _Answer | None = None
        self._after: dict[Cue, int] = {}  # cue -> where its first successor stands
        self._chance = FIRST_CHANCE
        self._guessed = 0
        for token in prompt:
            self._append(token)

    def know(self, phrases: Sequence[Phrases]) -> None:
        """Guess from these as well, the first ones first."""
        self._elsewhere = (*phrases, self._said)

    def extend(self, tokens: Sequence[int]) -> None:
        """Add tokens of the answer."""
        self._answer = self._answer or self._said.begin()
        for token in tokens:
            self._said.add(self._answer, self._append(token), token)

    def _append(self, token: int) -> list[Cue]:
        """Add a token; returns the cues that it follows."""
        end = len(self._tokens)
        cues = [tuple(self._tokens[end - n :]) for n in CUES if end >= n]
        for cue in cues:
            self._after.setdefault(cue, end)
        self._tokens.append(token)
        return cues

    def guess(self, most: int) -> list[int]:
        """Up to `most` tokens that may come next."""
        found = self._found()
        guess: list[int] = []
        if found and self._chance < LEAST_CHANCE:
            self._chance += PATIENCE
        elif found:
            source, at = found
            guess = [*source[at : at + min(most, int(math.log(LEAST_CHANCE) / math.log(min(self._chance, 0.999))))]]
        self._guessed = len(guess)
        return guess

    def _found(self) -> Found | None:
        """Tokens, and where among them what may come next begins: by the longest cue, the row's own before others'."""
        for n in CUES:
            cue = tuple(self._tokens[-n:])
            at = self._after.get(cue)
            if at is not None:
                return self._tokens, at
            for source in self._elsewhere:
                if found := source.find(cue):
                    return found
        return None

    def judge(self, tried: int, right: int) -> None:
        """Say how many tokens of the last guess were tried, and how many of these came; those behind the first wrong one tell nothing."""
        tried = min(tried, self._guessed)
        right = min(right, tried)
        self._chance = 1 - (1 - self._chance) * MEMORY**right
        if right < tried:
            self._chance *= MEMORY


def guesses(rows: Sequence[Lookup]) -> list[list[int]]:
    """Tokens to try behind the last one of every row, as many for each, see GUESSING."""
    most = next(tokens for n, tokens in MOST_GUESSES if len(rows) <= n)
    found = [row.guess(most) for row in rows]
    usual = sorted(map(len, found), reverse=True)[int(GUESSING * (len(rows) - 1))]
    return [(guess + [0] * usual)[:usual] for guess in found]
