"""The prompts that a build's memory is measured with."""

import json
from pathlib import Path

from bench.bench_build import write_prompts
from engine.job.source import Source
from engine.trajectories.sources import Collection


def test_prompts_are_different_and_of_one_length(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    write_prompts(path, 300, 40)
    prompts = [json.loads(line)["prompt"] for line in path.read_text().splitlines()]
    assert {len(prompt) for prompt in prompts} == {40}
    collection = Collection()
    collection.add_file(Source.open(str(path)))
    assert (len(collection.rows), collection.repeated, collection.bad) == (300, 0, [])
