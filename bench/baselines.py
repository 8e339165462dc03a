"""What the engine is measured against, on the transformers modules in the same process, dtype and thread count."""

from typing import Any

import torch
from transformers import PreTrainedModel


@torch.inference_mode()
def full_reforward_jacobi(
    model: PreTrainedModel, prompt: list[int], draft: list[int], length: int, pad: int, eos: frozenset[int]
) -> tuple[list[int], int]:
    """The algorithm of the paper's public script: a full forward over prompt + ``length`` tokens at every step, no cache,
    batch 1, until nothing changes. Returns the answer up to its first EOS, and the steps."""
    y = (draft + [pad] * length)[:length]
    steps = 0
    while True:
        steps += 1
        logits = model(input_ids=torch.tensor([prompt + y], device=model.device), use_cache=False).logits
        new = logits[0, len(prompt) - 1 : -1].argmax(-1).tolist()
        if new == y:
            break
        y = new
    end = next((i for i, token in enumerate(y) if token in eos), length - 1)
    return y[: end + 1], steps


@torch.inference_mode()
def greedy_generate(
    model: PreTrainedModel, prompts: list[list[int]], max_new_tokens: int, pad: int, **options: Any
) -> list[list[int]]:
    """transformers' greedy generate on left-padded prompts; the answers up to and including their EOS."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad, **options
    )
    eos = model.generation_config.eos_token_id
    eos_ids = set(eos if isinstance(eos, list) else [eos])  # {None}: it has no EOS
    answers = []
    for row in out[:, longest:].tolist():
        end = next((i for i, token in enumerate(row) if token in eos_ids), len(row) - 1)
        answers.append(row[: end + 1])
    return answers
