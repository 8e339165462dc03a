"""Any other causal LM: the transformers modules, with their attention replaced by ours over the paged cache."""

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from engine.batch import Feed, StepBatch
from engine.errors import UnsupportedModel
from engine.kernels import LinearWeight, kv_write, paged_attention
from engine.kv_cache import KVCache, pages_for
from engine.model import Head

ATTENTION = "diffpo_paged"
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-3}
# keywords attention modules pass that our attention honours or that have no effect on it
_HONOURED = {
    "dropout",
    "scaling",
    "sliding_window",
    "softcap",
    "position_ids",
    "use_cache",
    "cache_position",
    "is_causal",
}


def _paged(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' attention signature: query [1, heads, t, d] -> [1, t, heads, d]. The context travels as a keyword."""
    batch, cache = kwargs.pop("refine_context")
    unknown = sorted(k for k, v in kwargs.items() if k not in _HONOURED and v is not None and v is not False)
    if unknown or (attention_mask is not None and attention_mask.shape[-1] != attention_mask.shape[-2]):
        raise UnsupportedModel(
            f"{type(module).__name__} passes {unknown or 'a mask'} to its attention, which is not honoured"
        )
    config = cast(PreTrainedConfig, module.config)
    if getattr(config, "sliding_window", None) and "sliding_window" not in kwargs:
        raise UnsupportedModel(
            f"{type(module).__name__} keeps its sliding window of {config.sliding_window} in the mask, which is not honoured"
        )
    layer, heads, t = cast(int, module.layer_idx), query.shape[1], query.shape[2]
    k_cache, v_cache = cache.k[layer], cache.v[layer]
    kv_write(key[0].transpose(0, 1), value[0].transpose(0, 1), batch.slots, k_cache, v_cache, cache.layout)
    out = paged_attention(
        query[0].transpose(0, 1).reshape(t, -1).contiguous(), k_cache, v_cache, batch.block_table, batch.row_start,
        batch.first_position, heads=heads, scale=kwargs.get("scaling") or query.shape[-1] ** -0.5,
        softcap=kwargs.get("softcap"), window=kwargs.get("sliding_window") or 0, layout=cache.layout, longest=batch.end,
    )  # fmt: skip
    return out.view(1, t, heads, -1), None


def _max_positions(config: PreTrainedConfig) -> int:
    """How many positions there are at which a row does not depend on the longest sequence of its batch."""
    if getattr(config, "attention_chunk_size", None):
        raise UnsupportedModel(f"config field 'attention_chunk_size' = {config.attention_chunk_size} is not honoured")
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None:
        raise UnsupportedModel(f"a {config.model_type!r} configuration has no max_position_embeddings, which is needed")
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":  # beyond these the frequencies change, for all positions at once
        positions = min(positions, rope.get("original_max_position_embeddings") or positions)
    return int(positions)


class HFModel:
    """A transformers causal LM behind the engine's ``CausalModel`` protocol."""

    takes_padding = False

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.backbone = model.get_decoder()
        head = model.get_output_embeddings()
        config = model.config.get_text_config()
        weight = head.weight
        softcap = getattr(config, "final_logit_softcapping", None)
        self.head = Head(
            LinearWeight(weight, weight.shape[0], weight.shape[1], packed=False), getattr(head, "bias", None), softcap
        )
        self.max_positions = _max_positions(config)
        self.device = weight.device
        self.config = config

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype, device: torch.device, trust_remote_code: bool) -> "HFModel":
        """Loads a checkpoint and checks, on a few tokens, that our attention and head give the model's own logits."""
        AttentionInterface.register(ATTENTION, _paged)
        try:
            model = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                attn_implementation="eager",
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
            )
        except (ValueError, KeyError) as error:
            raise UnsupportedModel(f"transformers cannot load {folder}: {error}") from error
        nn.Module.to(model, device).eval()
        self = cls(model)
        self._verify()
        return self

    def new_cache(self, pages: int) -> KVCache:
        c = self.config
        heads = c.num_attention_heads
        kv_heads = getattr(c, "num_key_value_heads", None) or heads
        head_dim = getattr(c, "head_dim", None) or c.hidden_size // heads
        return KVCache(c.num_hidden_layers, pages, kv_heads, head_dim, self.model.dtype, self.device)

    @torch.inference_mode()
    def forward(self, batch: StepBatch, cache: KVCache) -> Tensor:
        out = self.backbone(
            input_ids=batch.token_ids[None], position_ids=batch.positions[None], use_cache=False,
            refine_context=(batch, cache),
        )  # fmt: skip
        hidden: Tensor = out.last_hidden_state
        return hidden[0] if batch.logit_rows is None else hidden[0, batch.logit_rows]

    @torch.inference_mode()
    def _verify(self) -> None:
        # Fed in two pieces, the second beside another sequence: a layer that keeps a state of its own, or computes
        # attention without our cache, agrees on one whole sequence and would be wrong on everything else.
        count = min(16, self.max_positions)
        half, pages = count // 2, list(range(2 * pages_for(count)))
        one = (torch.arange(count) * 7919 % self.config.vocab_size).tolist()
        other = one[::-1]
        texts = torch.tensor([one, other], device=self.device)
        expected = self.model(input_ids=texts, use_cache=False).logits.float().flatten(0, 1)
        passes = [
            [Feed(one[:half], 0, pages[::2], 0)],
            [Feed(one[half:], half, pages[::2], 0), Feed(other, 0, pages[1::2], 0)],
        ]
        try:
            self.model.set_attn_implementation(ATTENTION)
            cache = self.new_cache(len(pages))
            hidden = torch.cat([self.forward(StepBatch.pack(feeds, self.device), cache) for feeds in passes])
        except (RuntimeError, AttributeError, KeyError, TypeError, IndexError, ValueError) as error:
            raise UnsupportedModel(
                f"{type(self.model).__name__} does not run with paged attention ({type(error).__name__}: {error})"
            ) from error
        z = nn.functional.linear(hidden, self.head.weight.data, self.head.bias).float()
        if self.head.softcap:
            z = self.head.softcap * torch.tanh(z / self.head.softcap)
        difference = ((z - expected).abs().max() / expected.abs().max().clamp_min(1e-6)).item()
        if not difference <= _TOLERANCE[self.model.dtype]:
            raise UnsupportedModel(
                f"{type(self.model).__name__} computes something between its backbone and its logits, or in its attention, "
                f"that the engine does not honour: logits differ by {difference:.1e} relative"
            )
