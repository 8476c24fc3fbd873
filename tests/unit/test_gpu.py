"""What stands in for transformers' own on a GPU, on the CPU: steps recorded as traces, norms, grouped heads; each against what it stands in for."""

from __future__ import annotations

import importlib.util
import weakref
from pathlib import Path

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import AutoModelForCausalLM

from persona_models.adapters import read_adapter
from persona_models.base_model import load_base
from persona_models.decoder import TransformersDecoder
from persona_models.gated_lora import LoraBank
from persona_models.gpu import GROUPED, MOST_RECORDINGS, Recordings, fuse_norms, give_back, lean
from persona_models.row_cache import BLOCK

_spec = importlib.util.spec_from_file_location("shared", Path(__file__).parent.parent / "conftest.py")
shared = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(shared)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")


class Traces:
    """Records as a CUDA graph does: the operations and the tensors they held on to; Python runs once."""

    def __init__(self):
        self.made, self.replayed = 0, 0
        self.of: dict[int, list] = {}

    def __call__(self, step, said, room, generation):
        # As CUDA's allocator does, refuse memory whose recordings are all gone.
        alive = self.of.setdefault(generation, [])
        assert not alive or any(one() for one in alive)
        self.made += 1
        traced = make_fx(lambda said: room[: (out := step(said)).numel()].view_as(out).copy_(out))(said.clone())

        def replay(said):
            self.replayed += 1
            return traced(said)

        alive.append(weakref.ref(replay))
        return replay


@pytest.mark.parametrize("kind", ["llama", "qwen3", "neox", "phi", "gpt2", "mistral"])
@torch.no_grad()
def test_recorded_steps_give_the_logits_of_plain_ones(kind, tmp_path, tiny_tokenizer):
    """Rows that come, go and move, a prompt that is half read, guesses of changing number, an adapter that comes, one that takes another's place, a
    cache that grows."""
    folder = shared.save_tiny(kind, tmp_path / "base", tiny_tokenizer, context=1024, **({"sliding_window": 20} if kind == "mistral" else {}))
    base = load_base(str(folder), device="cpu")
    lean(base.model)
    bank = LoraBank(base.model)

    def adapter(seed, rank):
        return read_adapter(shared.save_adapter(folder, tmp_path / str(seed), seed=seed, rank=rank), base)

    bank.load("a", 3, adapter(1, 3).factors)
    traces = Traces()
    plain, recorded = (TransformersDecoder(base.model, bank, 6, 1024, r) for r in (None, Recordings(traces)))
    torch.manual_seed(0)

    def both(do):
        want, got = do(plain), do(recorded)
        if want is not None:
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)

    def steps(n, wide, times):
        """Of `wide` tokens a row all but one are taken back, as wrong guesses are."""
        for _ in range(times):
            tokens = torch.randint(5, 300, (n, wide)).tolist()
            both(lambda d, tokens=tokens: d.step(tokens))
            for decoder in (plain, recorded):
                for row in range(n):
                    decoder.cache.cut(row, decoder.cache.lengths[row] - wide + 1)

    def come(row, gate, length):
        both(lambda d: d.open(row, gate))
        text = torch.randint(5, 300, (length,)).tolist()
        both(lambda d: d.prefill(row, text))

    come(0, {}, 9)
    steps(1, 1, 4)
    come(1, {"a": 1.0}, 30)
    come(2, {"a": 0.5}, 3)
    steps(3, 1, 4)
    steps(3, 3, 3)
    made = traces.made
    come(3, {}, 5)  # still reads its prompt while the three before it step, padded to four rows
    steps(3, 3, 1)
    more = torch.randint(5, 300, (12,)).tolist()
    both(lambda d: d.prefill(3, more))
    steps(4, 3, 2)
    assert traces.made == made, "four rows of three tokens have the shape that three had"
    bank.load("b", 4, adapter(2, 4).factors)  # R grows
    both(lambda d: d.open(0, {"b": 1.0}))
    both(lambda d: d.prefill(0, more))
    steps(4, 2, 4)
    both(lambda d: d.move(3, 1))
    both(lambda d: d.close(3))
    bank.unload("a")
    bank.load("c", 3, adapter(3, 3).factors)  # into the place of the first
    come(2, {"c": 1.0}, 7)
    steps(3, 5, 3)
    made = traces.made
    come(1, {"b": 0.3, "c": 0.7}, 4)
    steps(3, 5, 3)
    assert traces.made == made, "other gates are no other shape"
    come(3, {}, BLOCK - 2)  # the cache grows
    steps(4, 1, 6)
    assert traces.made >= 6
    assert traces.replayed > traces.made


