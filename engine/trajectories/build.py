"""Builds a trajectory file: prompts x models -> answers, each kept in a journal as soon as it is there -> rows in order.

The journal ``OUTPUT.responses`` is what makes a run resumable: an answer that was paid for is never asked for again. The
output is put together from it in the end, whole or not at all, so it does not depend on who answered first.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from engine.errors import EngineError
from engine.job.book import Book, open_book
from engine.job.output import Refused, Settings, read_finished, read_record
from engine.job.rows import encode
from engine.job.settings import checkpoint_digest
from engine.job.source import Source
from engine.trajectories.endpoint import Answer, Endpoint, EndpointError, EndpointRefused, Pool, Sampling
from engine.trajectories.local import answer_all
from engine.trajectories.schema import BadRow, Response, TrajectoryRow, error_fields, without_repeats
from engine.trajectories.sources import Collection
from engine.trajectories.tally import Tally

JOURNAL_SUFFIX, ERRORS_SUFFIX = ".responses", ".errors"
WAIT_SECONDS = 0.1
MOST_FAILURES = 8
"""So many requests per place in the pool that fail one after the other, and the endpoint is taken to be gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A base model: at an endpoint, or a local checkpoint."""

    name: str
    url: str | None = None
    checkpoint: Path | None = None
    price_in: float = 0.0
    """Per million tokens of prompts."""
    price_out: float = 0.0

    def settings(self) -> dict[str, Any]:
        if self.checkpoint is None:
            return {"url": self.url}
        return {"checkpoint": checkpoint_digest(self.checkpoint)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """How an endpoint is spoken to; nothing of it changes an answer."""

    key: str | None = None
    concurrency: int = 8
    timeout: float = 300.0
    retries: int = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """What to build from what."""

    output: Path
    prompts: list[Source]
    responses: list[Source] = field(default_factory=list)
    models: list[Model] = field(default_factory=list)
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    sample: int | None = None
    pair_rewards: bool = False
    client: Client = field(default_factory=Client)
    load_options: dict[str, Any] = field(default_factory=dict)
    overwrite: bool = False
    retry_errors: bool = False

    @property
    def journal(self) -> Path:
        """Where the models' answers are kept."""
        return self.output.with_name(self.output.name + JOURNAL_SUFFIX)

    @property
    def errors(self) -> Path:
        """Where rows and answers that failed are told, if there are any."""
        return self.output.with_name(self.output.name + ERRORS_SUFFIX)

    def settings(self) -> Settings:
        """What decides the bytes of the output."""
        digests = [source.digest for source in (*self.prompts, *self.responses)]
        options = {"seed": self.seed, "sample": self.sample, "pair_rewards": self.pair_rewards, **asdict(self.sampling)}
        return {
            "input": {"digest": hashlib.blake2b(json.dumps([len(self.prompts), *digests]).encode()).hexdigest()[:32]},
            "models": {model.name: model.settings() for model in self.models},
            "order of models": {"names": [model.name for model in self.models]},
            "options": options,
            "plan": {"concurrency": 1},
        }

    def run(self, say: Callable[[str], None], check: Callable[[], None]) -> int:
        """Completes journal and output; the number of errors told. Raises Refused, OSError, EngineError."""
        foreign = self.output.exists() and read_record(self.journal)[0] is None
        if foreign and not self.overwrite:
            raise Refused(f"{self.output} is there and no build's: give another --output, or --overwrite")
        collected = Collection()
        for source in self.prompts:
            collected.add_file(source, pair_rewards=self.pair_rewards)
        for source in self.responses:
            collected.add_file(source, pair_rewards=self.pair_rewards, only_known=True)
        rows = collected.finished(self.sample, self.seed)
        say(
            f"{len(rows)} prompts ({collected.repeated} repeated, {len(collected.bad)} bad rows, "
            f"{collected.unmatched} rows of --responses belong to none of them)"
        )
        with open_book(self.journal, self.settings(), self.overwrite, self.retry_errors) as book:
            _Answers(self, rows, book, say, check).complete()
            errors = self._assemble(rows, collected.bad)
        say(f"{self.output}: {errors.rows} trajectories; {errors.count} errors" + errors.where(self.errors))
        return errors.count

    def unit(self, row: int, model: int) -> int:
        """The journal's index of a model's answer."""
        return row * len(self.models) + model

    def _assemble(self, rows: list[TrajectoryRow], bad: list[BadRow]) -> "_Told":
        places = {row.index: (row.end - len(row.line), len(row.line)) for row in read_finished(self.journal)}
        told = _Told([row.fields() for row in bad])
        new = self.output.with_name(self.output.name + ".new")
        with self.journal.open("rb") as journal, new.open("wb") as file:
            for i, row in enumerate(rows):
                added = []
                for j, model in enumerate(self.models):
                    if self.unit(i, j) not in places:
                        continue
                    start, length = places[self.unit(i, j)]
                    journal.seek(start)
                    answer = json.loads(journal.read(length))
                    if answer["error"]:
                        told.add(row, answer["error"], model.name)
                    else:
                        added.append(
                            Response(model=model.name, text=answer["text"], truncated=answer.get("truncated", False))
                        )
                whole = without_repeats(replace(row, responses=[*row.responses, *added]))
                if whole.responses:
                    told.rows += 1
                    file.write(encode(whole.fields()))
                else:
                    told.add(row, error_fields("there is no response to this prompt"))
            file.flush()
            os.fsync(file.fileno())
        told.write(self.errors)
        os.replace(new, self.output)
        return told


