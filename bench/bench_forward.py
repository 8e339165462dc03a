"""One forward pass with a KV cache: the lean decoder against transformers, at 1 .. 256 new tokens behind a prompt."""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from bench.measure import interleaved, medians, ratio
from engine.batch import Feed, StepBatch
from engine.kernels import linear_argmax
from engine.kv_cache import pages_for
from engine.model import Decoder
from engine.weights import resolve_checkpoint


def measure_forward(folder: Path, sizes: tuple[int, ...], rounds: int, prompt: int = 100) -> list[dict[str, float]]:
    """Rows of seconds and ratio (transformers / lean); both end with the argmax of every new row."""
    folder = resolve_checkpoint(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    lean = Decoder.load(folder, theirs.config, torch.float32, torch.device("cpu"))
    pages = list(range(pages_for(prompt + max(sizes))))
    cache = lean.new_cache(len(pages))
    torch.manual_seed(0)
    rows = []
    for size in sizes:
        ids = torch.randint(3, theirs.config.vocab_size, (1, prompt + size))
        with torch.inference_mode():
            past = theirs(ids[:, :prompt], use_cache=True).past_key_values
            lean.forward(StepBatch.pack([Feed(ids[0, :prompt].tolist(), 0, pages, 0)], lean.device), cache)

        @torch.inference_mode()
        def transformers_step(ids=ids, past=past, size=size) -> torch.Tensor:  # type: ignore[no-untyped-def]
            out = theirs(ids[:, prompt:], past_key_values=past, use_cache=True).logits.argmax(-1)
            past.crop(-size)
            return out

        def lean_step(tokens=ids[0, prompt:].tolist()) -> torch.Tensor:  # type: ignore[no-untyped-def]
            hidden = lean.forward(StepBatch.pack([Feed(tokens, prompt, pages, 0)], lean.device), cache)
            return linear_argmax(hidden, lean.head.weight)[0]

        assert torch.equal(transformers_step()[0], lean_step())
        seconds = interleaved({"transformers": transformers_step, "lean": lean_step}, rounds)
        rows.append({"tokens": size, **medians(seconds), "ratio": ratio(seconds, "transformers", "lean")})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    for row in measure_forward(args.model, (1, 2, 4, 8, 16, 32, 64, 128, 256), args.rounds):
        print("  ".join(f"{k} {v:.5g}" for k, v in row.items()))


if __name__ == "__main__":
    main()
