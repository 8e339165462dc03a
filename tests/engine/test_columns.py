"""Batches of columns: rows and their order, errors, what crosses to another process, and what a batch must bring."""

import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from engine import RefineOptions, Refiner
from engine.columns import RESULT_COLUMNS, RefineColumns
from tests.engine.checkpoints import VOCABULARY, Oracle, prompts

OPTIONS = RefineOptions(max_new_tokens=12)
PROMPTS = prompts(3)
DRAFTS = prompts(4)


@pytest.fixture
def columns(oracle: Callable[[str], Oracle]) -> Iterator[RefineColumns]:
    made = RefineColumns(str(oracle("llama").folder), OPTIONS, kv_cache_tokens=4096)
    yield made
    made.close()


def object_column(values: list[Any]) -> np.ndarray:
    column = np.empty(len(values), dtype=object)
    for i, value in enumerate(values):
        column[i] = value
    return column


def expected(load: Callable[..., Refiner], rows: list[dict[str, Any]]) -> list[list[Any]]:
    results = load("llama").refine(rows, OPTIONS)
    assert not any(result.error for result in results)
    return [[result.forward_tokens, result.finish_reason, result.converged] for result in results]


def got(batch: dict[str, Any]) -> list[list[Any]]:
    names = ("forward_tokens", "finish_reason", "converged")
    return [list(cells) for cells in zip(*(batch[name].tolist() for name in names), strict=True)]


class TestRows:
    @pytest.mark.parametrize("cell", [list, np.array], ids=["lists", "arrays"])
    def test_equal_to_refine(self, columns: RefineColumns, load: Callable[..., Refiner], cell: Any) -> None:
        rows = [{"prompt_ids": p, "draft_ids": d} for p, d in zip(PROMPTS, DRAFTS, strict=True)]
        batch = {name: object_column([cell(row[name]) for row in rows]) for name in ("prompt_ids", "draft_ids")}
        out = columns({**batch, "key": np.arange(len(rows))})
        assert list(out) == ["prompt_ids", "draft_ids", "key", *RESULT_COLUMNS]
        assert out["key"].tolist() == list(range(len(rows)))
        assert got(out) == expected(load, rows)
        assert out["error"].tolist() == [None] * len(rows)

    def test_a_missing_draft_is_none_or_nan(self, columns: RefineColumns, load: Callable[..., Refiner]) -> None:
        out = columns({"prompt_ids": PROMPTS[:3], "draft_ids": [None, float("nan"), DRAFTS[2]]})
        rows: list[dict[str, Any]] = [{"prompt_ids": ids} for ids in PROMPTS[:3]]
        rows[2]["draft_ids"] = DRAFTS[2]
        assert got(out) == expected(load, rows)

    def test_a_bad_row_costs_itself(self, columns: RefineColumns) -> None:
        good = columns({"prompt_ids": PROMPTS[:2]})
        out = columns({"prompt_ids": [PROMPTS[0], [VOCABULARY], None, PROMPTS[1]]})
        assert [out["finish_reason"][i] for i in (0, 3)] == good["finish_reason"].tolist()
        assert [error is None for error in out["error"]] == [True, False, False, True]
        assert all(out["error"][i].startswith("InvalidRequest: ") for i in (1, 2))
        assert [out["finish_reason"][i] for i in (1, 2)] == ["error", "error"]

    def test_text_of_the_refiner_that_ships(self) -> None:
        asked = ["Name a colour", "Say hello"]
        drafts = ["red red", None]
        columns = RefineColumns(options=OPTIONS)
        out = columns({"prompt": np.array(asked), "draft": object_column(drafts)})
        columns.close()
        with Refiner.from_pretrained() as refiner:
            results = refiner.refine([{"prompt": p, "draft": d} for p, d in zip(asked, drafts, strict=True)], OPTIONS)
        assert out["text"].tolist() == [result.text for result in results]

    def test_no_rows(self, columns: RefineColumns) -> None:
        out = columns({"prompt_ids": []})
        assert all(len(out[name]) == 0 for name in RESULT_COLUMNS)


class TestBatches:
    def test_without_prompts(self, columns: RefineColumns) -> None:
        with pytest.raises(ValueError, match=r"prompt, messages or prompt_ids, got \['draft'\]"):
            columns({"draft": ["a"]})

    def test_with_a_result_column(self, columns: RefineColumns) -> None:
        with pytest.raises(ValueError, match=r"columns \['text'\], where the results belong"):
            columns({"prompt": ["a"], "text": ["b"]})

    def test_of_unequal_columns(self, columns: RefineColumns) -> None:
        with pytest.raises(ValueError, match="same length"):
            columns({"prompt": ["a"], "draft": ["b", "c"]})


class TestElsewhere:
    def test_pickled_after_use(self, columns: RefineColumns) -> None:
        before = got(columns({"prompt_ids": PROMPTS}))
        data = pickle.dumps(columns)
        assert len(data) < 2000  # settings, no weights
        other = pickle.loads(data)
        assert got(other({"prompt_ids": PROMPTS})) == before
        other.close()

    def test_again_after_close(self, columns: RefineColumns) -> None:
        before = got(columns({"prompt_ids": PROMPTS}))
        columns.close()
        columns.close()
        assert got(columns({"prompt_ids": PROMPTS})) == before

    def test_imports_neither_torch_nor_ray(self) -> None:
        code = (
            "import sys; from engine.columns import RefineColumns; RefineColumns('m'); "
            "assert not {'torch', 'ray'} & set(sys.modules)"
        )
        subprocess.run([sys.executable, "-c", code], check=True)
