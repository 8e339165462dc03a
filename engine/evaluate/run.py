"""An evaluation: cases through every variant of refinement, both sides scored, one row per case and variant."""

import functools
from collections.abc import Callable, Collection, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.evaluate.cases import Case, read_cases
from engine.evaluate.folder import Folder, drop_book, is_of
from engine.evaluate.join import joined
from engine.evaluate.lending import Shared
from engine.evaluate.results import write_whole
from engine.evaluate.scores import Answers, Scoring
from engine.evaluate.variants import GIVEN, Variant, input_rows
from engine.job.output import read_finished, read_record
from engine.job.questions import Questions
from engine.job.report import Reporter
from engine.job.rows import REFINED, encode
from engine.job.run import Job, RefinerLike
from engine.job.settings import checkpoint_digest, job_settings
from engine.job.source import Fields, Source
from engine.trajectories.score import Scorer

if TYPE_CHECKING:
    from engine.refiner import Refiner

DRAFTS, BEST = "drafts", "best"
"""Names of the sides that every variant is compared with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What to evaluate, how, and where to keep it."""

    folder: Folder
    source: Source
    questions: Questions | None = None
    questions_digest: str | None = None
    checkpoint: Path
    load_options: dict[str, Any]
    variants: Sequence[Variant]
    scorer: dict[str, Any]
    """What identifies the scorer."""
    per_prompt: int | None = None
    whole_drafts: bool = False
    """Leave drafts longer than the refiner's limit as they are; then the two sides have not the same limit."""
    overwrite: bool = False
    """Start anew, but for refined answers without errors whose own settings are these; an overwriting run that was cut short
    goes on."""
    retry_errors: bool = False

    def setting(self) -> dict[str, Any]:
        """What every figure in the folder shares."""
        options = self.variants[0].options
        return {
            "input": {"digest": self.source.digest, "questions": self.questions_digest, "per_prompt": self.per_prompt},
            "model": {
                "digest": checkpoint_digest(self.checkpoint),
                **{name: str(self.load_options[name]) for name in ("dtype", "device", "backend")},
            },
            "scorer": self.scorer,
            "limit": {"max_new_tokens": options.max_new_tokens, "drafts_cut": not self.whole_drafts},
        }

    def run(
        self,
        load: "Callable[[], Refiner]",
        load_scorer: Callable[[], Scorer],
        say: Callable[[str], None],
        check: Callable[[], None],
    ) -> int:
        """Completes the rows of every variant; how many of them have errors, a case counted once. Raises Refused, OSError,
        EngineError, ValueError."""
        self.folder.begin(
            self.setting(), {"input": self.source.path, "model": str(self.checkpoint)}, self.variants,
            overwrite=self.overwrite,
        )  # fmt: skip
        cases = read_cases(self.source, self.questions, self._cutter(), self.per_prompt)
        usable = [case for case in cases if case.error is None]
        say(f"{len(cases)} cases of {len({case.group for case in usable})} prompts, {len(cases) - len(usable)} bad")
        shared = Shared(load)
        refined = {}
        with closing(shared):
            for variant in self.variants:
                refined[variant.name] = self._refine(variant, cases, shared, check)
        scoring = Scoring(self.folder.work, cases, self.scorer, load_scorer, check, self.retry_errors)
        ends = functools.cache(self._ends)
        scores = {
            DRAFTS: scoring.side(DRAFTS, {case.index: _drafts(case) for case in usable}),
            BEST: scoring.side(
                BEST, {c.index: Answers(None, [c.best], [c.best_cut]) for c in usable if c.best is not None}
            ),
        }
        failed: set[int] = set()
        for variant in self.variants:
            answers = {
                index: self._answers(variant, cases[index], row, ends)
                for index, row in refined[variant.name].items()
                if row["error"] is None
            }
            scored = scoring.side(variant.name, answers)
            rows = [
                joined(
                    case, variant.name, refined[variant.name].get(case.index), answers.get(case.index), scores,
                    scored.get(case.index),
                )
                for case in cases
            ]  # fmt: skip
            write_whole(self.folder.path / f"{variant.name}.jsonl", b"".join(encode(row) for row in rows))
            failed |= {row["index"] for row in rows if row["error"] is not None}
        self.folder.end()
        return len(failed)

    def _answers(self, variant: Variant, case: Case, row: Fields, ends: Callable[[], Collection[int]]) -> Answers:
        turns, limit = row.get("answers") or [row], variant.options.max_new_tokens

        def is_cut(turn: Fields) -> bool:
            """Whether an answer has no end of turn for want of room."""
            if turn["finish_reason"] == "steps":
                return len(turn["token_ids"]) == limit and turn["token_ids"][-1] not in ends()
            return bool(turn["finish_reason"] == "length")

        # a file of rewards by name means the model's answer to the prompt, as it is refined
        named = variant.name == GIVEN and len(case.turns) == 1
        return Answers(REFINED if named else None, [turn["text"] for turn in turns], [is_cut(turn) for turn in turns])

    def _ends(self) -> frozenset[int]:
        """The refiner's tokens that end an answer."""
        from transformers import AutoConfig

        from engine.refiner import read_vocabulary
        from engine.text import load_tokenizer

        remote = bool(self.load_options.get("trust_remote_code"))
        config = AutoConfig.from_pretrained(self.checkpoint, trust_remote_code=remote)
        return read_vocabulary(self.checkpoint, config, load_tokenizer(self.checkpoint, remote)).eos

    def _cutter(self) -> Callable[[str], tuple[str, bool]]:
        from engine.text import load_tokenizer

        tokenizer = load_tokenizer(self.checkpoint, bool(self.load_options.get("trust_remote_code")))
        limit = self.variants[0].options.max_new_tokens

        def cut(text: str) -> tuple[str, bool]:
            if self.whole_drafts or tokenizer is None:
                return text, False
            ids = tokenizer(text.strip(), add_special_tokens=False)["input_ids"]
            if len(ids) <= limit:
                # the refiner's limit includes the end of turn: its answer of so many tokens has none either
                return text, len(ids) == limit
            return str(tokenizer.decode(ids[:limit], skip_special_tokens=True)), True

        return cut

    def _refine(
        self, variant: Variant, cases: Sequence[Case], shared: Shared, check: Callable[[], None]
    ) -> dict[int, Fields]:
        """Rows of ``engine.job`` by case."""
        inputs, output = (self.folder.work / f"{variant.name}.{kind}.jsonl" for kind in ("input", "refined"))
        write_whole(inputs, b"".join(encode(row) for row in input_rows(cases, variant.guess)))
        source = Source.open(str(inputs))
        settings = job_settings(
            source, None, self.checkpoint, self.load_options, variant.options, token_ids=True, ordered=True
        )
        if self.overwrite and not is_of(output, settings):
            drop_book(output)
        fresh = read_record(output)[0] is None
        job = Job(
            source=source, output=output, settings=settings, options=variant.options, token_ids=True,
            retry_errors=self.retry_errors or self.overwrite,
        )  # fmt: skip

        def take() -> RefinerLike:
            refiner = shared.take()
            self.folder.note_run(variant.name, self.load_options, fresh=fresh)
            return refiner

        reporter = Reporter(name=f"engine.evaluate {variant.name}")
        try:
            job.run(take, reporter, check)
        except BaseException:
            reporter.close()
            raise
        reporter.end("finished")
        return {row.fields["id"]: row.fields for row in read_finished(output)}


def _drafts(case: Case) -> Answers:
    """A file of rewards by name means the model's whole answer to the prompt."""
    return Answers("" if case.whole and len(case.turns) == 1 else None, case.drafts, case.cut)
