"""What decides the bytes of an output: the input, the model, the options."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

from engine.job.output import Settings
from engine.job.source import Source
from engine.options import RefineOptions

MODEL_FILES = (".json", ".jinja", ".model", ".py", ".safetensors", ".txt")
WHOLE_BYTES = 16 << 20
SAMPLES, SAMPLE_BYTES = 1024, 16 << 10


def job_settings(
    source: Source,
    questions_digest: str | None,
    checkpoint: Path,
    load_options: dict[str, Any],
    options: RefineOptions,
    *,
    token_ids: bool,
    ordered: bool,
) -> Settings:
    """The record to keep beside an output. How much runs at once is not in it, because no answer depends on it, but for
    ``plan``: the number of sequences that windows are planned for, which a job keeps from its first run on."""
    concurrency = min(load_options["max_batch_size"], load_options["kv_cache_tokens"] // options.max_new_tokens)
    if source.rows is not None:
        concurrency = min(concurrency, source.rows)
    chosen = dataclasses.asdict(options)
    del chosen["concurrency"]
    return {
        "input": {"digest": source.digest, "form": source.form, "questions": questions_digest},
        "model": {
            "digest": checkpoint_digest(checkpoint),
            "dtype": str(load_options["dtype"]),
            "device": str(load_options["device"]).partition(":")[0],
            "backend": load_options["backend"],
        },
        "options": chosen,
        "output": {"token_ids": token_ids, "order": "input" if ordered else "as finished"},
        "plan": {"concurrency": max(concurrency, 1)},
    }


def checkpoint_digest(folder: Path) -> str:
    """Hash of a checkpoint's files; of large ones a thousand samples, which no two sets of trained weights share."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(folder.iterdir()):
        if path.suffix not in MODEL_FILES or not path.is_file():
            continue
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            if size <= WHOLE_BYTES:
                digest.update(file.read())
                continue
            for i in range(SAMPLES):
                file.seek(i * (size - SAMPLE_BYTES) // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
