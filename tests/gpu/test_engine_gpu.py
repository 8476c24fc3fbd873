"""The engine's references again, on a GPU. Where pytest's other plugins are missing: `PYTHONPATH=. python3 -m pytest -c /dev/null --rootdir=. tests/gpu`."""

from __future__ import annotations

import asyncio
import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from persona_models.adapters import read_adapter
from persona_models.base_model import load_base
from persona_models.engine import PersonaEngine
from persona_models.prompt import encode_prompt
from persona_models.protocol import GenerateRequest, Message

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

_spec = importlib.util.spec_from_file_location("shared", Path(__file__).parent.parent / "conftest.py")
shared = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(shared)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "neox"])
def test_mixed_personas_equal_generate_in_float32_read_anew_and_from_memory(kind, tmp_path, tiny_tokenizer):
    import peft

    folder = shared.save_tiny(kind, tmp_path / "base", tiny_tokenizer)
    adapters = {p: shared.save_adapter(folder, tmp_path / p, seed=i) for i, p in enumerate(shared.PERSONAS)}

    async def run():
        base = load_base(str(folder), device="cuda", dtype="float32")
        engine = PersonaEngine(base)
        for persona, path in adapters.items():
            engine.load_adapter(persona, read_adapter(path, base), "1")

        async def one(i, persona):
            request = GenerateRequest(str(i), (Message("user", "vpn " * (12 * i + 1)),), {persona: 1.0}, max_tokens=40)
            events = [e async for e in engine.generate(request)]
            return "".join(e.text for e in events), events[-1].cached_tokens

        said = [await asyncio.gather(*(one(i, p) for i, p in enumerate(shared.PERSONAS))) for _ in range(2)]
        recordings = engine._decoder.recordings
        assert not recordings.failed
        assert any(recordings._kept.values()), "steps are replayed as CUDA graphs"
        await engine.close()
        return said

    tokenizer = AutoTokenizer.from_pretrained(folder)
    first, again = asyncio.run(run())
    assert max(cached for _, cached in first) == 0 < max(cached for _, cached in again)
    for i, persona in enumerate(shared.PERSONAS):
        model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), adapters[persona]).cuda().eval()
        ids = torch.tensor([encode_prompt(tokenizer, [Message("user", "vpn " * (12 * i + 1))], document=None)]).cuda()
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
        assert first[i][0] == again[i][0] == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_long_prompts_and_a_merged_engine_equal_generate_in_float32(tmp_path, tiny_tokenizer):
    """Prompts in pieces, a window of rows that come and go, and the persona inside the weights."""
    import peft

    folder = shared.save_tiny("qwen3", tmp_path / "base", tiny_tokenizer, context=1024)
    path = shared.save_adapter(folder, tmp_path / "field", seed=4)
    texts = ["vpn " * n for n in (3, 200, 60, 280)]

    async def run(merged):
        base = load_base(str(folder), device="cuda", dtype="float32")
        engine = PersonaEngine(base, max_rows=2, merged="field" if merged else None)
        engine.load_adapter("field", read_adapter(path, base), "1")

        async def one(text):
            request = GenerateRequest("r", (Message("user", text),), {"field": 1.0}, max_tokens=10)
            return "".join([e.text async for e in engine.generate(request)])

        said = await asyncio.gather(*map(one, texts))
        await engine.close()
        return said

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), path).cuda().eval()
    want = []
    for text in texts:
        ids = torch.tensor([encode_prompt(tokenizer, [Message("user", text)], document=None)]).cuda()
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False)
        want.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    assert asyncio.run(run(False)) == want
    assert asyncio.run(run(True)) == want


def test_five_personas_run_in_bfloat16_on_a_real_shape(tmp_path):
    """Qwen2.5-0.5B's shape with random weights: sixteen rows finish, whatever the numbers say."""
    from pipelines.contest import Contest, save_random

    contest = Contest(save_random("qwen2.5-0.5b", tmp_path / "base"), "bfloat16", 16, 1)
    with contest.engine(5) as engine:
        timing = contest.ours(engine, lambda i: {f"p{i % 5}": 1.0})(16)
    assert len(timing.first_s) == 16
