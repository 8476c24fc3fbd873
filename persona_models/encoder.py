"""Sentence encoders: texts -> vectors of length 1. What a folder (or a Hugging Face repository) holds says which kind it is:

- a table of token vectors beside a tokenizer, as model2vec and sentence-transformers' StaticEmbedding write it: the mean of a text's token vectors,
  without torch;
- any other encoder that transformers can load: its last hidden states, pooled as the folder's sentence-transformers files say, else their mean.

Knows nothing of personas or features. torch and transformers are imported only where an encoder needs them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from tqdm import tqdm

from persona_models.errors import ConfigError

# Folders that sentence-transformers gives a table of its own.
_TABLES = ("", "0_StaticEmbedding")
_TABLE_NAMES = ("embeddings", "embedding.weight")
MAX_TOKENS = 512
BATCH = 32
# What two encoders that are the same one say alike.
PROBE = "The printer on the second floor does not print my report."
SAME = 0.999


class Model(Protocol):
    """What makes vectors of texts: (N, dim) float32, in any length."""

    dim: int

    def __call__(self, texts: Sequence[str]) -> np.ndarray: ...


class SentenceEncoder:
    """Encodes texts, each by itself; what `prepare` was given is encoded in batches and remembered."""

    def __init__(self, name: str, model: Model) -> None:
        self.name, self.model, self.dim = name, model, model.dim
        self._known: dict[str, np.ndarray] = {}

    def encode(self, text: str) -> np.ndarray:
        """(dim,) float32 of length 1; zeros for a blank text, and for one without a token that the encoder knows."""
        if not text.strip():
            return np.zeros(self.dim, dtype=np.float32)
        found = self._known.get(text)
        return _unit(self.model([text]))[0] if found is None else found

    def prepare(self, texts: Sequence[str]) -> None:
        """Encode these once for all later calls of `encode`."""
        fresh = sorted(dict.fromkeys(t for t in texts if t.strip() and t not in self._known), key=len)
        for i in tqdm(range(0, len(fresh), BATCH), desc=f"encoding with {Path(self.name).name}", unit="batch", dynamic_ncols=True):
            some = fresh[i : i + BATCH]
            self._known |= dict(zip(some, _unit(self.model(some)), strict=True))

    @property
    def probe(self) -> np.ndarray:
        """(dim,): the vector of PROBE, by which an encoder is recognised."""
        return self.encode(PROBE)

    def is_like(self, probe: np.ndarray) -> bool:
        """Whether another encoder, of which this is the `probe`, is the same one."""
        return probe.shape == (self.dim,) and float(probe @ self.probe) >= SAME


class TokenTable:
    """The mean of token vectors (V, dim); `rows` and `scales` (T,) are model2vec's: which vector a token has, and how much it counts."""

    def __init__(self, tokenizer: Tokenizer, vectors: np.ndarray, rows: np.ndarray | None = None, scales: np.ndarray | None = None) -> None:
        tokenizer.no_padding()
        tokenizer.enable_truncation(MAX_TOKENS)
        self.tokenizer, self.vectors, self.rows, self.scales = tokenizer, vectors, rows, scales
        self.dim = int(vectors.shape[1])
        unknown = json.loads(tokenizer.to_str())["model"].get("unk_token")
        self.unknown = tokenizer.token_to_id(unknown) if unknown else None

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        made = np.zeros((len(texts), self.dim), dtype=np.float32)
        for i, encoding in enumerate(self.tokenizer.encode_batch(list(texts), add_special_tokens=False)):
            ids = np.array([t for t in encoding.ids if t != self.unknown], dtype=np.int64)
            if len(ids):
                vectors = self.vectors[ids if self.rows is None else self.rows[ids]].astype(np.float32)
                made[i] = (vectors if self.scales is None else vectors * self.scales[ids, None]).mean(axis=0)
        return made


def load_encoder(spec: str) -> SentenceEncoder:
    """The encoder in a folder or a Hugging Face repository; a folder's name is its whole path. Raises ConfigError where there is none, or one that
    cannot be loaded or cannot encode."""
    folder = _folder(spec)
    # What stands in the folder may be exchanged while a server runs.
    stamp = tuple((str(p), p.stat().st_mtime_ns, p.stat().st_size) for p in sorted(folder.rglob("*")) if p.is_file())
    return _loaded(str(folder.resolve()) if Path(spec).is_dir() else spec, folder, stamp)


