"""What makes a decode step of transformers' models cheap on a GPU, where a small step is a thousand launches that each take longer than their work.

Steps of one shape are recorded as CUDA graphs and replayed; norms are one launch each; keys that several query heads share are not repeated in memory.
All of it computes what it stands in for. This file knows nothing of rows, requests or adapters.
"""

from __future__ import annotations

import logging
import threading
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
PLAIN, GROUPED = "sdpa", "grouped_sdpa"
# Queries a head up to which heads are grouped: a step's few, not a prompt's many, whose mask would have to be repeated.
FEW_QUERIES = 16
# Recordings kept; the least recently used one goes first.
MOST_RECORDINGS = 48
# What the grouped way does not know of.
_OTHER = ("softcap", "position_bias", "cache")

Step = Callable[[Tensor], Tensor]
# (step, an input like those to come, where to leave what it returns, which generation of recordings it is of) -> the step as it will be replayed
Record = Callable[[Step, Tensor, Tensor, int], Step]
# CUDA records for one thread at a time.
_RECORDING = threading.Lock()


class CudaGraphs:
    """Records steps as CUDA graphs of one device."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)
        self._pools: dict[int, Any] = {}

    def __call__(self, step: Step, said: Tensor, room: Tensor, generation: int) -> Step:
        """`said` is on the CPU. What a replay returns is overwritten by the next one, so it must have been looked at by then."""
        if generation not in self._pools:
            # Memory that recordings share; once the last of them is gone it cannot be recorded into again.
            self._pools = {generation: torch.cuda.graph_pool_handle()}
        pinned, given = said.pin_memory(), said.to(self._device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device), _RECORDING:
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                # Other threads may load adapters meanwhile, which must not end the recording.
                graph.capture_begin(pool=self._pools[generation], capture_error_mode="thread_local")
                try:
                    out = _left_in(room, step(given))
                finally:
                    graph.capture_end()

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

    def __init__(self, record: Record) -> None:
        self._record = record
        self._kept: OrderedDict[Hashable, Step | None] = OrderedDict()
        self._state: Hashable = None
        self._generation = 0
        # What all recordings return lies here, one at a time; a larger shape gets a larger one.
        self._room: Tensor | None = None
        self.failed = ""

    def run(self, shape: Hashable, state: Hashable, step: Step, said: Tensor) -> Tensor:
        """step(said), said a tensor of integers on the CPU. state: what recordings hold on to; where it differs from the last call's, all are made anew."""
        if state != self._state:
            self._forget()
            self._state = state
        replay = self._recorded(shape, step, said)
        if replay:
            return replay(said)
        out = step(said)
        if self._room is None or self._room.numel() < out.numel():
            self._room = out.new_empty(out.numel())
        return out

    def _recorded(self, shape: Hashable, step: Step, said: Tensor) -> Step | None:
        """The shape's recording; None where its step is to run as it is."""
        if self.failed:
            return None
        if shape not in self._kept:
            self._kept[shape] = None
            while len(self._kept) > MOST_RECORDINGS:
                self._kept.popitem(last=False)
            return None
        self._kept.move_to_end(shape)
        if self._kept[shape] is None and self._room is not None:
            try:
                self._kept[shape] = self._record(step, said, self._room, self._generation)
            except torch.cuda.OutOfMemoryError:
                # Those that are there take memory too; they are made again where there is some.
                self._forget()
                return None
            except RuntimeError as e:
                # Of a step that fails, the end of the recording only says that something did.
                self.failed = (str(e.__context__ or e) or type(e).__name__).splitlines()[0]
                self._forget()
                log.warning("decode steps cannot be recorded as CUDA graphs and run as they are: %s", self.failed)
        return self._kept.get(shape)

    def _forget(self) -> None:
        self._kept.clear()
        self._generation += 1


def _left_in(room: Tensor, out: Tensor) -> Tensor:
    """A copy of `out` at the beginning of `room` (at least as many numbers)."""
    return room[: out.numel()].view_as(out).copy_(out)


def lean(model: Any) -> None:
    """Fuse a model's norms and group its heads; `give_back` undoes it."""
    fuse_norms(model)
    if getattr(model.config, "_attn_implementation", None) == PLAIN:
        AttentionInterface.register(GROUPED, grouped_attention)
        ALL_MASK_ATTENTION_FUNCTIONS.register(GROUPED, ALL_MASK_ATTENTION_FUNCTIONS[PLAIN])
        model.set_attn_implementation(GROUPED)


def give_back(model: Any) -> None:
    """Let a model compute as transformers has it."""
    for norm in model.modules():
        if getattr(norm.__dict__.get("forward"), "func", None) is nn.functional.rms_norm:
            del norm.forward
    if getattr(model.config, "_attn_implementation", None) == GROUPED:
        model.set_attn_implementation(PLAIN)


def fuse_norms(model: nn.Module) -> int:
    """Let the RMS norms of a model run as torch's own, one launch instead of seven; returns how many do.

    Only norms that torch's agrees with on some numbers; some families weigh with 1 + weight.
    """
    fused = 0
    for norm in model.modules():
        weight, eps = getattr(norm, "weight", None), getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
        if not type(norm).__name__.endswith("RMSNorm") or not isinstance(weight, Tensor) or weight.ndim != 1 or not isinstance(eps, float):
            continue
        own = partial(nn.functional.rms_norm, normalized_shape=tuple(weight.shape), weight=weight, eps=eps)
        x = torch.linspace(-3, 3, 2 * weight.numel(), dtype=weight.dtype, device=weight.device).view(2, -1)
        near = 4 * torch.finfo(weight.dtype).eps
        with torch.no_grad():
            alike = torch.allclose(norm(x).float(), own(x).float(), rtol=near, atol=near)
        if alike:
            norm.forward = own
            fused += 1
    return fused


def grouped_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' sdpa attention, where a step's query heads (n, H, T, D) that share a key head are more queries of it, so that every key is read once.

    A single query a head transformers groups itself.
    """
    groups = query.shape[1] // key.shape[1]
    few = 1 < query.shape[2] <= FEW_QUERIES
    plain = not kwargs.get("dropout") and all(kwargs.get(name) is None for name in _OTHER)
    if groups == 1 or not few or not plain or attention_mask is None or attention_mask.shape[1] != 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    n, heads, t, dim = query.shape
    asked = query.reshape(n, key.shape[1], groups * t, dim)
    mask = attention_mask.repeat(1, 1, groups, 1)
    attended = nn.functional.scaled_dot_product_attention(asked, key, value, attn_mask=mask, scale=scaling)
    return attended.reshape(n, heads, t, -1).transpose(1, 2).contiguous(), None
