"""Start weights that can already copy: an induction circuit written into the first two layers of a Llama model.

Attention that continues a repeated passage ("look back" heads feeding "match" heads) is what copying a draft needs,
and a small model finds it only after many million tokens. Here layer 0 gets three heads that carry the token one
place back, the token two places back and a blur of the tokens before; layer 1 gets heads that look for a place with
the same history and pass on the token found there. Everything else starts at random, and training is free to change
all of it.
"""

import itertools

import torch
from transformers import LlamaForCausalLM

SIGMA = 0.06  # scale of an embedding entry, and of what the circuit writes to the residual stream
CONSTANT = 5.0  # a direction shared by all embeddings, for the heads that look at positions only
COPY_GAIN = 5.0  # a copied token must outweigh the current one in the residual stream
MATCH_GAIN = 3.0
WEIGHTS = (7, 5, 4, 4, 4)  # shares of the match for the last token, the one before, ...


def _orthonormal(rows: int, columns: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(columns, rows))[0].T


def _frequencies(model: LlamaForCausalLM) -> torch.Tensor:
    size = model.config.head_dim
    return model.config.rope_parameters["rope_theta"] ** (-torch.arange(0, size, 2) / size)


def _look_back(model: LlamaForCausalLM, offset: int, read: torch.Tensor, write: slice) -> None:
    """Make a head of layer 0 attend ``offset`` places back and write a projection of the token there to ``write``."""
    attention = model.model.layers[0].self_attn
    size = attention.head_dim
    rows = slice((offset - 1) * size, offset * size)
    theta = _frequencies(model)
    amount = (theta > 0.01).float() * 1.15  # slower rotations cannot tell neighbours apart
    query, key, value = (p.weight[rows] for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    for matrix in (query, key, value):
        matrix.zero_()
    key[: size // 2, -1] = amount
    query[: size // 2, -1] = amount * (offset * theta).cos()
    query[size // 2 :, -1] = -amount * (offset * theta).sin()
    value[: read.shape[0], : read.shape[1]] = read
    output = attention.o_proj.weight[:, rows]
    output.zero_()
    output[write, : read.shape[0]] = SIGMA * torch.eye(read.shape[0])


def _match(model: LlamaForCausalLM, head: int, read: torch.Tensor, history: list[slice], copied: slice) -> None:
    """Make a head of layer 1 find where the same history was followed by a token, and copy part of that token."""
    attention = model.model.layers[1].self_attn
    size = attention.head_dim
    rows = slice(head * size, (head + 1) * size)
    slow = (_frequencies(model) < 0.004).nonzero().flatten()  # content must survive the rotation over long distances
    dims = torch.stack([slow, slow + size // 2], 1).flatten() + head * size
    order = sorted(range(len(dims)), key=lambda i: (i * 0.618) % 1)  # every part gets slower and faster rotations
    shares = [round(len(dims) * sum(WEIGHTS[:i]) / sum(WEIGHTS)) for i in range(len(history) + 1)]
    parts = [dims[order[start:stop]] for start, stop in itertools.pairwise(shares)]
    query, key, value, output = (
        p.weight for p in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    )
    for matrix in (query[rows], key[rows], value[rows], output[:, rows]):
        matrix.zero_()
    for back, chosen in enumerate(parts):  # the current token is what stands one place before the token to copy
        project = MATCH_GAIN * _orthonormal(len(chosen), read.shape[0])
        key[chosen, history[back]] = project
        if back:
            query[chosen, history[back - 1]] = project
        else:
            query[chosen, : read.shape[1]] = project @ read
    count = copied.stop - copied.start
    value[rows.start : rows.start + count, copied] = torch.eye(count)
    output[copied, rows.start : rows.start + count] = COPY_GAIN * SIGMA * torch.eye(count)


@torch.no_grad()
def write_induction(model: LlamaForCausalLM) -> None:
    """Overwrite the start weights of ``model`` with the copying circuit."""
    hidden, heads = model.config.hidden_size, model.config.num_attention_heads
    content = (hidden // 2) // heads * heads
    carried = (hidden - 1 - content) // len(WEIGHTS)
    history = [slice(content + i * carried, content + (i + 1) * carried) for i in range(len(WEIGHTS))]
    embedding = model.get_input_embeddings().weight
    embedding.mul_(0.1)
    embedding[:, :content] = torch.randn(embedding.shape[0], content) * SIGMA
    embedding[:, -1] = CONSTANT * SIGMA
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.mul_(0.3)
        layer.mlp.down_proj.weight.mul_(0.3)
    read = _orthonormal(carried, content)
    for i, write in enumerate(history):
        _look_back(model, i + 1, read, write)
    share = content // heads
    for head in range(heads):
        _match(model, head, read, history, slice(head * share, (head + 1) * share))
