"""What a PEFT method did to the base's weights -> plain LoRA factors, so that every method's adapter can share a batch with the others.

Each adapted layer is merged for a moment; the change of its weight is factored by SVD, with the smallest rank that keeps all but a thousandth of its
energy. For LoRA's own kin this is exact; for methods that rotate or rescale whole weights the rank may be high. Knows nothing of training.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from persona_models.adapters import MAX_RANK, WEIGHTS
from persona_models.errors import AdapterError

ENERGY = 0.999


@dataclass(frozen=True)
class Factored:
    """Factors by module name, A (r, in) and B (out, r), and the least share of a layer's change that they keep."""

    factors: dict[str, tuple[Tensor, Tensor]]
    kept: float

    @property
    def rank(self) -> int:
        return max(a.shape[0] for a, _ in self.factors.values())

    def save(self, folder: Path, base_name: str) -> None:
        """Write a LoRA adapter in PEFT's own format."""
        ranks = {name: a.shape[0] for name, (a, _) in self.factors.items()}
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.rank,
            rank_pattern=ranks,
            alpha_pattern=ranks,
            target_modules=sorted(ranks),
            task_type="CAUSAL_LM",
            inference_mode=True,
            base_model_name_or_path=base_name,
        )
        folder.mkdir(parents=True, exist_ok=True)
        config.save_pretrained(str(folder))
        tensors = {}
        for name, (a, b) in self.factors.items():
            tensors[f"base_model.model.{name}.lora_A.weight"] = a.contiguous()
            tensors[f"base_model.model.{name}.lora_B.weight"] = b.contiguous()
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


@torch.no_grad()
def factor(model: Any, *, energy: float = ENERGY, max_rank: int = MAX_RANK) -> Factored:
    """Factor what a PEFT model's adapter does. The model is left as it was.

    Raises AdapterError where the method changes something else than the weights of linear layers.
    """
    factors, kept = {}, 1.0
    for name, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        layer = module.get_base_layer()
        if not isinstance(layer, nn.Linear):
            raise AdapterError(f"{name}: a {type(layer).__name__} was adapted; only linear layers can be served as LoRA factors")
        before = layer.weight.detach().clone()
        bias = None if layer.bias is None else layer.bias.detach().clone()
        module.merge()
        change = (layer.weight.detach() - before).float()
        moved = bias is not None and layer.bias is not None and not torch.equal(layer.bias, bias)
        module.unmerge()
        # Unmerging subtracts, and leaves rounding errors behind.
        layer.weight.copy_(before)
        if bias is not None and layer.bias is not None:
            layer.bias.copy_(bias)
        if moved:
            raise AdapterError(f"{name}: the method changes a bias, which LoRA factors cannot; choose another one")
        u, s, v = torch.linalg.svd(change, full_matrices=False)
        total = float((s**2).sum())
        if total == 0:
            continue
        sums = (s**2).cumsum(0) / total
        rank = min(max_rank, int((sums < energy).sum()) + 1)
        kept = min(kept, float(sums[rank - 1]))
        factors[name.removeprefix("base_model.model.")] = (v[:rank].clone(), (u[:, :rank] * s[:rank]).clone())
    if not factors:
        raise AdapterError("the adapter changes no weight of a linear layer; the method cannot be served, or nothing was learnt")
    return Factored(factors, kept)
