"""What each control changes, and what it leaves as it was."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.evaluate.cases import Case
from engine.evaluate.variants import CONTROLS, input_rows, variants
from engine.options import DEFAULT_CONDITION, RefineOptions

TEXT = st.text("abc ", min_size=1, max_size=12)


def case(index: int, prompt: int, model: str, drafts: list[str], **fields: Any) -> Case:
    turns = [f"question {prompt}, turn {turn}" for turn in range(len(drafts))]
    return Case(
        index=index, id=index, prompt=turns[0], group=str(prompt), turns=turns, drafts=drafts,
        cut=[False] * len(drafts), model=model, **fields,
    )  # fmt: skip


@st.composite
def some_cases(draw: st.DrawFn) -> list[Case]:
    count = draw(st.integers(2, 12))
    drafts = st.lists(TEXT, min_size=1, max_size=2)
    made = [
        case(i, i if i < 2 else draw(st.integers(0, 4)), draw(st.sampled_from("ab")), draw(drafts))
        for i in range(count)
    ]
    if not all(len(one.drafts) == 2 for one in made[:2]):
        made = [case(one.index, int(one.group), one.model, one.drafts[:1]) for one in made]
    return made


@given(some_cases(), st.integers(0, 3))
def test_guesses(cases: list[Case], seed: int) -> None:
    rows = {guess: input_rows(cases, guess, seed) for guess in ("given", "none", "shuffled", "random")}  # type: ignore[arg-type]
    for guess, made in rows.items():
        assert [row["id"] for row in made] == [one.index for one in cases]
        assert [row["turns"] for row in made] == [one.turns for one in cases]
        assert made == input_rows(cases, guess, seed)  # type: ignore[arg-type]
    assert [row["drafts"] for row in rows["given"]] == [one.drafts for one in cases]
    assert all(row["drafts"] == [] for row in rows["none"])
    words = {word for one in cases for draft in one.drafts for word in draft.split()}
    for one, shuffled, rand in zip(cases, rows["shuffled"], rows["random"], strict=True):
        assert len(shuffled["drafts"]) == len(rand["drafts"]) == len(one.drafts)
        for turn, draft in enumerate(shuffled["drafts"]):
            others = [o for o in cases if o.group != one.group and len(o.drafts) > turn]
            mine = [o for o in others if o.model == one.model]
            assert draft in [o.drafts[turn] for o in mine or others]
        for draft, text in zip(one.drafts, rand["drafts"], strict=True):
            assert len(text.split()) == len(draft.split())
            assert set(text.split()) <= words


def test_a_single_prompt_has_no_other_draft() -> None:
    with pytest.raises(ValueError, match="two different prompts"):
        input_rows([case(0, 0, "a", ["x"]), case(1, 0, "b", ["y"])], "shuffled")


def test_cases_with_errors_are_not_refined() -> None:
    bad = case(1, 1, "a", ["y"], error={"type": "InvalidRequest", "message": "no"})
    assert [row["id"] for row in input_rows([case(0, 0, "a", ["x"]), bad], "given")] == [0]


def test_a_history_stays_before_its_turn() -> None:
    chat = [{"role": "system", "content": "Be brief."}]
    (row,) = input_rows([case(0, 0, "a", ["x"], history=chat)], "given")
    assert row == {"id": 0, "messages": [*chat, {"role": "user", "content": "question 0, turn 0"}], "draft": "x"}


def test_every_control_changes_its_option_alone() -> None:
    options = RefineOptions(max_new_tokens=33)
    made = {variant.name: variant for variant in variants(options, CONTROLS, [4, 1, 4], 5)}
    assert list(made) == ["given", "alone", "shuffled", "random", "steps-1", "steps-4", "keep_prefix", "condition"]
    assert [made[name].guess for name in ("given", "alone", "shuffled", "random")] == [
        "given",
        "none",
        "shuffled",
        "random",
    ]
    changes: dict[str, dict[str, Any]] = {
        "steps-1": {"steps": 1}, "steps-4": {"steps": 4}, "keep_prefix": {"keep_prefix": 5},
        "condition": {"condition": DEFAULT_CONDITION},
    }  # fmt: skip
    for name, variant in made.items():
        assert variant.options == RefineOptions(max_new_tokens=33, **changes.get(name, {}))
        assert variant.held
        assert variant.changed
    assert "not the prompt" in made["condition"].held


def test_without_a_draft_there_is_none_in_the_prompt() -> None:
    made = {variant.name: variant for variant in variants(RefineOptions(condition=DEFAULT_CONDITION), CONTROLS, [1])}
    assert made["alone"].options.condition is None
    assert made["shuffled"].options.condition == DEFAULT_CONDITION
    assert "condition" not in made  # given already is


def test_unknown_controls_are_refused() -> None:
    with pytest.raises(ValueError, match="best_of_n"):
        variants(RefineOptions(), ["alone", "best_of_n"])
