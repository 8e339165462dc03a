"""The training commands of README, as they stand there, on the refiner that ships: log and curves under bench/results/.

python -m bench.training_run --data alpaca_responses.jsonl [name=value ...]
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.measure import RESULTS, machine, save
from engine.refiner import DEFAULT_CHECKPOINT
from engine.training.plot import PICTURE, read_log

HELD_OUT = 40
NAME = "training_run"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="trajectories with rewards")
    parser.add_argument("settings", nargs="*", metavar="name=value", help="of engine.train, beyond README's")
    args = parser.parse_args()
    rows = sum(1 for line in args.data.read_text(encoding="utf-8").splitlines() if line.strip())
    results: dict[str, Any] = {"machine": machine(), "rows": rows, "held_out": HELD_OUT}
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "refiner")
        train = [sys.executable, "-m", "engine.train"]
        start = time.monotonic()
        subprocess.run(
            [*train, f"model={DEFAULT_CHECKPOINT}", f"data={args.data}", f"held_out={HELD_OUT}", f"output={output}",
             *args.settings], check=True,
        )  # fmt: skip
        results["seconds"] = time.monotonic() - start
        subprocess.run([*train, "--plot", str(output)], check=True)
        results["log"] = read_log(output)
        shutil.copy(output / PICTURE, RESULTS / f"{NAME}_{PICTURE}")
        samples = (output / "samples.jsonl").read_text(encoding="utf-8").splitlines()
        results["last_sample"] = json.loads(samples[-1])
    save(NAME, results)


if __name__ == "__main__":
    main()
