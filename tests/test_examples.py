"""The examples do what they say: the scripts are run, the Kubernetes job's own command and arguments too, in a shell."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.engine.checkpoints import build

EXAMPLES = Path(__file__).parents[1] / "examples"
ROWS = 30


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("llama", tmp_path_factory.mktemp("model")).folder


def drafts(path: Path, first: int, count: int) -> Path:
    rows = [{"id": i, "prompt_ids": [5 + i, 7], "draft_ids": [9] * (i % 5)} for i in range(first, first + count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def start(command: list[str], folder: Path, **variables: str) -> "subprocess.Popen[str]":
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "RANK", "WORLD"))}
    environment |= {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.Popen(command, env=environment, cwd=folder, stderr=subprocess.PIPE, text=True)


def ids(*paths: Path) -> list[int]:
    return [json.loads(line)["id"] for path in paths for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_slurm(model: Path, tmp_path: Path) -> None:
    """Two tasks share three files; an error row makes its task's status 3 and no other's."""
    source, refined = tmp_path / "drafts", tmp_path / "refined"
    source.mkdir()
    files = [drafts(source / f"{name}.jsonl", 6 * name, 6) for name in range(3)]
    with files[1].open("a") as file:
        file.write("{}\n")
    script = ["bash", str(EXAMPLES / "slurm.sbatch"), "drafts", "refined"]
    options = ["--model", str(model), "--max-new-tokens", "8"]
    count = {"SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_MIN": "4"}
    tasks = [start([*script, *options], tmp_path, **count, SLURM_ARRAY_TASK_ID=str(task)) for task in (4, 5)]
    said = [task.communicate(timeout=300)[1] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 3], said
    assert [path.name for path in sorted(refined.glob("*.jsonl"))] == [f"{name}.jsonl" for name in range(3)]
    assert ids(*(refined / f"{name}.jsonl" for name in range(3))) == [*range(12), 6, *range(12, 18)]


def container(job: dict[str, Any]) -> dict[str, Any]:
    (only,) = job["spec"]["template"]["spec"]["containers"]
    return dict(only)


@pytest.mark.slow
def test_kubernetes(model: Path, tmp_path: Path) -> None:
    """Every pod's command, with the index that it would be told: together they make the whole output."""
    job = yaml.safe_load((EXAMPLES / "kubernetes.yaml").read_text())
    spec, pod = job["spec"], container(job)
    env = {variable["name"]: variable for variable in pod["env"]}
    assert int(env["WORLD_SIZE"]["value"]) == spec["completions"] == spec["parallelism"] == 4
    assert spec["completionMode"] == "Indexed"
    assert env["RANK"]["valueFrom"]["fieldRef"]["fieldPath"].endswith("['batch.kubernetes.io/job-completion-index']")
    mount = pod["volumeMounts"][0]["mountPath"]
    arguments = [text.replace(mount, str(tmp_path)) for text in pod["args"] if text != "--device=cuda"]
    drafts(tmp_path / "drafts.jsonl", 0, ROWS)
    with (tmp_path / "drafts.jsonl").open("a") as file:
        file.write("{}\n")
    python = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    pods = [
        start(
            [*pod["command"], *arguments, "--model", str(model), "--max-new-tokens=8"], tmp_path,
            PATH=python, RANK=str(rank), WORLD_SIZE="4",
        )
        for rank in range(4)
    ]  # fmt: skip
    said = [pod.communicate(timeout=300)[1] for pod in pods]
    assert [pod.returncode for pod in pods] == [0] * 4, said
    assert ids(tmp_path / "refined.jsonl") == [*range(ROWS), ROWS]


def test_the_plan_is_what_its_command_prints() -> None:
    """As long as the measurements behind it are the committed ones."""
    command = [sys.executable, "-m", "bench.plan"]
    printed = subprocess.run(command, cwd=EXAMPLES.parent, capture_output=True, text=True, check=True).stdout
    assert printed.startswith("| what | figure |")
    assert printed in (EXAMPLES / "README.md").read_text()
