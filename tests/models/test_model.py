"""The training model computes what DeepSeek-V3's own code computes, and can learn."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import pytest
import torch

from models.data import heldout
from models.data.render import Renderer
from models.eval_nano import evaluate
from models.nano.checkpoint import INDEX_NAME, load_checkpoint, save_checkpoint
from models.nano.config import NanoConfig
from models.nano.generate import generate
from models.nano.layers import AttentionPlan
from models.nano.model import NanoModel
from models.nano.optimizer import orthogonalize
from models.train_nano import Run, balance, lr_factor, parse_args

SMALL = NanoConfig(num_hidden_layers=2, n_routed_experts=8, max_position_embeddings=256)
CPU = torch.device("cpu")
NUM_PROMPTS = 400


@pytest.fixture
def model() -> NanoModel:
    torch.manual_seed(0)
    model = NanoModel(SMALL, torch.float32)
    for layer in model.moe_layers():
        layer.e_score_correction_bias.normal_(std=0.05)
    return model


def test_logits_are_those_of_transformers(model: NanoModel, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    save_checkpoint(model, tmp_path, torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    lengths = [7, 33, 12, 50]
    ids = torch.randint(0, SMALL.vocab_size, (sum(lengths),))
    with torch.no_grad():
        ours = model.logits(ids, AttentionPlan.build(lengths, CPU))
        for part, logits in zip(ids.split(lengths), ours.split(lengths), strict=True):
            torch.testing.assert_close(logits, theirs(part[None]).logits[0], atol=1e-4, rtol=1e-4)


def test_gradients_of_the_grouped_experts_are_those_of_autograd(model: NanoModel) -> None:
    layer = model.moe_layers()[0]
    x = torch.randn(40, SMALL.hidden_size, requires_grad=True)

    def by_expert() -> torch.Tensor:
        weights, ids = layer.route(x)
        out = torch.zeros_like(x)
        for expert in range(SMALL.n_routed_experts):
            gate, up = layer.experts.gate_up_proj[expert].chunk(2)
            y = torch.nn.functional.silu(x @ gate.t()) * (x @ up.t())
            y = y @ layer.experts.down_proj[expert].t()
            out = out + y * (weights * (ids == expert)).sum(dim=1, keepdim=True)
        return out

    inputs = [x, layer.gate.weight, layer.experts.gate_up_proj, layer.experts.down_proj]
    target = torch.randn(40, SMALL.hidden_size)
    weights, ids = layer.route(x)
    ours = torch.autograd.grad((layer.experts(x, weights, ids) * target).sum(), inputs)
    plain = torch.autograd.grad((by_expert() * target).sum(), inputs)
    for mine, wanted in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, wanted, atol=1e-4, rtol=1e-3)


def test_a_checkpoint_loads_as_it_was_saved(model: NanoModel, tmp_path: Path) -> None:
    save_checkpoint(model, tmp_path, torch.float32)
    again = load_checkpoint(tmp_path, torch.float32)
    assert again.config == SMALL
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_cached_generation_equals_recomputation(model: NanoModel) -> None:
    prompts = [torch.randint(0, 3000, (length,)).tolist() for length in (5, 17, 9)]
    for prompt, answer in zip(prompts, generate(model, prompts, 8), strict=True):
        ids = list(prompt)
        for token in answer:
            with torch.no_grad():
                logits = model.logits(torch.tensor(ids), AttentionPlan.build([len(ids)], CPU))
            assert int(logits[-1].argmax()) == token
            ids.append(token)


def test_orthogonalize_brings_singular_values_near_one() -> None:
    for shape in ((3, 64, 32), (3, 32, 64)):
        values = torch.linalg.svdvals(orthogonalize(torch.randn(shape)).float())
        assert values.min() > 0.6
        assert values.max() < 1.4


def test_balance_raises_idle_experts_and_lowers_busy_ones(model: NanoModel) -> None:
    (layer,) = model.moe_layers()
    before = layer.e_score_correction_bias.clone()
    layer.load.copy_(torch.arange(8.0))
    balance(model, 0.01)
    moved = layer.e_score_correction_bias - before
    assert (moved[:4] > 0).all()
    assert (moved[4:] < 0).all()
    assert layer.load.sum() == 0


def test_learning_rate_warms_up_stays_and_decays() -> None:
    factors = [lr_factor(step, 100, 10, 40) for step in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert set(factors[10:60]) == {1.0}
    assert factors[80] == pytest.approx(0.5)
    assert factors[100] == 0.0


def _args(model: Path, work: Path, steps: int) -> argparse.Namespace:
    tokenizer = Path(__file__).parents[2] / "models" / "kimi-nano" / "tokenizer.json"
    model.mkdir(exist_ok=True)
    (model / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    options = f"--model {model} --work {work} --steps {steps} --micro-tokens 512 --decay-steps 1"
    return parse_args([*options.split(), "--micro-batches", "2", "--warmup-steps", "1"])


def test_training_lowers_the_loss_and_resumes(tmp_path: Path) -> None:
    run = Run(_args(tmp_path / "model", tmp_path / "work", 100))
    losses = [run.advance()["loss"] for _ in range(6)]
    assert losses[-1] < losses[0]
    run.save()
    again = Run(_args(tmp_path / "model", tmp_path / "work", 100))
    again.resume()
    assert again.step == 6
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name


@pytest.fixture(scope="module")
def shipped() -> Path:
    return Path(__file__).parents[2] / "models" / "kimi-nano"


def test_the_shipped_checkpoint_has_kimis_traits(shipped: Path) -> None:
    config = json.loads((shipped / "config.json").read_text())
    assert {**config, **dataclasses.asdict(NanoConfig())} == config
    assert config["architectures"] == ["DeepseekV3ForCausalLM"]
    assert config["topk_method"] == "noaux_tc"
    index = json.loads((shipped / INDEX_NAME).read_text())
    files = set(index["weight_map"].values())
    assert len(files) >= 2
    assert sum((shipped / name).stat().st_size for name in files) <= 39_000_000
    bias = load_checkpoint(shipped).moe_layers()[0].e_score_correction_bias
    assert bias.dtype == torch.float32


@pytest.mark.slow
def test_the_shipped_checkpoint_meets_its_thresholds_on_heldout_prompts(shipped: Path) -> None:
    """What `python -m models.eval_nano` prints, and the card promises."""
    model = load_checkpoint(shipped)
    report = evaluate(model, Renderer(shipped), heldout(n=NUM_PROMPTS), batch=50)
    assert not report.misses()
