"""Shared by all tests: a clean environment, and tiny real models made here (no network, no downloads)."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

# Before any library reads them. Tests never touch a model hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"

PERSONAS = ("leadership", "knowledge_worker", "field", "admin", "new_hire")
ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No setting of the machine reaches a test, and no test writes outside its own folder."""
    for name in list(os.environ):
        if name.startswith(("DESKROUTE_", "MLFLOW_TRACKING", "MLFLOW_REGISTRY")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("DESKROUTE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory) -> Path:
    """An MLflow store without runs. Copied to where a test needs one: MLflow takes seconds to make its tables."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    client = MlflowClient(f"sqlite:///{path}", f"sqlite:///{path}")
    client.search_experiments()
    client.search_registered_models()
    return path


@pytest.fixture
def ticket_project(tmp_path, long_base_folder, empty_store):
    """A function that makes the test's folder a project on the tiny base: a registry, open gates, and the given settings and tickets (a CSV)."""

    def make(settings: str, tickets: list[str]) -> Path:
        (tmp_path / "state").mkdir()
        shutil.copy(empty_store, tmp_path / "state")
        (tmp_path / "deskroute.yaml").write_text(f"base: {long_base_folder}\n{settings}")
        (tmp_path / "gates.yaml").write_text("persona: []\nrouter: []\n")
        (tmp_path / "tickets.csv").write_text("\n".join(tickets))
        return tmp_path

    return make


@pytest.fixture
def read_tickets():
    """A function that reads a file of tickets whole: (tickets, report, the rows kept aside)."""
    from pipelines.tickets import TicketFile, TicketReport

    def read(path: Path, personas=PERSONAS, **options):
        aside: list = []
        report = TicketReport(aside.append)
        return [t for _, t in TicketFile(path, personas, **options).tickets(report)], report, aside

    return read


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """A byte-level BPE tokenizer with the built-in template, trained on a few sentences."""
    from pipelines.pretrain import build_tokenizer

    texts = ["the vpn drops, restart the client and call the service desk on 4357", "my printer is stuck", "step one: open the menu"] * 3
    return build_tokenizer(texts, 400)


@pytest.fixture(scope="session")
def long_base_folder(tmp_path_factory, tiny_tokenizer) -> Path:
    """The same with room for an article and its answer in a tokenizer that knows few words."""
    return save_tiny("llama", tmp_path_factory.mktemp("long"), tiny_tokenizer, context=2048)


@pytest.fixture(scope="session")
def tiny_base_folder(tmp_path_factory, tiny_tokenizer) -> Path:
    """A random two-layer Llama with that tokenizer, saved as Hugging Face would."""
    return save_tiny("llama", tmp_path_factory.mktemp("base"), tiny_tokenizer)


def save_tiny(kind: str, folder: Path, tokenizer, *, seed: int = 0, context: int = 256, hidden: int = 32, **more) -> Path:
    """Write a tiny random model of an architecture with a tokenizer into a folder; `more` goes into its configuration."""
    import torch
    from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig, MistralConfig, PhiConfig, Qwen2Config, Qwen3Config

    common = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None, "pad_token_id": tokenizer.pad_token_id}
    sized = common | {
        "hidden_size": hidden,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": context,
    }
    grouped = sized | {"num_key_value_heads": 2} | more
    configs = {
        "llama": lambda: LlamaConfig(**grouped),
        "qwen2": lambda: Qwen2Config(**grouped),
        "qwen3": lambda: Qwen3Config(**grouped, head_dim=8),
        "mistral": lambda: MistralConfig(**grouped),
        "neox": lambda: GPTNeoXConfig(**sized),
        "phi": lambda: PhiConfig(**sized),
        "gpt2": lambda: GPT2Config(**common, n_embd=32, n_layer=2, n_head=4, n_positions=context),
    }
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(configs[kind]())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_adapter(base: Path, folder: Path, *, seed: int, rank: int = 4, **lora) -> Path:
    """Train nothing, but give a LoRA adapter random weights that change the output, and save it with plain peft."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, init_lora_weights=False, task_type="CAUSAL_LM", **({"target_modules": "all-linear"} | lora))
    get_peft_model(model, config).save_pretrained(folder)
    return folder


def generated(base: Path, adapter: Path | None, messages, max_tokens: int, document: str | None = None) -> str:
    """The slow, obvious way to answer: one request at a time through peft and `generate`."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from persona_models.prompt import encode_prompt

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    if adapter:
        model = PeftModel.from_pretrained(model, adapter).eval()
    ids = torch.tensor([encode_prompt(tokenizer, messages, document=document)])
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
