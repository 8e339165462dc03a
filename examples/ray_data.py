"""Refines JSON lines of prompt and draft on a Ray cluster: python examples/ray_data.py drafts.jsonl refined_folder [actors]

Every actor holds a model and takes a CPU (with device="cuda" and num_gpus=1 a GPU); leave one CPU more for reading and writing.
"""

import sys

import ray

from engine import DEFAULT_CONDITION, RefineOptions
from engine.columns import RefineColumns

source, target, actors = sys.argv[1], sys.argv[2], int((sys.argv[3:] or ["1"])[0])
ray.data.DataContext.get_current().execution_options.preserve_order = True
ray.data.read_json(source, lines=True).map_batches(
    RefineColumns,
    fn_constructor_kwargs={"options": RefineOptions(condition=DEFAULT_CONDITION)},  # and model=.., device="cuda"
    compute=ray.data.ActorPoolStrategy(size=actors),
    num_cpus=1,
    batch_size=256,
).write_json(target)
