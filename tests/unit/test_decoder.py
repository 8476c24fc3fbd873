"""The two decoders against transformers' own forward pass, token by token: prompts in pieces, rows that move, adapters and mixtures, windows."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from persona_models.adapters import read_adapter
from persona_models.base_model import load_base
from persona_models.decoder import TransformersDecoder, make_decoder
from persona_models.errors import ConfigError
from persona_models.fused import FusedDecoder, fits
from persona_models.gated_lora import LoraBank
from persona_models.packed import packed
from persona_models.row_cache import BLOCK, RowCache

_spec = importlib.util.spec_from_file_location("shared", Path(__file__).parent.parent / "conftest.py")
shared = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(shared)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")

VARIANTS = {
    "llama, shared key heads": ("llama", {}),
    "llama, every head its keys": ("llama", {"num_key_value_heads": 4}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, longer by scaling": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}),
    "qwen2": ("qwen2", {}),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "mistral": ("mistral", {"sliding_window": None}),
}


def shaken(model: nn.Module) -> None:
    """Random biases and norms: fresh models have zeros and ones there, which would hide a mistake."""
    torch.manual_seed(9)
    for name, p in model.named_parameters():
        if p.ndim == 1:
            p.data += 0.3 * torch.randn_like(p) if "norm" in name else 0.1 * torch.randn_like(p)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.inference_mode()
def test_both_decoders_give_the_logits_of_transformers(variant, tmp_path, tiny_tokenizer):
    """Three rows of different adapters and lengths, prompts in uneven pieces, one row leaving in between; every logit against a plain forward pass."""
    kind, more = VARIANTS[variant]
    folder = shared.save_tiny(kind, tmp_path / "base", tiny_tokenizer, **more)
    folders = {p: shared.save_adapter(folder, tmp_path / p, seed=i, rank=2 + i) for i, p in enumerate(("field", "admin"))}
    base = load_base(str(folder), device="cpu")
    shaken(base.model)
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    shaken(plain)
    bank = LoraBank(base.model)
    for persona, path in folders.items():
        adapter = read_adapter(path, base)
        bank.load(persona, adapter.rank, adapter.factors)
    gates = [{}, {"field": 1.0}, {"field": 0.4, "admin": 0.6}]
    torch.manual_seed(3)
    texts = [torch.randint(5, 300, (n,)).tolist() for n in (7, 150, 31)]

    def want(text, gate):
        """Logits of the last token of a text: the weights with the gate's adapters added, one plain pass."""
        merged = AutoModelForCausalLM.from_pretrained(folder).eval()
        merged.load_state_dict(plain.state_dict())
        for persona, weight in gate.items():
            for module, (a, b) in read_adapter(folders[persona], base).factors.items():
                merged.get_submodule(module).weight.add_(weight * (b.T @ a))
        return merged(input_ids=torch.tensor([text])).logits[0, -1]

    assert fits(base.model)
    for decoder in (FusedDecoder(base.model, bank, 4, 256), TransformersDecoder(base.model, bank, 4, 256)):
        so_far = [list(t) for t in texts]
        for row, (text, gate) in enumerate(zip(texts, gates, strict=True)):
            decoder.open(row, gate)
            cut = len(text) // 3
            decoder.prefill(row, text[:cut])
            torch.testing.assert_close(decoder.prefill(row, text[cut:]), want(text, gate), atol=2e-4, rtol=1e-3)
        left = gates
        for token in range(20, 28):
            if token == 24:  # the first row leaves, the last one takes its place
                decoder.move(2, 0)
                decoder.close(2)
                so_far, left = [so_far[2], so_far[1]], [gates[2], gates[1]]
            got = decoder.step([[token + i] for i in range(len(so_far))])[:, 0]
            for i, text in enumerate(so_far):
                text.append(token + i)
                if token in (20, 24, 27):
                    torch.testing.assert_close(got[i], want(text, left[i]), atol=2e-4, rtol=1e-3)


