"""The oldest Triton that is supported compiles the kernels too, and interprets them to the same results."""

import os
import platform
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OLDEST = "3.6.0"
SOME = "24"
"""Compilations out of all, spread over operations, shapes and chips: they take most of a second each."""
ON_SM_90 = (
    "consistency_loss-gemma-2-9b",
    "gated_activation-gemma-2-9b, 2048 rows",
    "jacobi-64 slots, 2048 rows",
    "linear_argmax-gemma-2-9b, 1 row",
    "linear_argmax-gemma-2-9b, 256 rows",
    "linear_sample-gemma-2-9b, 256 rows",
    "paged_attention-gemma-2-2b, 4 rows of 4",
    "paged_attention-gemma-2-9b, 256 rows of 1",
    "rms_norm-gemma-2-9b",
    "rope_kv_write-gemma-2-9b",
)
"""Of every operation a shape, or as many as all of its kernels take."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(platform.system() != "Linux", reason="Triton's wheels are for Linux"),
]


@pytest.fixture(scope="module")
def oldest() -> Path:
    """A folder with only that version, beside which everything else is found as usual; kept in build/."""
    folder = ROOT / "build" / f"triton-{OLDEST}"
    if not folder.exists():
        folder.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as new:
            command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", new, f"triton=={OLDEST}"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"pip cannot get Triton {OLDEST}: {done.stderr.strip().splitlines()[-1]}")
            with suppress(OSError):  # another process of the tests was here first
                Path(new).rename(folder)
            Path(new).mkdir(exist_ok=True)  # what is to be removed now
    return folder


def run(oldest: Path, *arguments: str, **variables: str) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"PYTHONPATH": str(oldest), "OMP_NUM_THREADS": "1", **variables}
    version = [sys.executable, "-c", "import triton; print(triton.__version__)"]
    found = subprocess.run(version, env=environment, capture_output=True, text=True, check=True).stdout.strip()
    assert found == OLDEST
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-n", "0", "-W", "ignore", *arguments]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout


def test_compiles_without_spills_and_on_tensor_cores(oldest: Path) -> None:
    assert f"{SOME} passed" in run(oldest, "--few", SOME, "tests/kernels/test_triton_compile.py")


def test_compiles_every_kernel_for_one_chip(oldest: Path) -> None:
    """Those above are few, and may leave out all of an operation's for a chip."""
    tables = (ROOT / "bench/results/triton_aot").glob("*.json")
    assert {shape.partition("-")[0] for shape in ON_SM_90} == {table.stem for table in tables}
    tests = [f"tests/kernels/test_triton_compile.py::test_figures[{shape}-90]" for shape in ON_SM_90]
    assert f"{len(tests)} passed" in run(oldest, *tests)


def test_interprets(oldest: Path) -> None:
    files = sorted(str(path) for path in Path(__file__).parent.glob("*_triton_*cases.py"))
    assert f"{2 * len(files)} passed" in run(oldest, "--few", "2", *files, TRITON_INTERPRET="1")
