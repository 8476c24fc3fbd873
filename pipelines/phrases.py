"""What a persona's answers say often: phrases that the engine guesses from, see persona_models/lookup.py. Knows nothing of files or models."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Iterator, Sequence

# Tokens that make a phrase at least.
RUN = 4
# What fewer answers say may be somebody's own words, and is nothing that others will say.
LEAST_ANSWERS = 3
# Of a built-in persona's 960 answers: with half as many tokens a row of the evaluation goes on by 7.0 a step, with these by 7.7, with more no further.
MOST_TOKENS = 4096
# More answers say nothing that comes more often, and take memory.
MOST_ANSWERS = 2000

_Run = tuple[int, ...]


def often_said(answers: Sequence[Sequence[int]], most: int = MOST_TOKENS) -> list[_Run]:
    """Tokens of answers, in no order -> phrases that each stand whole in LEAST_ANSWERS of them at least, in `most` tokens, the most useful first.

    Where there is more, runs that fewer answers have are left out, until the rest fits.
    """
    answers = answers[:MOST_ANSWERS]
    where: dict[_Run, list[tuple[int, int]]] = {}
    for number, answer in enumerate(answers):
        for at, run in enumerate(_runs(answer)):
            where.setdefault(run, []).append((number, at))
    counts = {run: len({number for number, _ in places}) for run, places in where.items()}
    thresholds = range(LEAST_ANSWERS, max(counts.values(), default=0) + 1)

    def stretches(least: int) -> list[_Run]:
        return _new(_stretches(answers, {run for run, n in counts.items() if n >= least}))

    # Nearly in order: a higher threshold may cut a stretch into two that share tokens.
    chosen = bisect_left(thresholds, True, key=lambda least: sum(map(len, stretches(least))) <= most)
    if chosen == len(thresholds):
        return []
    kept = []
    for phrase in _new([piece for stretch in stretches(thresholds[chosen]) for piece in _pieces(stretch, answers, where)]):
        if len(phrase) <= most:
            kept.append(phrase)
            most -= len(phrase)
    return kept


def _runs(tokens: Sequence[int]) -> Iterator[_Run]:
    return (tuple(tokens[i : i + RUN]) for i in range(len(tokens) - RUN + 1))


def _stretches(answers: Sequence[Sequence[int]], common: Collection[_Run]) -> list[_Run]:
    """The longest stretches of answers whose runs are all common, by how many tokens they make up in all."""
    found: Counter[_Run] = Counter()
    for answer in answers:
        begin: int | None = None
        for i, run in enumerate([*_runs(answer), ()]):
            if run in common:
                begin = i if begin is None else begin
            elif begin is not None:
                found[tuple(answer[begin : i + RUN - 1])] += 1
                begin = None
    return [stretch for stretch, _ in sorted(found.items(), key=lambda item: (-item[1] * len(item[0]), item[0]))]


def _pieces(stretch: _Run, answers: Sequence[Sequence[int]], where: dict[_Run, list[tuple[int, int]]]) -> Iterator[_Run]:
    """A stretch cut into pieces that enough answers say whole; every run of it is in one. where: run -> (answer, place) of each of its places."""
    begin, end = 0, 0
    while end < len(stretch):
        places = where[stretch[begin : begin + RUN]]
        end = begin + RUN
        while end < len(stretch):
            ahead = end - begin
            longer = [(n, at) for n, at in places if at + ahead < len(answers[n]) and answers[n][at + ahead] == stretch[end]]
            if len({n for n, _ in longer}) < LEAST_ANSWERS:
                break
            places, end = longer, end + 1
        yield stretch[begin:end]
        begin = end - RUN + 1


def _new(phrases: Sequence[_Run]) -> list[_Run]:
    """Without those that only say what the ones before do."""
    said: set[_Run] = set()
    kept = []
    for phrase in phrases:
        runs = set(_runs(phrase))
        if not runs <= said:
            kept.append(phrase)
            said |= runs
    return kept