@torch.inference_mode()
def test_a_row_gets_wider_adapters_than_the_batch_had(tmp_path, tiny_base_folder):
    """Factors are laid out for the widest row; a mixture that comes later must not disturb the rows that are there."""
    base = load_base(str(tiny_base_folder), device="cpu")
    bank = LoraBank(base.model)
    for i, rank in enumerate((2, 5)):
        targets = ["q_proj", "down_proj"] if i == 0 else "all-linear"
        folder = shared.save_adapter(tiny_base_folder, tmp_path / str(i), seed=i, rank=rank, target_modules=targets)
        bank.load(f"a{i}", rank, read_adapter(folder, base).factors)
    text = list(range(5, 25))
    alone = FusedDecoder(base.model, bank, 2, 256)
    alone.open(0, {"a0": 1.0})
    first = alone.prefill(0, text)
    decoder = FusedDecoder(base.model, bank, 2, 256)
    decoder.open(0, {"a0": 1.0})
    torch.testing.assert_close(decoder.prefill(0, text), first)
    decoder.open(1, {"a0": 0.5, "a1": 0.5})
    decoder.prefill(1, text)
    torch.testing.assert_close(decoder.step([[7], [7]])[0], alone.step([[7]])[0], atol=1e-5, rtol=1e-5)
    assert decoder.rank == 7
    decoder.close(1)
    decoder.open(1, {"a0": 1.0})
    assert decoder.rank == 2, "nobody pays for a mixture that is gone"
    torch.testing.assert_close(decoder.prefill(1, text), first, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(decoder.step([[8]])[0], alone.step([[8]])[0], atol=1e-5, rtol=1e-5)


def test_what_the_fused_decoder_cannot_do_is_left_to_transformers(tmp_path, tiny_tokenizer):
    for name, (kind, more) in {
        "neox": ("neox", {}),
        "window": ("mistral", {"sliding_window": 8}),
        "act": ("llama", {"hidden_act": "gelu"}),
        "rope": ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}),
    }.items():
        base = load_base(str(shared.save_tiny(kind, tmp_path / name, tiny_tokenizer, **more)), device="cpu")
        assert not fits(base.model), name
        assert isinstance(make_decoder(base.model, LoraBank(base.model), 2, 64), TransformersDecoder)
    half = load_base(str(shared.save_tiny("llama", tmp_path / "half", tiny_tokenizer)), device="cpu", dtype="bfloat16")
    assert not fits(half.model)


@torch.inference_mode()
def test_layers_with_a_window_look_no_further_back(tmp_path, tiny_tokenizer):
    base = load_base(str(shared.save_tiny("mistral", tmp_path / "window", tiny_tokenizer, sliding_window=8)), device="cpu")
    decoder = make_decoder(base.model, LoraBank(base.model), 2, 128)
    decoder.open(0, {})
    text = list(range(5, 45))
    got = [decoder.prefill(0, text[:13]), decoder.prefill(0, text[13:30]), *(decoder.step([[t]])[0, 0] for t in text[30:])]
    want = base.model(input_ids=torch.tensor([text])).logits[0]
    for logits, place in zip(got, (12, 29, *range(30, 40)), strict=True):
        torch.testing.assert_close(logits, want[place], atol=1e-4, rtol=1e-3)


def test_layers_that_are_no_attention_are_refused(tiny_base_folder):
    base = load_base(str(tiny_base_folder), device="cpu")
    base.model.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ConfigError, match="layers of the kind linear_attention"):
        make_decoder(base.model, LoraBank(base.model), 2, 64)


@pytest.mark.parametrize("rows", [1, 3, 16, 40])
def test_packed_products_are_those_of_the_weights(rows):
    """Weights of a bfloat16 checkpoint take the float16 way, others must not lose a digit by it."""
    torch.manual_seed(rows)
    x, bias = torch.randn(rows, 96), torch.randn(80)
    fine = torch.randn(80, 96)
    coarse = fine.bfloat16().float()
    coarse[0, 0] = 1e-6  # subnormal in float16
    for weight in (fine, coarse):
        for b in (None, bias):
            want = nn.functional.linear(x.double(), weight.double(), None if b is None else b.double())
            with torch.inference_mode():
                torch.testing.assert_close(packed(weight, b)(x).double(), want, atol=2e-5, rtol=1e-5)


def test_a_cache_keeps_its_tokens_when_it_grows_and_when_rows_move():
    cache = RowCache(1, 3, 1000, torch.float32, torch.device("cpu"))
    said = torch.randn(2, BLOCK - 1, 4)
    start = cache.grow(1, BLOCK - 1)
    cache.put_chunk(0, 1, start, said, -said)
    cache.move(1, 0)
    for _ in range(3):
        at, mask = cache.next_columns(2)
        cache.put(0, at, torch.full((2, 1, 2, 4), 5.0), torch.full((2, 1, 2, 4), 6.0))
    keys, values = cache.layer(0)
    assert cache.columns == 2 * BLOCK
    for row in (0, 1):
        assert cache.lengths[row] == BLOCK + 2
        torch.testing.assert_close(keys[row, :, : BLOCK - 1], said)
        torch.testing.assert_close(values[row, :, : BLOCK - 1], -said)
        assert (keys[row, :, BLOCK - 1 : BLOCK + 2] == 5).all()
        assert (mask[row, 0, 0] == 0).sum() == BLOCK + 2
    cache.clear(0)
    assert cache.lengths[0] == 0
