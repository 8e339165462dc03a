import sys

import pytest
import torch
from torch import Tensor

from engine.kernels import LinearWeight, linear_argmax, linear_sample
from engine.kernels.gumbel_noise import gumbel_noise
from tests.kernels import references
from tests.kernels.references import randn

NAN = float("nan")
ROWS = 23


def inputs(with_bias: bool = True) -> tuple[Tensor, LinearWeight, Tensor | None]:
    weight = LinearWeight.from_dense(randn(1, 301, 24, dtype=torch.bfloat16).float())
    return randn(0, ROWS, 24), weight, randn(2, 301) if with_bias else None


def noise(rows: int = ROWS) -> dict[str, Tensor]:
    return {"seeds": torch.arange(rows) % 5 + 2**62, "positions": torch.arange(rows) * 3}


@pytest.mark.usefixtures("forced_kernels")
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
def test_token_and_log_probability(with_bias: bool, softcap: float | None) -> None:
    x, weight, bias = inputs(with_bias)
    temperature = torch.tensor([0.3, 1.0, 2.5]).repeat(ROWS)[:ROWS]
    index, log_p = linear_sample(
        x, weight, bias, temperature=temperature, softcap=softcap, log_probability=True, **noise()
    )
    wide = None if bias is None else bias.double()
    z = references.soft_capped(references.linear(x.double(), weight.dense().double(), wide), softcap)
    scores = z / temperature[:, None] + gumbel_noise(**noise(), vocabulary=301)
    best = scores.topk(2).values
    assert (best[:, 0] - best[:, 1]).min() > 1e-4  # these inputs have no draw that rounding decides
    assert torch.equal(index, scores.argmax(-1))
    assert log_p is not None
    exact = z.log_softmax(-1).gather(1, index[:, None])[:, 0]
    torch.testing.assert_close(log_p.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("forced_kernels")
@pytest.mark.parametrize("softcap", [None, 0.5])
def test_greedy_rows_are_those_of_argmax(softcap: float | None) -> None:
    """Bit for bit, also where the cap makes logits equal."""
    x, weight, bias = inputs()
    temperature = torch.tensor([0.0, 0.8, 0.0]).repeat(ROWS)[:ROWS]
    index, _ = linear_sample(x, weight, bias, temperature=temperature, softcap=softcap, **noise())
    greedy = linear_argmax(x, weight, bias, softcap=softcap)[0]
    assert torch.equal(index[temperature == 0], greedy[temperature == 0])
    assert not torch.equal(index, greedy)


def test_rows_are_drawn_alike_in_any_batch(instruction_set: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = inputs()
    temperature = torch.tensor([0.0, 0.8, 1.9]).repeat(ROWS)[:ROWS]

    def draw(rows: list[int]) -> tuple[Tensor, Tensor | None]:
        chosen = {name: value[rows] for name, value in {**noise(), "temperature": temperature}.items()}
        return linear_sample(x[rows], weight, bias, softcap=5.0, log_probability=True, **chosen)

    whole = draw(list(range(ROWS)))
    for rows in ([4], [7, 1, 1, 22], list(range(ROWS))[::-1]):
        part = draw(rows)
        assert torch.equal(part[0], whole[0][rows])
        assert part[1] is not None
        assert whole[1] is not None
        assert torch.equal(part[1], whole[1][rows])
    module = sys.modules[linear_sample.__module__]  # as an attribute of the package it is the function
    monkeypatch.setattr(module, "MAX_LOGITS_BYTES", 8 * 301 * 5)
    assert torch.equal(draw(list(range(ROWS)))[0], whole[0])


@pytest.mark.usefixtures("forced_kernels")
def test_nan_and_rows_out_of_use() -> None:
    x, weight, _ = inputs()
    x[3] = NAN
    bias = torch.zeros(301)
    bias[:300] = NAN
    ones, count = torch.ones(ROWS), torch.tensor([7], dtype=torch.int32)
    index, log_p = linear_sample(x, weight, bias, temperature=ones, row_count=count, log_probability=True, **noise())
    assert index.tolist() == [300] * 3 + [-1] + [300] * 3 + [-1] * (ROWS - 7)
    assert log_p is not None
    assert log_p[:3].tolist() == [0.0] * 3
    assert log_p[[3, *range(7, ROWS)]].isnan().all()
    index, value = linear_argmax(x, weight, bias, row_count=count)
    assert index.tolist() == [300] * 3 + [-1] + [300] * 3 + [-1] * (ROWS - 7)
    assert value.isnan().tolist() == [i < 0 for i in index.tolist()]
    assert linear_sample(x[:0], weight, temperature=ones[:0], **noise(0))[0].shape == (0,)


def test_infinite_logits_and_ties() -> None:
    """+inf wins, the lowest of several; where all are -inf, the first that is a number."""
    x, weight, bias = torch.zeros(2, 24), inputs()[1], torch.zeros(301)
    bias[[40, 80]] = float("inf")
    vectors = {"temperature": torch.ones(2), **noise(2)}
    assert linear_sample(x, weight, bias, **vectors)[0].tolist() == [40, 40]
    bias.fill_(float("-inf"))
    bias[0] = NAN
    assert linear_sample(x, weight, bias, **vectors)[0].tolist() == [1, 1]


def test_refused_inputs() -> None:
    x, weight, bias = inputs()
    with pytest.raises(ValueError, match="one entry per row"):
        linear_sample(x, weight, bias, temperature=torch.ones(1), **noise())
    with pytest.raises(ValueError, match='impl must be "auto", "torch" or "triton", got \'cpp\''):
        linear_sample(x, weight, bias, temperature=torch.ones(ROWS), **noise(), impl="cpp")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match='impl="triton" cannot run here'):
        linear_sample(x, weight, bias, temperature=torch.ones(ROWS), **noise(), impl="triton")
