"""Load any Hugging Face causal language model by name or path; "builtin" is the one that ships.

Knows nothing of adapters or requests.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from persona_models.errors import ConfigError
from persona_models.prompt import prepare_tokenizer
from persona_models.protocol import BUILTIN

BUILTIN_FOLDER = Path(__file__).with_name("builtin")


@dataclass
class BaseModel:
    """A loaded base: model in eval mode, tokenizer with a chat template, and what others need to know of it."""

    model: Any
    tokenizer: Any
    name: str
    digest: str
    context_tokens: int
    stop_ids: frozenset[int]

    @property
    def device(self) -> torch.device:
        return self.model.device


def base_folder(spec: str) -> str:
    """What `from_pretrained` takes for a `base:` value: the shipped folder for "builtin", else the value itself."""
    return str(BUILTIN_FOLDER / "base") if spec == BUILTIN else spec


def load_base(spec: str, *, device: str = "auto", dtype: str = "auto") -> BaseModel:
    """Load a base.

    device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1"; dtype: "auto" (float32 on CPU, bfloat16 on GPU) or a torch name.
    Raises ConfigError when the model is not there, is no causal language model, or has no fast tokenizer.
    """
    folder = base_folder(spec)
    place = torch.device("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else torch.device(device)
    kind = _dtype(dtype, place)
    tokenizer = _tokenizer(spec, folder)
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=kind, use_safetensors=True)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as e:
        raise _cannot_load(spec, e) from None
    model = model.to(place).eval().requires_grad_(False)
    if place.type == "cuda":
        # cuDNN's attention makes a plan for every length anew, in every thread, and a row grows with every step.
        torch.backends.cuda.enable_cudnn_sdp(False)
    return BaseModel(model, prepare_tokenizer(tokenizer), spec, weights_digest(model), _context(model.config, tokenizer), _stop_ids(model, tokenizer))


def check_base(spec: str, dtype: str = "auto") -> None:
    """What load_base would say of a base that is not there or does not fit, without loading its weights."""
    _dtype(dtype, torch.device("cpu"))
    folder = base_folder(spec)
    _tokenizer(spec, folder)
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as e:
        raise _cannot_load(spec, e) from None
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ConfigError(f"base: {spec!r} is a {config.model_type} model, which transformers knows no causal language model for")


def gpu_count() -> int:
    """CUDA devices of this machine."""
    return torch.cuda.device_count()


def _dtype(name: str, place: torch.device) -> torch.dtype:
    kind = getattr(torch, name, None) if name != "auto" else (torch.float32 if place.type == "cpu" else torch.bfloat16)
    if not isinstance(kind, torch.dtype):
        raise ConfigError(f"dtype: {name!r} is not a torch data type; use auto, float32, bfloat16 or float16")
    return kind


def _tokenizer(spec: str, folder: str) -> Any:
    if spec == BUILTIN and not (Path(folder) / "config.json").is_file():
        raise ConfigError(f"base: the built-in base is not in {folder}; run `deskroute pretrain`, or name a model by `base:`")
    # Loading a small model takes a moment; a bar for it would only clutter the ready line.
    transformers_logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as e:
        raise _cannot_load(spec, e) from None
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(f"base: {spec!r} has no fast tokenizer (tokenizer.json); convert it with the tokenizers package")
    return tokenizer


def _cannot_load(spec: str, error: Exception) -> ConfigError:
    first = str(error).strip().splitlines()[0]
    return ConfigError(f"base: cannot load {spec!r} as a causal language model ({first}); give a folder or a Hugging Face id that can be reached")


def weights_digest(model: Any) -> str:
    """16 hex digits that tell one set of base weights from another: names, shapes and a sample of values, rounded to bfloat16.

    The sample keeps it fast for billions of parameters; the rounding makes it the same whether the weights were loaded as float32 or bfloat16.
    """
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        flat = value.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 64)][:64].to("cpu", torch.float32).to(torch.bfloat16)
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def _context(config: Any, tokenizer: Any) -> int:
    limits = [getattr(config, "max_position_embeddings", None), tokenizer.model_max_length]
    return min([int(n) for n in limits if n and n < 10**7] or [2048])


def _stop_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    ids: set[int] = set()
    for source in (model.generation_config.eos_token_id, tokenizer.eos_token_id):
        ids |= set(source) if isinstance(source, (list, tuple)) else {source}
    return frozenset(i for i in ids if i is not None)