class _Told:
    """The errors beside an output."""

    def __init__(self, lines: list[dict[str, Any]]) -> None:
        self.lines, self.rows = lines, 0

    @property
    def count(self) -> int:
        return len(self.lines)

    def add(self, row: TrajectoryRow, error: dict[str, Any], model: str | None = None) -> None:
        whose = {} if model is None else {"model": model}
        self.lines.append({"prompt_id": row.prompt_id, **whose, "error": error})

    def where(self, path: Path) -> str:
        return f" in {path}" if self.lines else ""

    def write(self, path: Path) -> None:
        new = path.with_name(path.name + ".new")
        if not self.lines:
            path.unlink(missing_ok=True)
            new.unlink(missing_ok=True)  # of a run that ended while it wrote it
            return
        new.write_bytes(b"".join(encode(line) for line in self.lines))
        os.replace(new, path)


class _Answers:
    """Completes the journal."""

    def __init__(
        self, job: Build, rows: list[TrajectoryRow], book: Book, say: Callable[[str], None], check: Callable[[], None]
    ) -> None:
        self.job, self.rows, self.book, self.check = job, rows, book, check
        self.wanted = {
            job.unit(i, j)
            for i, row in enumerate(rows)
            for j, model in enumerate(job.models)
            if all(response.model != model.name for response in row.responses)  # else it has answered already
        }
        self.tally = Tally({model.name: (model.price_in, model.price_out) for model in job.models}, say)
        self.failures = dict.fromkeys((model.url for model in job.models), 0)

    def complete(self) -> None:
        self.tally.start(len(self.wanted), self.book.done.count)
        self.book.begin(all_kept=True)
        try:
            self._ask_endpoints()
            self._ask_checkpoints()
        finally:
            self.book.flush()
        self.book.finish(len(self.wanted))
        self.tally.end(row.fields for row in read_finished(self.job.journal))

    def _due(self, kind: Callable[[Model], bool]) -> Iterator[tuple[int, TrajectoryRow, Model]]:
        for i, row in enumerate(self.rows):
            for j, model in enumerate(self.job.models):
                unit = self.job.unit(i, j)
                if kind(model) and unit in self.wanted and unit not in self.book.done:
                    yield unit, row, model

    def _seed(self, row: TrajectoryRow, model: Model) -> int:
        text = json.dumps([self.job.seed, str(row.prompt_id), model.name])
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1

    def _ask_endpoints(self) -> None:
        due = self._due(lambda model: model.url is not None)
        following = next(due, None)
        if following is None:
            return
        client, places = self.job.client, self.job.client.concurrency
        endpoints = {
            url: Endpoint(
                url, key=client.key, timeout=client.timeout, retries=client.retries, connections=places
            )
            for url in {model.url for model in self.job.models if model.url}
        }  # fmt: skip
        asked: dict[int, tuple[TrajectoryRow, Model]] = {}
        with closing(Pool(places)) as pool:
            try:
                while following is not None or pool.running:
                    self.check()
                    while following is not None and pool.has_room:
                        unit, row, model = following
                        asked[unit] = row, model
                        ask = endpoints[model.url or ""].ask
                        pool.add(unit, partial(ask, model.name, row.chat(), self.job.sampling, self._seed(row, model)))
                        following = next(due, None)
                    for unit, answer in pool.finished(WAIT_SECONDS):
                        self._take(unit, *asked.pop(unit), answer)
                    self.book.tick(idle=True)  # what was paid for is on disk before the next is asked
            finally:
                self._keep(pool, asked)
                for endpoint in endpoints.values():
                    endpoint.close()

    def _keep(self, pool: Pool, asked: dict[int, tuple[TrajectoryRow, Model]]) -> None:
        """Answers that are there when the job ends early: they are paid for."""
        for unit, answer in pool.finished(0.0):
            if isinstance(answer, Answer):
                self._take(unit, *asked.pop(unit), answer)

    def _ask_checkpoints(self) -> None:
        for model in self.job.models:
            if model.checkpoint is None:
                continue
            units: dict[int, TrajectoryRow] = {}

            def rows(model: Model = model, units: dict[int, TrajectoryRow] = units) -> Iterator[Any]:
                for unit, row, _ in self._due(lambda other: other is model):
                    units[unit] = row
                    yield unit, row, self._seed(row, model)

            for unit, answer in answer_all(
                model.checkpoint, rows(), self.job.sampling, self.job.load_options, self.check
            ):
                self._take(unit, units.pop(unit), model, answer)

    def _take(self, unit: int, row: TrajectoryRow, model: Model, answer: Answer | BaseException) -> None:
        line: dict[str, Any] = {"prompt_id": row.prompt_id, "model": model.name}
        if isinstance(answer, Answer):
            self.failures[model.url] = 0
            line |= {**asdict(answer), "index": unit, "error": None}
        elif isinstance(answer, EngineError) and not isinstance(answer, EndpointRefused):
            line |= {"index": unit, "error": error_fields(answer)}
            self.failures[model.url] += isinstance(answer, EndpointError)
        else:
            raise answer
        self.book.write(unit, encode(line))
        self.tally.add(line)
        if self.failures[model.url] >= MOST_FAILURES * self.job.client.concurrency:
            raise EndpointRefused(
                f"{self.failures[model.url]} requests in a row failed, the last one: {answer}; run the same command again with "
                "--retry-errors once the endpoint answers"
            )
