"""An evaluation: cases through every variant of refinement, both sides scored, one row per case and variant."""

import functools
import json
import os
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.evaluate.cases import Case, read_cases
from engine.evaluate.join import joined
from engine.evaluate.results import JUDGES, RESULTS, RUNS, write_whole
from engine.evaluate.scores import Answers, Scoring
from engine.evaluate.variants import GIVEN, Variant, input_rows
from engine.job.book import Files
from engine.job.output import Claim, Refused, Settings, difference, read_finished, read_record
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
OVERWRITING = "overwriting"
"""In results.json from the start of a run with --overwrite to its end: the same command then goes on."""
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
    """Start anew, but for refined answers without errors whose own settings are these; an overwriting run that was cut short
    goes on."""
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
        """Completes the rows of every variant; how many of them have errors, a case counted once. Raises Refused, OSError,
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
        scoring = Scoring(self.work, cases, self.scorer, load_scorer, check, self.retry_errors)
        scores = {
            DRAFTS: scoring.side(DRAFTS, {case.index: _drafts(case) for case in usable}),
            BEST: scoring.side(
                BEST, {c.index: Answers(None, [c.best], [c.best_cut]) for c in usable if c.best is not None}
            ),
        }
        failed: set[int] = set()
        for variant in self.variants:
            answers = {
                index: self._answers(variant, cases[index], row)
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
            write_whole(self.folder / f"{variant.name}.jsonl", b"".join(encode(row) for row in rows))
            failed |= {row["index"] for row in rows if row["error"] is not None}
        self._write_record({name: value for name, value in self._record().items() if name != OVERWRITING})
        return len(failed)

    def _record(self) -> dict[str, Any]:
        """What results.json holds; nothing where there is none."""
        path = self.folder / RESULTS
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return found

    def _write_record(self, record: dict[str, Any]) -> None:
        write_whole(self.folder / RESULTS, (json.dumps(record, indent=1) + "\n").encode())

    def _begin(self) -> None:
        self.work.mkdir(parents=True, exist_ok=True)
        before, setting = self._record(), self.setting()
        known: dict[str, Any] = before.get("variants", {})
        made = {variant.name: variant.fields() for variant in self.variants}
        changed = difference(before.get("setting"), setting) if before else None
        clash = sorted(name for name in made if name in known and _without_runs(known[name]) != made[name])
        goes_on = bool(before.get(OVERWRITING)) and not changed and not clash and set(known) == set(made)
        anew = self.overwrite and not goes_on
        if changed and not anew:
            raise Refused(f"{self.folder} holds another evaluation ({changed}): give another --output, or --overwrite")
        if clash and not anew:
            raise Refused(
                f"{self.folder} has {', '.join(clash)} with other options: give another --output, or --overwrite"
            )
        if anew:
            self._drop(known)
        record = {
            **({OVERWRITING: True} if anew or goes_on else {}),
            "setting": setting,
            "shown": {"input": self.source.path, "model": str(self.checkpoint)},
            "variants": {
                **({} if anew else known),
                **{name: {**fields, RUNS: known.get(name, {}).get(RUNS, [])} for name, fields in made.items()},
            },
        }
        self._write_record(record)

    def _drop(self, known: dict[str, Any]) -> None:
        """Removes what is begun anew: all but the refined answers of this run's variants, which their own settings judge.
        Raises Refused where another process writes them."""
        asked = {variant.name for variant in self.variants}
        for name in sorted({path.name.partition(".jsonl")[0] for path in self.work.glob("*.jsonl*")}):
            variant, _, kind = name.rpartition(".")
            path = self.work / f"{name}.jsonl"
            if kind == "scores" or (kind == "refined" and variant not in asked):
                _drop_book(path)
            elif kind == "input" and variant not in asked:
                path.unlink(missing_ok=True)
        for path in (*(self.folder / f"{name}.jsonl" for name in known), *(self.folder / JUDGES).glob("*.jsonl")):
            path.unlink(missing_ok=True)

    def _answers(self, variant: Variant, case: Case, row: Fields) -> Answers:
        turns, limit = row.get("answers") or [row], variant.options.max_new_tokens
        # a file of rewards by name means the model's answer to the prompt, as it is refined
        named = variant.name == GIVEN and len(case.turns) == 1
        return Answers(
            REFINED if named else None,
            [turn["text"] for turn in turns],
            [self._ends_at_limit(turn, limit) for turn in turns],
        )

    def _ends_at_limit(self, turn: Fields, limit: int) -> bool:
        """Whether an answer has no end of turn for want of room."""
        if turn["finish_reason"] == "steps" and len(turn["token_ids"]) == limit:
            return turn["token_ids"][-1] not in _eos(self.checkpoint, bool(self.load_options.get("trust_remote_code")))
        return bool(turn["finish_reason"] == "length")

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
        self, variant: Variant, cases: Sequence[Case], shared: _Shared, check: Callable[[], None]
    ) -> dict[int, Fields]:
        """Rows of ``engine.job`` by case."""
        inputs, output = self.work / f"{variant.name}.input.jsonl", self.work / f"{variant.name}.refined.jsonl"
        write_whole(inputs, b"".join(encode(row) for row in input_rows(cases, variant.guess)))
        source = Source.open(str(inputs))
        settings = job_settings(
            source, None, self.checkpoint, self.load_options, variant.options, token_ids=True, ordered=True
        )
        if self.overwrite and not _is_of(output, settings):
            _drop_book(output)
        fresh = read_record(output)[0] is None
        job = Job(
            source=source, output=output, settings=settings, options=variant.options, token_ids=True,
            retry_errors=self.retry_errors or self.overwrite,
        )  # fmt: skip

        def take() -> RefinerLike:
            refiner = shared.take()
            self._note_run(variant.name, fresh)
            return refiner

        reporter = Reporter(name=f"engine.evaluate {variant.name}")
        try:
            job.run(take, reporter, check)
        except BaseException:
            reporter.close()
            raise
        reporter.end("finished")
        return {row.fields["id"]: row.fields for row in read_finished(output)}

    def _note_run(self, name: str, fresh: bool) -> None:
        """Records what a variant's rows are computed with, beside that of those kept."""
        record, now = self._record(), _run(self.load_options)
        before = [] if fresh else record["variants"][name][RUNS]
        record["variants"][name][RUNS] = [*(run for run in before if run != now), now]
        self._write_record(record)


def _is_of(output: Path, settings: Settings) -> bool:
    """Whether the rows of an output can be read and were made with these settings."""
    try:
        for _ in read_finished(output) if output.exists() else ():
            pass
    except Refused:
        return False
    return difference(read_record(output)[0], settings) is None


def _drop_book(rows: Path) -> None:
    """Removes an output with everything beside it. Raises Refused where another process writes it."""
    files = Files(rows, rows)
    with Claim(rows) as claim:
        for path in (rows, files.retry, *files.all_ahead):
            path.unlink(missing_ok=True)
        claim.remove()


def _drafts(case: Case) -> Answers:
    """A file of rewards by name means the model's whole answer to the prompt."""
    return Answers("" if case.whole and len(case.turns) == 1 else None, case.drafts, case.cut)


def _without_runs(variant: Fields) -> Fields:
    return {name: value for name, value in variant.items() if name != RUNS}


@functools.cache
def _eos(checkpoint: Path, remote: bool) -> frozenset[int]:
    from transformers import AutoConfig

    from engine.refiner import read_vocabulary
    from engine.text import load_tokenizer

    config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=remote)
    return read_vocabulary(checkpoint, config, load_tokenizer(checkpoint, remote)).eos


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
