"""Start weights that can already copy: an induction circuit written into the first three layers of a Llama model.

Attention that continues a repeated passage is what copying a draft needs, and a small model finds it only after many
million tokens. Here the heads of layer 0 carry the tokens one to five places back, layer 1 carries those five places
further, and the heads of layer 2 look for a place with the same history of ten tokens, in a user turn rather than in
an answer, and pass on the token found there. Everything else starts at random, and training is free to change all of
it.
"""

import torch
from transformers import LlamaForCausalLM

SIGMA = 0.06  # scale of an embedding entry, and of what the circuit writes to the residual stream
CONSTANT = 5.0  # a direction shared by all embeddings, for the heads that look at positions only
COPY_GAIN = 5.0  # a copied token must outweigh the current one in the residual stream
MATCH_GAIN = 3.0
SHARES = (6, 5, 4, 3, 2, 2, 1, 1, 1, 1)  # of a head's match dimensions, for the last token, the one before, ...
FLAG_GAIN = 6.0  # how much a draft is preferred to the answer so far
HALF = len(SHARES) // 2
ROLE, SIDE, FLAG, ONE = -4, -3, -2, -1  # dimensions: is a role token, which role, whose turn this is, the constant


def _orthonormal(rows: int, columns: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(columns, rows))[0].T


class _Head:
    """Views of one attention head's weights, cleared."""

    def __init__(self, model: LlamaForCausalLM, layer: int, head: int) -> None:
        attention = model.model.layers[layer].self_attn
        self.size = attention.head_dim
        rows = slice(head * self.size, (head + 1) * self.size)
        self.query, self.key, self.value = (
            projection.weight[rows] for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        self.output = attention.o_proj.weight[:, rows]
        for matrix in (self.query, self.key, self.value, self.output):
            matrix.zero_()
        theta = model.config.rope_parameters["rope_theta"]
        self.frequencies = theta ** (-torch.arange(0, self.size, 2) / self.size)

    def look_back(self, offset: int) -> None:
        """Attend ``offset`` places back."""
        amount = (self.frequencies > 0.01).float() * 1.15  # slower rotations cannot tell neighbours apart
        half = self.size // 2
        self.key[:half, ONE] = amount
        self.query[:half, ONE] = amount * (offset * self.frequencies).cos()
        self.query[half:, ONE] = -amount * (offset * self.frequencies).sin()

    def slow(self) -> torch.Tensor:
        """Dimensions whose rotation leaves content comparable over long distances, slowest first."""
        chosen = (self.frequencies < 0.004).nonzero().flatten().flip(0)
        return torch.stack([chosen, chosen + self.size // 2], 1).flatten()

    def move(self, source: slice, target: slice, gain: float) -> None:
        """Pass on the dimensions ``source`` of the tokens attended to."""
        used = (self.value != 0).any(1).sum()
        count = source.stop - source.start
        self.value[used : used + count, source] = torch.eye(count)
        self.output[target, used : used + count] = gain * SIGMA * torch.eye(count)


def _match(head: _Head, read: torch.Tensor, history: list[slice]) -> None:
    """Attend to the place whose ten preceding tokens are the current one and the nine before it."""
    slow = head.slow()
    head.query[slow[0], ONE] = 1.0
    head.key[slow[0], FLAG] = FLAG_GAIN
    dims = slow[2:]
    order = sorted(range(len(dims)), key=lambda i: (i * 0.618) % 1)  # every part gets slower and faster rotations
    start = 0
    for back, share in enumerate(SHARES):
        chosen = dims[order[start : start + round(share * len(dims) / sum(SHARES))]]
        start += len(chosen)
        project = MATCH_GAIN * _orthonormal(len(chosen), read.shape[0])
        head.key[chosen, history[back]] = project
        if back:
            head.query[chosen, history[back - 1]] = project
        else:
            head.query[chosen, : read.shape[1]] = project @ read


@torch.no_grad()
def write_induction(model: LlamaForCausalLM, user: int, assistant: int) -> None:
    """Overwrite the start weights of ``model``; ``user`` and ``assistant`` are the ids of the role tokens."""
    hidden, heads = model.config.hidden_size, model.config.num_attention_heads
    content = (hidden // 2) // heads * heads
    carried = (hidden + ROLE - content) // len(SHARES)
    history = [slice(content + i * carried, content + (i + 1) * carried) for i in range(len(SHARES))]
    embedding = model.get_input_embeddings().weight
    embedding.mul_(0.1)
    embedding[:, :content] = torch.randn(embedding.shape[0], content) * SIGMA
    embedding[:, ONE] = CONSTANT * SIGMA
    embedding[[user, assistant], ROLE] = 5 * SIGMA
    embedding[user, SIDE] = 5 * SIGMA
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.mul_(0.3)
        layer.mlp.down_proj.weight.mul_(0.3)
    read = _orthonormal(carried, content)
    for i in range(HALF):
        head = _Head(model, 0, i)
        head.look_back(i + 1)
        head.value[:carried, :content] = read
        head.output[history[i], :carried] = SIGMA * torch.eye(carried)
    movers = [_Head(model, 1, 0), _Head(model, 1, 1)]
    for i in range(HALF):
        mover = movers[i % 2]
        mover.look_back(HALF)
        mover.move(history[i], history[i + HALF], gain=1.0)
    turn = _Head(model, 1, 2)
    turn.key[-1, ROLE] = turn.query[-1, ONE] = 4.0
    turn.value[0, SIDE] = 1.0
    turn.output[FLAG, 0] = SIGMA
    share = content // heads
    for i in range(heads):
        head = _Head(model, 2, i)
        _match(head, read, history)
        head.move(slice(i * share, (i + 1) * share), slice(i * share, (i + 1) * share), COPY_GAIN)
