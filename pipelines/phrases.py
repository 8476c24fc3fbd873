"""What a persona's answers say often: phrases that the engine guesses from, see persona_models/lookup.py. Knows nothing of files or models."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Iterator, Sequence

# Tokens of which each run must come in several answers.
RUN = 4
# What fewer answers say may be somebody's own words, and is nothing that others will say.
LEAST_ANSWERS = 3
# Of a built-in persona's 960 answers: with half as many tokens a row of the evaluation goes on by 7.0 a step, with these by 7.7, with more no further.
MOST_TOKENS = 4096

_Run = tuple[int, ...]


def often_said(answers: Sequence[Sequence[int]], most: int = MOST_TOKENS) -> list[_Run]:
    """Tokens of answers -> the phrases that come in several of them, in `most` tokens at most, the most useful first.

    Every RUN tokens of a phrase stand in LEAST_ANSWERS answers at least, and in as many more as it takes to keep within `most`.
    """
    counts = Counter(run for answer in answers for run in set(_runs(answer)))
    often = range(LEAST_ANSWERS, max(counts.values(), default=0) + 2)
    least = bisect_left(often, True, key=lambda n: sum(map(len, _phrases(answers, {r for r, c in counts.items() if c >= n}))) <= most)
    return _phrases(answers, {run for run, count in counts.items() if count >= often[least]}) if len(often) else []


def _runs(tokens: Sequence[int]) -> Iterator[_Run]:
    return (tuple(tokens[i : i + RUN]) for i in range(len(tokens) - RUN + 1))


def _phrases(answers: Sequence[Sequence[int]], common: Collection[_Run]) -> list[_Run]:
    """The longest stretches of answers whose runs are all common, by how many tokens they make up in all; none that only says what others do."""
    found: Counter[_Run] = Counter()
    for answer in answers:
        begin: int | None = None
        for i, run in enumerate([*_runs(answer), ()]):
            if run in common:
                begin = i if begin is None else begin
            elif begin is not None:
                found[tuple(answer[begin : i + RUN - 1])] += 1
                begin = None
    said: set[_Run] = set()
    kept = []
    for phrase, _ in sorted(found.items(), key=lambda item: (-item[1] * len(item[0]), item[0])):
        runs = set(_runs(phrase))
        if not runs <= said:
            kept.append(phrase)
            said |= runs
    return kept
