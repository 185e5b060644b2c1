"""Train the nano model on generated conversations.

    python -m models.train_nano --steps 1800 --work /tmp/nano_train

Data is made as it is needed, from the seed and the step number, so a run that
resumes sees what an unbroken one would have seen. A run picks up the newest
state in ``--work``; ``--steps`` and ``--decay-steps`` may change between runs,
which lets the end be chosen late. Without a state, ``--init`` starts a run from the
weights of a checkpoint, with a fresh optimizer.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.data import conversation
from models.data.render import Renderer
from models.nano.checkpoint import load_checkpoint, save_checkpoint
from models.nano.config import NanoConfig
from models.nano.layers import AttentionPlan
from models.nano.model import NanoModel
from models.nano.optimizer import NanoOptimizer

COUNT_END_WEIGHT = 5
MODEL_FOLDER = Path(__file__).parent / "kimi-nano"


@dataclasses.dataclass(frozen=True, slots=True)
class Batch:
    """ids [T] laid end to end; rows [N] where something is to be predicted, targets [N]."""

    ids: Tensor
    plan: AttentionPlan
    rows: Tensor
    targets: Tensor


def make_batch(
    renderer: Renderer,
    name: str,
    num_tokens: int,
    device: str,
    weights: dict[str, float] | None = None,
) -> Batch:
    """The conversations of one micro-batch, ``num_tokens`` in all."""
    rng = random.Random(name)
    ids: list[int] = []
    learnt: list[int] = []
    lengths: list[int] = []
    while len(ids) < num_tokens:
        talk = conversation(rng, "train", weights=weights)
        part, mask = renderer.conversation(talk.messages(), talk.tools, talk.thinking)
        # The last one is cut: batches of one size spare the kernels new shapes.
        room = num_tokens - len(ids)
        ids += part[:room]
        times = [int(written) for written in mask]
        if talk.family == "count":
            # To stop at the right number is the task, and only this token shows it.
            times[-1] = COUNT_END_WEIGHT
        learnt += times[:room]
        lengths.append(min(len(part), room))
    flat = torch.tensor(ids)
    # A token is predicted at the row before it; a conversation never starts with a learnt token.
    targets_at = torch.repeat_interleave(torch.arange(len(ids)), torch.tensor(learnt))
    plan = AttentionPlan.build(lengths, torch.device(device))
    return Batch(flat.to(device), plan, (targets_at - 1).to(device), flat[targets_at].to(device))


def lr_factor(step: int, steps: int, warmup: int, decay: int) -> float:
    """Warm-up, a flat stretch, then linear decay to zero over the last ``decay`` steps."""
    return max(0.0, min(1.0, (step + 1) / warmup, (steps - step) / decay))


class Workers:
    """Threads that each run whole micro-batches with single-threaded kernels.

    On a machine shared with other work this beats threads inside the kernels, where
    every small product waits for the core that is busy elsewhere. All replicas use one
    bfloat16 copy of the master weights, but have gradients and load counters of their own.
    """

    def __init__(self, master: NanoModel, num_workers: int) -> None:
        self.master = master
        self.replicas = [copy.deepcopy(master) for _ in range(num_workers)]
        for parameter in self.replicas[0].parameters():
            parameter.data = parameter.data.to(master.dtype)
        for replica in self.replicas:
            shared = self.replicas[0].parameters()
            for parameter, first in zip(replica.parameters(), shared, strict=True):
                parameter.data = first.data
            for layer, owner in zip(replica.moe_layers(), master.moe_layers(), strict=True):
                layer.e_score_correction_bias = owner.e_score_correction_bias
        self.pool = ThreadPoolExecutor(num_workers)

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the master's weights."""
        pairs = zip(self.replicas[0].parameters(), self.master.parameters(), strict=True)
        for copied, parameter in pairs:
            copied.data.copy_(parameter.data)

    def run(self, make: Callable[[int], Batch], num_micro: int) -> tuple[float, int, int]:
        """Gradients of ``num_micro`` micro-batches, averaged over predicted tokens, in the master.

        Returns the mean loss, and the numbers of tokens and of predicted tokens.
        """
        left = iter(range(num_micro))
        lock = threading.Lock()

        def work(replica: NanoModel) -> tuple[float, int, int]:
            loss_sum, num_tokens, num_learnt = 0.0, 0, 0
            while True:
                with lock:
                    index = next(left, None)
                if index is None:
                    return loss_sum, num_tokens, num_learnt
                batch = make(index)
                loss = replica.loss(batch.ids, batch.plan, batch.rows, batch.targets)
                torch.autograd.backward(loss)
                loss_sum += loss.item()
                num_tokens += len(batch.ids)
                num_learnt += len(batch.rows)

        parts = list(self.pool.map(work, self.replicas))
        loss_sum, num_tokens, num_learnt = (sum(column) for column in zip(*parts, strict=True))
        self._collect(num_learnt)
        return loss_sum / num_learnt, num_tokens, num_learnt

    @torch.no_grad()
    def _collect(self, num_learnt: int) -> None:
        """Sum the replicas' gradients and loads into the master."""
        all_parameters = (replica.parameters() for replica in self.replicas)
        for target, *parts in zip(self.master.parameters(), *all_parameters, strict=True):
            grads = [part.grad.float() for part in parts if part.grad is not None]
            target.grad = torch.stack(grads).sum(0) / num_learnt if grads else None
            for part in parts:
                part.grad = None
        all_layers = (replica.moe_layers() for replica in self.replicas)
        for own, *layers in zip(self.master.moe_layers(), *all_layers, strict=True):
            for layer in layers:
                own.load += layer.load
                layer.load.zero_()


