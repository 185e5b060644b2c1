"""Score the nano checkpoint on held-out prompts.

    python -m models.eval_nano

Greedy answers to prompts whose tasks never occur in training (see
``models.data.sample.split_of``). Exits with 1 when a threshold is missed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from models.data import FAMILIES, Sample, heldout
from models.data.answers import Answer, parse_answer
from models.data.render import Renderer
from models.nano.checkpoint import load_checkpoint
from models.nano.generate import generate
from models.nano.model import NanoModel

MIN_RIGHT = 0.95
MIN_CALLS_RIGHT = 0.97
MAX_NEW_TOKENS = 700


@dataclasses.dataclass(slots=True)
class Score:
    """Counts of one family. calls: tool calls wanted; calls_right: name and arguments right."""

    asked: int = 0
    right: int = 0
    ended: int = 0
    calls: int = 0
    calls_right: int = 0

    def add(self, sample: Sample, answer: Answer) -> None:
        self.asked += 1
        self.ended += answer.ended
        self.right += answer.ended and sample.check(answer.content, answer.tool_calls)
        wanted = sample.expected
        if isinstance(wanted, str):
            return
        got = [(call["function"]["name"], _data(call)) for call in answer.tool_calls]
        self.calls += len(wanted)
        self.calls_right += sum(a == b for a, b in zip(wanted, got, strict=False))


def _data(call: dict[str, Any]) -> Any:
    try:
        return json.loads(call["function"]["arguments"])
    except ValueError:
        return None


@dataclasses.dataclass(frozen=True, slots=True)
class Report:
    """Scores per family, expert loads per MoE layer (relative to their mean), and failures."""

    scores: dict[str, Score]
    loads: list[list[float]]
    failures: list[tuple[Sample, Answer]]

    def misses(self) -> list[str]:
        """Every threshold that was missed, in words."""
        out = []
        for family, score in self.scores.items():
            if score.right < MIN_RIGHT * score.asked:
                out.append(f"{family}: {score.right} of {score.asked} right")
            if score.ended < score.asked:
                out.append(f"{family}: {score.asked - score.ended} answers did not end")
        calls = sum(score.calls for score in self.scores.values())
        right = sum(score.calls_right for score in self.scores.values())
        if right < MIN_CALLS_RIGHT * calls:
            out.append(f"{right} of {calls} tool calls right")
        dead = sum(load == 0 for layer in self.loads for load in layer)
        if dead:
            out.append(f"{dead} experts never chosen")
        return out

    def to_json(self) -> dict[str, Any]:
        return {
            "families": {name: dataclasses.asdict(score) for name, score in self.scores.items()},
            "expert_load": [
                {"min": min(layer), "max": max(layer), "dead": layer.count(0.0)}
                for layer in self.loads
            ],
            "misses": self.misses(),
        }


def evaluate(model: NanoModel, renderer: Renderer, samples: list[Sample], batch: int) -> Report:
    """Answer ``samples`` greedily and score them."""
    for layer in model.moe_layers():
        layer.load.zero_()
    scores = {family: Score() for family in dict.fromkeys(sample.family for sample in samples)}
    failures = []
    # Families with long answers stay together, so that short ones do not wait for them.
    ordered = sorted(samples, key=lambda sample: sample.family)
    for at in range(0, len(ordered), batch):
        part = ordered[at : at + batch]
        prompts = [renderer.prompt(s.messages, s.tools, s.thinking) for s in part]
        for sample, ids in zip(part, generate(model, prompts, MAX_NEW_TOKENS), strict=True):
            answer = parse_answer(renderer, ids, sample.thinking)
            scores[sample.family].add(sample, answer)
            if not (answer.ended and sample.check(answer.content, answer.tool_calls)):
                failures.append((sample, answer))
    loads = [(layer.load / layer.load.mean()).tolist() for layer in model.moe_layers()]
    return Report(scores, loads, failures)


def print_report(report: Report) -> None:
    print(f"{'family':<12}{'asked':>6}{'right':>6}{'%':>7}{'ended':>7}{'calls right':>14}")
    for family, s in report.scores.items():
        calls = f"{s.calls_right} / {s.calls}" if s.calls else ""
        share = f"{100 * s.right / s.asked:.1f}"
        print(f"{family:<12}{s.asked:>6}{s.right:>6}{share:>7}{s.ended:>7}{calls:>14}")
    for index, load in enumerate(report.loads):
        print(
            f"MoE layer {index}: expert load {min(load):.2f} to {max(load):.2f} of the mean,"
            f" {load.count(0.0)} dead"
        )


def _print_failures(report: Report) -> None:
    for sample, answer in report.failures:
        question = sample.messages[-1]["content"]
        got = answer.content or [call["function"] for call in answer.tool_calls]
        print(
            f"[{sample.family}{'' if sample.thinking else ', no thinking'}] {question}\n"
            f"    wanted {sample.expected}\n    got    {got}   (thought: {answer.thought})"
        )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", type=Path, default=Path(__file__).parent / "kimi-nano")
    add("--prompts", type=int, default=400, help="in all, the families in turn")
    add("--family", choices=FAMILIES, help="only this family")
    add("--seed", type=int, default=0)
    add("--batch", type=int, default=50)
    add("--device", default="cpu", help="cpu or cuda")
    add("--threads", type=int, default=2)
    add("--json", type=Path, help="write the report to this file")
    add("--failures", action="store_true", help="print every wrong answer")
    return parser.parse_args(argv)


def main() -> int:
    args = parse_args()
    torch.set_num_threads(args.threads)
    start = time.perf_counter()
    model = load_checkpoint(args.model).to(args.device)
    samples = heldout(args.family, args.prompts, args.seed)
    report = evaluate(model, Renderer(args.model), samples, args.batch)
    print_report(report)
    if args.failures:
        _print_failures(report)
    if args.json:
        args.json.write_text(json.dumps(report.to_json(), indent=2) + "\n")
    for miss in report.misses():
        print(f"MISSED: {miss}")
    print(f"{len(samples)} prompts in {time.perf_counter() - start:.0f} s")
    return 1 if report.misses() else 0


if __name__ == "__main__":
    sys.exit(main())
