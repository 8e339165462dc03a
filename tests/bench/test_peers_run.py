"""The whole catalogue on the shipped refiner, with a reward model of random weights."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from bench.peers.answer import Answer, Cost
from bench.peers.catalogue import BASE, Models, Settings, load, peers, reference
from bench.peers.engine_peers import BaseModel
from bench.peers.measure import measure
from bench.reproduction.paper.measure import Fluency
from engine import Request
from engine.refiner import DEFAULT_CHECKPOINT

TOKENS = 6
TEXTS = ["How do I boil an egg?", "Name a colour.", "Say hello."]


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reward")
    tokenizer = AutoTokenizer.from_pretrained(DEFAULT_CHECKPOINT, pad_token="<|pad|>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, num_labels=1, initializer_range=0.5,
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(reward_model: Path) -> Models:
    with load(DEFAULT_CHECKPOINT, DEFAULT_CHECKPOINT, None, reward_model) as loaded:
        yield loaded


def test_rewards_are_of_the_text_and_what_was_read_is_counted(models: Models, reward_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(reward_model)
    model = LlamaForSequenceClassification.from_pretrained(reward_model).eval()
    request, codec = Request(prompt=TEXTS[0]), models.base.engine._codec
    texts = [tokenizer("Put it in water.")["input_ids"], tokenizer("Wait!")["input_ids"]]
    before = models.base.scorer.tokens
    found = models.base.scorer.score([request, request], texts)
    read = 0
    for ids, reward in zip(texts, found, strict=True):
        chat = [{"role": "user", "content": request.prompt}, {"role": "assistant", "content": codec.decode(ids)}]
        whole = tokenizer.apply_chat_template(chat, tokenize=False, continue_final_message=True)
        tokens = tokenizer(whole, add_special_tokens=False)["input_ids"]
        read += len(tokens)
        with torch.no_grad():
            hidden = model.model(input_ids=torch.tensor([tokens])).last_hidden_state
            assert reward == pytest.approx(model.score(hidden)[0, -1, 0].item(), abs=1e-4)
    assert models.base.scorer.tokens - before == read
    with pytest.raises(ValueError, match="cannot read so long"):
        models.base.scorer.judge([request], [Answer(token_ids=[], text="word " * 100, cost=Cost())])


def test_every_peer_answers_and_the_lossless_ones_agree(models: Models) -> None:
    settings = Settings(tokens=TOKENS, temperature=0.7, weights=(0.0, 20.0), candidates=3)
    made = peers(models, settings)
    requests = [Request(prompt=text, seed=number) for number, text in enumerate(TEXTS)]
    results = measure(
        BaseModel(models.base.engine, TOKENS), made, requests, models.base.scorer,
        batches={1: 1, 3: 3}, rounds=1, limits={}, record=lambda results: None,
        fluency=Fluency(DEFAULT_CHECKPOINT),
    )  # fmt: skip
    methods = results["methods"]
    assert set(methods) == {BASE, *made}
    together = {name for name, found in methods.items() if "batch 3" in found}
    assert set(methods) - together == {name for name, peer in made.items() if peer.largest_batch == 1}
    for name, found in methods.items():
        same = {value for measured in found.values() for value in measured["same"]}
        assert same == ({True} if reference(name) else {None})
    # the refiner is the base model here: without a reward its answers are those of ARGS
    assert methods["ARGS, weight 0"]["batch 3"]["score"] == methods[BASE]["batch 3"]["score"]
    # texts that are the same are as likely
    nats = {name: found["batch 3"]["nats"] for name, found in methods.items() if name in together}
    assert all(len(values) == 3 for values in nats.values())
    assert any(value is not None for value in nats[BASE])
    assert nats["DiffPO, converged"] == nats["refiner, token by token"] == nats[BASE]
    # the first four of sixteen samples are the four
    pairs = zip(*(methods[f"best of {n}"]["batch 3"]["score"] for n in (4, 16)), strict=True)
    assert all(few <= many for few, many in pairs)
