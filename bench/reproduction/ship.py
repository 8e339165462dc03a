"""Writes a trained refiner as the package ships it: weights mixed with those it started from, stored as float16."""

import argparse
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from bench.reproduction.base import average, save


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="trained checkpoint folder")
    parser.add_argument("--base", type=Path, required=True, help="checkpoint folder its training started from")
    parser.add_argument("--mix", type=float, default=1.0, help="share of the trained weights")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint folder to write")
    args = parser.parse_args()
    trained, base = (LlamaForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (args.model, args.base))
    average(trained, base, args.mix)
    save(trained, AutoTokenizer.from_pretrained(args.base), args.out)


if __name__ == "__main__":
    main()
