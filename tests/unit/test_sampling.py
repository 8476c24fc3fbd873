"""Sampling against the definitions written out."""

from __future__ import annotations

import pytest
import torch

from persona_models import sampling
from persona_models.protocol import GenerateRequest, Message


def request(**kwargs) -> GenerateRequest:
    return GenerateRequest("r", (Message("user", "x"),), **kwargs)


def drawn(logits, wanted, n=4000):
    """Share of each token in n draws."""
    random = sampling.generator(wanted, torch.device("cpu"))
    counts = torch.zeros(len(logits))
    for _ in range(n):
        counts[sampling.choose(logits, wanted, random, so_far=0, stop_ids=())] += 1
    return counts / n


LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0])


@pytest.mark.parametrize(
    ("asked", "kept"),
    [({}, 5), ({"top_k": 2}, 2), ({"top_k": 99}, 5), ({"top_p": 0.5}, 1), ({"top_p": 0.75}, 2), ({"top_k": 3, "top_p": 0.99}, 3)],
)
def test_tokens_are_drawn_as_often_as_they_are_likely_among_those_kept(asked, kept):
    """4,000 draws with one seed: the largest deviation is far below 0.04 (five standard errors of a half)."""
    temperature = 0.8
    probs = torch.softmax(LOGITS / temperature, -1)
    want = torch.where(torch.arange(5) < kept, probs, torch.zeros(5))
    torch.testing.assert_close(drawn(LOGITS, request(temperature=temperature, seed=3, **asked)), want / want.sum(), atol=0.04, rtol=0)


def test_banned_tokens_never_come_and_leave_their_share_to_the_others():
    probs = torch.softmax(LOGITS, -1) * torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0])
    random = sampling.generator(request(temperature=1.0, seed=3), torch.device("cpu"))
    counts = torch.zeros(5)
    for _ in range(4000):
        counts[sampling.choose(LOGITS, request(temperature=1.0), random, so_far=0, stop_ids=(), banned={0, 3})] += 1
    torch.testing.assert_close(counts / 4000, probs / probs.sum(), atol=0.04, rtol=0)
    assert sampling.choose(LOGITS, request(), None, so_far=0, stop_ids=(), banned={0}) == 1
    assert LOGITS[0] == 2.0  # the caller's logits stay as they are


def test_a_seed_repeats_and_the_coldest_is_greedy():
    hot = request(temperature=1.0, seed=5)
    one, two = (sampling.generator(hot, torch.device("cpu")) for _ in range(2))
    draws = [[sampling.choose(LOGITS, hot, g, so_far=0, stop_ids=()) for _ in range(30)] for g in (one, two)]
    assert draws[0] == draws[1]
    assert len(set(draws[0])) > 1
    assert sampling.generator(request(temperature=1e-9), torch.device("cpu")) is None
    assert sampling.choose(LOGITS, request(), None, so_far=0, stop_ids=()) == 0


def test_bias_and_a_least_length_come_before_everything_else():
    before = LOGITS.clone()
    assert sampling.choose(LOGITS, request(logit_bias={3: 5.0}), None, so_far=0, stop_ids=()) == 3
    assert sampling.choose(LOGITS, request(min_tokens=2), None, so_far=1, stop_ids=(0,)) == 1
    assert sampling.choose(LOGITS, request(min_tokens=2), None, so_far=2, stop_ids=(0,)) == 0
    assert torch.equal(LOGITS, before), "another row may still need them"


def test_only_requests_for_the_likeliest_token_are_plain():
    assert sampling.is_plain(request())
    for other in ({"temperature": 0.5}, {"logit_bias": {1: 1.0}}, {"min_tokens": 1}, {"logprobs": 0}):
        assert not sampling.is_plain(request(**other))


def test_log_probabilities():
    own, best = sampling.log_probabilities(LOGITS, 2, 2)
    logs = torch.log_softmax(LOGITS, -1)
    assert own == pytest.approx(float(logs[2]))
    assert [i for i, _ in best] == [0, 1]
    assert [p for _, p in best] == pytest.approx(logs[:2].tolist())
    assert sampling.log_probabilities(LOGITS, 2, 0)[1] == []
