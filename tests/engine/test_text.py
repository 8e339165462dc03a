"""Chat template, BOS, where the draft is tokenised, end of turn, and the condition template."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from engine import InvalidRequest, RefineOptions, Refiner, Request
from engine.jacobi import Vocabulary
from engine.text import TextCodec, load_tokenizer
from tests.engine.checkpoints import VOCABULARY

SPECIAL = ["<unk>", "<bos>", "<eos>", "<pad>", "<turn>", "</turn>"]
BOS, EOS, END = 1, 2, 5
WORDS = [chr(c) for c in range(32, 127)]
# Like Gemma's: the BOS is in the template, a turn ends with a token of its own, the answer is stripped.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system turns') }}"
    "{% endif %}<turn>{{ m['role'] }}:{{ m['content'] | trim }}</turn>{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant:{% endif %}"
)


def tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """Characters, with a BOS that the tokenizer adds by itself as well."""
    vocabulary = {token: i for i, token in enumerate(SPECIAL + WORDS)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>",
        additional_special_tokens=["<turn>", "</turn>"],
    )  # fmt: skip
    made.chat_template = template
    return made


def codec(template: str | None = TEMPLATE, eos: frozenset[int] = frozenset({EOS, END})) -> TextCodec:
    return TextCodec(tokenizer(template), Vocabulary(VOCABULARY, eos, 3))


def text(codec: TextCodec, ids: list[int]) -> str:
    assert codec.tokenizer is not None
    return "".join((SPECIAL + WORDS)[i] for i in ids)


def test_the_template_is_rendered_once_with_one_bos() -> None:
    c = codec()
    prompt, draft = c.encode(Request(prompt="hi there"), None)
    assert text(c, prompt) == "<bos><turn>user:hi there</turn><turn>assistant:"
    assert draft == []


def test_several_turns() -> None:
    c = codec()
    turns = [("user", "a"), ("assistant", "b"), ("user", "c")]
    prompt, _ = c.encode(Request(messages=[{"role": r, "content": t} for r, t in turns]), None)
    assert text(c, prompt) == "<bos><turn>user:a</turn><turn>assistant:b</turn><turn>user:c</turn><turn>assistant:"


def test_special_tokens_end_the_draft_as_the_template_ends_a_turn() -> None:
    """Gemma's way: the tokenizer's own EOS is another one."""
    c = codec()
    assert c.encode(Request(prompt="q", draft=" an answer\n"), None)[1] == [*(ids(c, "an answer")), END]


def ids(c: TextCodec, words: str) -> list[int]:
    assert c.tokenizer is not None
    encoded: list[int] = c.tokenizer(words, add_special_tokens=False)["input_ids"]
    return encoded


@pytest.mark.parametrize(
    ("template", "eos", "tail"),
    [
        (TEMPLATE, {EOS}, [EOS]),
        (TEMPLATE, {END}, [END]),
        (TEMPLATE, set(), []),
        (None, {EOS, END}, [EOS]),
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", {EOS}, [EOS]),
        # templates that know no assistant's turn
        ("{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}", {EOS}, [EOS]),
        ("{% if messages[-1]['role'] != 'user' %}{{ raise_exception('user last') }}{% endif %}x", {EOS}, [EOS]),
    ],
)
def test_end_of_turn(template: str | None, eos: set[int], tail: list[int]) -> None:
    c = codec(template, frozenset(eos))
    draft = c.encode(Request(prompt="q", draft="yes"), None)[1]
    assert draft == [*ids(c, "yes"), *tail]


def test_draft_is_tokenised_behind_the_prompt() -> None:
    """A tokenizer that marks the start of a text, as SentencePiece does, must not do so at the start of the answer."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, "▁", "a", "b", "▁a", "▁b", ":"])}
    merges = [("▁", "a"), ("▁", "b")]
    inner = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    made = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")
    made.chat_template = "{{ messages[0]['content'] }}:"
    c = TextCodec(made, Vocabulary(VOCABULARY, frozenset(), 0))
    prompt, draft = c.encode(Request(prompt="b", draft="a b"), None)
    assert [made.convert_ids_to_tokens(part) for part in (prompt, draft)] == [["▁b", ":"], ["a", "▁b"]]


def test_draft_ids_are_taken_as_they_are() -> None:
    assert codec().encode(Request(prompt="q", draft_ids=[7, 8]), None)[1] == [7, 8]
    assert codec().encode(Request(prompt_ids=[9], draft_ids=[7, 8]), None) == ([9], [7, 8])
    assert codec().encode(Request(prompt_ids=[9], draft=" ab "), None) == ([9], [*ids(codec(), "ab"), END])


