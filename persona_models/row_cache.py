"""Keys and values of the rows in flight, allocated once: row i's token at position p lies in column p.

Nothing is concatenated or padded from one step to the next; a step writes a column or a few a row, of which some may be taken back, and attention
reads the columns up to the longest row.
`TransformersCache` shows it to any model of transformers as one of its caches. This file knows nothing of requests or sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

# Columns come in blocks of this many tokens; some are kept beyond the longest row, for tokens that are tried and taken back.
BLOCK, SPARE = 256, 16


class RowCache:
    """Per layer keys and values of (rows, H, C, D), H key-value heads of size D over C columns; C doubles until rows of `limit` tokens fit."""

    def __init__(self, layers: int, rows: int, limit: int, dtype: torch.dtype, device: torch.device) -> None:
        self.rows, self.limit, self.dtype, self.device = rows, limit + SPARE, dtype, device
        self.keys: list[Tensor | None] = [None] * layers
        self.values: list[Tensor | None] = [None] * layers
        self.lengths = [0] * rows
        self.columns = min(BLOCK, self.limit)
        self.growths = 0  # how often keys and values went to another place, or were about to
        self._rows = torch.arange(rows, device=device)[:, None]
        self._counted = torch.arange(self.limit, device=device)

    def reserve(self, columns: int) -> None:
        """Make room for rows of `columns` tokens."""
        if columns <= self.columns:
            return
        self.growths += 1
        wide = min(self.limit, max(2 * self.columns, -(-columns // BLOCK) * BLOCK))
        for kind in (self.keys, self.values):
            for i, old in enumerate(kind):
                if old is not None:
                    new = zeros((*old.shape[:2], wide, old.shape[3]), self.dtype, self.device)
                    for row, n in enumerate(self.lengths):
                        new[row, :, :n] = old[row, :, :n]
                    kind[i] = new
        self.columns = wide

    def clear(self, row: int) -> None:
        """Forget a row's tokens."""
        self.lengths[row] = 0

    def cut(self, row: int, length: int) -> None:
        """Forget all but a row's first tokens."""
        self.lengths[row] = length

    def move(self, source: int, target: int) -> None:
        """Copy a row over another one."""
        n = self.lengths[source]
        for kind in (self.keys, self.values):
            for states in kind:
                if states is not None:
                    states[target, :, :n] = states[source, :, :n]
        self.lengths[target] = n

    def next_columns(self, n: int, tokens: int = 1) -> tuple[Tensor, Tensor]:
        """Open `tokens` more columns for each of the first n rows.

        Returns where these tokens go, (n, T), and what is added to their attention scores, (n, 1, T, C): 0 where they may look, their row up to
        themselves, -inf elsewhere.
        """
        longest = max(self.lengths[:n]) + tokens
        self.reserve(longest)
        starts = torch.tensor(self.lengths[:n], device=self.device)
        for row in range(n):
            self.lengths[row] += tokens
        return self.window(starts, tokens, longest)

    def window(self, starts: Tensor, tokens: int, columns: int) -> tuple[Tensor, Tensor]:
        """What next_columns returns for rows that hold `starts` (n,) tokens, of the first columns."""
        at = starts[:, None] + self._counted[:tokens]
        mask = torch.zeros(len(starts), tokens, columns, dtype=self.dtype, device=self.device)
        return at, mask.masked_fill_(self._counted[:columns] > at[..., None], float("-inf"))[:, None]

    def put(self, layer: int, at: Tensor, keys: Tensor, values: Tensor) -> None:
        """Write T tokens of each of the first n rows: keys and values (n, T, H, D) at columns `at` (n, T)."""
        rows = self._rows[: len(at)]
        k, v = self._columns_for(layer, keys.shape[2], keys.shape[3])
        k[rows, :, at] = keys
        v[rows, :, at] = values

    def put_chunk(self, layer: int, row: int, start: int, keys: Tensor, values: Tensor) -> None:
        """Write consecutive tokens of one row: keys and values (H, T, D) from column `start`."""
        k, v = self._columns_for(layer, keys.shape[0], keys.shape[2])
        k[row, :, start : start + keys.shape[1]] = keys
        v[row, :, start : start + values.shape[1]] = values

    def grow(self, row: int, tokens: int) -> int:
        """Count `tokens` more of a row, before they are written; returns the column of the first."""
        start = self.lengths[row]
        self.reserve(start + tokens)
        self.lengths[row] = start + tokens
        return start

    @property
    def alike(self) -> bool:
        """Whether all layers were written to and hold keys and values of one shape, so that `read` and `fill` can be used."""
        shapes = {None if states is None else states.shape for states in (*self.keys, *self.values)}
        return len(shapes) == 1 and None not in shapes

    @property
    def token_bytes(self) -> int:
        """What a token takes in all layers, which are alike."""
        keys, _ = self.layer(0)
        return 2 * len(self.keys) * keys.shape[1] * keys.shape[3] * keys.element_size()

    def read(self, row: int, start: int, end: int) -> Tensor:
        """A copy of a row's columns: (2 layers, H, end - start, D), keys and values in turn."""
        return torch.stack([kind[row, :, start:end] for i in range(len(self.keys)) for kind in self.layer(i)])

    def fill(self, row: int, states: Tensor) -> None:
        """Append to a row what `read` gave."""
        start = self.grow(row, states.shape[2])
        for layer in range(len(self.keys)):
            self.put_chunk(layer, row, start, states[2 * layer], states[2 * layer + 1])

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer that was written to, (rows, H, C, D) each."""
        k, v = self.keys[layer], self.values[layer]
        if k is None or v is None:
            raise RuntimeError(f"layer {layer} was never written to")
        return k, v

    def _columns_for(self, layer: int, heads: int, dim: int) -> tuple[Tensor, Tensor]:
        """Columns of a layer; the first tokens of all allocate them."""
        if self.keys[layer] is None:
            shape = (self.rows, heads, self.columns, dim)
            # Zeros, since a masked column still counts as nought times what it holds.
            self.keys[layer], self.values[layer] = (zeros(shape, self.dtype, self.device) for _ in range(2))
        return self.layer(layer)


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros. On a CPU, memory that is taken only where it is written to."""
    if dtype == torch.float32 and device.type == "cpu":
        return torch.from_numpy(np.zeros(shape, dtype=np.float32))
    return torch.zeros(shape, dtype=dtype, device=device)


