"""Rewards of answers, as peers that use them while answering ask for them and as all answers are judged."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from engine import Request
from engine.trajectories.reward_model import RewardModel
from engine.trajectories.schema import Response, TrajectoryRow


class Scorer(Protocol):
    """Gives rewards."""

    tokens: int
    """Positions fed through the reward model so far, padding excluded."""

    def score(self, requests: Sequence[Request], answers: Sequence[list[int]]) -> list[float]:
        """One reward for each pair of a request and an answer in tokens."""
        ...


class ModelScorer:
    """A sequence classification model that reads prompt and answer as text, each time anew: a bidirectional encoder, such as
    the one here, has nothing to keep from one prefix of an answer to the next."""

    def __init__(self, model: RewardModel, codec: Any) -> None:
        """``codec``: of the model whose tokens the answers are."""
        self.tokens = 0
        self._model, self._codec = model, codec
        model._model.register_forward_pre_hook(self._count, with_kwargs=True)

    @classmethod
    def load(cls, folder: Path, codec: Any, batch_size: int = 64) -> "ModelScorer":
        """Raises what ``RewardModel.load`` does."""
        return cls(
            RewardModel.load(
                folder, device="cpu", dtype="float32", batch_size=batch_size, max_length=None, trust_remote_code=False
            ),
            codec,
        )

    def score(self, requests: Sequence[Request], answers: Sequence[list[int]]) -> list[float]:
        """Raises ValueError where a prompt and its answer are too long for the model."""
        rows = [TrajectoryRow(prompt_id=0, prompt=request.prompt or "") for request in requests]
        # an answer under way, or cut at the limit, has no end of turn
        responses = [
            Response(
                model="", text=self._codec.decode(ids), truncated=not ids or ids[-1] not in self._codec.vocabulary.eos
            )
            for ids in answers
        ]
        rewards = self._model.score(list(zip(rows, responses, strict=True)))
        missing = [i for i, reward in enumerate(rewards) if reward is None]
        if missing:
            prompt = rows[missing[0]].prompt
            raise ValueError(f"the reward model cannot read so long a prompt and answer, leave it out: {prompt:.80}")
        return [float(reward) for reward in rewards if reward is not None]

    def _count(self, module: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.tokens += int(kwargs["attention_mask"].sum())
