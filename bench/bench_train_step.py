"""One training step, forward and backward: train_step against loops in plain PyTorch.

    python -m bench.bench_train_step [--quick] [--model tiny,small] [--drafts 1,3] [--dtype float32,bfloat16] [--threads 1]

- ``consistency-llm``: as Consistency LLM trains, written anew: a forward for every term, logits of all tokens.
- ``one by one``, ``padded``: the strongest loops on plain rows of prompt and response, a forward per trajectory or one of
  all; the target is computed once for both terms, logits only of what counts.
- ``shared prompt``: train_step's own rows with the loss in plain PyTorch: what the layout does without the operation.
- ``train_step``: all trajectories at once, rows padded to the longest; ``train_step, one by one``: in micro-batches of one.

The models are random, the responses random tokens of lengths as in a data set, drafts differ from the first tokens on:
nothing of the cost depends on what the weights or tokens are. All compute the same loss, which is checked first.
"""

import argparse
import functools
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from bench.measure import interleaved, machine, medians, save, spread
from bench.train_step_loops import EOS, OMEGA, PAD, Chosen, consistency_llm, one_by_one, padded, shared_prompt
from engine import Trajectory, TrajectoryCollator, train_step
from engine.training import TrainBatch

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 3,
             "num_key_value_heads": 3, "vocab_size": 8192, "tie_word_embeddings": True},
    "small": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8,
              "num_key_value_heads": 4, "vocab_size": 32000, "tie_word_embeddings": False},
}  # fmt: skip
PEERS = ("consistency-llm", "one by one", "padded", "shared prompt")
OURS = ("train_step", "train_step, one by one")


def build(name: str, attention: str, device: str, dtype: torch.dtype) -> PreTrainedModel:
    """A random Llama of one of SIZES."""
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES[name], max_position_embeddings=2048, attn_implementation=attention)
    return LlamaForCausalLM(config).to(device=device, dtype=dtype).train()  # type: ignore[arg-type]


def draw(count: int, drafts: int, vocabulary: int, seed: int = 0) -> list[Chosen]:
    """Prompts of 20 to 200 tokens, responses of 100 to 256, each draft as long as its target or shorter."""
    rng = random.Random(seed)

    def text(low: int, high: int) -> list[int]:
        return [rng.randrange(3, vocabulary) for _ in range(rng.randint(low, high))]

    chosen = []
    for _ in range(count):
        target = [*text(100, 255), EOS]
        chosen.append((text(20, 200), target, [text(60, len(target)) for _ in range(drafts)]))
    return chosen


def our_step(model: PreTrainedModel, batches: list[TrainBatch], impl: Any) -> float:
    """Gradients of micro-batches by train_step; returns the loss of them all."""
    labels = sum(int(batch["label_count"]) for batch in batches)
    pairs = sum(int(batch["pair_count"]) for batch in batches)
    total = 0.0
    for batch in batches:
        out = train_step(
            model, batch, omega=OMEGA, loss_impl=impl, ar_denominator=labels, consistency_denominator=max(pairs, 1)
        )
        out.loss.backward()
        total += float(out.loss.detach())
    return total


def calls(
    model: PreTrainedModel, chosen: list[Chosen], impl: str, max_tokens: int | None
) -> dict[str, Callable[[], float]]:
    """The variants, each from cleared gradients."""
    collator = TrajectoryCollator(PAD, drafts=len(chosen[0][2]), max_tokens=max_tokens)
    given = [
        Trajectory(id=i, prompt_ids=prompt, responses=[*drafts, target])
        for i, (prompt, target, drafts) in enumerate(chosen)
    ]
    batch, *singles = (
        cast(TrainBatch, {name: cast(Tensor, tensor).to(model.device) for name, tensor in collator(part).items()})
        for part in (given, *([one] for one in given))
    )
    steps: dict[str, Callable[[], float]] = {
        "consistency-llm": functools.partial(consistency_llm, model, chosen),
        "one by one": functools.partial(one_by_one, model, chosen),
        "padded": functools.partial(padded, model, chosen),
        "shared prompt": functools.partial(shared_prompt, model, batch),
        "train_step, one by one": functools.partial(our_step, model, singles, impl),
        "train_step": functools.partial(our_step, model, [batch], impl),
    }

    def run(step: Callable[[], float]) -> float:
        model.zero_grad(set_to_none=False)  # their memory belongs to no variant
        loss = step()
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        return loss

    return {name: functools.partial(run, step) for name, step in steps.items()}


@dataclass(frozen=True)
class Setting:
    """What one line of the results is about."""

    model: str
    drafts: int
    dtype: str

    def prepare(self, args: argparse.Namespace) -> tuple[PreTrainedModel, dict[str, Callable[[], float]]]:
        """The model, with gradients allocated, and the variants."""
        model = build(self.model, args.attention, args.device, getattr(torch, self.dtype))
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        chosen = draw(args.batch, self.drafts, SIZES[self.model]["vocab_size"])
        return model, calls(model, chosen, args.loss_impl, args.max_tokens or None)


