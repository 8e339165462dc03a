"""Which peers are measured, by the names they have in the results."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
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
from engine.trajectories.reward_model import RewardModel

BASE = "base"
REFINER = "refiner, token by token"
ALIGNER = "Aligner-style"
CORRECTOR = f"{ALIGNER}, token by token"
CONVERGED = "DiffPO, converged"
STEPS = (1, 2, 4, 8)
REFINER_BEST_OF = "refiner, best of 4"
BEST_OF = (4, 16)
LOOKUP_TOKENS = 10
"""Most tokens that transformers' prompt lookup tries at a time, its documentation's value."""
ARGS_CANDIDATES = 10
"""Tokens that ARGS tries at each step by its authors' default."""


class Checkpoint:
    """One model in the engine, and in transformers where a peer asks for it."""

    def __init__(self, folder: Path, engine: Refiner, judge: RewardModel) -> None:
        self.folder, self.engine = folder, engine
        self.scorer = ModelScorer(judge, engine._codec)
        """Of answers in this model's tokens."""

    @cached_property
    def modules(self) -> PreTrainedModel:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()
        return model


@dataclass(frozen=True)
class Models:
    """What all peers run on, each loaded once."""

    base: Checkpoint
    """Writes drafts, samples, and answers under guidance."""
    refiner: Checkpoint
    corrector: Checkpoint
    """Reads the draft in its prompt: Aligner's part."""


@contextmanager
def load(base: Path, refiner: Path, corrector: Path | None, reward: Path) -> Iterator[Models]:
    """float32, on the CPU. Without a ``corrector`` the refiner is shown the draft."""
    judge = load_reward_model(reward)
    with ExitStack() as opened:

        def checkpoint(folder: Path) -> Checkpoint:
            return Checkpoint(folder, opened.enter_context(Refiner.from_pretrained(folder)), judge)

        second = checkpoint(refiner)
        yield Models(checkpoint(base), second, checkpoint(corrector) if corrector else second)


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
    tokens, base, refiner, corrector = settings.tokens, models.base, models.refiner, models.corrector
    made: dict[str, Peer] = {
        f"best of {n}": BestOfN(base.engine, base.scorer, tokens, n=n, temperature=settings.temperature)
        for n in BEST_OF
    }
    for weight in settings.weights:
        name = f"ARGS, weight {weight:g}"
        made[name] = RewardGuided(base.engine, base.scorer, tokens, weight=weight, candidates=settings.candidates)
    shown = RefineOptions(condition=DEFAULT_CONDITION)
    one_by_one = replace(TOKEN_BY_TOKEN, condition=DEFAULT_CONDITION)
    codec, modules = refiner.engine._codec, refiner.modules
    made |= {
        CORRECTOR: EnginePeer(corrector.engine, one_by_one, tokens, takes_draft=True),
        f"{ALIGNER}, this engine": EnginePeer(corrector.engine, shown, tokens, takes_draft=True),
        f"{ALIGNER}, prompt lookup": Generate(
            corrector.modules, corrector.engine._codec, tokens, condition=DEFAULT_CONDITION, takes_draft=True,
            prompt_lookup_num_tokens=LOOKUP_TOKENS,
        ),
        REFINER: EnginePeer(refiner.engine, TOKEN_BY_TOKEN, tokens, takes_draft=False),
        REFINER_BEST_OF: BestOfN(refiner.engine, refiner.scorer, tokens, n=4, temperature=settings.temperature),
        "refiner, this engine without a draft": EnginePeer(
            refiner.engine, RefineOptions(), tokens, takes_draft=False
        ),
        "refiner, generate": Generate(modules, codec, tokens),
        "refiner, prompt lookup": Generate(modules, codec, tokens, prompt_lookup_num_tokens=LOOKUP_TOKENS),
        "refiner, lookahead": Lookahead(modules, codec, tokens),
        "refiner, shrinking window": ShrinkingWindow(refiner.engine, tokens, takes_draft=False),
        "DiffPO, public loop": PublicLoop(modules, codec, tokens),
        "DiffPO, shrinking window": ShrinkingWindow(refiner.engine, tokens, takes_draft=True),
    }  # fmt: skip
    for steps in STEPS:
        name = f"DiffPO, {steps} step{'s' if steps > 1 else ''}"
        made[name] = EnginePeer(refiner.engine, RefineOptions(steps=steps), tokens, takes_draft=True)
    made[CONVERGED] = EnginePeer(refiner.engine, RefineOptions(), tokens, takes_draft=True)
    return made


def reference(name: str) -> str | None:
    """The peer that has to give the same tokens: the same model, prompt and greedy choice, one token at a time."""
    if name in ("DiffPO, public loop", "DiffPO, shrinking window", CONVERGED):
        return REFINER
    if name == REFINER_BEST_OF:
        return None
    family = name.partition(",")[0]
    same = {"refiner": REFINER, ALIGNER: CORRECTOR}.get(family)
    return None if same == name else same