@pytest.mark.parametrize("draft", ["", " ", "\n\t "])
def test_a_blank_draft_is_none(draft: str) -> None:
    assert codec().encode(Request(prompt="q", draft=draft), None)[1] == []


def test_keep_prefix_keeps_no_end_of_turn() -> None:
    """The end behind a text draft is the engine's addition: a kept one would end the answer before the model had run."""
    c = codec()
    whole = ids(c, "yes")
    for keep in range(len(whole)):
        assert c.encode(Request(prompt="q", draft="yes"), None, keep)[1] == [*whole, END]
    assert c.encode(Request(prompt="q", draft="yes"), None, len(whole))[1] == whole


@pytest.mark.parametrize("adds_bos", [True, False])
def test_without_a_template_the_prompt_is_tokenised_as_the_tokenizer_does(adds_bos: bool) -> None:
    c = codec(None)
    assert c.tokenizer is not None
    c.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A" if adds_bos else "$A", special_tokens=[("<bos>", c.tokenizer.bos_token_id)]
    )
    assert text(c, c.encode(Request(prompt="hi"), None)[0]) == ("<bos>hi" if adds_bos else "hi")
    with pytest.raises(InvalidRequest, match="no chat template"):
        c.encode(Request(messages=[{"role": "user", "content": t} for t in "ab"]), None)


def test_condition() -> None:
    """Braces in the texts are text; only the last turn is changed; the draft is still the starting point."""
    c = codec()
    template = "{{Q}} {prompt} / {draft} / {prompt}"
    prompt, draft = c.encode(Request(prompt="{draft}{x}", draft="{prompt}{0}%s"), template)
    assert text(c, prompt) == "<bos><turn>user:{Q} {draft}{x} / {prompt}{0}%s / {draft}{x}</turn><turn>assistant:"
    assert draft == [*ids(c, "{prompt}{0}%s"), END]
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    prompt, _ = c.encode(Request(messages=turns, draft="d"), "{prompt}+{draft}")
    assert text(c, prompt) == "<bos><turn>user:a</turn><turn>assistant:b</turn><turn>user:c+d</turn><turn>assistant:"
    assert turns[-1]["content"] == "c"


def test_condition_needs_texts() -> None:
    for request in (Request(prompt="a"), Request(prompt="a", draft_ids=[7]), Request(prompt_ids=[7], draft="a")):
        with pytest.raises(InvalidRequest, match="condition"):
            codec().encode(request, "{prompt}{draft}")


def test_what_the_template_refuses_is_the_requests_error() -> None:
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    with pytest.raises(InvalidRequest, match="no system turns"):
        codec().encode(Request(messages=turns), None)


def test_without_a_tokenizer_text_is_refused() -> None:
    c = TextCodec(None, Vocabulary(VOCABULARY, frozenset({EOS}), 3))
    assert c.encode(Request(prompt_ids=[5], draft_ids=[6]), None) == ([5], [6])
    assert c.decode([5]) is None
    for request in (Request(prompt="a"), Request(prompt_ids=[5], draft="a")):
        with pytest.raises(InvalidRequest, match="without a tokenizer"):
            c.encode(request, None)


def test_decode_leaves_special_tokens_out() -> None:
    c = codec()
    assert (c.decode([*ids(c, "yes"), END]) or "").replace(" ", "") == "yes"


def test_through_the_refiner(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("llama")
    assert load_tokenizer(folder, False) is None
    tokenizer().save_pretrained(folder)
    c = codec()
    prompt, _ = c.encode(Request(prompt="q"), None)
    options = RefineOptions(max_new_tokens=16)
    with Refiner.from_pretrained(folder, kv_cache_tokens=512) as refiner:
        first, second, chat = refiner.refine(
            [
                {"prompt": "q", "draft": "some text"},
                {"prompt_ids": prompt},
                {"messages": [{"role": "user", "content": "q"}], "draft": ""},
            ],
            options,
        )
        assert first.token_ids == second.token_ids == chat.token_ids
        assert first.text == second.text == c.decode(first.token_ids)
        assert first.text is not None
        conditioned, bare = refiner.refine(
            [{"prompt": "q", "draft": "d"}, {"prompt": "q"}],
            RefineOptions(max_new_tokens=16, condition="{prompt} {draft}"),
        )
        assert conditioned.error is None
        assert isinstance(bare.error, InvalidRequest)