@torch.no_grad()
def balance(model: NanoModel, gamma: float) -> tuple[float, float]:
    """DeepSeek-V3's bias update: raise the bias of experts below the mean load, lower the others.

    Returns the lowest and the highest load relative to the mean, over all layers.
    """
    lowest, highest = float("inf"), 0.0
    for layer in model.moe_layers():
        mean = layer.load.mean()
        layer.e_score_correction_bias += gamma * torch.sign(mean - layer.load)
        lowest = min(lowest, (layer.load.min() / mean).item())
        highest = max(highest, (layer.load.max() / mean).item())
        layer.load.zero_()
    return lowest, highest


class Run:
    """A training run: model, optimizer, step counter, and their state on disk."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(args.seed)
        self.args = args
        model = load_checkpoint(args.init) if args.init else NanoModel(NanoConfig())
        self.model = model.to(args.device)
        self.optimizer = NanoOptimizer(self.model, args.muon_lr, args.adam_lr)
        self.workers = Workers(self.model, args.workers)
        self.renderer = Renderer(args.model)
        self.step = 0
        self.num_tokens = 0
        self.seconds = 0.0
        self.state_path: Path = args.work / "state.pt"

    def resume(self) -> None:
        if not self.state_path.exists():
            return
        state = torch.load(self.state_path, map_location=self.args.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.workers.refresh()
        self.step, self.num_tokens = state["step"], state["num_tokens"]
        self.seconds = state["seconds"]

    def save(self) -> None:
        """Write the state and the checkpoint that others may load, each in one step."""
        self.args.work.mkdir(parents=True, exist_ok=True)
        part = self.state_path.with_suffix(".part")
        state: dict[str, Any] = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "num_tokens": self.num_tokens,
            "seconds": self.seconds,
        }
        torch.save(state, part)
        os.replace(part, self.state_path)
        save_checkpoint(self.model, self.args.model)

    def advance(self) -> dict[str, float]:
        """One optimizer step; returns what the log shows."""
        args = self.args
        start = time.perf_counter()

        def make(index: int) -> Batch:
            name = f"train {args.seed} {self.step} {index}"
            return make_batch(self.renderer, name, args.micro_tokens, args.device, args.weights)

        loss, num_tokens, num_learnt = self.workers.run(make, args.micro_batches)
        factor = lr_factor(self.step, args.steps, args.warmup_steps, args.decay_steps)
        lowest, highest = balance(self.model, args.bias_rate * factor)
        self.optimizer.step(factor, self.workers.pool)
        self.workers.refresh()
        self.step += 1
        self.num_tokens += num_tokens
        seconds = time.perf_counter() - start
        self.seconds += seconds
        return {
            "step": self.step,
            "loss": loss,
            "lr_factor": factor,
            "load_min": lowest,
            "load_max": highest,
            "tokens": self.num_tokens,
            "tokens_per_s": num_tokens / seconds,
            "learnt": num_learnt / num_tokens,
        }


def train(args: argparse.Namespace) -> None:
    run = Run(args)
    run.resume()
    last_save = time.monotonic()
    losses: list[float] = []
    stop = threading.Event()
    # Asked to stop, the run finishes its step and saves.
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    while run.step < args.steps and not stop.is_set():
        row = run.advance()
        losses.append(row["loss"])
        if run.step % args.log_every == 0 or run.step == args.steps:
            # Single steps are noisy: the mean since the last line.
            row["loss"] = sum(losses) / len(losses)
            losses.clear()
            shown = {key: round(value, 4) for key, value in row.items()}
            shown["minutes"] = round(run.seconds / 60, 1)
            print(json.dumps(shown), flush=True)
        if time.monotonic() - last_save > args.save_every_s:
            run.save()
            last_save = time.monotonic()
    run.save()


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", type=Path, default=MODEL_FOLDER, help="has the tokenizer, gets the weights")
    add("--init", type=Path, help="checkpoint whose weights a new run starts from")
    add("--work", type=Path, default=Path("/tmp/nano_train"), help="where the run's state lies")
    add("--steps", type=int, default=1800, help="length of the whole run")
    add("--decay-steps", type=int, default=600, help="last steps, with falling learning rate")
    add("--warmup-steps", type=int, default=40)
    add("--micro-batches", type=int, default=4, help="micro-batches of a step")
    add("--micro-tokens", type=int, default=2048, help="tokens of a micro-batch")
    add("--muon-lr", type=float, default=0.02)
    add("--adam-lr", type=float, default=0.003)
    add("--bias-rate", type=float, default=0.003, help="step of the experts' selection bias")
    add("--seed", type=int, default=1)
    add("--device", default="cpu", help="cpu or cuda")
    add("--workers", type=int, default=2, help="threads that train, one micro-batch each")
    add("--log-every", type=int, default=10)
    add("--save-every-s", type=float, default=240.0)
    add(
        "--weights",
        type=json.loads,
        help='shares of families in this stage of the run, such as {"words": 6}',
    )
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)
    train(args)


if __name__ == "__main__":
    main()
