"""One forward pass with a KV cache: the lean decoder against transformers, at 1 .. 256 new tokens behind a prompt."""

import argparse
import functools
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from bench.measure import interleaved, medians, ratios
from engine.batch import Feed, StepBatch
from engine.kernels import linear_argmax
from engine.kv_cache import KVCache, pages_for
from engine.model import Decoder
from engine.weights import resolve_checkpoint


def measure_forward(folder: Path, sizes: tuple[int, ...], rounds: int, prompt: int = 100) -> list[dict[str, Any]]:
    """Seconds and the ratios transformers / lean, for every size; both end with the argmax of every new row."""
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

        variants = {
            "transformers": functools.partial(_transformers_step, theirs, ids[:, prompt:], past),
            "lean": functools.partial(_lean_step, lean, Feed(ids[0, prompt:].tolist(), prompt, pages, 0), cache),
        }
        assert torch.equal(variants["transformers"](), variants["lean"]())
        seconds = interleaved(variants, rounds)
        rows.append({"tokens": size, **medians(seconds), "ratios": ratios(seconds, "transformers", "lean")})
    return rows


@torch.inference_mode()
def _transformers_step(model: PreTrainedModel, ids: torch.Tensor, past: DynamicCache) -> torch.Tensor:
    tokens = model(ids, past_key_values=past, use_cache=True).logits.argmax(-1)
    past.crop(-ids.shape[1])
    return tokens[0]


def _lean_step(model: Decoder, feed: Feed, cache: KVCache) -> torch.Tensor:
    hidden = model.forward(StepBatch.pack([feed], model.device), cache)
    return linear_argmax(hidden, model.head.weight)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    for row in measure_forward(args.model, (1, 2, 4, 8, 16, 32, 64, 128, 256), args.rounds):
        least, median, most = row.pop("ratios")
        print("  ".join(f"{k} {v:.5g}" for k, v in row.items()), f" ratio {median:.3g} ({least:.3g} to {most:.3g})")


if __name__ == "__main__":
    main()
