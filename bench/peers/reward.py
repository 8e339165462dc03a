"""Rewards of answers, as peers that use them while answering ask for them and as all answers are judged."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from bench.peers.answer import Answer, Cost, answer_in
from engine import Request
from engine.text import TextCodec
from engine.trajectories.reward_model import RewardModel
from engine.trajectories.schema import Response, TrajectoryRow


class Scorer(Protocol):
    """Gives rewards."""

    tokens: int
    """Positions fed through the reward model so far, padding excluded."""

    def score(self, requests: Sequence[Request], answers: Sequence[list[int]]) -> list[float]:
        """One reward for each pair of a request and an answer in tokens."""
        ...


def load_reward_model(folder: Path, batch_size: int = 64) -> RewardModel:
    """In float32 on the CPU. Raises what ``RewardModel.load`` does."""
    return RewardModel.load(
        folder, device="cpu", dtype="float32", batch_size=batch_size, max_length=None, trust_remote_code=False
    )


class ModelScorer:
    """A sequence classification model that reads prompt and answer as text, each time anew: a bidirectional encoder, such as
    the one here, has nothing to keep from one prefix of an answer to the next."""

    def __init__(self, model: RewardModel, codec: TextCodec) -> None:
        """``codec``: of the model whose tokens the answers are."""
        self.tokens = 0
        self._model, self._codec = model, codec
        model._model.register_forward_pre_hook(self._count, with_kwargs=True)

    def score(self, requests: Sequence[Request], answers: Sequence[list[int]]) -> list[float]:
        return self.judge(requests, [answer_in(self._codec, ids, Cost()) for ids in answers])

    def judge(self, requests: Sequence[Request], answers: Sequence[Answer]) -> list[float]:
        """Rewards of answers as text. Raises ValueError where a prompt and its answer are too long for the model."""
        rows = [TrajectoryRow(prompt_id=0, prompt=request.prompt or "") for request in requests]
        # an answer under way, or cut at the limit, has no end of turn
        responses = [Response(model="", text=answer.text or "", truncated=not answer.ended) for answer in answers]
        rewards = self._model.score(list(zip(rows, responses, strict=True)))
        missing = [i for i, reward in enumerate(rewards) if reward is None]
        if missing:
            prompt = rows[missing[0]].prompt
            raise ValueError(f"the reward model cannot read so long a prompt and answer, leave it out: {prompt:.80}")
        return [float(reward) for reward in rewards if reward is not None]

    def _count(self, module: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.tokens += int(kwargs["attention_mask"].sum())
