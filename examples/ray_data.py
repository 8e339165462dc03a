"""Refines JSON lines of prompt and draft on a Ray cluster: python examples/ray_data.py drafts.jsonl refined_folder [actors]"""

import sys

import ray

from engine import RefineOptions
from engine.columns import RefineColumns

source, target, actors = sys.argv[1], sys.argv[2], int((sys.argv[3:] or ["2"])[0])
ray.data.DataContext.get_current().execution_options.preserve_order = True
ray.data.read_json(source, lines=True).map_batches(
    RefineColumns,
    fn_constructor_kwargs={"options": RefineOptions(max_new_tokens=256)},  # and model=, device="cuda" with num_gpus=1
    compute=ray.data.ActorPoolStrategy(size=actors),
    batch_size=256,
).write_json(target)
