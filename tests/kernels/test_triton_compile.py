"""Every Triton kernel of the loss compiled for each chip, its figures held against the committed table and the chip."""

import dataclasses
import json
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

from tests.kernels import triton_ahead_of_time as ahead  # noqa: E402

pytestmark = pytest.mark.slow

TABLE = json.loads(Path(__file__).parents[2].joinpath("bench/results/triton_aot.json").read_text())
SPILLED_BY_3_6 = {80: 68, 90: 0, 100: 8}
"""Bytes, by Triton 3.6 in one kernel each; later versions spill nothing."""
NEW = "if that is intended, run python -m bench.triton_table and commit its output"


@pytest.mark.parametrize("chip", ahead.CHIPS)
@pytest.mark.parametrize("shape", ahead.SHAPES)
def test_figures(shape: str, chip: int) -> None:
    launches = {launch.name: launch for launch in ahead.launches(ahead.SHAPES[shape])}
    committed = TABLE["figures"][shape][f"sm_{chip}"]
    assert launches.keys() == committed.keys(), f"other kernels than in the table: {NEW}"
    for name, launch in launches.items():
        figures, before = ahead.figures(launch, chip), committed[name]
        print(f"sm_{chip} {shape} {name}: {figures}")
        assert figures.spilled <= (SPILLED_BY_3_6[chip] if triton.__version__ < "3.9" else 0), name
        assert figures.shared <= ahead.SHARED_LIMIT[chip], name
        assert figures.registers * 32 * launch.warps <= 65536, name
        assert figures.tensor_cores == before["tensor_cores"], name
        if triton.__version__ == TABLE["triton"]:
            assert dataclasses.asdict(figures) == before, f"{name}: not as in the table; {NEW}"


def test_table_names_no_spill_and_every_product_on_tensor_cores() -> None:
    """Of the table itself, whatever compiled it."""
    for shape, chips in TABLE["figures"].items():
        for chip, kernels in chips.items():
            for name, figures in kernels.items():
                assert figures["spilled"] == 0, (shape, chip, name)
                multiplies = name.startswith(("project", "gathered")) and "float32" not in shape
                expected = ahead.TENSOR_CORES[int(chip.removeprefix("sm_"))] if multiplies else None
                assert figures["tensor_cores"] == expected, (shape, chip, name)


def test_grids_fit() -> None:
    """At most 2^31 - 1 programs in the first dimension and 65535 in the others, whatever the shape."""
    shape = ahead.SHAPES["llama-3-8b with extras"]
    for d, v, rows in ((64, 1 << 23, 8192), (4096, 256000, 1 << 20)):
        for launch in ahead.launches(dataclasses.replace(shape, d=d, v=v), rows):
            first, *others = launch.grid
            assert 0 < first < 1 << 31
            assert all(size <= 65535 for size in others)
