"""What makes a decode step of transformers' models cheap on a GPU, where a small step is a thousand launches that each take longer than their work.

Steps of one shape are recorded as CUDA graphs and replayed; norms are one launch each; keys that several query heads share are not repeated in memory.
All of it computes what it stands in for. This file knows nothing of rows, requests or adapters.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

log = logging.getLogger("deskroute")
GROUPED = "grouped_sdpa"
# Queries a head up to which heads are grouped: a step's few, not a prompt's many, whose mask would have to be repeated.
FEW_QUERIES = 16
# Recordings kept; each holds the logits of its shape, and the least recently used one goes first.
MOST_RECORDINGS = 48

Step = Callable[[Tensor], Tensor]


def record(step: Step, said: Tensor, pool: Any) -> Step:
    """`step` on an input like `said` (on the CPU) as a CUDA graph; what it returns is overwritten by the next replay."""
    pinned, given = said.pin_memory(), said.cuda()
    graph = torch.cuda.CUDAGraph()
    # Other threads may load adapters meanwhile, which must not end the recording.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        out = step(given)

    def replay(said: Tensor) -> Tensor:
        pinned.copy_(said)
        given.copy_(pinned, non_blocking=True)
        graph.replay()
        return out

    return replay


class Recordings:
    """Steps by their shape. A shape's first step runs as it is, which also sets the libraries up for it, its second one is recorded, further ones are replayed.

    Where a model cannot be recorded, as it looks at numbers on the CPU in between, its steps go on running as they are: `failed` says why.
    """

    def __init__(self, record: Callable[[Step, Tensor, Any], Step] = record) -> None:
        self._record = record
        self._kept: OrderedDict[Hashable, Step | None] = OrderedDict()
        self._state: Hashable = None
        self._pool: Any = None
        self.failed = ""

    def run(self, shape: Hashable, state: Hashable, step: Step, said: Tensor) -> Tensor:
        """step(said), said a tensor of integers on the CPU. state: what recordings hold on to; where it differs from the last call's, all are made anew."""
        if state != self._state:
            self._kept.clear()
            self._state = state
            self._pool = torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None
        if self.failed or shape not in self._kept:
            self._kept[shape] = None
            while len(self._kept) > MOST_RECORDINGS:
                self._kept.popitem(last=False)
            return step(said)
        self._kept.move_to_end(shape)
        replay = self._kept[shape]
        if replay is None:
            try:
                replay = self._kept[shape] = self._record(step, said, self._pool)
            except RuntimeError as e:
                self.failed = str(e).splitlines()[0]
                log.warning("decode steps cannot be recorded as CUDA graphs and run as they are: %s", self.failed)
                return step(said)
        return replay(said)


def fuse_norms(model: nn.Module) -> int:
    """Let the RMS norms of a model run as torch's own, one launch instead of seven; returns how many do.

    Only norms that torch's agrees with on random numbers; some families weigh with 1 + weight.
    """
    fused = 0
    for norm in model.modules():
        weight, eps = getattr(norm, "weight", None), getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
        if not type(norm).__name__.endswith("RMSNorm") or not isinstance(weight, Tensor) or weight.ndim != 1 or not isinstance(eps, float):
            continue
        own = partial(nn.functional.rms_norm, normalized_shape=tuple(weight.shape), weight=weight, eps=eps)
        x = torch.linspace(-3, 3, 2 * weight.numel(), dtype=weight.dtype, device=weight.device).view(2, -1)
        with torch.no_grad():
            alike = torch.allclose(norm(x).float(), own(x).float(), rtol=2 * torch.finfo(weight.dtype).eps, atol=torch.finfo(weight.dtype).eps)
        if alike:
            norm.forward = own
            fused += 1
    return fused


def grouped_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' sdpa attention, where a step's query heads (n, H, T, D) that share a key head are more queries of it, so that every key is read once."""
    groups = query.shape[1] // key.shape[1]
    if groups == 1 or attention_mask is None or attention_mask.shape[1] != 1 or not 1 < query.shape[2] <= FEW_QUERIES or kwargs.get("softcap"):
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    n, heads, t, dim = query.shape
    asked = query.reshape(n, key.shape[1], groups * t, dim)
    mask = attention_mask.repeat(1, 1, groups, 1)
    attended = nn.functional.scaled_dot_product_attention(asked, key, value, attn_mask=mask, scale=scaling)
    return attended.reshape(n, heads, t, -1).transpose(1, 2).contiguous(), None


def group_heads(model: Any) -> None:
    """Let a model that attends by torch's sdpa do it by `grouped_attention`."""
    if getattr(model.config, "_attn_implementation", None) == "sdpa":
        AttentionInterface.register(GROUPED, grouped_attention)
        ALL_MASK_ATTENTION_FUNCTIONS.register(GROUPED, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
        model.set_attn_implementation(GROUPED)
