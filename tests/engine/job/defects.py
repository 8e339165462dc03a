"""Rows that are wrong in every way we could think of, and what the error of each must say."""

import json
from collections.abc import Callable
from random import Random
from typing import Any

VOCABULARY = 261
POSITIONS = 2048
LONGEST_LINE = 100_000
QUESTIONS = [{"question_id": 81, "turns": ["Name a colour", "Another?"]}, {"question_id": "b", "turns": ["Say hello"]}]

Defect = Callable[[Random], tuple[dict[str, Any] | bytes, list[str]]]
"""A row, or a whole line, with words that its error message must hold."""

_VALUES: dict[str, list[Any]] = {
    "int": [0, 5, -3, 10**40],
    "float": [1.5, -0.0, 1e300],
    "bool": [True, False],
    "list": [["x"], [[]], [1, 2]],
    "dict": [{"a": 1}, {"content": "x"}],
    "str": ["text", "\u00e4\u2028", " "],
}


def _other(random: Random, *fitting: str) -> tuple[Any, str]:
    """A value of a type that does not fit, and the type's name."""
    kind = random.choice([name for name in _VALUES if name not in fitting])
    return random.choice(_VALUES[kind]), kind


def _word(random: Random) -> str:
    return "".join(random.choices("abc \u00e4\u4e2d", k=random.randint(0, 8))) + "x"


def _row(random: Random) -> dict[str, Any]:
    return {"prompt": _word(random), "draft": _word(random), "more": {"a": [_word(random)]}}


def _turn(role: Any = "user", content: Any = "hi") -> dict[str, Any]:
    return {"role": role, "content": content}


# --- lines that are no JSON object


def cut_off(random: Random) -> tuple[bytes, list[str]]:
    line = json.dumps(_row(random)).encode()
    return line[: random.randint(1, len(line) - 1)], ["is not valid JSON: ", " at column "]


def cut_within_a_character(random: Random) -> tuple[bytes, list[str]]:
    character = random.choice("\u00e4\u4e2d\U0001f600").encode()
    line = b'{"prompt": "' + _word(random).encode() + character[: random.randint(1, len(character) - 1)]
    return line + random.choice([b"", b'"}']), ["is not valid JSON: ", "can't decode byte", "position"]


def no_utf8(random: Random) -> tuple[bytes, list[str]]:
    wrong = random.choice([b"\xff", b"\x80", b"\xc0\xaf", b"\xed\xa0\x80", "\u00e4".encode("latin-1")])
    return b'{"prompt": "a' + wrong + b'b"}', ["is not valid JSON: ", f"can't decode byte 0x{wrong[0]:02x}"]


def another_encoding(random: Random) -> tuple[bytes, list[str]]:
    line = json.dumps(_row(random)).encode(random.choice(["utf-16-le", "utf-16-be", "utf-32-le"]))
    return line, ["is not valid JSON: "]


def nearly_json(random: Random) -> tuple[bytes, list[str]]:
    line = random.choice([
        b"{'prompt': 'x'}", b'{"prompt": "x",}', b'{"prompt": x}', b'{prompt: "x"}', b'{"prompt": "x"} {"prompt": "y"}',
        b'{"prompt" "x"}', b'{"prompt": "a\tb"}', b'{"prompt": "\\x41"}', b'{"prompt": 01}', b'{"prompt": "x"}}',
        b'{"prompt": True}', b'{"prompt": "x"} // why', b'{"prompt": .5}', b'{"prompt": "\\u12"}', b'"prompt": "x"', b",",
        b'{"prompt": "x";}', b"prompt,draft", b"\x00", b"\x00" * 50,
    ])  # fmt: skip
    return line, ["is not valid JSON: ", " at column "]


def noise(random: Random) -> tuple[bytes, list[str]]:
    return b"\x01" + random.randbytes(random.randint(8, 200)).replace(b"\n", b"."), ["is not valid JSON: "]


def no_finite_number(random: Random) -> tuple[bytes, list[str]]:
    number = random.choice(["NaN", "Infinity", "-Infinity", "1e999", "-1e400", "1" * 400 + ".0", "9" * 310 + "e10"])
    place = random.choice(['{"prompt": "x", "score": %s}', '{"prompt": %s}', '{"prompt_ids": [1, %s]}', "%s"])
    return (place % number).encode(), [f"is not valid JSON: {number:.40} is not a finite number"]