def chunk_mask(start: int, tokens: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(1, 1, T, start + T): token t of a chunk sees the start columns before it and the chunk up to itself."""
    mask = torch.full((tokens, start + tokens), float("-inf"), dtype=dtype, device=device)
    return mask.triu_(start + 1)[None, None]


class TransformersCache(Cache):
    """A RowCache as transformers' models see one; say before each forward pass whose tokens are coming."""

    def __init__(self, rows: RowCache) -> None:
        self.rows = rows
        self._at: Tensor | None = None
        self._row, self._start, self._columns = 0, 0, 0
        super().__init__(layers=[_Layer(self, i) for i in range(len(rows.keys))])

    def next_tokens(self, at: Tensor, columns: int) -> None:
        """The next pass brings T tokens for each of the first n rows, for columns `at` (n, T), and looks at the first columns."""
        self._at, self._columns = at, columns

    def chunk(self, row: int, start: int) -> None:
        """The next pass brings consecutive tokens of one row."""
        self._at, self._row, self._start = None, row, start

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """(B, H, T, D) new keys and values -> all that the pass may look at."""
        if self._at is not None:
            n = len(self._at)
            self.rows.put(layer, self._at, keys.transpose(1, 2), values.transpose(1, 2))
            k, v = self.rows.layer(layer)
            return k[:n, :, : self._columns], v[:n, :, : self._columns]
        end = self._start + keys.shape[2]
        self.rows.put_chunk(layer, self._row, self._start, keys[0], values[0])
        k, v = self.rows.layer(layer)
        return k[self._row : self._row + 1, :, :end], v[self._row : self._row + 1, :, :end]


class _Layer(CacheLayerMixin):
    def __init__(self, cache: TransformersCache, index: int) -> None:
        super().__init__()
        self.cache, self.index = cache, index
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: columns come with the first token."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.cache.write(self.index, key_states, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return self.cache._start

    def get_max_length(self) -> int:
        return self.cache.rows.limit
