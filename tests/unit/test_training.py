"""The loop both trainings share: a killed run that is resumed equals one that was not."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from persona_models.errors import WorkError
from pipelines import training
from pipelines.training import LoopSettings, mean_loss, pad, rate_at, token_loss, train

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")


class Counting:
    """Batches of a simple pattern; a pure function of the step."""

    steps = 12

    def batch(self, step):
        rows = [[(step + i + j) % 50 + 10 for j in range(8 + i)] for i in range(4)]
        return [(r, [-100, -100, *r[2:]]) for r in rows]


@pytest.fixture
def model(tiny_base_folder):
    return AutoModelForCausalLM.from_pretrained(tiny_base_folder)


def run(model, path, **kwargs):
    settings = LoopSettings(lr=1e-2, save_every_steps=5)
    return train(model, Counting(), settings, pad_id=0, checkpoint=path, identity={"x": 1}, title="t", **kwargs)


def test_a_killed_run_resumes_with_the_same_losses_and_weights(tiny_base_folder, tmp_path):
    whole = AutoModelForCausalLM.from_pretrained(tiny_base_folder)
    want = run(whole, tmp_path / "a.safetensors")

    def power_cut(step, loss):
        if step == 7:
            raise KeyboardInterrupt

    cut = AutoModelForCausalLM.from_pretrained(tiny_base_folder)
    with pytest.raises(KeyboardInterrupt):
        run(cut, tmp_path / "b.safetensors", on_step=power_cut)
    resumed = AutoModelForCausalLM.from_pretrained(tiny_base_folder)
    got = run(resumed, tmp_path / "b.safetensors")
    assert got.resumed_at == 5
    assert got.losses == want.losses
    assert got.tokens == want.tokens
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_checkpoint_of_another_run_is_refused(model, tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(KeyboardInterrupt):
        run(model, path, on_step=lambda step, loss: (_ for _ in ()).throw(KeyboardInterrupt) if step == 6 else None)
    with pytest.raises(WorkError, match="belongs to a run with other settings or data; delete it"):
        train(model, Counting(), LoopSettings(lr=1e-3), pad_id=0, checkpoint=path, identity={"x": 1}, title="t")


def test_a_run_that_diverges_stops_and_says_so(model, tmp_path):
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(WorkError, match="the loss is nan at step 0; lower the learning rate"):
        run(model, tmp_path / "a.safetensors")


def test_losses_fall(model, tmp_path):
    history = run(model, tmp_path / "a.safetensors")
    assert history.losses[-1] < 0.85 * history.losses[0]


def test_mean_loss_weighs_tokens_not_batches(model):
    """The obvious way: one example at a time, then one mean over all tokens."""
    examples = [e for step in range(3) for e in Counting().batch(step)]
    total = count = 0.0
    with torch.inference_mode():
        for example in examples:
            ids, labels = pad([example], 0, torch.device("cpu"))
            n = int((labels[:, 1:] != -100).sum())
            total, count = total + float(token_loss(model.eval(), ids, labels)) * n, count + n
    assert mean_loss(model, examples, 0, rows=5) == pytest.approx(total / count, rel=1e-5)


def test_rate_warms_up_then_falls_to_a_tenth():
    settings = LoopSettings(lr=1.0, warmup=0.1)
    rates = [rate_at(s, 100, settings) for s in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == 1.0
    assert rates[-1] == pytest.approx(0.1, abs=0.01)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_padding_carries_no_loss():
    ids, labels = pad([([1, 2], [-100, 2]), ([3], [3])], 9, torch.device("cpu"))
    assert ids.tolist() == [[1, 2], [3, 9]]
    assert labels.tolist() == [[-100, 2], [3, -100]]
    assert training.Encoded


def test_token_loss_is_cross_entropy_over_all_positions(model):
    """Against the obvious way: logits everywhere, unlabelled positions ignored; and for a model that only knows the obvious way."""
    ids, labels = pad(Counting().batch(3), 0, model.device)
    labels[1, :6] = -100
    logits = model.eval()(input_ids=ids).logits[:, :-1]
    want = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)

    class Plain(torch.nn.Module):
        def forward(self, input_ids, use_cache):
            return model(input_ids=input_ids, use_cache=use_cache)

    assert float(token_loss(model, ids, labels)) == pytest.approx(float(want), rel=1e-5)
    assert float(token_loss(Plain(), ids, labels)) == pytest.approx(float(want), rel=1e-5)
    whole = token_loss(model, ids, labels, reduction="sum")
    assert float(whole) == pytest.approx(float(want) * int((labels[:, 1:] != -100).sum()), rel=1e-5)