@lru_cache(maxsize=2)
def _loaded(spec: str, folder: Path, stamp: tuple[tuple[str, int, int], ...]) -> SentenceEncoder:
    try:
        table = next((t for place in _TABLES if (t := _table(folder / place)) is not None), None)
        encoder = SentenceEncoder(spec, table or _transformer(folder))
        if not np.isfinite(encoder.probe).all() or not encoder.probe.any():
            raise ValueError(f"it makes no vector of {PROBE!r}: it must know English words")
        return encoder
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError, ImportError, SafetensorError) as e:
        said = str(e).strip().splitlines() or [type(e).__name__]
        raise ConfigError(
            f"router.encoder: {spec!r} cannot be loaded as a sentence encoder ({said[0][:200]}); "
            "give a folder or a Hugging Face id of a model2vec or sentence-transformers model with model.safetensors and tokenizer.json"
        ) from None


def _folder(spec: str) -> Path:
    if Path(spec).is_dir():
        return Path(spec)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(snapshot_download(spec, allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model"]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as e:
        raise ConfigError(
            f"router.encoder: {spec!r} is no folder, and no model that can be had from Hugging Face here ({type(e).__name__}); "
            "give the path of a folder, or leave router.encoder out"
        ) from None


def _table(folder: Path) -> TokenTable | None:
    weights, tokenizer = folder / "model.safetensors", folder / "tokenizer.json"
    if not (weights.is_file() and tokenizer.is_file()):
        return None
    with safe_open(weights, framework="np") as file:
        names = set(file.keys())
        name = next((n for n in _TABLE_NAMES if n in names), None)
        if name is None:
            return None
        rows, scales = (file.get_tensor(n) if n in names else None for n in ("mapping", "weights"))
        vectors = file.get_tensor(name)
    try:
        read = Tokenizer.from_file(str(tokenizer))
    except Exception as e:  # tokenizers raises nothing narrower
        raise ValueError(f"{tokenizer}: {e}") from None
    tokens = read.get_vocab_size()
    if vectors.ndim != 2 or not np.isfinite(vectors).all() or len(vectors if rows is None else rows) < tokens:
        raise ValueError(f"{weights}: vectors {vectors.shape} do not fit a tokenizer of {tokens} tokens, or are not finite")
    if (rows is not None and not 0 <= rows.min() <= rows.max() < len(vectors)) or (scales is not None and len(scales) < tokens):
        raise ValueError(f"{weights}: its mapping or its weights do not fit {len(vectors)} vectors and {tokens} tokens")
    return TokenTable(read, vectors, rows, scales)


def _transformer(folder: Path) -> Model:
    import torch
    from transformers import AutoModel, AutoTokenizer

    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has neither a table of token vectors nor a config.json")
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModel.from_pretrained(folder, use_safetensors=True, dtype=torch.float32).eval().requires_grad_(False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    longest = min(MAX_TOKENS, tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", MAX_TOKENS))

    class Pooled:
        dim = int(model.config.hidden_size)
        pool = staticmethod(_pooling(folder))

        def __call__(self, texts: Sequence[str]) -> np.ndarray:
            read = tokenizer(list(texts), padding=True, truncation=True, max_length=longest, return_tensors="pt")
            with torch.inference_mode():
                states = model(**read).last_hidden_state
                pooled: np.ndarray = self.pool(states, read["attention_mask"]).numpy()
            return pooled

    return Pooled()


def _pooling(folder: Path) -> Callable[[Any, Any], Any]:
    """How sentence-transformers' files say that token states (N, T, D) become one vector. Raises ValueError for a way that is not known here."""
    ways = {"pooling_mode_cls_token": _first, "pooling_mode_mean_tokens": _mean}
    path = folder / "1_Pooling" / "config.json"
    if not path.is_file():
        return _mean
    wanted = [k for k, on in json.loads(path.read_text(encoding="utf-8")).items() if k.startswith("pooling_mode_") and on is True]
    if len(wanted) != 1 or wanted[0] not in ways:
        raise ValueError(f"{path}: pooling by {', '.join(wanted) or 'nothing'}; known are the mean and the first token")
    return ways[wanted[0]]


def _first(states: Any, mask: Any) -> Any:
    return states[:, 0]


def _mean(states: Any, mask: Any) -> Any:
    return (states * mask[:, :, None]).sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp(min=1)


def _unit(vectors: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    made: np.ndarray = np.divide(vectors, length, out=np.zeros_like(vectors), where=length > 0)
    return made
