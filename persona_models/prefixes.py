"""Keys and values of prompts that were read once, so that the same article, or a conversation a turn later, is not read again.

A prompt is remembered in blocks of tokens. A block hangs on the one before it, and the first on the adapters that read it, so that it is found only
behind the very same beginning. The blocks asked for longest ago go first; a block is touched after those that hang on it, so none outlives its
beginning. This file knows nothing of requests, slots or sampling.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from persona_models.row_cache import RowCache

BLOCK_TOKENS = 16

_Key = tuple[Hashable, tuple[int, ...]]  # (the adapters, or the serial number of the block before; the tokens)


@dataclass(frozen=True, eq=False)
class _Block:
    """What BLOCK_TOKENS tokens left in the cache: (2 layers, H, BLOCK_TOKENS, D)."""

    serial: int
    states: Tensor


class Prefixes:
    """The beginnings of prompts that were read into one cache, at most `max_bytes` of them. Used by the model's thread."""

    def __init__(self, cache: RowCache, max_bytes: int) -> None:
        self.cache, self.max_bytes = cache, max_bytes
        self.bytes = 0
        self._blocks: OrderedDict[_Key, _Block] = OrderedDict()
        self._made = 0

    def recall(self, row: int, gate: Mapping[str, float], tokens: Sequence[int]) -> int:
        """Fill an empty row with what is known of the beginning of a prompt; returns how many tokens that were. One at least is left to be read."""
        keys = self._known(gate, tokens[:-1])
        if keys:
            self.cache.fill(row, torch.cat([self._blocks[key].states for key in keys], dim=2))
            self._touch(keys)
        return len(keys) * BLOCK_TOKENS

    def keep(self, row: int, gate: Mapping[str, float], tokens: Sequence[int]) -> None:
        """Remember a row, which holds these tokens or as many of them as were read."""
        tokens = tokens[: self.cache.lengths[row]]
        keys = self._known(gate, tokens)
        start, end = len(keys) * BLOCK_TOKENS, len(tokens) // BLOCK_TOKENS * BLOCK_TOKENS
        if self.max_bytes and start < end and self.cache.alike:
            before: Hashable = self._blocks[keys[-1]].serial if keys else _adapters(gate)
            for i, states in enumerate(self.cache.read(row, start, end).split(BLOCK_TOKENS, dim=2)):
                self._made += 1
                at = start + i * BLOCK_TOKENS
                key = (before, tuple(tokens[at : at + BLOCK_TOKENS]))
                self._blocks[key] = _Block(self._made, states.clone())
                self.bytes += states.nbytes
                keys.append(key)
                before = self._made
        self._touch(keys)
        while self.bytes > self.max_bytes:
            self.bytes -= self._blocks.popitem(last=False)[1].states.nbytes

    def _known(self, gate: Mapping[str, float], tokens: Sequence[int]) -> list[_Key]:
        """The blocks that these tokens begin with."""
        keys: list[_Key] = []
        before: Hashable = _adapters(gate)
        for start in range(0, len(tokens) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
            key = (before, tuple(tokens[start : start + BLOCK_TOKENS]))
            block = self._blocks.get(key)
            if block is None:
                break
            keys.append(key)
            before = block.serial
        return keys

    def _touch(self, keys: Sequence[_Key]) -> None:
        for key in reversed(keys):
            self._blocks.move_to_end(key)


def _adapters(gate: Mapping[str, float]) -> Hashable:
    return frozenset(gate.items())
