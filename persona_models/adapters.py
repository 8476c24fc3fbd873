"""Adapter folders in PEFT's own format -> checked factors.

An adapter made by anyone with `peft` loads here, one made here loads in `peft`. Everything is checked before a weight of a running model is touched.
Knows nothing of MLflow or serving.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from persona_models.base_model import BUILTIN_FOLDER, BaseModel
from persona_models.errors import AdapterError
from persona_models.gated_lora import linear_shape
from persona_models.lookup import Phrases

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Written beside PEFT's files by our pipeline: which base the adapter was made for, and how.
CARD = "deskroute.json"
# And what the answers that it was trained on say often, texts in a list: see lookup.py. Adapters made elsewhere do without.
PHRASES = "phrases.json"
# More of them would take more memory than the adapter.
MOST_PHRASE_TOKENS = 8192
MAX_RANK = 256


@dataclass(frozen=True)
class Adapter:
    """A checked adapter: factors by module name, A (r, in) and B (r, out), with alpha / r folded into B; and what its answers say often."""

    rank: int
    factors: dict[str, tuple[Tensor, Tensor]]
    phrases: Phrases = field(default_factory=Phrases)


def builtin_adapter(persona: str) -> Path | None:
    """The shipped adapter of a persona, if there is one."""
    folder = BUILTIN_FOLDER / "adapters" / persona
    return folder if (folder / CONFIG).is_file() else None


def read_card(folder: Path) -> dict[str, Any]:
    """What our pipeline wrote beside the adapter; empty for adapters made elsewhere."""
    try:
        return json.loads((folder / CARD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, json.JSONDecodeError) as e:
        raise AdapterError(f"{folder}: {CARD} cannot be read ({e}); restore the folder or retrain the persona") from None


def read_adapter(folder: Path, base: BaseModel) -> Adapter:
    """Read and check an adapter folder against a base.

    Raises AdapterError, naming the folder and the fault, for missing or damaged files, another PEFT method than LoRA, another base, modules or
    shapes that the base does not have, a rank over MAX_RANK, and values that are not finite.
    """
    config = _read_config(folder)
    made_for = read_card(folder).get("base_digest")
    if made_for and made_for != base.digest:
        raise AdapterError(
            f"{folder}: the adapter was made for another base ({made_for}) than the one loaded, {base.name!r} ({base.digest}); retrain it on this base"
        )
    try:
        tensors = load_file(folder / WEIGHTS)
    except FileNotFoundError:
        raise AdapterError(f"{folder}: {WEIGHTS} is missing; an adapter saved by peft has it beside {CONFIG}") from None
    except (SafetensorError, OSError) as e:
        raise AdapterError(f"{folder}: {WEIGHTS} is damaged ({e})") from None
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for name in sorted({_module(key, folder) for key in tensors}):
        a, b = _pair(tensors, name, folder)
        try:
            n_in, n_out = linear_shape(base.model.get_submodule(name))
        except AttributeError:
            raise AdapterError(f"{folder}: adapts {name}, which the base {base.name!r} does not have; it was made for another architecture") from None
        rank = a.shape[0]
        if a.shape != (rank, n_in) or b.shape != (n_out, rank):
            raise AdapterError(
                f"{folder}: {name} has factors {tuple(a.shape)} and {tuple(b.shape)}, the base needs (r, {n_in}) and ({n_out}, r); it was made for another base"
            )
        if rank > MAX_RANK:
            raise AdapterError(f"{folder}: rank {rank} of {name} is over the limit of {MAX_RANK}")
        if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
            raise AdapterError(f"{folder}: {name} holds values that are not finite (NaN or infinity); the training run diverged")
        scale = _alpha(config, name) / (math.sqrt(rank) if config.get("use_rslora") else rank)
        factors[name] = (a, (b * scale).T.contiguous())
    if not factors:
        raise AdapterError(f"{folder}: {WEIGHTS} holds no LoRA factors")
    return Adapter(max(a.shape[0] for a, _ in factors.values()), factors, _read_phrases(folder, base))


def _read_phrases(folder: Path, base: BaseModel) -> Phrases:
    """The phrases that lie beside an adapter, the first MOST_PHRASE_TOKENS of them."""
    path = folder / PHRASES
    phrases: list[list[int]] = []
    room = MOST_PHRASE_TOKENS
    try:
        texts = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(texts, list):
            raise ValueError("no list")
        for text in texts:
            phrase = base.tokenizer.encode(text, add_special_tokens=False)
            room -= len(phrase)
            if room < 0:
                break
            phrases.append(phrase)
    except FileNotFoundError:
        return Phrases()
    except (OSError, ValueError, TypeError, RecursionError) as e:
        raise AdapterError(f"{path} is no list of texts ({e}); retrain the persona, or delete the file, which only makes answers faster") from None
    return Phrases(phrases)


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterError(f"{folder}: no {CONFIG}; give a folder saved by peft's save_pretrained") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise AdapterError(f"{folder}: {CONFIG} cannot be read ({e})") from None
    method = config.get("peft_type")
    if method != "LORA":
        raise AdapterError(f"{folder}: the method is {method}; only LORA adapters can share a batch, merge others into a base of their own")
    outside: dict[str, tuple[Any, ...]] = {
        "bias": ("none", None),
        "use_dora": (False, None),
        "modules_to_save": (None, []),
        "lora_bias": (False, None),
        "alora_invocation_tokens": (None, []),
        # Other ways to begin (pissa, olora, corda ...) change the base as well.
        "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
    }
    for key, harmless in outside.items():
        if config.get(key, harmless[0]) not in harmless:
            raise AdapterError(
                f"{folder}: {key}={config[key]!r} changes weights outside the LoRA factors, which cannot share a batch; train without it"
            )
    return config


def _module(key: str, folder: Path) -> str:
    name = key.removeprefix("base_model.model.")
    for suffix in (".lora_A.weight", ".lora_B.weight"):
        if name.endswith(suffix):
            return name.removesuffix(suffix)
    raise AdapterError(f"{folder}: {key} is no LoRA factor of a linear layer; such adapters cannot share a batch")


def _pair(tensors: dict[str, Tensor], name: str, folder: Path) -> tuple[Tensor, Tensor]:
    found = [tensors.get(f"base_model.model.{name}.lora_{x}.weight", tensors.get(f"{name}.lora_{x}.weight")) for x in "AB"]
    if found[0] is None or found[1] is None:
        raise AdapterError(f"{folder}: {name} has only one of its two factors")
    return found[0].float(), found[1].float()


def _alpha(config: dict[str, Any], module: str) -> float:
    pattern = config.get("alpha_pattern") or {}
    return float(pattern.get(get_pattern_key(pattern.keys(), module), config.get("lora_alpha", 8)))
