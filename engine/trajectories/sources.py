"""Prompts and existing responses in the formats they are published in, as rows of trajectories."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from engine.errors import InvalidTrajectory
from engine.job.source import Fields, Source
from engine.trajectories.schema import (
    BadRow,
    Response,
    TrajectoryRow,
    checked_messages,
    checked_reward,
    checked_text,
    parse_row,
    prompt_key,
    read_checked,
    usable_ids,
    without_repeats,
)

_SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}
_NAMES = {role: name for name, role in _ROLES.items()}


@dataclass(slots=True)
class Collection:
    """Rows by prompt, in the order in which the prompts came up first."""

    rows: dict[str, TrajectoryRow] = field(default_factory=dict)
    bad: list[BadRow] = field(default_factory=list)
    repeated: int = 0
    """Prompts that had come before."""
    unmatched: int = 0
    """Rows left out because their prompt is not among the known ones."""

    def add_file(self, source: Source, *, pair_rewards: bool = False, only_known: bool = False) -> None:
        """Reads a file; with ``only_known`` what belongs to none of the prompts so far is left out. Raises OSError."""

        def parse(fields: Fields) -> TrajectoryRow:
            return parse_any(fields, pair_rewards=pair_rewards)

        for _, row in read_checked(source, parse):
            if isinstance(row, BadRow):
                self.bad.append(row)
                continue
            key = prompt_key(row.prompt)
            known = self.rows.get(key)
            if known is None and only_known:
                self.unmatched += 1
            elif known is None:
                self.rows[key] = row
            else:
                self.repeated += not only_known
                self.rows[key] = replace(known, responses=[*known.responses, *row.responses])

    def finished(self, sample: int | None, seed: int) -> list[TrajectoryRow]:
        """The rows, or ``sample`` of them drawn by hashes of seed and prompt, without repeated responses or ids."""
        keys = list(self.rows)
        if sample is not None and sample < len(keys):
            chosen = set(sorted(keys, key=lambda key: hashlib.sha256(f"{seed}/{key}".encode()).digest())[:sample])
            keys = [key for key in keys if key in chosen]
        rows, ids = [], set()
        for key in keys:
            row = without_repeats(self.rows[key])
            if str(row.prompt_id) in ids:  # two files may both count from 0; draws in training go by the id
                row = replace(row, prompt_id=f"{row.prompt_id}-{key}")
            ids.add(str(row.prompt_id))
            rows.append(row)
        return rows


def parse_any(fields: Fields, *, pair_rewards: bool = False) -> TrajectoryRow:
    """A row of any of the formats, told apart by its fields. Raises InvalidTrajectory."""
    if "responses" in fields:
        return parse_row(fields)
    if fields.get("all_generated_responses") is not None:
        return _sampled(fields)
    if "chosen" in fields and "rejected" in fields:
        return _pair(fields, pair_rewards)
    if "completions" in fields:
        return _ultrafeedback(fields)
    row = _prompt(fields)
    if fields.get("output") is None:
        return row
    text, model = checked_text("output", fields["output"]), fields.get("generator", fields.get("model", "output"))
    return replace(row, responses=[Response(model=checked_text("generator", model), text=text)])


def _prompt(fields: Fields) -> TrajectoryRow:
    chat = fields["prompt"] if isinstance(fields.get("prompt"), list) else fields.get("messages")
    if chat is not None:
        return _row(fields, checked_messages(_without_answer(chat)))
    name = next((name for name in ("prompt", "instruction") if fields.get(name) is not None), None)
    if name is None:
        raise InvalidTrajectory(
            f"a row needs prompt, instruction, messages or chosen and rejected, got the fields {sorted(fields)!s:.200}"
        )
    if fields.get("input"):
        raise InvalidTrajectory("the row has instruction and input: join them into instruction")
    return _row(fields, [{"role": "user", "content": checked_text(name, fields[name])}])


def _without_answer(messages: Any) -> Any:
    if isinstance(messages, list) and messages and isinstance(messages[-1], Mapping):
        return messages[:-1] if messages[-1].get("role") == "assistant" else messages
    return messages


def _row(fields: Fields, messages: list[dict[str, str]]) -> TrajectoryRow:
    """The row of a chat that ends with the user's turn."""
    single = len(messages) == 1 and messages[0]["role"] == "user"
    prompt = messages[0]["content"] if single else transcript(messages)
    if not prompt.strip():
        raise InvalidTrajectory("the prompt is empty: leave the row out")
    identity = next((fields[name] for name in ("prompt_id", "id") if fields.get(name) is not None), None)
    source = next((fields[name] for name in ("source", "dataset") if isinstance(fields.get(name), str)), None)
    return TrajectoryRow(
        prompt_id=usable_ids(identity, prompt), prompt=prompt, source=source, messages=None if single else messages
    )


