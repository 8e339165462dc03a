"""Answers of a local checkpoint, through the engine: a refiner without a draft generates."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from engine.errors import EngineError
from engine.trajectories.endpoint import Answer, EmptyAnswer, Sampling
from engine.trajectories.schema import TrajectoryRow


def answer_all(
    checkpoint: Path,
    rows: Iterator[tuple[int, TrajectoryRow, int]],
    sampling: Sampling,
    load_options: dict[str, Any],
    check: Callable[[], None],
) -> Iterator[tuple[int, Answer | EngineError]]:
    """Answers to ``rows`` of (unit, row, seed), as they finish; the checkpoint is loaded if there is one."""
    first = next(rows, None)
    if first is None:
        return
    from engine.options import RefineOptions
    from engine.refiner import Refiner

    options = RefineOptions(max_new_tokens=sampling.max_tokens, temperature=sampling.temperature)
    with Refiner.from_pretrained(checkpoint, **load_options) as refiner, refiner.session(options) as session:
        due: tuple[int, TrajectoryRow, int] | None = first
        while due is not None or session.open:
            check()
            while due is not None and session.has_room:
                unit, row, seed = due
                failed = session.add({"messages": row.chat(), "seed": seed}, unit)
                due = next(rows, None)
                if failed and failed.error:
                    yield unit, failed.error
            for result in session.step() if session.open else ():
                yield result.index, result.error or _answer(result.text, result.finish_reason, len(result.token_ids))


def _answer(text: str | None, reason: str, tokens: int) -> Answer | EngineError:
    if not text or not text.strip():
        return EmptyAnswer("the model ended its answer before the first word")
    return Answer(text=text, truncated=reason == "length", completion_tokens=tokens)
