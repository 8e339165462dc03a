"""Refinement of a batch of columns, for engines that hand out such batches: Ray Data, pandas UDFs of Spark, datasets.map."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.options import RefineOptions

if TYPE_CHECKING:
    from engine.refiner import Refiner

REQUEST_COLUMNS = ("prompt", "messages", "prompt_ids", "draft", "draft_ids")
RESULT_COLUMNS = ("text", "steps", "converged", "forward_tokens", "finish_reason", "error")

Column = Sequence[Any] | np.ndarray[Any, Any]


class RefineColumns:
    """Callable from columns to columns: those it gets, and behind them RESULT_COLUMNS, row by row in the same order.

    Reads the columns of a request's fields: prompt, messages or prompt_ids; draft or draft_ids. None and NaN stand for a
    field that the row lacks. A row that fails costs only itself: its ``error`` says why, and its ``text`` is None.

    The model is loaded by the first call and stays until ``close`` or the object's end. Pickled, it leaves the model behind
    and loads it anew, so that an instance can be sent to other processes.
    """

    def __init__(self, model: str | None = None, options: RefineOptions | None = None, **load_options: Any) -> None:
        """``model``: checkpoint folder or hub id (default: the refiner that ships); ``load_options``: those of
        Refiner.from_pretrained."""
        self._model = model
        self._options = options
        self._load_options = load_options
        self._refiner: Refiner | None = None

    def __call__(self, batch: Mapping[str, Column]) -> dict[str, Column]:
        """The batch with the result columns, numpy arrays of one entry per row. Raises ValueError where columns do not fit;
        what is no single row's fault (a checkpoint that cannot be loaded, a dead engine) is raised too."""
        rows = _requests(batch)
        if self._refiner is None:
            from engine.refiner import Refiner

            self._refiner = Refiner.from_pretrained(self._model, **self._load_options)
        results = self._refiner.refine(rows, self._options)
        values = {name: [getattr(result, name) for result in results] for name in RESULT_COLUMNS[:-1]}
        errors = [f"{type(r.error).__name__}: {r.error}" if r.error else None for r in results]
        return {
            **batch,
            "text": np.array(values["text"], dtype=object),
            "steps": np.array(values["steps"], dtype=np.int64),
            "converged": np.array(values["converged"], dtype=np.bool_),
            "forward_tokens": np.array(values["forward_tokens"], dtype=np.int64),
            "finish_reason": np.array(values["finish_reason"], dtype=object),
            "error": np.array(errors, dtype=object),
        }

    def close(self) -> None:
        """Frees the model; the next call loads it again."""
        if self._refiner is not None:
            self._refiner.close()
            self._refiner = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_refiner": None}


def _requests(batch: Mapping[str, Column]) -> list[dict[str, Any]]:
    taken = sorted(set(RESULT_COLUMNS) & set(batch))
    if taken:
        raise ValueError(f"the batch has columns {taken}, where the results belong: rename them")
    names = [name for name in REQUEST_COLUMNS if name in batch]
    if not {"prompt", "messages", "prompt_ids"} & set(names):
        raise ValueError(f"a batch needs a column prompt, messages or prompt_ids, got {sorted(batch)}")
    lengths = {name: len(column) for name, column in batch.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"all columns of a batch must have the same length, got {lengths}")
    columns = zip(*(batch[name] for name in names), strict=True)
    rows = [dict(zip(names, map(_plain, cells), strict=True)) for cells in columns]
    return [{name: value for name, value in row.items() if value is not None} for row in rows]


def _plain(value: Any) -> Any:
    """A cell without numpy: its types are not those that a request takes."""
    if isinstance(value, np.ndarray):
        return [_plain(item) for item in value.tolist()]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
