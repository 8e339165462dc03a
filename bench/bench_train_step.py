"""One training step, forward and backward: train_step against loops that run prompt and response of every draft anew.

    python -m bench.bench_train_step [--quick] [--model tiny,small] [--drafts 1,3] [--attention sdpa] [--device cpu]

- ``consistency-llm``: as Consistency LLM trains, written anew: one trajectory after the other, a forward and backward
  of the target for its cross entropy, a forward of the target without gradients as the teacher, a forward and backward
  of every draft; logits of all tokens, losses in plain PyTorch.
- ``plain``: the strongest loop without a packed row: one forward of target and drafts of all trajectories as rows of a
  right-padded batch, whose target's logits serve both terms; logits of all tokens, losses in plain PyTorch.

The models are random, the responses random tokens of lengths as in a data set, drafts differ from the first tokens on:
nothing of the cost depends on what the weights or tokens are. All three compute the same loss, which is checked first.
"""

import argparse
import functools
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from bench.measure import interleaved, machine, medians, ratio, save
from engine import Trajectory, TrajectoryCollator, train_step
from engine.training import TrainBatch

OMEGA, PAD, EOS = 1e3, 0, 2
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 3,
             "num_key_value_heads": 3, "vocab_size": 8192, "tie_word_embeddings": True},
    "small": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8,
              "num_key_value_heads": 4, "vocab_size": 32000, "tie_word_embeddings": False},
}  # fmt: skip
Chosen = tuple[list[int], list[int], list[list[int]]]
VARIANTS = ("consistency-llm", "plain", "train_step")


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


def filled(draft: list[int], length: int) -> list[int]:
    """The draft as long as the target."""
    return (draft + [PAD] * length)[:length]


def first_pair(target: list[int], draft: list[int]) -> int:
    """The first index of the response at which the contexts differ."""
    return next((i + 1 for i, (a, b) in enumerate(zip(target, draft, strict=True)) if a != b), len(target))


def divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """Sum of KL(teacher || student) over rows of logits."""
    log_p, log_q = teacher.detach().float().log_softmax(-1), student.float().log_softmax(-1)
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True)


def counts(chosen: list[Chosen]) -> tuple[int, int]:
    """Tokens with a cross entropy, positions with a divergence."""
    pairs = sum(len(t) - first_pair(t, filled(d, len(t))) for _, t, drafts in chosen for d in drafts)
    return sum(len(target) for _, target, _ in chosen), max(1, pairs)


def consistency_llm_step(model: PreTrainedModel, chosen: list[Chosen]) -> float:
    """Gradients of the batch, a backward after every forward; returns the loss."""
    labels, pairs = counts(chosen)
    total = torch.zeros((), device=model.device)
    for prompt, target, drafts in chosen:
        rows = slice(len(prompt) - 1, -1)
        ids = torch.tensor([prompt + target], device=model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0, rows]
        loss = F.cross_entropy(logits.float(), ids[0, len(prompt) :], reduction="sum") / labels
        loss.backward()
        total += loss.detach()
        with torch.no_grad():
            teacher = model(input_ids=ids, use_cache=False).logits[0, rows]
        for draft in drafts:
            guess = filled(draft, len(target))
            first = first_pair(target, guess)
            given = torch.tensor([prompt + guess], device=model.device)
            student = model(input_ids=given, use_cache=False).logits[0, rows]
            loss = OMEGA * divergence(teacher[first:], student[first:]) / pairs
            loss.backward()
            total += loss.detach()
    return float(total)


def plain_step(model: PreTrainedModel, chosen: list[Chosen]) -> float:
    """Gradients of the batch from one padded forward; returns the loss."""
    labels, pairs = counts(chosen)
    texts = [p + r for p, t, drafts in chosen for r in (t, *(filled(d, len(t)) for d in drafts))]
    longest = max(map(len, texts))
    ids = torch.tensor([text + [PAD] * (longest - len(text)) for text in texts], device=model.device)
    logits = iter(model(input_ids=ids, use_cache=False).logits)  # padding lies behind all that counts
    loss = torch.zeros((), device=model.device)
    for prompt, target, drafts in chosen:
        rows = slice(len(prompt) - 1, len(prompt) + len(target) - 1)
        teacher = next(logits)[rows]
        right = torch.tensor(target, device=model.device)
        loss = loss + F.cross_entropy(teacher.float(), right, reduction="sum") / labels
        for draft in drafts:
            first = first_pair(target, filled(draft, len(target)))
            loss = loss + OMEGA * divergence(teacher[first:], next(logits)[rows][first:]) / pairs
    loss.backward()
    return float(loss.detach())


def our_step(model: PreTrainedModel, batch: TrainBatch, impl: Any) -> float:
    """Gradients of the batch by train_step; returns the loss."""
    loss = train_step(model, batch, omega=OMEGA, loss_impl=impl).loss
    loss.backward()
    return float(loss.detach())


