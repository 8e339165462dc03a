"""What the GPU path has to reach, and what it was measured to: for the benchmark's output and the results page."""

from typing import Any, NamedTuple

NOT_MEASURED = "not measured"
AT_LEAST_OF_FLOOR = 0.8
"""Speed of a kernel over that of moving its bytes, or of its arithmetic, at the measured ceilings."""
MOST_OVER_FLOOR = 1.25
MOST_IDLE_SECONDS = 20e-6
LEAST_TIMES_GENERATE = 40
MODEL = "gemma-2-9b"

KERNELS = (
    ("paged_attention", f"{MODEL}: 1 x 256 rows behind 512", AT_LEAST_OF_FLOOR),
    ("linear_argmax", f"{MODEL}, 256 rows", AT_LEAST_OF_FLOOR),
    ("linear_sample", f"{MODEL}, 256 rows", None),
    ("rms_norm", "256 x 4096", None),
    ("rope_kv_write", "llama-3-8b 256 rows", None),
    ("gated_activation", "silu 256 x 14336", None),
    ("jacobi_accept", "8 sequences, 256 rows, drafts of 256", None),
)
"""Operation, shape and target; the shapes are among those of bench/gpu."""


class Line(NamedTuple):
    what: str
    target: str
    found: str


def kernel_lines(results: dict[str, Any]) -> list[Line]:
    """``results``: of the stage "kernels", or nothing."""
    cases = [case for records in results.values() for case in records if "variants" in case]
    lines = []
    for operation, shape, target in KERNELS:
        case = next((c for c in cases if (c["operation"], c["shape"]) == (operation, shape)), None)
        wanted = f"≥ {target:.0%} of the floor's speed" if target else ""
        lines.append(Line(f"{operation}, {shape}", wanted, of_kernel(case["variants"]) if case else NOT_MEASURED))
    return lines


def of_kernel(variants: dict[str, Any]) -> str:
    """Time and share of the floor's speed, and the fastest of the others beside it."""
    ours = variants["ours"]
    if "error" in ours or "median_seconds" not in ours:
        return f"failed: {ours.get('error', 'not timed')}"
    others = {name: v["median_seconds"] for name, v in variants.items() if name != "ours" and "median_seconds" in v}
    text = f"{1e6 * ours['median_seconds']:.1f} µs, {ours['share_of_floor']:.0%}"
    if not others:
        return text
    fastest = min(others, key=lambda name: others[name])
    return f"{text}; {fastest} takes {others[fastest] / ours['median_seconds']:.2f} times as long"


def engine_lines(results: dict[str, Any]) -> list[Line]:
    """Of the first model. ``results``: of the stage "engine", or nothing."""
    model, record = next(iter(results.items()), (MODEL, {}))
    step, gaps, alone = (record.get(name, {}) for name in ("step", "host_gaps", "batch 1"))
    over, idle = step.get("over_floor"), gaps.get("median_seconds")
    whole = record.get("one_launch", {}).get("no draft")
    times = alone.get("times_faster_than_generate", {}).get("refine, right draft")
    return [
        Line(
            f"Jacobi step, {model}, {step.get('rows', 256)} rows of one sequence",
            f"≤ {MOST_OVER_FLOOR} times the floor of weights read or arithmetic",
            f"{min(step['seconds'].values()) * 1e3:.2f} ms, {over:.2f} times" if over else NOT_MEASURED,
        ),
        Line(
            f"device idle between steps, {model}, batch 1",
            f"< {1e6 * MOST_IDLE_SECONDS:.0f} µs",
            f"{1e6 * idle:.1f} µs (median of {gaps['steps'] - 1})" if idle is not None else NOT_MEASURED,
        ),
        Line(
            f"refine from a right draft, {model}, batch 1",
            f"≥ {LEAST_TIMES_GENERATE} times as fast as transformers' generate",
            f"{times:.1f} times" if times else NOT_MEASURED,
        ),
        Line(
            f"all steps in one launch against step by step, {model}, batch 1, no draft",
            "",
            f"{whole['ratio']:.3f} of the time, {whole['steps']} steps" if whole else NOT_MEASURED,
        ),
    ]


def loss_lines(results: dict[str, Any]) -> list[Line]:
    """Of the consistency loss; ``results``: all of its benchmark's, or nothing."""
    variants = results.get(MODEL, {}).get("variants", {})
    ours = variants.get("triton dense", {})
    if "times_six_products" not in ours:
        return [Line(f"consistency_loss, {MODEL}, 8192 rows per stream", "", NOT_MEASURED)]
    text = f"{1e3 * ours['median_seconds']:.1f} ms, {ours['times_six_products']:.2f} times its six products alone"
    return [Line(f"consistency_loss, {MODEL}, {results[MODEL]['rows']} rows per stream", "", text)]