def peak_megabytes(args: argparse.Namespace, setting: Setting, variant: str) -> float:
    """Peak memory of a step above model and gradients; on a CPU in a process of its own, as a peak never falls."""
    if args.device != "cpu":
        step = setting.prepare(args)[1][variant]
        step()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    passed = ("batch", "max_tokens", "attention", "loss_impl", "threads")
    settings = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in passed]
    one = [f"--model={setting.model}", f"--drafts={setting.drafts}", f"--dtype={setting.dtype}"]
    command = [sys.executable, "-m", "bench.bench_train_step", *settings, *one, f"--peak={variant}"]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def print_peak(args: argparse.Namespace, setting: Setting) -> None:
    """The child's side of ``peak_megabytes``."""
    step = setting.prepare(args)[1][args.peak]
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is resident now
    before = resident_peak()
    step()
    print(resident_peak() - before)


def resident_peak() -> float:
    """Megabytes; Linux."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e6


def check_agreement(model: PreTrainedModel, steps: dict[str, Callable[[], float]], dtype: str) -> dict[str, float]:
    """How far each variant's gradients are from those of ``padded``, relative; AssertionError unless all do the same."""

    def gradients() -> torch.Tensor:
        return torch.cat([parameter.grad.flatten().double() for parameter in model.parameters()])  # type: ignore[union-attr]

    reference = steps["padded"]()
    expected = gradients()
    differences = {}
    for name, step in steps.items():
        loss = step()
        differences[name] = float((gradients() - expected).norm() / expected.norm())
        tolerance = 1e-4 if dtype == "float32" else 0.05
        assert abs(loss - reference) <= tolerance * abs(reference), (name, loss, reference)
        assert dtype != "float32" or differences[name] <= 1e-5, differences
    return differences


def measure(args: argparse.Namespace, setting: Setting) -> dict[str, Any]:
    """Times, paired ratios and memory of one setting."""
    model, steps = setting.prepare(args)
    differences = check_agreement(model, steps, setting.dtype)
    seconds = interleaved(steps, args.rounds)
    return {
        **asdict(setting),
        "seconds": medians(seconds),
        "spread": spread(seconds),
        "ratios": {ours: {name: quartiles(seconds[name], seconds[ours]) for name in PEERS} for ours in OURS},
        "gradients_from_padded": differences,
        "peak_megabytes": {name: peak_megabytes(args, setting, name) for name in steps},
    }


def quartiles(slow: list[float], fast: list[float]) -> list[float]:
    """Lower quartile, median and upper quartile of slow / fast, over the rounds."""
    return statistics.quantiles([a / b for a, b in zip(slow, fast, strict=True)], n=4, method="inclusive")


def parse_args() -> argparse.Namespace:
    """Command line of the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny,small", help="sizes of the model, separated by commas")
    parser.add_argument("--drafts", default="1,3", help="values of K, separated by commas")
    parser.add_argument("--dtype", default="float32,bfloat16", help="of weights and logits, separated by commas")
    parser.add_argument("--batch", type=int, default=4, help="trajectories")
    parser.add_argument("--max-tokens", type=int, default=0, help="tokens of a packed row; 0: a row per trajectory")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--attention", default="sdpa", choices=["sdpa", "eager", "flex_attention"])
    parser.add_argument("--loss-impl", default="auto", choices=["auto", "torch", "cpp", "triton"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="two rounds of the tiny model: a check that it runs")
    parser.add_argument("--note", default="", help="what else a reader must know, such as what ran beside it")
    parser.add_argument("--name", default="train_step_cpu", help="file name under bench/results/")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.model, args.drafts, args.dtype, args.batch, args.rounds = "tiny", "1", "float32", 2, 2
    return args


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    choices = (args.model.split(","), args.dtype.split(","), map(int, args.drafts.split(",")))
    settings = [Setting(model, drafts, dtype) for model, dtype, drafts in itertools.product(*choices)]
    if args.peak:
        print_peak(args, settings[0])
        return
    given = {k: v for k, v in vars(args).items() if k not in ("peak", "name", "note", "quick")}
    results: dict[str, Any] = {"machine": machine(), "note": args.note, "settings": given, "rows": []}
    for setting in settings:
        results["rows"].append(measure(args, setting))
        print(json.dumps(results["rows"][-1]), flush=True)
        results["machine"]["load_after"] = os.getloadavg()[0]
        if not args.quick:
            save(args.name, results)  # line by line: an hour of them is not lost with the last


if __name__ == "__main__":
    main()
