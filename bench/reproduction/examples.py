"""Training examples for the demonstration refiner: clean text, artificially damaged drafts, chat token ids."""

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from pathlib import Path

from tokenizers import Tokenizer

CONDITION = "{prompt}\n\nDraft answer:\n{draft}"
USER, ASSISTANT, END, PAD = "<|user|>", "<|assistant|>", "<|end|>", "<|pad|>"

FILLERS = (
    "um,", "uh,", "well,", "you know,", "I mean,", "like,", "so yeah,", "you see,", "to be honest,", "as I said,",
    "I guess,", "or something,", "kind of,", "sort of,", "and stuff,", "if you will,", "as it were,", "let me see,",
    "how do I put this,", "believe me,", "or whatever,", "needless to say,", "at the end of the day,", "hmm,",
)  # fmt: skip
FUNCTION_WORDS = frozenset(
    "a an the of to in on at for from by with and or but is are was were be been it its this that these those as if "
    "you your we our they their he she his her i my not can will would should may have has had do does so than then "
    "there which who when how what into about up out more most also".split()
)
WORD = re.compile(r"\s*\S+")
PLAIN_WORD = re.compile(r"(?<= )[A-Za-z]+(?![A-Za-z'’])")
"""Letters behind a space, which the tokenizer splits by themselves."""
EDIT_WEIGHT = 4.0  # most answer tokens are plain copies; those at a correction are what is left to learn
SENTENCE_END = re.compile(r"[.!?][\"')*]*$")


Example = tuple[list[int], list[float]]  # token ids of a chat and their loss weights


@dataclass(frozen=True)
class Row:
    """One prompt with its best response and the other responses."""

    prompt: str
    best: str
    others: tuple[str, ...]


