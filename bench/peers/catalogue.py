"""Which peers are measured, by the names they have in the results."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from bench.peers.answer import Peer
from bench.peers.best_of_n import BestOfN
from bench.peers.engine_peers import TOKEN_BY_TOKEN, EnginePeer
from bench.peers.lookahead import Lookahead
from bench.peers.reward import ModelScorer, load_reward_model
from bench.peers.reward_guided import RewardGuided
from bench.peers.shrinking_window import ShrinkingWindow
from bench.peers.transformers_peers import Generate, PublicLoop
from engine import DEFAULT_CONDITION, RefineOptions, Refiner

BASE = "base"
REFINER = "refiner, token by token"
CORRECTOR = "Aligner-style, token by token"
CONVERGED = "DiffPO, converged"
STEPS = (1, 2, 4, 8)
REFINER_BEST_OF = "refiner, best of 4"
BEST_OF = (4, 16)
LOOKUP_TOKENS = 10
"""Most tokens that transformers' prompt lookup tries at a time, its documentation's value."""


@dataclass(frozen=True)
class Models:
    """What all peers run on: each of base and refiner loaded once in the engine, the refiner also in transformers."""

    base: Refiner
    refiner: Refiner
    modules: PreTrainedModel
    """The refiner's weights."""
    scorer: ModelScorer
    """Of answers in the base model's tokens."""
    refined: ModelScorer
    """The same in the refiner's."""


@contextmanager
def load(base: Path, refiner: Path, reward: Path) -> Iterator[Models]:
    """float32, on the CPU."""
    with Refiner.from_pretrained(base) as first, Refiner.from_pretrained(refiner) as second:
        modules = AutoModelForCausalLM.from_pretrained(refiner, dtype=torch.float32).eval()
        judge = load_reward_model(reward)
        yield Models(first, second, modules, ModelScorer(judge, first._codec), ModelScorer(judge, second._codec))


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What peers can be tuned by."""

    tokens: int
    temperature: float
    """Of best-of-n's samples."""
    weights: tuple[float, ...]
    """Of the reward in ARGS."""
    candidates: int
    """Tokens that ARGS tries at each step."""


def peers(models: Models, settings: Settings) -> dict[str, Peer]:
    """All peers but the base model itself, which makes the drafts."""
    tokens, base, refiner = settings.tokens, models.base, models.refiner
    codec, shown = refiner._codec, RefineOptions(condition=DEFAULT_CONDITION)
    made: dict[str, Peer] = {
        f"best of {n}": BestOfN(base, models.scorer, tokens, n=n, temperature=settings.temperature) for n in BEST_OF
    }
    for weight in settings.weights:
        name = f"ARGS, weight {weight:g}"
        made[name] = RewardGuided(base, models.scorer, tokens, weight=weight, candidates=settings.candidates)
    # of the refiner there is no more than this: what its reward costs and gains is in the base model's rows
    made[REFINER_BEST_OF] = BestOfN(refiner, models.refined, tokens, n=4, temperature=settings.temperature)
    one_by_one = RefineOptions(condition=DEFAULT_CONDITION, window=TOKEN_BY_TOKEN.window, realign=False)
    made |= {
        CORRECTOR: EnginePeer(refiner, one_by_one, tokens, takes_draft=True),
        "Aligner-style, this engine": EnginePeer(refiner, shown, tokens, takes_draft=True),
        "Aligner-style, prompt lookup": Generate(
            models.modules, codec, tokens, condition=DEFAULT_CONDITION, takes_draft=True,
            prompt_lookup_num_tokens=LOOKUP_TOKENS,
        ),
        REFINER: EnginePeer(refiner, TOKEN_BY_TOKEN, tokens, takes_draft=False),
        "refiner, this engine without a draft": EnginePeer(refiner, RefineOptions(), tokens, takes_draft=False),
        "refiner, generate": Generate(models.modules, codec, tokens),
        "refiner, prompt lookup": Generate(models.modules, codec, tokens, prompt_lookup_num_tokens=LOOKUP_TOKENS),
        "refiner, lookahead": Lookahead(models.modules, codec, tokens),
        "refiner, shrinking window": ShrinkingWindow(refiner, tokens, takes_draft=False),
        "DiffPO, public loop": PublicLoop(models.modules, codec, tokens),
        "DiffPO, shrinking window": ShrinkingWindow(refiner, tokens, takes_draft=True),
    }  # fmt: skip
    for steps in STEPS:
        name = f"DiffPO, {steps} step{'s' if steps > 1 else ''}"
        made[name] = EnginePeer(refiner, RefineOptions(steps=steps), tokens, takes_draft=True)
    made[CONVERGED] = EnginePeer(refiner, RefineOptions(), tokens, takes_draft=True)
    return made


def reference(name: str) -> str | None:
    """The peer that has to give the same tokens: the same model, prompt and greedy choice, one token at a time."""
    if name in ("DiffPO, public loop", "DiffPO, shrinking window", CONVERGED):
        return REFINER
    if name == REFINER_BEST_OF:
        return None
    family = name.partition(",")[0]
    same = {"refiner": REFINER, "Aligner-style": CORRECTOR}.get(family)
    return None if same == name else same