def transcript(messages: list[dict[str, str]]) -> str:
    """A chat as one text, each turn behind its speaker's name."""
    return "\n\n".join(f"{_NAMES.get(turn['role'], turn['role'])}: {turn['content']}" for turn in messages)


def _pair(fields: Fields, pair_rewards: bool) -> TrajectoryRow:
    """A preference pair: chats (UltraFeedback, binarised) or transcripts (HH-RLHF)."""
    chats = {name: _chat(name, fields[name], fields.get("prompt")) for name in ("rejected", "chosen")}
    prompts = {name: chat[:-1] for name, chat in chats.items()}
    if prompts["chosen"] != prompts["rejected"]:
        raise InvalidTrajectory("chosen and rejected answer different prompts: leave the row out")
    responses = []
    for place, (name, chat) in enumerate(chats.items()):
        reward = checked_reward(f"score_{name}", fields.get(f"score_{name}"))
        if reward is None and pair_rewards:
            reward = float(place)
        responses.append(Response(model=name, text=chat[-1]["content"], reward=reward))
    return replace(_row(fields, checked_messages(prompts["chosen"])), responses=responses)


def _chat(name: str, value: object, prompt: object) -> list[dict[str, str]]:
    """Messages, the last of them the assistant's. Raises InvalidTrajectory."""
    if isinstance(value, list):
        chat = [dict(turn) if isinstance(turn, Mapping) else {} for turn in value]
    elif isinstance(value, str) and (parts := _SPEAKER.split(value))[1:]:
        speakers, texts = parts[1::2], parts[2::2]
        chat = [{"role": _ROLES[who], "content": text.strip()} for who, text in zip(speakers, texts, strict=True)]
    elif isinstance(value, str) and isinstance(prompt, str):
        chat = [{"role": "user", "content": prompt}, {"role": "assistant", "content": value}]
    else:
        raise InvalidTrajectory(f"{name} must be a chat or a transcript of Human and Assistant, got {value!r:.80}")
    if len(chat) < 2 or chat[-1].get("role") != "assistant":
        raise InvalidTrajectory(f"{name} must end with the assistant's answer behind a prompt: leave the row out")
    checked_text(f"the answer of {name}", chat[-1].get("content"))
    return chat


def _ultrafeedback(fields: Fields) -> TrajectoryRow:
    completions = fields["completions"]
    if not isinstance(completions, list):
        raise InvalidTrajectory(f"completions must be a list, got {type(completions).__name__}")
    responses = []
    for i, value in enumerate(completions):
        if not isinstance(value, Mapping):
            raise InvalidTrajectory(f"completions[{i}] must be an object, got {type(value).__name__}")
        responses.append(
            Response(
                model=checked_text(f"completions[{i}].model", value.get("model")),
                text=checked_text(f"completions[{i}].response", value.get("response")),
                reward=checked_reward(f"completions[{i}].overall_score", value.get("overall_score")),
            )
        )
    return replace(_prompt(fields), responses=responses)


def _sampled(fields: Fields) -> TrajectoryRow:
    """UltraFeedback's prompts with all samples of one model and their ArmoRM scores, as SimPO's authors publish them; the pair
    beside them is the best and the worst of these."""
    texts, rewards = fields["all_generated_responses"], fields.get("all_rm_scores")
    if not isinstance(texts, list):
        raise InvalidTrajectory(f"all_generated_responses must be a list, got {type(texts).__name__}")
    rewards = [None] * len(texts) if rewards is None else rewards
    if not isinstance(rewards, list) or len(rewards) != len(texts):
        raise InvalidTrajectory(f"all_rm_scores must be a list of {len(texts)} numbers, got {rewards!r:.80}")
    responses = [
        Response(
            model=f"sample {i}",
            text=checked_text(f"all_generated_responses[{i}]", text),
            reward=checked_reward(f"all_rm_scores[{i}]", reward),
        )
        for i, (text, reward) in enumerate(zip(texts, rewards, strict=True))
    ]
    return replace(_prompt(fields), responses=responses)
