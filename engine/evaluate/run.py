"""An evaluation: cases through every variant of refinement, both sides scored, one row per case and variant."""

import json
import os
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.evaluate.cases import Case, read_cases
from engine.evaluate.join import joined
from engine.evaluate.results import RESULTS, write_whole
from engine.evaluate.scores import Answers, Scoring
from engine.evaluate.variants import GIVEN, Variant, input_rows
from engine.job.output import Refused, difference, read_finished
from engine.job.questions import Questions
from engine.job.report import Reporter
from engine.job.rows import REFINED, encode
from engine.job.run import Job, RefinerLike, SessionLike
from engine.job.settings import checkpoint_digest, job_settings
from engine.job.source import Fields, Source
from engine.options import RefineOptions
from engine.request import Request
from engine.trajectories.score import Scorer

if TYPE_CHECKING:
    from engine.refiner import Refiner

WORK = "work"
DRAFTS, BEST = "drafts", "best"
"""Names of the sides that every variant is compared with."""


class _Shared:
    """One loaded refiner for several jobs, each of which closes what it was given."""

    def __init__(self, load: "Callable[[], Refiner]") -> None:
        self._load = load
        self._refiner: Refiner | None = None

    def take(self) -> RefinerLike:
        if self._refiner is None:
            self._refiner = self._load()
            self._warm_up(self._refiner)
        return _Lent(self._refiner)

    def _warm_up(self, refiner: RefinerLike) -> None:
        """What is done once only, such as choosing kernels, belongs to no variant's seconds."""
        with closing(refiner.session(RefineOptions(max_new_tokens=4))) as session:
            if session.add(Request(prompt="Hello", draft="Hello there"), 0) is None:
                while not session.step():
                    pass

    def close(self) -> None:
        if self._refiner is not None:
            self._refiner.close()
        self._refiner = None


@dataclass(frozen=True, slots=True)
class _Lent:
    refiner: RefinerLike

    @property
    def max_batch_size(self) -> int:
        return self.refiner.max_batch_size

    def session(self, options: RefineOptions) -> SessionLike:
        return self.refiner.session(options)

    def close(self) -> None:
        """The next job goes on with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What to evaluate, how, and where to keep it."""

    folder: Path
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
    retry_errors: bool = False

    @property
    def work(self) -> Path:
        """Where what a run is resumed from lies."""
        return self.folder / WORK

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
        """Completes the rows of every variant; the cases with errors among those of ``given``. Raises Refused, OSError,
        EngineError, ValueError."""
        self._begin()
        cases = read_cases(self.source, self.questions, self._cutter(), self.per_prompt)
        usable = [case for case in cases if case.error is None]
        say(f"{len(cases)} cases of {len({case.group for case in usable})} prompts, {len(cases) - len(usable)} bad")
        shared = _Shared(load)
        refined = {}
        with closing(shared):
            for variant in self.variants:
                refined[variant.name] = self._refine(variant, cases, shared, check)
        scoring = Scoring(self.work, cases, self.scorer, load_scorer, check, self.overwrite, self.retry_errors)
        scores = {
            DRAFTS: scoring.side(DRAFTS, {case.index: Answers("", case.drafts, case.cut) for case in usable}),
            BEST: scoring.side(
                BEST, {c.index: Answers("+best", [c.best], [c.best_cut]) for c in usable if c.best is not None}
            ),
        }
        errors = 0
        for variant in self.variants:
            answers = {index: _answers(row) for index, row in refined[variant.name].items() if row["error"] is None}
            scored = scoring.side(variant.name, answers)
            rows = [
                joined(case, variant.name, refined[variant.name].get(case.index), scores, scored.get(case.index))
                for case in cases
            ]
            write_whole(self.folder / f"{variant.name}.jsonl", b"".join(encode(row) for row in rows))
            errors += sum(row["error"] is not None for row in rows) if variant.name == GIVEN else 0
        return errors

    def _begin(self) -> None:
        self.work.mkdir(parents=True, exist_ok=True)
        path, setting = self.folder / RESULTS, self.setting()
        before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        changed = difference(before.get("setting"), setting) if before else None
        if changed and not self.overwrite:
            raise Refused(f"{self.folder} holds another evaluation ({changed}): give another --output, or --overwrite")
        if before and self.overwrite:
            for name in before.get("variants", {}):
                (self.folder / f"{name}.jsonl").unlink(missing_ok=True)
        kept = before.get("variants", {}) if before and not self.overwrite else {}
        made = {variant.name: variant.fields() for variant in self.variants}
        clash = sorted(name for name in made if name in kept and kept[name] != made[name])
        if clash:
            raise Refused(
                f"{self.folder} has {', '.join(clash)} with other options: give another --output, or --overwrite"
            )
        record = {
            "setting": setting,
            "shown": {"input": self.source.path, "model": str(self.checkpoint), "run": _run(self.load_options)},
            "variants": {**kept, **made},
        }
        write_whole(path, (json.dumps(record, indent=1) + "\n").encode())

    def _cutter(self) -> Callable[[str], tuple[str, bool]]:
        from engine.text import load_tokenizer

        tokenizer = load_tokenizer(self.checkpoint, bool(self.load_options.get("trust_remote_code")))
        limit = self.variants[0].options.max_new_tokens

        def cut(text: str) -> tuple[str, bool]:
            if self.whole_drafts or tokenizer is None:
                return text, False
            ids = tokenizer(text.strip(), add_special_tokens=False)["input_ids"]
            if len(ids) <= limit:
                return text, False
            return str(tokenizer.decode(ids[:limit], skip_special_tokens=True)), True

        return cut

    def _refine(
        self, variant: Variant, cases: Sequence[Case], shared: _Shared, check: Callable[[], None]
    ) -> dict[int, Fields]:
        """Rows of ``engine.job`` by case."""
        inputs, output = self.work / f"{variant.name}.input.jsonl", self.work / f"{variant.name}.refined.jsonl"
        write_whole(inputs, b"".join(encode(row) for row in input_rows(cases, variant.guess)))
        source = Source.open(str(inputs))
        settings = job_settings(
            source, None, self.checkpoint, self.load_options, variant.options, token_ids=True, ordered=True
        )
        job = Job(
            source=source, output=output, settings=settings, options=variant.options, token_ids=True,
            overwrite=self.overwrite, retry_errors=self.retry_errors,
        )  # fmt: skip
        reporter = Reporter(name=f"engine.evaluate {variant.name}")
        try:
            job.run(shared.take, reporter, check)
        except BaseException:
            reporter.close()
            raise
        reporter.end("finished")
        return {row.fields["id"]: row.fields for row in read_finished(output)}


def _answers(row: Fields) -> Answers:
    turns = row.get("answers") or [row]
    return Answers(REFINED, [turn["text"] for turn in turns], [turn["finish_reason"] == "length" for turn in turns])


def _run(load_options: dict[str, Any]) -> dict[str, Any]:
    import platform

    import torch
    import transformers

    names = ("dtype", "device", "max_batch_size", "max_batch_tokens", "kv_cache_tokens")
    return {
        **{name: str(load_options[name]) for name in names},
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
