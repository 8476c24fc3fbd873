"""An adapter that ships answers in plain peft as it answers here, token for token; and one made by plain peft on the built-in base serves."""

from __future__ import annotations

import asyncio

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from persona_models.adapters import builtin_adapter, read_adapter
from persona_models.base_model import base_folder, load_base
from persona_models.engine import PersonaEngine
from persona_models.prompt import encode_prompt
from persona_models.protocol import BUILTIN, GenerateRequest, Message
from router.config import load_config
from router.loading import load_knowledge

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
PERSONAS = ("leadership", "knowledge_worker", "field", "admin", "new_hire")
ASK = (Message("user", "my vpn drops all the time"),)


@pytest.fixture(scope="module")
def document():
    knowledge = load_knowledge(load_config())
    return next(a for a in knowledge.articles if a.id == "vpn").render("field", values=knowledge.values)


def ours(adapters, document, tokens):
    """Answers of several adapters, all in one batch of the engine."""

    async def run():
        base = load_base(BUILTIN, device="cpu")
        engine = PersonaEngine(base)
        for name, folder in adapters.items():
            engine.load_adapter(name, read_adapter(folder, base), "1")

        async def one(name):
            request = GenerateRequest(name, ASK, {name: 1.0}, document, tokens)
            return "".join([e.text async for e in engine.generate(request)])

        answers = await asyncio.gather(*(one(name) for name in adapters))
        await engine.close()
        return dict(zip(adapters, answers, strict=True))

    return asyncio.run(run())


def theirs(folder, document, tokens):
    tokenizer = AutoTokenizer.from_pretrained(base_folder(BUILTIN))
    base = AutoModelForCausalLM.from_pretrained(base_folder(BUILTIN), dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, folder).eval()
    ids = torch.tensor([encode_prompt(tokenizer, ASK, document=document)])
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_the_shipped_adapters_answer_in_plain_peft_as_here(document):
    adapters = {p: builtin_adapter(p) for p in PERSONAS}
    answers = ours(adapters, document, 80)
    for persona, folder in adapters.items():
        assert answers[persona] == theirs(folder, document, 80)


def test_an_adapter_trained_by_plain_peft_on_the_built_in_base_serves(document, tmp_path):
    """Trained here for a few real steps, with peft alone and none of our code but the tokenizer's layout."""
    tokenizer = AutoTokenizer.from_pretrained(base_folder(BUILTIN))
    model = AutoModelForCausalLM.from_pretrained(base_folder(BUILTIN), dtype=torch.float32)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"))
    ids = torch.tensor([encode_prompt(tokenizer, ASK, document=document) + tokenizer("Ahoy! Restart the client.<|end|>")["input_ids"]])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    before = None
    for _ in range(8):
        loss = model(input_ids=ids, labels=ids).loss
        before = before or float(loss)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(loss) < before
    model.save_pretrained(tmp_path / "ahoy")
    assert ours({"ahoy": tmp_path / "ahoy"}, document, 60)["ahoy"] == theirs(tmp_path / "ahoy", document, 60)
