"""Every Triton kernel compiled for each chip, its figures held against the committed tables and the chip."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")

from tests.kernels.ahead_of_time import OPERATIONS, consistency_loss, jacobi  # noqa: E402
from tests.kernels.ahead_of_time.barriers import barriers_in, phases  # noqa: E402
from tests.kernels.ahead_of_time.compiling import (  # noqa: E402
    CHIPS,
    SHARED_LIMIT,
    TENSOR_CORES,
    compiled,
    figures,
    widest_load,
)

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parents[2] / "bench/results/triton_aot"
VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
SPILLED_BY_3_6 = {
    ("gathered_kernel", 80): 68, ("project_sums_kernel", 100): 8, ("project_differences_kernel", 100): 8,
    ("project_argmax_kernel", 80): 12, ("attention_kernel", 80): 124,
}  # fmt: skip
"""Bytes, at most, by kernel and chip; later versions spill nothing."""
NEW = "if that is intended, run python -m bench.triton_table and commit its output"


def table(operation: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / f"{operation}.json").read_text())
    return found


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize(
    ("operation", "shape"), [(name, shape) for name, op in OPERATIONS.items() for shape in op.SHAPES]
)
def test_figures(operation: str, shape: str, chip: int) -> None:
    launches = {launch.name: launch for launch in OPERATIONS[operation].launches(shape) if chip in launch.chips}
    before = table(operation)
    committed = before["figures"][shape][f"sm_{chip}"]
    assert launches.keys() == committed.keys(), f"other kernels than in the table: {NEW}"
    for name, launch in launches.items():
        allowed = SPILLED_BY_3_6.get((launch.kernel.__name__, chip), 0) if VERSION < (3, 9) else 0
        found = figures(launch, chip)
        print(f"sm_{chip} {shape} {name}: {found}")
        assert found.spilled <= allowed, name
        assert found.shared <= SHARED_LIMIT[chip], name
        assert found.registers * 32 * launch.warps <= 65536, name
        assert found.tensor_cores == committed[name]["tensor_cores"], name
        assert found.load_bytes >= committed[name]["load_bytes"], f"{name}: narrower loads than in the table"
        if triton.__version__ == before["triton"]:
            assert dataclasses.asdict(found) == committed[name], f"{name}: not as in the table; {NEW}"


@pytest.mark.parametrize("operation", OPERATIONS)
def test_table_names_no_spill_and_every_product_on_tensor_cores(operation: str) -> None:
    """Of the table itself, whatever compiled it."""
    for shape, chips in table(operation)["figures"].items():
        for chip, kernels in chips.items():
            for name, found in kernels.items():
                assert found["spilled"] == 0, (shape, chip, name)
                multiplies = OPERATIONS[operation].multiplies(name, shape)
                best = TENSOR_CORES[int(chip.removeprefix("sm_"))]
                expected = best if multiplies is True else multiplies or None
                assert found["tensor_cores"] == expected, (shape, chip, name)


@pytest.mark.parametrize("chip", CHIPS)
def test_accepting_reads_before_it_writes(chip: int) -> None:
    """Threads of a program are not in step: what one writes, another must have read before, behind a barrier.

    An interpreter cannot show that, it has no threads. The rates alone are written before the first barrier: by the
    thread that computed them, from what it read itself.
    """
    (launch,) = (found for found in jacobi.launches("64 slots, 2048 rows") if found.kernel.__name__ == "accept_kernel")
    done = compiled(launch, chip)
    deciding, writing, ahead = phases(done.asm["ttgir"])
    assert barriers_in(done.asm["ptx"], launch.kernel) == 2
    assert {"fields", "text", "draft", "iterate"} < deciding.loads
    assert deciding.stores == {"rates"}
    assert writing.stores == {"fields", "text"}
    assert not writing.loads & {"fields", "rates"}  # of the text it reads places below those it writes
    assert ahead.stores == {"fields", "iterate"}
    assert ahead.loads == {"predictions", "text", "eos"}


def test_grids_fit() -> None:
    """At most 2^31 - 1 programs in the first dimension and 65535 in the others, whatever the shape."""
    shape = consistency_loss.SHAPES["llama-3-8b with extras"]
    for d, v, rows in ((64, 1 << 23, 8192), (4096, 256000, 1 << 20), (64, 16, 40_000_000)):
        for launch in consistency_loss.launches_of(dataclasses.replace(shape, d=d, v=v), rows):
            first, *others = launch.grid
            assert 0 < first < 1 << 31
            assert all(size <= 65535 for size in others)


@pytest.mark.parametrize(
    ("ptx", "expected"),
    [
        ("ld.shared.v4.b32 { %r1, %r2, %r3, %r4 }, [ %r5 + 0 ];", 0),
        ("@%p1 ld.global.b16 { %rs1 }, [ %rd1 + 0 ];", 2),
        ("ld.global.b32 { %r1 }, [ %rd1 + 0 ];\nld.global.v2.f32 { %r1, %r2 }, [ %rd1 + 0 ];", 8),
        ("ld.global.L1::evict_last.L2::cache_hint.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ], %rd2;", 16),
        ("ld.global.v8.b32 { %r1, %r2, %r3, %r4, %r5, %r6, %r7, %r8 }, [ %rd1 + 0 ];", 32),
        ("cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;", 16),
        ("cp.async.ca.shared.global.L2::cache_hint [ %r1 + 0 ], [ %rd1 + 0 ], 0x4, %r2, %rd3;", 4),
    ],
)
def test_widest_load(ptx: str, expected: int) -> None:
    assert widest_load(ptx) == expected
