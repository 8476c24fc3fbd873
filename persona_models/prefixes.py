"""Keys and values of prompts that were read once, so that the same article, or a conversation a turn later, is not read again.

A prompt is remembered in blocks of tokens. A block hangs on the one before it, and the first on the adapters that read it, so that it is found only
behind the very same beginning. The blocks asked for longest ago go first; a block is touched after those that hang on it, so none outlives its
beginning. This file knows nothing of requests, slots or sampling.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from persona_models.row_cache import RowCache

BLOCK_TOKENS = 16

_Key = tuple[Hashable, tuple[int, ...]]  # (the adapters, or the serial number of the block before; the tokens)


@dataclass(frozen=True, eq=False)
class _Block:
    """What BLOCK_TOKENS tokens left in the cache: (2 layers, H, BLOCK_TOKENS, D), and the adapters that read them, with their weights."""

    serial: int
    states: Tensor
    adapters: frozenset[tuple[str, float]]


class Prefixes:
    """The beginnings of prompts that were read into one cache, at most `max_bytes` of them, and half as many of one prompt. Used by the model's thread.

    Remembering is a convenience: where memory fails, everything is forgotten and the prompt is read as if nothing had been known.
    """

    def __init__(self, cache: RowCache, max_bytes: int) -> None:
        self.cache, self.max_bytes = cache, max_bytes
        self.bytes = 0
        self._blocks: OrderedDict[_Key, _Block] = OrderedDict()
        self._made = 0

    def recall(self, row: int, gate: Mapping[str, float], tokens: Sequence[int], most: int) -> int:
        """Fill a row, which holds the first of these tokens or none, with what is known of the next ones.

        Returns how many tokens that were, at most about `most`. One at least is left to be read.
        """
        start = self.cache.lengths[row]
        keys = self._known(gate, tokens[:-1])[start // BLOCK_TOKENS :][: max(1, most // BLOCK_TOKENS)]
        if not keys or start % BLOCK_TOKENS:
            return 0
        try:
            self.cache.fill(row, torch.cat([self._blocks[key].states for key in keys], dim=2))
        except RuntimeError:
            self.cache.cut(row, start)
            self.forget()
            return 0
        self._touch(self._known(gate, tokens[:-1]))
        return len(keys) * BLOCK_TOKENS

    def keep(self, row: int, gate: Mapping[str, float], tokens: Sequence[int]) -> None:
        """Remember a row, which holds these tokens or as many of them as were read."""
        tokens = tokens[: self.cache.lengths[row]]
        keys = self._known(gate, tokens)
        if self.max_bytes and self.cache.alike:
            most = self.max_bytes // 2 // (BLOCK_TOKENS * self.cache.token_bytes)
            try:
                self._add(row, gate, keys, tokens, min(most, len(tokens) // BLOCK_TOKENS))
            except RuntimeError:
                self.forget()
                keys = []
        self._touch(keys)
        while self.bytes > self.max_bytes:
            self.bytes -= self._blocks.popitem(last=False)[1].states.nbytes

    def forget(self) -> None:
        """Forget everything."""
        self._blocks.clear()
        self.bytes = 0

    def retain(self, adapters: Collection[str]) -> None:
        """Forget what was read with adapters that are no longer among these."""
        for key in [k for k, block in self._blocks.items() if not all(name in adapters for name, _ in block.adapters)]:
            self.bytes -= self._blocks.pop(key).states.nbytes

    def _add(self, row: int, gate: Mapping[str, float], keys: list[_Key], tokens: Sequence[int], blocks: int) -> None:
        """Make the blocks that lack to the first `blocks` of a row, and add their keys to those of the others."""
        before: Hashable = self._blocks[keys[-1]].serial if keys else _adapters(gate)
        for i in range(len(keys), blocks):
            at = slice(i * BLOCK_TOKENS, (i + 1) * BLOCK_TOKENS)
            states = self.cache.read(row, at.start, at.stop)
            self._made += 1
            keys.append((before, tuple(tokens[at])))
            self._blocks[keys[-1]] = _Block(self._made, states, _adapters(gate))
            self.bytes += states.nbytes
            before = self._made

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


def _adapters(gate: Mapping[str, float]) -> frozenset[tuple[str, float]]:
    return frozenset(gate.items())