def load_rows(path: Path) -> list[Row]:
    """Read the response file; the response with the highest reward is the best one."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        texts = [r["text"].strip() for r in sorted(record["responses"], key=lambda r: -r["reward"])]
        rows.append(Row(record["prompt"].strip(), texts[0], tuple(t for t in texts[1:] if t)))
    return [row for row in rows if row.best]


def _misspell(word: str, rng: random.Random) -> str:
    letters = [i for i, c in enumerate(word) if c.isalpha()]
    if len(letters) < 4:
        return word
    i = rng.choice(letters[1:-1])
    kind = rng.random()
    if kind < 0.4:
        return word[:i] + word[i + 1 :]
    if kind < 0.8:
        return word[:i] + word[i + 1 : i + 2] + word[i] + word[i + 2 :]
    return word[:i] + word[i] + word[i:]


def _damage_one(pieces: list[str], i: int, rng: random.Random, words: list[str]) -> None:
    """Damage piece ``i`` (leading whitespace plus a word) in place; a deleted piece becomes the empty string."""
    space, word = re.match(r"(\s*)(.*)", pieces[i], re.DOTALL).groups()
    kind = rng.random()
    if kind < 0.18 and i:  # the first word is kept, so that the draft keeps a plain start
        if word.lower() in FUNCTION_WORDS or rng.random() < 0.3:
            pieces[i] = ""
    elif kind < 0.42:
        pieces[i] += " " + word
    elif kind < 0.50 and i + 1 < len(pieces) and pieces[i + 1]:
        next_space, next_word = re.match(r"(\s*)(.*)", pieces[i + 1], re.DOTALL).groups()
        pieces[i], pieces[i + 1] = space + next_word, next_space + word
    elif kind < 0.55:
        pieces[i] = space + rng.choice(words)
    elif kind < 0.78:
        pieces[i] = space + _misspell(word, rng)
    else:
        pieces[i] = f"{space}{rng.choice(FILLERS)} {word}"


def damage(text: str, rng: random.Random, words: list[str]) -> str:
    """Return ``text`` with a light random share of its words damaged; about one text in ten stays as it is."""
    pieces = WORD.findall(text)
    if not pieces or rng.random() < 0.1:
        return text
    rate = rng.uniform(0.03, 0.12)
    for i in range(len(pieces)):
        if rng.random() < rate:
            _damage_one(pieces, i, rng, words)
        starts = i == 0 or bool(SENTENCE_END.search(pieces[i - 1]))
        if starts and rng.random() < 0.2:
            pieces[i] = pieces[i].lower()
        if SENTENCE_END.search(pieces[i]) and rng.random() < 0.08:
            pieces[i] = pieces[i].rstrip(".!?")
    if len(pieces) > 12 and rng.random() < 0.06:
        del pieces[-rng.randint(1, 4) :]
    return "".join(pieces).strip()


@dataclass
class ExampleMaker:
    """Draws chat examples as token ids with loss weights from training rows."""

    rows: list[Row]
    tokenizer: Tokenizer
    rng: random.Random
    words: list[str] = field(init=False)

    def __post_init__(self) -> None:
        texts = (text for row in self.rows for text in (row.best, *row.others))
        self.words = sorted({word for text in texts for word in re.findall(r"[A-Za-z][a-z]+", text)})
        self._special = {name: self.tokenizer.token_to_id(name) for name in (USER, ASSISTANT, END)}

    def encode(self, prompt: str, answer: str, draft: str | None = None) -> Example:
        """Token ids of one turn as the chat template writes it, with the loss weights of the answer and its end."""
        encode: Callable[[str], list[int]] = lambda text: self.tokenizer.encode(text).ids  # noqa: E731
        user = prompt if draft is None else CONDITION.format(prompt=prompt, draft=draft)
        head = [self._special[USER], *encode(user), self._special[END], self._special[ASSISTANT]]
        tail = [*encode(answer), self._special[END]]
        weights = [1.0] * len(tail)
        if draft is not None and draft != answer:
            matcher = SequenceMatcher(None, encode(draft), tail[:-1], autojunk=False)
            for tag, _, _, start, stop in matcher.get_opcodes():
                if tag != "equal":  # with the token after it, which shows whether something was left out or skipped
                    weights[start : stop + 1] = [EDIT_WEIGHT] * (stop + 1 - start)
        return head + tail, [0.0] * len(head) + weights

    def copy_example(self, max_words: int, few: bool = False) -> Example:
        """A list of random words to repeat: nothing but attention to the draft can predict it.

        With ``few`` different words the same word pairs come again and again, so that a short history does not tell
        the place.
        """
        count = self.rng.randint(3, max_words)
        words = self.rng.sample(self.words, self.rng.randint(2, 3 + count // 4)) if few else self.words
        text = " ".join(self.rng.choices(words, k=count))
        return self.encode(self._short_prompt(), text, text)

    def chunk_example(self, max_words: int) -> Example:
        """A damaged chunk of any response, with the right prompt, another one or none."""
        row = self.rng.choice(self.rows)
        answer = self._chunk(self.rng.choice((row.best, *row.others)), max_words)
        prompt = row.prompt if len(row.prompt) < 400 and self.rng.random() < 0.5 else self._short_prompt()
        return self.encode(prompt, answer, damage(answer, self.rng, self.words))

    def full_example(self, max_tokens: int, conditioned: bool, best: bool = True) -> Example:
        """A best (else: any) response from its start, cut after at most ``max_tokens``, with or without its damaged draft."""
        row = self.rng.choice(self.rows)
        answer = cut(row.best if best else self.rng.choice((row.best, *row.others)), max_tokens, self.tokenizer)
        if not conditioned:
            return self.encode(row.prompt[:800], answer)
        return self.encode(row.prompt[:800], answer, damage(answer, self.rng, self.words))

    def _short_prompt(self) -> str:
        prompt = self.rng.choice(self.rows).prompt
        return " ".join(prompt.split()[: self.rng.randint(0, 12)])

    def _chunk(self, text: str, max_words: int) -> str:
        pieces = WORD.findall(text)
        starts = [0] + [i + 1 for i in range(len(pieces) - 1) if SENTENCE_END.search(pieces[i])]
        start = self.rng.choice(starts) if self.rng.random() < 0.8 else self.rng.randrange(len(pieces))
        chunk = pieces[start : start + self.rng.randint(min(5, max_words), max_words)]
        ends = [i + 1 for i, piece in enumerate(chunk) if SENTENCE_END.search(piece)]
        if ends and self.rng.random() < 0.85:
            chunk = chunk[: ends[-1]]
        return "".join(chunk).strip()


def words_by_tokens(words: Sequence[str], tokenizer: Tokenizer) -> dict[int, list[str]]:
    """The words by how many tokens they have behind a space."""
    groups: dict[int, list[str]] = {}
    for word in words:
        groups.setdefault(len(tokenizer.encode(f" {word}").ids), []).append(word)
    return groups


def substitute(text: str, rng: random.Random, groups: dict[int, list[str]], tokenizer: Tokenizer) -> str:
    """Return ``text`` with a light random share of its words replaced by others of as many tokens.

    Every token that is not replaced keeps its place, which ``damage`` does not promise.
    """
    rate = rng.uniform(0.03, 0.15)

    def other(match: re.Match[str]) -> str:
        word = match[0]
        return rng.choice(groups.get(len(tokenizer.encode(f" {word}").ids), [word])) if rng.random() < rate else word

    return PLAIN_WORD.sub(other, text)


def passage(text: str, rng: random.Random) -> str:
    """``text`` from the start of one of its sentences on."""
    pieces = WORD.findall(text)
    starts = [0] + [i + 1 for i in range(len(pieces) - 1) if SENTENCE_END.search(pieces[i])]
    return "".join(pieces[rng.choice(starts) :]).strip()


def cut(text: str, max_tokens: int, tokenizer: Tokenizer) -> str:
    """Cut ``text`` to at most ``max_tokens`` tokens, at the end of a sentence where there is one."""
    encoding = tokenizer.encode(text)
    if len(encoding.ids) <= max_tokens:
        return text
    text = text[: encoding.offsets[max_tokens - 1][1]]
    pieces = WORD.findall(text)[:-1]
    ends = [i + 1 for i, piece in enumerate(pieces) if SENTENCE_END.search(piece)]
    return "".join(pieces[: ends[-1]] if ends else pieces).strip()