def integer_without_end(random: Random) -> tuple[bytes, list[str]]:
    place = random.choice(['{"prompt": "x", "n": %s}', '{"prompt_ids": [%s]}', '{"id": -%s, "prompt": "x"}'])
    return (place % ("7" * random.randint(4301, 9000))).encode(), ["is not valid JSON: ", "4300 digits"]


def too_deep(random: Random) -> tuple[bytes, list[str]]:
    depth = random.choice([257, 300, 900, 990, 1000, 5000, 15_000])
    opening, closing = random.choice([(b"[", b"]"), (b'{"a":', b"}")])
    nested = opening * depth + (b"1" + closing * depth if random.random() < 0.7 or depth < 1100 else b"")
    field = random.choice([b"prompt", b"messages", b"more", b"prompt_ids", b"turns"])
    return b'{"' + field + b'": ' + nested + b"}", ["is nested deeper than 256 levels"]


def no_object(random: Random) -> tuple[bytes, list[str]]:
    value, kind = _other(random, "dict")
    value, kind = random.choice([(value, kind), (None, "NoneType"), ([], "list")])
    return json.dumps(value).encode(), [f"must hold a JSON object, got {kind}"]


def too_long_a_line(random: Random) -> tuple[bytes, list[str]]:
    line = json.dumps({"prompt": "x", "more": "y" * LONGEST_LINE})
    return line[: random.randint(LONGEST_LINE + 1, len(line))].encode(), [f"is longer than {LONGEST_LINE} bytes"]


# --- objects that ask for nothing, or for too much


def nothing_to_do(random: Random) -> tuple[dict[str, Any], list[str]]:
    fields = random.choice([{"promt": "x"}, {"prompt": None}, {"text": "x", "answer": "y"}, {"messages": None}])
    return fields, ["a row needs prompt, messages or prompt_ids", f"{next(iter(fields))!r}"]


def only_a_draft(random: Random) -> tuple[dict[str, Any], list[str]]:
    draft = random.choice([{"draft": _word(random)}, {"draft_ids": [7, 8]}])
    return draft, ["exactly one of prompt, messages and prompt_ids, got none of them"]


def two_prompts(random: Random) -> tuple[dict[str, Any], list[str]]:
    both = {"prompt": "x", "messages": [_turn()], "prompt_ids": [5]}
    left_out = random.choice([*both, None])
    given = [name for name in both if name != left_out]
    return {name: both[name] for name in given}, ["exactly one of prompt, messages and prompt_ids", f"got {given}"]


def two_drafts(random: Random) -> tuple[dict[str, Any], list[str]]:
    return {"prompt": "x", "draft": _word(random), "draft_ids": [4]}, ["draft or draft_ids, got both: leave one out"]


def empty(random: Random) -> tuple[dict[str, Any], list[str]]:
    return random.choice([
        ({"prompt": ""}, ["prompt is empty: give the text to answer"]),
        ({"prompt": "", "draft": "x"}, ["prompt is empty"]),
        ({"prompt_ids": []}, ["prompt_ids is empty: it needs at least one token"]),
        ({"messages": []}, ["messages must be a non-empty list of chat turns, got list of length 0"]),
        ({"messages": [_turn(content="")]}, ["a message's content is empty"]),
        ({"messages": [_turn(""), _turn()]}, ["a message's role is empty"]),
    ])  # fmt: skip


def too_long(random: Random) -> tuple[dict[str, Any], list[str]]:
    length = random.randint(POSITIONS, 2 * POSITIONS)
    row = random.choice(
        [{"prompt_ids": [9] * length}, {"prompt": "y" * length}, {"messages": [_turn(content="y" * length)]}]
    )
    return row, ["RequestTooLong", "prompt of ", f"exceeds the model's {POSITIONS} positions"]  # fmt: skip


# --- fields of the wrong type


