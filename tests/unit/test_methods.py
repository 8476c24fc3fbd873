"""Every PEFT method by name: trained for a few steps, factored, read back and served through the gates, against PEFT's own logits."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from persona_models.adapters import read_adapter
from persona_models.as_lora import factor
from persona_models.base_model import load_base
from persona_models.errors import ConfigError
from persona_models.gated_lora import LoraBank
from pipelines.finetune import LORA_KIN, METHODS, peft_config
from router.config import Training

pytestmark = pytest.mark.filterwarnings("ignore")
IDS = torch.arange(30)[None]


@pytest.mark.parametrize("method", [m for m in METHODS if m not in LORA_KIN])
def test_what_a_method_learns_is_served_as_lora_factors(method, tiny_base_folder, tmp_path):
    torch.manual_seed(0)
    base = load_base(str(tiny_base_folder), device="cpu")
    untouched = base.model(input_ids=IDS).logits.detach()
    model = get_peft_model(base.model, peft_config(Training(method=method, rank=8), base.model))
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-2)
    for _ in range(4):
        torch.nn.functional.cross_entropy(model(input_ids=IDS).logits[0, :-1], IDS[0, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.inference_mode():
        want = model(input_ids=IDS).logits
    found = factor(model)
    found.save(tmp_path / "adapter", "tiny")
    with torch.inference_mode():
        torch.testing.assert_close(model(input_ids=IDS).logits, want)
    served = load_base(str(tiny_base_folder), device="cpu")
    adapter = read_adapter(tmp_path / "adapter", served)
    bank = LoraBank(served.model)
    bank.load("a", adapter.rank, adapter.factors)
    bank.gate.rows = bank.open([{"a": 1.0}])
    with torch.inference_mode():
        got = served.model(input_ids=IDS).logits
    effect = float((want - untouched).abs().max())
    assert found.kept >= 0.999
    # 99.9 % of the energy of each weight's change leaves about 3 % of its size.
    assert float((got - want).abs().max()) <= 0.05 * effect
    assert effect > 1e-4


def test_methods_that_change_no_weight_are_refused(tiny_base_folder):
    base = load_base(str(tiny_base_folder), device="cpu")
    with pytest.raises(ConfigError, match=r"'prefix_tuning' cannot share a batch.*use one of lora, rslora, dora"):
        peft_config(Training(method="prefix_tuning"), base.model)