def calls(
    model: PreTrainedModel, chosen: list[Chosen], impl: str, max_tokens: int | None
) -> dict[str, Callable[[], float]]:
    """The variants, each from cleared gradients."""
    collator = TrajectoryCollator(PAD, drafts=len(chosen[0][2]), max_tokens=max_tokens)
    given = [
        Trajectory(id=i, prompt_ids=prompt, responses=[*drafts, target])
        for i, (prompt, target, drafts) in enumerate(chosen)
    ]
    batch = {name: tensor.to(model.device) for name, tensor in collator(given).items()}  # type: ignore[attr-defined]
    steps: dict[str, Callable[[], float]] = {
        "consistency-llm": functools.partial(consistency_llm_step, model, chosen),
        "plain": functools.partial(plain_step, model, chosen),
        "train_step": functools.partial(our_step, model, batch, impl),  # type: ignore[arg-type]
    }

    def run(step: Callable[[], float]) -> float:
        model.zero_grad(set_to_none=False)  # their memory belongs to no variant
        loss = step()
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        return loss

    return {name: functools.partial(run, step) for name, step in steps.items()}


def prepare(args: argparse.Namespace, model_name: str, drafts: int) -> dict[str, Callable[[], float]]:
    """Model and data of one setting, with gradients allocated."""
    model = build(model_name, args.attention, args.device, getattr(torch, args.dtype))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return calls(
        model, draw(args.batch, drafts, SIZES[model_name]["vocab_size"]), args.loss_impl, args.max_tokens or None
    )


def peak_megabytes(args: argparse.Namespace, model_name: str, drafts: int, variant: str) -> float:
    """Peak memory of a step above model and gradients; on a CPU in a process of its own, as a peak never falls."""
    if args.device != "cpu":
        step = prepare(args, model_name, drafts)[variant]
        step()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    settings = [f"--{k.replace('_', '-')}={v}" for k, v in vars(args).items() if k not in ("quick", "peak", "name")]
    command = [sys.executable, "-m", "bench.bench_train_step", *settings, f"--peak={model_name},{drafts},{variant}"]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def print_peak(args: argparse.Namespace) -> None:
    """The child's side of ``peak_megabytes``."""
    name, drafts, variant = args.peak.split(",")
    step = prepare(args, name, int(drafts))[variant]
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is resident now
    before = resident_peak()
    step()
    print(resident_peak() - before)


def resident_peak() -> float:
    """Megabytes; Linux."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e6


def measure(args: argparse.Namespace, model_name: str, drafts: int) -> dict[str, Any]:
    """Times, ratios and memory of one model and K."""
    steps = prepare(args, model_name, drafts)
    losses = {name: step() for name, step in steps.items()}
    reference = losses["plain"]
    tolerance = 1e-4 if args.dtype == "float32" else 0.05
    assert all(abs(loss - reference) <= tolerance * abs(reference) for loss in losses.values()), losses
    seconds = interleaved(steps, args.rounds)
    return {
        "model": model_name,
        "drafts": drafts,
        "seconds": medians(seconds),
        "spread": {name: [min(values), max(values)] for name, values in seconds.items()},
        "ratio_consistency_llm": ratio(seconds, "consistency-llm", "train_step"),
        "ratio_plain": ratio(seconds, "plain", "train_step"),
        "peak_megabytes": {name: peak_megabytes(args, model_name, drafts, name) for name in VARIANTS},
    }


def parse_args() -> argparse.Namespace:
    """Command line of the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny,small", help="sizes of the model, separated by commas")
    parser.add_argument("--drafts", default="1,3", help="values of K, separated by commas")
    parser.add_argument("--batch", type=int, default=4, help="trajectories")
    parser.add_argument("--max-tokens", type=int, default=0, help="tokens of a packed row; 0: a row per trajectory")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--attention", default="sdpa", choices=["sdpa", "eager", "flex_attention"])
    parser.add_argument("--loss-impl", default="auto", choices=["auto", "torch", "cpp", "triton"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="one round of the tiny model: a check that it runs")
    parser.add_argument("--name", default="train_step", help="file name under bench/results/")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.model, args.drafts, args.batch, args.rounds = "tiny", "1", 2, 1
    return args


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    if args.peak:
        print_peak(args)
        return
    settings = {k: v for k, v in vars(args).items() if k not in ("peak", "name")}
    results: dict[str, Any] = {"machine": machine(), "settings": settings, "rows": []}
    for model_name in args.model.split(","):
        for drafts in map(int, args.drafts.split(",")):
            results["rows"].append(measure(args, model_name, drafts))
            print(json.dumps(results["rows"][-1]), flush=True)
    if not args.quick:
        print(save(args.name, results))


if __name__ == "__main__":
    main()
