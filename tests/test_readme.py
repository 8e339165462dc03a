"""The README's Python examples run as they stand, on the refiner that ships."""

import re
from pathlib import Path
from typing import Any

import torch

from engine.refiner import DEFAULT_CHECKPOINT

README = Path(__file__).parents[1] / "README.md"


def test_examples(capsys: Any) -> None:
    examples = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(examples) >= 3
    names: dict[str, Any] = {}  # later examples use what earlier ones made
    for code in examples:
        exec(code.replace("path/or/hub-id", str(DEFAULT_CHECKPOINT)), names)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].endswith("True")  # converged, of the first example
    assert printed[-1].endswith("|")  # nothing tentative in the last iterate of the second
    assert torch.isfinite(names["out"].loss)
    assert all(parameter.grad is not None for parameter in names["model"].parameters())
