"""What a trajectory file holds: rewards by model and by level, length bias, ties, gaps."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from engine.trajectories.schema import BadRow, Response, TrajectoryRow, without_repeats


@dataclass(slots=True)
class Sums:
    """Of one model's, or one level's, responses; lengths in characters."""

    count: int = 0
    rewarded: int = 0
    reward: float = 0.0
    reward_squares: float = 0.0
    length: int = 0
    wins: int = 0

    def add(self, response: Response, *, won: bool = False) -> None:
        self.count += 1
        self.length += len(response.text)
        self.wins += won
        if response.reward is not None:
            self.rewarded += 1
            self.reward += response.reward
            self.reward_squares += response.reward**2

    def figures(self) -> dict[str, float | int | None]:
        mean = self.reward / self.rewarded if self.rewarded else None
        variance = None if mean is None else max(0.0, self.reward_squares / self.rewarded - mean**2)
        return {
            "responses": self.count,
            "rewarded": self.rewarded,
            "mean_reward": mean,
            "reward_deviation": None if variance is None else math.sqrt(variance),
            "win_share": self.wins / self.rewarded if self.rewarded else None,
            "mean_length": self.length / self.count,
        }


@dataclass(slots=True)
class LengthBias:
    """What rewards have to do with lengths, each seen against its mean within the prompt."""

    xx: float = 0.0
    xy: float = 0.0
    yy: float = 0.0
    bins: dict[float, list[float]] = field(default_factory=dict)
    """Rewards less their means, as [count, sum], by length in shares of the mean: 2**(i / 2), each for what is nearest."""

    def add(self, lengths: list[int], rewards: list[float]) -> None:
        x_mean, y_mean = sum(lengths) / len(lengths), sum(rewards) / len(rewards)
        for length, reward in zip(lengths, rewards, strict=True):
            x, y = length - x_mean, reward - y_mean
            self.xx, self.xy, self.yy = self.xx + x * x, self.xy + x * y, self.yy + y * y
            entry = self.bins.setdefault(round(2 * math.log2(length / x_mean)) / 2, [0, 0.0])
            entry[0], entry[1] = entry[0] + 1, entry[1] + y

    @property
    def correlation(self) -> float | None:
        return self.xy / math.sqrt(self.xx * self.yy) if self.xx > 0 and self.yy > 0 else None

    def figures(self) -> dict[str, dict[str, float | int]]:
        return {
            f"{2**power:.3g}": {"responses": int(count), "reward_above_prompt": total / count}
            for power, (count, total) in sorted(self.bins.items())
        }


@dataclass(slots=True)
class Summary:
    """Filled by ``add``, row after row."""

    prompts: int = 0
    bad: list[BadRow] = field(default_factory=list)
    models: dict[str, Sums] = field(default_factory=dict)
    levels: dict[int, Sums] = field(default_factory=dict)
    sizes: dict[int, int] = field(default_factory=dict)
    """Prompts by number of usable responses."""
    missing: int = 0
    """Responses without a reward."""
    repeated: int = 0
    """Responses that repeat another of their prompt."""
    ties: int = 0
    """Prompts with two or more responses of equal reward."""
    top_ties: int = 0
    """Prompts whose best reward is shared."""
    longest_wins: int = 0
    """Prompts of two or more usable responses whose target is the longest."""
    compared: int = 0
    lengths: LengthBias = field(default_factory=LengthBias)

    @classmethod
    def of(cls, rows: Iterable[TrajectoryRow | BadRow]) -> "Summary":
        summary = cls()
        for row in rows:
            if isinstance(row, BadRow):
                summary.bad.append(row)
            else:
                summary.add(row)
        return summary

    def add(self, row: TrajectoryRow) -> None:
        once = without_repeats(row)
        self.prompts += 1
        self.repeated += len(row.responses) - len(once.responses)
        usable = ranked(once)
        self.sizes[len(usable)] = self.sizes.get(len(usable), 0) + 1
        for response in once.responses:
            won = bool(usable) and response is usable[-1]
            self.models.setdefault(response.model, Sums()).add(response, won=won)
            self.missing += response.reward is None
        for level, response in enumerate(usable):
            self.levels.setdefault(level, Sums()).add(response, won=level == len(usable) - 1)
        rewards = [response.reward or 0.0 for response in usable]
        if len(usable) < 2:
            return
        lengths = [len(response.text) for response in usable]
        self.ties += len(set(rewards)) < len(rewards)
        self.top_ties += rewards[-1] == rewards[-2]
        self.compared += 1
        self.longest_wins += lengths[-1] == max(lengths)
        self.lengths.add(lengths, rewards)

    def figures(self) -> dict[str, Any]:
        """All of it, as JSON has it."""
        return {
            "prompts": self.prompts,
            "bad_rows": [row.fields() for row in self.bad],
            "models": {name: self.models[name].figures() for name in sorted(self.models)},
            "levels": {str(level): self.levels[level].figures() for level in sorted(self.levels)},
            "prompts_by_usable_responses": {str(size): self.sizes[size] for size in sorted(self.sizes)},
            "missing_rewards": self.missing,
            "repeated_responses": self.repeated,
            "prompts_with_ties": self.ties,
            "prompts_with_tied_best": self.top_ties,
            "length_reward_correlation": self.lengths.correlation,
            "reward_by_length": self.lengths.figures(),
            "longest_is_best_share": self.longest_wins / self.compared if self.compared else None,
        }

    def text(self) -> str:
        """The same as tables."""
        figures = self.figures()
        by_reward = sorted(figures["models"].items(), key=lambda item: -(item[1]["mean_reward"] or -math.inf))
        sizes = ", ".join(f"{count} with {size}" for size, count in figures["prompts_by_usable_responses"].items())
        lines = [
            f"{self.prompts} prompts, {len(self.bad)} bad rows; usable responses: {sizes or 'none'}",
            "",
            *_table("model", by_reward),
            "",
            *_table("level", list(figures["levels"].items())),
            "",
            f"length bias: correlation of length and reward within prompts {_number(self.lengths.correlation)}; "
            f"the best response is the longest in {_share(self.longest_wins, self.compared)} of the prompts",
            f"ties: {self.ties} prompts, among them {self.top_ties} whose best reward is shared",
            f"missing rewards: {self.missing}; repeated responses: {self.repeated}",
            *(f"bad: {row}" for row in self.bad[:10]),
            *([f"bad: .. and {len(self.bad) - 10} more"] if len(self.bad) > 10 else []),
        ]
        return "\n".join(lines)


def ranked(row: TrajectoryRow) -> list[Response]:
    """The usable responses, worst first, the target last: the rule of ``engine.training.rank``, on texts."""
    usable = [response for response in row.responses if response.reward is not None and response.text.strip()]
    return sorted(usable, key=lambda response: response.reward or 0.0)


def _table(head: str, items: list[tuple[str, dict[str, Any]]]) -> list[str]:
    width = max([len(head), *(len(name) for name, _ in items)])
    lines = [f"{head:<{width}}  responses  mean reward  deviation  win share  mean length"]
    for name, row in items:
        reward, deviation, share = (_number(row[key]) for key in ("mean_reward", "reward_deviation", "win_share"))
        lines.append(
            f"{name:<{width}}  {row['responses']:>9}  {reward:>11}  {deviation:>9}  {share:>9}  {row['mean_length']:>11.0f}"
        )
    return lines


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"
