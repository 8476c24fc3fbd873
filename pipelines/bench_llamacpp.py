"""llama.cpp's server in the engine's benchmark: the same weights in float32 and the same adapters as GGUF, an adapter chosen by each request.

Used where the Python package gguf is installed and llama-server is on the PATH. Prompts are sent as token ids, so its tokenizer takes no part.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from persona_models.adapters import Adapter
from persona_models.base_model import BaseModel
from persona_models.errors import WorkError

# Names of a Llama-like model's parts in transformers and in GGUF.
_PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def missing(base: BaseModel) -> str:
    """Why llama.cpp cannot take part; empty where it can."""
    import importlib.util

    if importlib.util.find_spec("gguf") is None or shutil.which("llama-server") is None:
        return "the package gguf is not installed or llama-server is not on the PATH"
    if base.model.config.model_type != "qwen2" or base.device.type != "cpu":
        return f"only Qwen2 bases on a CPU are converted here, this one is {base.model.config.model_type} on {base.device.type}"
    return ""


def gguf_name(module: str) -> str:
    """A module of transformers -> its tensor's name in GGUF, without suffix."""
    if module in _WHOLE:
        return _WHOLE[module]
    _, _, layer, part = module.split(".", 3)
    return f"blk.{layer}.{_PARTS[part]}"


def write_base(base: BaseModel, path: Path) -> None:
    """The base as float32 GGUF."""
    import gguf

    config = base.model.config
    writer = gguf.GGUFWriter(str(path), "qwen2")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    words = base.tokenizer.convert_ids_to_tokens(list(range(config.vocab_size)))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([w or f"[{i}]" for i, w in enumerate(words)])
    special = set(base.tokenizer.all_special_ids)
    writer.add_token_types([gguf.TokenType.CONTROL if i in special else gguf.TokenType.NORMAL for i in range(config.vocab_size)])
    writer.add_token_merges([" ".join(pair) for pair in json.loads(base.tokenizer.backend_tokenizer.to_str())["model"]["merges"]])
    writer.add_eos_token_id(base.tokenizer.eos_token_id)
    for name, value in base.model.named_parameters():
        module, _, kind = name.rpartition(".")
        writer.add_tensor(f"{gguf_name(module)}.{kind}", _array(value))
    _finish(writer)


def write_adapter(adapter: Adapter, path: Path) -> None:
    """An adapter as GGUF; alpha equals the rank, since the scale is in B already."""
    import gguf

    writer = gguf.GGUFWriter(str(path), "qwen2")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(adapter.rank))
    for module, (a, b) in adapter.factors.items():
        writer.add_tensor(f"{gguf_name(module)}.weight.lora_a", _array(a))
        writer.add_tensor(f"{gguf_name(module)}.weight.lora_b", _array(b.T))
    _finish(writer)


def _finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _array(value: Tensor) -> Any:
    return value.detach().float().contiguous().numpy()


@contextmanager
def server(base: BaseModel, adapters: Sequence[Adapter], folder: Path, threads: int, rows: int) -> Iterator[str]:
    """A running llama-server with the adapters by number, its address. Raises WorkError with its last words where it does not start."""
    import httpx

    write_base(base, folder / "base.gguf")
    paths = [folder / f"adapter{i}.gguf" for i in range(len(adapters))]
    for adapter, path in zip(adapters, paths, strict=True):
        write_adapter(adapter, path)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = ["llama-server", "-m", str(folder / "base.gguf"), "--lora", ",".join(map(str, paths)), "--lora-init-without-apply"]
    command += ["-np", str(rows), "-c", str(rows * base.context_tokens), "-t", str(threads), "-tb", str(threads), "--threads-http", "8"]
    command += ["--host", "127.0.0.1", "--port", str(port), "-ctk", "f32", "-ctv", "f32", "--no-webui", "--no-warmup"]
    log = folder / "llama-server.log"
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            if process.poll() is not None:
                raise WorkError(f"llama-server ended at its start: {' '.join(log.read_text().splitlines()[-1:])}")
            with suppress(httpx.HTTPError):
                if httpx.get(f"{url}/health", timeout=1).status_code == 200:
                    break
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait(20)


def answers(url: str, prompts: Sequence[Sequence[int]], adapter_of: Sequence[int | None], lengths: Sequence[int]) -> list[Mapping[str, Any]]:
    """What the server says to all prompts at once, each with one adapter or none, in so many tokens; its `tokens`, `timings` and the seconds `took_s`."""

    import httpx

    def one(prompt: Sequence[int], adapter: int | None, tokens: int) -> Mapping[str, Any]:
        body = {
            "prompt": list(prompt),
            "n_predict": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "cache_prompt": False,
            "return_tokens": True,
            "lora": [{"id": adapter or 0, "scale": 0.0 if adapter is None else 1.0}],
        }
        began = time.perf_counter()
        found: dict[str, Any] = httpx.post(f"{url}/completion", json=body, timeout=600).raise_for_status().json()
        return found | {"took_s": time.perf_counter() - began}

    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(one, prompts, adapter_of, lengths))
