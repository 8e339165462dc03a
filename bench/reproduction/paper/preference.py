"""DPO and SimPO on the trajectories' best against worst responses, by trl's own trainers; adapters of LoRA, merged at the end.

DPO (Rafailov et al., 2305.18290): trl's DPOTrainer with its default beta. SimPO (Meng et al., 2405.14734): trl's CPOTrainer
with loss_type="simpo" and without CPO's own cross entropy (cpo_alpha=0), beta 2 and gamma 1: the ratio of 0.5 that its
authors advise.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer

from bench.reproduction.data import Fields
from bench.reproduction.paper.results import update

RANK = 16
SIDES = ("chosen", "rejected")


def pair(row: Fields, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Texts of the best and the worst response behind the prompt's template, and which of them was cut."""
    chat = [{"role": "user", "content": row["prompt"]}]
    worst, *_, best = sorted(row["responses"], key=lambda response: response["reward"])
    return {
        "prompt": tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True),
        **{side: response["text"] for side, response in zip(SIDES, (best, worst), strict=True)},
        **{
            f"{side}_cut": response.get("truncated", False) for side, response in zip(SIDES, (best, worst), strict=True)
        },
    }


def without_false_ends(columns: dict[str, Any], cut: dict[str, bool]) -> dict[str, Any]:
    """A tokenised pair without the end of turn that trl puts behind every response, also behind one that was cut."""
    shortened = dict(columns)
    for side in SIDES:
        if cut[side]:
            for name in columns:
                if name in (f"{side}_ids", f"{side}_input_ids", f"{side}_labels", f"{side}_attention_mask"):
                    shortened[name] = columns[name][:-1]
    return shortened


def make_trainer(
    method: str, model: Any, tokenizer: PreTrainedTokenizerBase, pairs: list[dict[str, Any]], **options: Any
) -> Any:
    """trl's trainer of ``method``, its pairs tokenised and mended."""
    texts = Dataset.from_list([{name: pair[name] for name in ("prompt", *SIDES)} for pair in pairs])
    common: dict[str, Any] = {
        "model": model, "train_dataset": texts, "processing_class": tokenizer,
        "peft_config": LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"),
    }  # fmt: skip
    options = {"save_strategy": "no", "report_to": "none", "gradient_checkpointing": False, "bf16": False, **options}
    if method == "dpo":
        trainer: Any = DPOTrainer(args=DPOConfig(beta=0.1, **options), **common)
    else:
        settings = CPOConfig(loss_type="simpo", beta=2.0, simpo_gamma=1.0, cpo_alpha=0.0, **options)
        trainer = CPOTrainer(args=settings, **common)
    if len(trainer.train_dataset) != len(pairs):
        raise SystemExit(f"trl left out {len(pairs) - len(trainer.train_dataset)} pairs")
    mended = [
        without_false_ends(columns, {side: pair[f"{side}_cut"] for side in SIDES})
        for columns, pair in zip(trainer.train_dataset, pairs, strict=True)
    ]
    trainer.train_dataset = Dataset.from_list(mended)
    return trainer


def train(method: str, folder: Path, rows: list[Fields], out: Path, **options: Any) -> list[dict[str, float]]:
    """Trains, merges and saves; what trl logged."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    generation = model.generation_config
    trainer = make_trainer(
        method, model, tokenizer, [pair(row, tokenizer) for row in rows], output_dir=str(out), **options
    )
    trainer.train()
    merged = trainer.model.merge_and_unload()
    merged.generation_config = generation
    merged.config.use_cache = True
    merged.save_pretrained(out / "model")
    AutoTokenizer.from_pretrained(folder).save_pretrained(out / "model")
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("method", choices=("dpo", "simpo"))
    parser.add_argument("--model", type=Path, required=True, help="checkpoint folder to start from")
    parser.add_argument("--data", type=Path, required=True, help="trajectory file")
    parser.add_argument("--out", type=Path, required=True, help="folder for the run; the checkpoint is in model/")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=-1)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.data.read_text(encoding="utf-8").splitlines()]
    log = train(
        args.method, args.model, rows, args.out,
        learning_rate=args.lr, per_device_train_batch_size=2, gradient_accumulation_steps=args.batch_size // 2,
        num_train_epochs=1, max_steps=args.steps, lr_scheduler_type="cosine", warmup_steps=0.1, max_length=1024,
        logging_steps=5, use_cpu=args.device == "cpu", seed=0,
    )  # fmt: skip
    kept = [{k: round(v, 4) for k, v in entry.items() if k.startswith(("loss", "rewards/"))} for entry in log]
    update(args.results, f"preference/{args.method}", kept)


if __name__ == "__main__":
    main()
