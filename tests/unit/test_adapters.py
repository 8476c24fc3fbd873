"""Adapter folders: what peft writes loads, and every way in which a folder can be wrong is said before a weight is touched."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from persona_models.adapters import CARD, CONFIG, WEIGHTS, read_adapter
from persona_models.base_model import check_base, load_base, weights_digest
from persona_models.errors import AdapterError, ConfigError
from persona_models.gated_lora import LoraBank

_spec = importlib.util.spec_from_file_location("shared", Path(__file__).parent.parent / "conftest.py")
shared = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(shared)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")


@pytest.fixture
def base(tiny_base_folder):
    return load_base(str(tiny_base_folder), device="cpu")


@pytest.fixture
def folder(tiny_base_folder, tmp_path) -> Path:
    return shared.save_adapter(tiny_base_folder, tmp_path / "adapter", seed=1)


def edit(folder: Path, **changes) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    "lora", [{}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 64}}, {"rank_pattern": {"v_proj": 2}}, {"target_modules": ["q_proj"]}]
)
def test_logits_equal_pefts(base, tiny_base_folder, tmp_path, lora):
    """Scaling, patterns and partial targets are folded in exactly as peft applies them."""
    folder = shared.save_adapter(tiny_base_folder, tmp_path / "a", seed=2, rank=4, **lora)
    ids = torch.arange(20).unsqueeze(0)
    with torch.inference_mode():
        want = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base_folder), folder).eval()(input_ids=ids).logits
        bank = LoraBank(base.model)
        adapter = read_adapter(folder, base)
        bank.load("a", adapter.rank, adapter.factors)
        bank.gate.rows = bank.open([{"a": 1.0}])
        got = base.model(input_ids=ids).logits
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_uninstalling_puts_the_base_back(base, folder):
    ids = torch.arange(12).unsqueeze(0)
    with torch.inference_mode():
        before = base.model(input_ids=ids).logits
        bank = LoraBank(base.model)
        adapter = read_adapter(folder, base)
        bank.load("a", adapter.rank, adapter.factors)
        bank.gate.rows = bank.open([{"a": 1.0}])
        assert not torch.equal(base.model(input_ids=ids).logits, before)
        bank.uninstall()
        assert torch.equal(base.model(input_ids=ids).logits, before)


def test_a_folder_that_is_no_adapter(base, tmp_path):
    with pytest.raises(AdapterError, match=r"no adapter_config.json; give a folder saved by peft"):
        read_adapter(tmp_path, base)


def test_missing_weights(base, folder):
    (folder / WEIGHTS).unlink()
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors is missing"):
        read_adapter(folder, base)


def test_damaged_weights(base, folder):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])
    with pytest.raises(AdapterError, match="is damaged"):
        read_adapter(folder, base)


def test_an_adapter_made_for_another_base_by_its_card(base, folder):
    (folder / CARD).write_text(json.dumps({"base_digest": "0123456789abcdef"}))
    with pytest.raises(AdapterError, match=r"made for another base \(0123456789abcdef\)"):
        read_adapter(folder, base)


def test_an_adapter_made_for_another_base_by_its_shapes(base, folder):
    tensors = {k: torch.zeros(v.shape[0] + 1, v.shape[1]) if "lora_B" in k else v for k, v in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(AdapterError, match="it was made for another base"):
        read_adapter(folder, base)


def test_an_adapter_made_for_another_architecture(base, tiny_tokenizer, tmp_path):
    other = shared.save_tiny("neox", tmp_path / "neox", tiny_tokenizer)
    folder = shared.save_adapter(other, tmp_path / "a", seed=1)
    with pytest.raises(AdapterError, match="does not have; it was made for another architecture"):
        read_adapter(folder, base)


def test_values_that_are_not_finite(base, folder):
    tensors = load_file(folder / WEIGHTS)
    tensors[next(iter(tensors))][0, 0] = float("nan")
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(AdapterError, match="not finite"):
        read_adapter(folder, base)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"peft_type": "IA3"}, "the method is IA3"),
        ({"use_dora": True}, "use_dora=True"),
        ({"bias": "all"}, "bias='all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ],
)
def test_methods_that_cannot_share_a_batch(base, folder, change, says):
    edit(folder, **change)
    with pytest.raises(AdapterError, match=says):
        read_adapter(folder, base)


def test_digest_is_the_same_in_bfloat16_and_another_for_other_weights(tiny_base_folder, tmp_path, tiny_tokenizer):
    one = load_base(str(tiny_base_folder), device="cpu")
    rounded = AutoModelForCausalLM.from_pretrained(tiny_base_folder, dtype=torch.bfloat16)
    other = shared.save_tiny("llama", tmp_path / "other", tiny_tokenizer, seed=9)
    assert weights_digest(rounded) == one.digest
    assert load_base(str(other), device="cpu").digest != one.digest


@pytest.mark.parametrize("spec", ["no/such-model", "/nowhere"])
def test_a_base_that_is_not_there(spec):
    with pytest.raises(ConfigError, match=r"cannot load .* as a causal language model"):
        load_base(spec)
    with pytest.raises(ConfigError, match=r"cannot load .* as a causal language model"):
        check_base(spec)
