"""The engine's references again, on a GPU."""

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
def test_mixed_personas_equal_generate_in_float32(kind, tmp_path, tiny_tokenizer):
    import peft

    folder = shared.save_tiny(kind, tmp_path / "base", tiny_tokenizer)
    adapters = {p: shared.save_adapter(folder, tmp_path / p, seed=i) for i, p in enumerate(shared.PERSONAS)}

    async def run():
        base = load_base(str(folder), device="cuda", dtype="float32")
        engine = PersonaEngine(base)
        for persona, path in adapters.items():
            engine.load_adapter(persona, read_adapter(path, base), "1")

        async def one(i, persona):
            request = GenerateRequest(str(i), (Message("user", "vpn " * (i + 1)),), {persona: 1.0}, max_tokens=12)
            return "".join([e.text async for e in engine.generate(request)])

        answers = await asyncio.gather(*(one(i, p) for i, p in enumerate(shared.PERSONAS)))
        await engine.close()
        return answers

    tokenizer = AutoTokenizer.from_pretrained(folder)
    for i, (persona, answer) in enumerate(zip(shared.PERSONAS, asyncio.run(run()), strict=True)):
        model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), adapters[persona]).cuda().eval()
        ids = torch.tensor([encode_prompt(tokenizer, [Message("user", "vpn " * (i + 1))], document=None)]).cuda()
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        assert answer == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