def test_a_model_that_cannot_be_recorded_runs_on():
    def refuse(step, said, room, generation):
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        finally:
            raise RuntimeError("the capture failed due to a previous error")

    recordings = Recordings(refuse)
    for i in range(4):
        assert recordings.run("shape", 0, lambda said: said * 2, torch.tensor([i])).item() == 2 * i
    assert recordings.failed == "operation not permitted when stream is capturing"


def test_without_memory_recordings_are_given_up_for_the_moment():
    traces, full = Traces(), iter([True, False])

    def record(step, said, room, generation):
        if next(full):
            raise torch.cuda.OutOfMemoryError("no memory")
        return traces(step, said, room, generation)

    recordings = Recordings(record)
    for i in range(5):  # plain, no memory and plain, plain as if new, recorded, replayed
        assert recordings.run("shape", 0, lambda said: said * 2, torch.tensor([i])).item() == 2 * i
    assert not recordings.failed
    assert (traces.made, traces.replayed) == (1, 2)


def test_the_least_recently_used_recording_goes_first():
    traces = Traces()
    recordings = Recordings(traces)

    def run(shape):
        assert recordings.run(shape, 0, lambda said: said + 1, torch.tensor([shape])).item() == shape + 1

    for shape in (0, 0, 1, 1):
        run(shape)
    for shape in range(2, MOST_RECORDINGS + 1):
        run(0)
        run(shape)
    made = traces.made
    run(0)
    assert traces.made == made
    run(1)
    run(1)
    assert traces.made == made + 1


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral"])
@torch.no_grad()
def test_fused_norms_and_grouped_heads_change_no_logits(kind, tmp_path, tiny_tokenizer):
    folder = shared.save_tiny(kind, tmp_path / kind, tiny_tokenizer)
    plain, changed = (AutoModelForCausalLM.from_pretrained(folder).eval() for _ in range(2))
    for model in (plain, changed):
        torch.manual_seed(2)
        for name, p in model.named_parameters():
            p.data += torch.randn_like(p) if "norm" in name else 0
    lean(changed)
    assert changed.config._attn_implementation == GROUPED
    assert fuse_norms(changed) == (9 if kind == "qwen3" else 5)
    ids = torch.randint(5, 300, (3, 7))
    mask = torch.zeros(3, 1, 7, 7).masked_fill(torch.ones(7, 7).triu(1).bool(), float("-inf"))
    mask[1, :, 3:, :2] = float("-inf")
    for given in (mask, None):
        torch.testing.assert_close(
            changed(input_ids=ids, attention_mask=given).logits, plain(input_ids=ids, attention_mask=given).logits, atol=1e-5, rtol=1e-4
        )
    give_back(changed)
    assert changed.config._attn_implementation == plain.config._attn_implementation
    assert torch.equal(changed(input_ids=ids, attention_mask=mask).logits, plain(input_ids=ids, attention_mask=mask).logits)


@torch.no_grad()
def test_norms_of_another_kind_stay(tmp_path):
    from transformers import Gemma2Config

    model = AutoModelForCausalLM.from_config(
        Gemma2Config(
            vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8
        )
    )
    for name, p in model.named_parameters():
        p.data += 0.5 if "norm" in name else 0
    assert fuse_norms(model) == 0