def wrong_text(random: Random) -> tuple[dict[str, Any], list[str]]:
    name = random.choice(["prompt", "draft"])
    value, kind = _other(random, "str")
    return {"prompt": "x", name: value}, [f"{name} must be a string, got {kind}"]


def repeated_key(random: Random) -> tuple[bytes, list[str]]:
    value, kind = _other(random, "str")
    return b'{"prompt": "x", "prompt": %s}' % json.dumps(value).encode(), [f"prompt must be a string, got {kind}"]


def half_a_pair(random: Random) -> tuple[dict[str, Any], list[str]]:
    text = _word(random) + chr(random.randint(0xD800, 0xDFFF))
    row, place = random.choice([
        ({"prompt": text}, "prompt"),
        ({"prompt": "x", "draft": text}, "draft"),
        ({"messages": [_turn(content=text)]}, "a message's content"),
        ({"turns": ["x", text]}, "turns[1]"),
        ({"instruction": text}, "instruction"),
    ])  # fmt: skip
    return row, [place, "is not valid Unicode text", f"\\u{ord(text[-1]):x}"]


def wrong_ids(random: Random) -> tuple[dict[str, Any], list[str]]:
    name = random.choice(["prompt_ids", "draft_ids"])
    value, kind = _other(random, "list")
    row = {name: value} if name == "prompt_ids" else {"prompt": "x", name: value}
    return row, [f"{name} must be a list of integers, got {kind}"]


def wrong_id_inside(random: Random) -> tuple[dict[str, Any], list[str]]:
    name = random.choice(["prompt_ids", "draft_ids"])
    value, kind = random.choice([_other(random, "int"), (None, "NoneType"), ("y" * 5000, "str"), (7.0, "float")])
    ids = [3, 4]
    ids.insert(random.randint(0, 2), value)
    row = {name: ids} if name == "prompt_ids" else {"prompt": "x", name: ids}
    return row, [f"{name} must hold integers, got {value!r:.80} ({kind})"]


def id_out_of_range(random: Random) -> tuple[dict[str, Any], list[str]]:
    name = random.choice(["prompt_ids", "draft_ids"])
    value = random.choice([-1, VOCABULARY, VOCABULARY + 1, 2**31, 2**63, -(2**63), 10**50])
    ids = [3, value, 4] if random.random() < 0.5 else [value]
    row = {name: ids} if name == "prompt_ids" else {"prompt_ids": [5], name: ids}
    return row, [f"{name} must be in 0 .. {VOCABULARY - 1}, got {value}"]


def wrong_messages(random: Random) -> tuple[dict[str, Any], list[str]]:
    value, kind = _other(random, "list")
    says = "a dict with the keys" if kind == "dict" else kind
    return {"messages": value}, [f"messages must be a non-empty list of chat turns, got {says}"]


def wrong_message(random: Random) -> tuple[dict[str, Any], list[str]]:
    value, kind = _other(random, "dict")
    content, content_kind = _other(random, "str")
    bad, says = random.choice([
        (value, f"got {kind}"),
        (None, "got NoneType"),
        ({"role": "user"}, "with the keys ['role']"),
        ({"content": "x"}, "with the keys ['content']"),
        ({**_turn(), "name": "z"}, "with the keys ['content', 'name', 'role']"),
        ({}, "with the keys []"),
        (_turn(role=content), f"a message's role must be a string, got {content_kind}"),
        (_turn(content=content), f"a message's content must be a string, got {content_kind}"),
        (_turn(content=[{"type": "text", "text": "x"}]), "a message's content must be a string, got list"),
    ])  # fmt: skip
    expects = [] if "must be" in says else ['a message must be {"role": ..., "content": ...}']
    return {"messages": random.choice([[bad], [_turn(), _turn("assistant"), bad], [bad, _turn()]])}, [*expects, says]


def not_the_users_turn(random: Random) -> tuple[dict[str, Any], list[str]]:
    role = random.choice(["assistant", "system", "tool", "User", " ", "r" * 5000])
    return {"messages": [_turn(), _turn(role)]}, ["messages must end with the user's turn", f"got role {role!r:.80}"]


