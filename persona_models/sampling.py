"""Logits -> tokens, row by row as each request asks. Knows nothing of models or text."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from persona_models.protocol import GenerateRequest

# Below this temperature sampling is greedy: dividing by less would overflow.
COLDEST = 1e-3


def generator(request: GenerateRequest, device: torch.device) -> torch.Generator | None:
    """The row's own random numbers, so that a seed repeats whatever else is in the batch; None for a greedy request."""
    if request.temperature < COLDEST:
        return None
    random = torch.Generator(device=device)
    random.manual_seed(request.seed) if request.seed is not None else random.seed()
    return random


def is_plain(request: GenerateRequest) -> bool:
    """Whether the request wants the likeliest token and nothing else."""
    return request.temperature < COLDEST and not request.logit_bias and not request.min_tokens and request.logprobs is None


def choose(
    logits: Tensor,
    request: GenerateRequest,
    random: torch.Generator | None,
    *,
    so_far: int,
    stop_ids: Sequence[int],
    banned: Collection[int] = (),
) -> int:
    """One token from logits (V,), after `so_far` tokens of the answer.

    Order: logit_bias, none of `banned`, no end before min_tokens, temperature, top_k, then the nucleus of probability top_p.
    """
    if request.logit_bias or banned or so_far < request.min_tokens:
        logits = logits.clone()
        if request.logit_bias:
            ids = torch.tensor(list(request.logit_bias), device=logits.device)
            logits[ids] += torch.tensor(list(request.logit_bias.values()), dtype=logits.dtype, device=logits.device)
        if banned:
            logits[list(banned)] = float("-inf")
        if so_far < request.min_tokens and stop_ids:
            logits[list(stop_ids)] = float("-inf")
    if random is None:
        return int(logits.argmax())
    scores = logits.float() / request.temperature
    if 0 < request.top_k < len(scores):
        # Of equal scores at the border all stay.
        scores = scores.masked_fill(scores < scores.topk(request.top_k).values[-1], float("-inf"))
    probs = torch.softmax(scores, dim=-1)
    if request.top_p < 1.0:
        ranked, order = probs.sort(descending=True)
        # A token stays while the probability before it is under top_p, so that at least one stays.
        ranked = ranked * ((ranked.cumsum(-1) - ranked) < request.top_p)
        return int(order[torch.multinomial(ranked, 1, generator=random)])
    return int(torch.multinomial(probs, 1, generator=random))


def log_probabilities(logits: Tensor, token: int, top: int) -> tuple[float, list[tuple[int, float]]]:
    """Of the model's own distribution, before any setting of the request: the token's log-probability, and the `top` likeliest tokens with theirs."""
    logs = torch.log_softmax(logits.float(), dim=-1)
    best = logs.topk(top) if top else None
    return float(logs[token]), [] if best is None else list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
