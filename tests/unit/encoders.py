"""Tiny sentence encoders: tokenizers of whole words, and tables of token vectors as model2vec writes them."""

from __future__ import annotations

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

# One word of persona_models.encoder.PROBE, so that each of these can be recognised.
PROBED = "printer"


def tokenizer_of(words):
    made = Tokenizer(models.WordLevel({"[UNK]": 0, "[PAD]": 1, **{w: i + 2 for i, w in enumerate(words)}}, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    return made


def save_table(folder, words, vectors, **more):
    """vectors: (2 + words, dim), those of an unknown word and of padding first."""
    folder.mkdir(parents=True)
    tokenizer_of(words).save(str(folder / "tokenizer.json"))
    save_file({"embeddings": vectors.astype(np.float32), **more}, folder / "model.safetensors")
    return str(folder)


def random_table(folder, words=(PROBED, "jam", "tray"), *, dim=8, seed=0):
    return save_table(folder, list(words), np.random.default_rng(seed).normal(size=(len(words) + 2, dim)))
