"""Which of the paper's claims hold in these results: by the interval of a difference of rewards, not by its mean alone, and
only for text that is text. A reward model this small gives broken text with the right beginnings a high reward.
"""

from collections.abc import Iterator, Mapping

from bench.reproduction.paper.answers import OWN, REAL
from bench.reproduction.paper.compare import Answers, difference, percent, shown, wins
from engine.evaluate.statistics import Estimate

HOLDS, FAILS, OPEN, ABSENT = (
    "holds",
    "does not hold: the opposite is measured",
    "open: the interval has 0 in it",
    "not measured",
)
ALIGNED = {"dpo": "DPO", "simpo": "SimPO"}
BROKEN = "does not count: the reward is higher, the text is broken"
REFINED = (("4 steps", "{} + diffpo, 4 steps"), ("draft shown", "{} + shown"), ("converged", "diffpo"))
"""Ways to use the refiner behind a base, and their sets; converged, the base plays no part in the answer."""


def verdict(estimate: Estimate) -> str:
    """Of a difference that should be above 0."""
    if estimate.low > 0:
        return HOLDS
    return FAILS if estimate.high < 0 else OPEN


def broken(sets: Mapping[str, Answers], name: str) -> bool:
    """Whether the chat model finds these answers less likely than any real model's, beyond both intervals. That a text repeats
    itself does not count here: the chat model's own answers do, and tables show by how much."""
    real = [estimate.high for base in REAL if base in sets and (estimate := sets[base].mean("nats"))]
    found = sets[name].mean("nats")
    return bool(real) and found is not None and found.low > max(real)


def compared(sets: Mapping[str, Answers], one: str, other: str) -> tuple[str, str]:
    """Figures and verdict."""
    if one not in sets or other not in sets:
        return "–", ABSENT
    estimate = difference(sets[one], sets[other])
    found = verdict(estimate)
    if found == HOLDS and broken(sets, one):
        found = BROKEN
    return f"{shown(estimate)}; wins {percent(wins(sets[one], sets[other]))}", found


def claims(sets: Mapping[str, Answers]) -> Iterator[list[str]]:
    """Rows: the claim, the paper's figure, the reward difference here, the verdict."""
    for other, paper in (("base", "36.83 to 55.84"), ("dpo", "47.20 to 55.84"), ("simpo", "52.57 to 55.84")):
        for way, name in REFINED:
            yield [f"base + DiffPO ({way}) above {ALIGNED.get(other, other)}", paper,
                   *compared(sets, name.format("base"), other)]  # fmt: skip
    yield [
        "DiffPO above plain fine-tuning on the same responses (converged)",
        "not compared",
        *compared(sets, "diffpo", "ar"),
    ]
    later = ("base + diffpo, 4 steps", "base + ar, 4 steps")
    yield ["DiffPO above plain fine-tuning on the same responses (4 steps)", "not compared", *compared(sets, *later)]
    for way, name in REFINED:
        yield [f"one refiner improves every base ({way})", "all of 8", *counted(sets, name)]
    for smaller, larger in (("layers-18", "layers-24"), ("layers-24", "diffpo")):
        yield [f"a larger refiner is better: {larger} above {smaller}", "8B 36.44, 9B 55.84; 2B far weaker",
               *compared(sets, larger, smaller)]  # fmt: skip
    for base in ("dpo", "simpo"):
        for way, name in REFINED:
            yield [
                f"adds on top of {ALIGNED[base]} ({way})",
                "adds again",
                *compared(sets, name.format(base), base),
            ]


def counted(sets: Mapping[str, Answers], name: str) -> tuple[str, str]:
    """How many bases are better, worse, or neither by the interval."""
    names = [(base, name.format(base)) for base in (*REAL, *OWN) if base in sets and name.format(base) in sets]
    if not names:
        return "–", ABSENT
    known = [verdict(difference(sets[made], sets[base])) for base, made in names]
    better, worse, unreadable = known.count(HOLDS), known.count(FAILS), sum(broken(sets, made) for _, made in names)
    text = f"higher {better}, lower {worse}, open {known.count(OPEN)} of {len(known)}"
    if unreadable:
        return f"{text}; text broken in {unreadable}", BROKEN
    if worse:
        return text, f"does not hold: lower behind {worse}"
    return text, HOLDS if better == len(known) else f"open: higher behind {better} of {len(known)}"