def wrong_identity(random: Random) -> tuple[dict[str, Any], list[str]]:
    value, kind = _other(random, "str", "int")
    row = random.choice([{"prompt": "x"}, {"turns": ["x"]}, {"instruction": "x"}])
    return {**row, "id": value}, [f"id must be a string or an integer, got {kind}"]


# --- the known formats


def wrong_turns(random: Random) -> tuple[dict[str, Any], list[str]]:
    value, kind = _other(random, "list")
    other, other_kind = _other(random, "str")
    return random.choice([
        ({"turns": value}, [f"turns must be a non-empty list of texts, got {kind}"]),
        ({"turns": []}, ["turns must be a non-empty list of texts, got list without elements"]),
        ({"turns": None, "drafts": ["x"]}, ["turns must be a non-empty list of texts, got nothing"]),
        ({"turns": ["x", other]}, [f"turns[1] must be a string, got {other_kind}"]),
        ({"turns": [None]}, ["turns[0] must be a string, got nothing"]),
        ({"turns": ["x", ""]}, ["turns[1]", "prompt is empty"]),
        ({"turns": ["x"], "drafts": value}, [f"drafts must be a list of texts, got {kind}"]),
        ({"turns": ["x"], "drafts": [other]}, [f"drafts[0] must be a string, got {other_kind}"]),
        ({"turns": ["x"], "drafts": ["a", "b"]}, ["got 2 drafts for 1 turns: at most one each"]),
        ({"turns": ["x", "y" * POSITIONS]}, ["RequestTooLong", "turn 2 of 2: prompt of "]),
    ])  # fmt: skip


def wrong_instruction(random: Random) -> tuple[dict[str, Any], list[str]]:
    value, kind = _other(random, "str")
    good = {"instruction": "x", "output": "y", "generator": "m"}
    return random.choice([
        ({**good, "instruction": value}, [f"instruction must be a string, got {kind}"]),
        ({**good, "instruction": None}, ["instruction must be a string, got nothing"]),
        ({**good, "instruction": ""}, ["instruction", "prompt is empty"]),
        ({**good, "output": value}, [f"output must be a string, got {kind}"]),
        ({**good, "input": "z"}, ["instruction and input: join them into instruction"]),
        ({**good, "instruction": "y" * POSITIONS}, ["RequestTooLong", "prompt of "]),
    ])  # fmt: skip


def wrong_choices(random: Random) -> tuple[dict[str, Any], list[str]]:
    value, kind = _other(random, "list")
    other, other_kind = _other(random, "str")
    item, item_kind = _other(random, "dict")
    key = random.choice([0, 82, "81", "c", None, [81], {"a": 1}, 1.5])
    row, says = random.choice([
        ({"choices": value}, [f"choices must be a non-empty list, got {kind}"]),
        ({"choices": []}, ["choices must be a non-empty list, got list without elements"]),
        ({"choices": [item]}, ['choices[0] must be {"turns": [text, ...], ...}', f"got {item_kind}"]),
        ({"choices": [{"turns": ["x"]}, {"index": 1}]}, ["choices[1].turns must be a non-empty list of texts, got nothing"]),
        ({"choices": [{"turns": value}]}, [f"choices[0].turns must be a non-empty list of texts, got {kind}"]),
        ({"choices": [{"turns": ["x", other]}]}, [f"choices[0].turns[1] must be a string, got {other_kind}"]),
        ({"choices": [{"turns": ["x", "y", "z"]}]}, ["got 3 choices[0].turns for 2 turns of question 81"]),
        ({"question_id": key, "choices": [{"turns": ["x"]}]}, ["question_id must name one of the 2 questions, got "]),
    ])  # fmt: skip
    return {"question_id": 81, **row}, says


DEFECTS: list[Defect] = [
    cut_off, cut_within_a_character, no_utf8, another_encoding, nearly_json, noise, no_finite_number, integer_without_end,
    too_deep, no_object, too_long_a_line, nothing_to_do, only_a_draft, two_prompts, two_drafts, empty, too_long, wrong_text,
    repeated_key, half_a_pair, wrong_ids, wrong_id_inside, id_out_of_range, wrong_messages, wrong_message,
    not_the_users_turn, wrong_identity, wrong_turns, wrong_instruction, wrong_choices,
]  # fmt: skip
