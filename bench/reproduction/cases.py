"""What a checkpoint is asked to refine: held-out prompts with the drafts of every base model, and the controls."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from engine.trajectories.dataset import load
from engine.trajectories.schema import BadRow, read_rows, without_repeats

CONTROLS = ("given", "shuffled", "random", "none")
"""Guesses: the draft; one of the same base model for another prompt; random tokens; no guess."""


@dataclass(frozen=True, slots=True)
class Case:
    """One prompt with a guess to start from."""

    prompt: int
    """Number of the prompt: what confidence intervals draw from."""
    model: str
    """Who wrote the draft."""
    prompt_ids: list[int]
    guess: list[int]
    target: list[int]
    """The best response; empty where none is known."""

    def cut(self, tokens: int) -> "Case":
        """The same about the first ``tokens`` tokens of the answer."""
        return replace(self, guess=self.guess[:tokens], target=self.target[:tokens])


def ranked_cases(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[Case]:
    """Of every trajectory in the file one case per response that is not the best one."""
    cases = []
    rows = (row for row in read_rows(str(path)) if not isinstance(row, BadRow))
    for number, (row, trajectory) in enumerate(zip(rows, load(str(path), tokenizer), strict=True)):
        responses = without_repeats(row).responses
        best = max(range(len(responses)), key=lambda i: (responses[i].reward or 0.0, i))
        prompt, target = list(trajectory.prompt_ids), list(trajectory.responses[best])
        for i, (response, ids) in enumerate(zip(responses, trajectory.responses, strict=True)):
            if i != best and ids:
                cases.append(Case(number, response.model, prompt, list(ids), target))
    return cases


def mt_bench_cases(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[Case]:
    """The first turn of every row of ``turns`` and ``drafts``; nothing says which draft is best."""
    numbers: dict[str, int] = {}
    cases = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        question = row["turns"][0]
        chat = [{"role": "user", "content": question}]
        text = str(tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False))
        prompt: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        draft: list[int] = tokenizer(row["drafts"][0].strip(), add_special_tokens=False)["input_ids"]
        number = numbers.setdefault(question, len(numbers))
        cases.append(Case(number, row["model"], prompt, draft, []))
    return cases


def spread(cases: Sequence[Case], per_prompt: int, every: int = 1) -> list[Case]:
    """Of every ``every``-th prompt ``per_prompt`` cases, starting with another base model for each prompt."""
    chosen = []
    for turn, prompt in enumerate(sorted({case.prompt for case in cases})[::every]):
        mine = [case for case in cases if case.prompt == prompt]
        chosen += [mine[(turn * per_prompt + i) % len(mine)] for i in range(min(per_prompt, len(mine)))]
    return chosen


def controlled(cases: Sequence[Case], control: str, vocabulary: int, length: int) -> list[Case]:
    """The cases with the guesses of a control; a random one has ``length`` tokens."""
    rng = random.Random(0)
    if control == "given":
        return list(cases)
    if control == "shuffled":
        return [replace(case, guess=_of_another_prompt(case, cases, rng)) for case in cases]
    if control == "none":
        return [replace(case, guess=[], model="") for case in cases]
    if control == "random":
        return [replace(case, guess=[rng.randrange(4, vocabulary) for _ in range(length)], model="") for case in cases]
    raise ValueError(f"control must be one of {CONTROLS}, got {control!r}")


def _of_another_prompt(case: Case, cases: Sequence[Case], rng: random.Random) -> list[int]:
    others = [other for other in cases if other.prompt != case.prompt]
    alike = [other for other in others if other.model == case.model]
    return rng.choice(alike or others).guess
