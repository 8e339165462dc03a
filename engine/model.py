"""The lean decoder: one configuration-driven forward pass for Llama, Mistral, Qwen2, Qwen3 and Gemma-2 over packed rows
and a paged KV cache, with weights read straight from safetensors into the layout their kernels stream."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from engine.batch import StepBatch
from engine.config import ModelSpec, model_spec
from engine.errors import UnsupportedModel
from engine.kernels import (
    LinearWeight,
    embedding,
    gated_activation,
    linear,
    paged_attention,
    rms_norm,
    rope_kv_write,
)
from engine.kernels.flash_attention import FlashIndices, flash_indices, rows_for_flash
from engine.kv_cache import KVCache
from engine.weights import Checkpoint, TensorSource, WeightSource


@dataclass(frozen=True, slots=True)
class Head:
    """The projection to the vocabulary."""

    weight: LinearWeight
    bias: Tensor | None
    softcap: float | None


class CausalModel(Protocol):
    """What the engine needs of a model."""

    head: Head
    max_positions: int
    device: torch.device
    takes_padding: bool
    """Whether ``forward`` passes over rows of no sequence, whose slot is -1."""

    def new_cache(self, pages: int) -> KVCache:
        """A KV cache of this model's shape."""

    def forward(self, batch: StepBatch, cache: KVCache) -> Tensor:
        """Writes the K/V of every row and returns the final hidden states [r, hidden_size] of batch.logit_rows."""


@dataclass(frozen=True, slots=True)
class Layer:
    """Weights of one decoder layer; q, k, v and gate, up are stored as one projection each."""

    qkv: LinearWeight
    qkv_bias: Tensor | None
    o: LinearWeight
    o_bias: Tensor | None
    gate_up: LinearWeight
    gate_up_bias: Tensor | None
    down: LinearWeight
    down_bias: Tensor | None
    attention_norm: Tensor
    mlp_norm: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    attention_post_norm: Tensor | None
    mlp_post_norm: Tensor | None


class Decoder:
    """A decoder-only transformer over packed rows; use ``Decoder.load``."""

    takes_padding = True

    def __init__(
        self,
        spec: ModelSpec,
        embed: LinearWeight,
        layers: list[Layer],
        norm: Tensor,
        head: LinearWeight,
        compute_dtype: torch.dtype,
    ) -> None:
        self.spec = spec
        self.embed = embed
        self.layers = layers
        self.norm = norm
        self.head = Head(head, None, spec.logit_softcap)
        self.max_positions = spec.max_positions
        self.device = embed.data.device
        self.compute_dtype = compute_dtype
        scale = torch.tensor(spec.embedding_scale, dtype=torch.float32, device="cpu")
        self.embedding_scale = scale.to(embed.data.dtype).item()
        self.rotation = torch.empty(0, spec.head_dim, dtype=torch.float32, device=self.device)
        # tables that graphs captured before may still read; together less than twice the one in use
        self._outgrown: list[Tensor] = []

    @classmethod
    def load(cls, folder: Path, config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> "Decoder":
        """Reads a checkpoint folder; raises UnsupportedModel for a config field or tensor it would not honour."""
        spec = model_spec(config)
        with Checkpoint(folder) as checkpoint:
            return _Loader(spec, checkpoint, dtype, device).decoder(f"the checkpoint in {folder}")

    @classmethod
    def from_tensors(
        cls, config: PreTrainedConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device
    ) -> "Decoder":
        """Copies the weights of a model in memory, ``tensors`` being its ``state_dict()``; raises as ``load`` does."""
        return _Loader(model_spec(config), TensorSource(tensors), dtype, device).decoder("the model in memory")

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> "Decoder":
        """A decoder of the same configuration, dtype and device with other weights; raises as ``from_tensors`` does."""
        source = TensorSource(tensors)
        return _Loader(self.spec, source, self.embed.data.dtype, self.device).decoder("the model in memory")

    @torch.no_grad()
    def assign(self, other: "Decoder") -> None:
        """Copies the weights of a decoder made by ``with_tensors`` into this one's own storage."""
        if (other.head.weight is other.embed) != (self.head.weight is self.embed):
            raise UnsupportedModel(
                "head and embeddings must be one matrix in both models or in neither: tie or untie them alike"
            )
        for mine, theirs in zip(self._weights(), other._weights(), strict=True):
            mine.copy_(theirs)

    def _weights(self) -> Iterator[Tensor]:
        for holder in (self.embed, self.head.weight, self.norm):
            yield holder.data
        for layer in self.layers:
            for field in fields(layer):
                value: LinearWeight | Tensor | None = getattr(layer, field.name)
                if value is not None:
                    yield value.data

    def new_cache(self, pages: int) -> KVCache:
        spec = self.spec
        flash_rows = rows_for_flash(self.device, self.compute_dtype, spec.head_dim)
        return KVCache(
            spec.layers, pages, spec.kv_heads, spec.head_dim, self.compute_dtype, self.device, flash_rows=flash_rows
        )

    @torch.inference_mode()
    def forward(self, batch: StepBatch, cache: KVCache) -> Tensor:
        self._extend_rotation(batch.end)
        flash = None
        if cache.flash_rows is not None:
            sequences = (batch.block_table, batch.row_start, batch.first_position)
            flash = flash_indices(*sequences, cache.flash_rows)
        residual = embedding(batch.token_ids, self.embed, self.embedding_scale)
        # x: what the next normalisation adds to the residual stream first
        x: Tensor | None = None
        for index, layer in enumerate(self.layers):
            h = _norm(x, residual, layer.attention_norm, self.spec.eps)
            h = self._attention(index, layer, h, batch, cache, flash)
            if index == len(self.layers) - 1 and batch.logit_rows is not None:
                # nobody reads what other rows hold behind their last K/V
                h, residual = h[batch.logit_rows], residual[batch.logit_rows]
            h = linear(h, layer.o, layer.o_bias)
            if layer.attention_post_norm is not None:
                h = rms_norm(h, layer.attention_post_norm, self.spec.eps)
            h = rms_norm(h, layer.mlp_norm, self.spec.eps, residual=residual)
            h = linear(h, layer.gate_up, layer.gate_up_bias)
            x = linear(gated_activation(h, self.spec.activation), layer.down, layer.down_bias)
            if layer.mlp_post_norm is not None:
                x = rms_norm(x, layer.mlp_post_norm, self.spec.eps)
        assert x is not None
        return rms_norm(x, self.norm, self.spec.eps, residual=residual)

    def _attention(
        self, index: int, layer: Layer, h: Tensor, batch: StepBatch, cache: KVCache, flash: FlashIndices | None
    ) -> Tensor:
        spec = self.spec
        qkv = linear(h, layer.qkv, layer.qkv_bias)
        rope_kv_write(
            qkv, self.rotation, batch.positions, batch.slots, cache.k[index], cache.v[index],
            head_dim=spec.head_dim, q_norm=layer.q_norm, k_norm=layer.k_norm, eps=spec.eps, layout=cache.layout,
        )  # fmt: skip
        return paged_attention(
            qkv, cache.k[index], cache.v[index], batch.block_table, batch.row_start, batch.first_position,
            heads=spec.heads, scale=spec.attention_scale, softcap=spec.attention_softcap,
            window=spec.layer_windows[index], layout=cache.layout, longest=batch.end, flash=flash,
        )  # fmt: skip

    def _extend_rotation(self, positions: int) -> None:
        if positions <= self.rotation.shape[0]:
            return
        # doubled, so that a long context does not rebuild the table at every step
        size = min(self.max_positions, max(256, positions, 2 * self.rotation.shape[0]))
        inv_freq = self.spec.inv_freq.to(self.device)
        angle = torch.arange(size, device=self.device)[:, None].float() * inv_freq
        self._outgrown.append(self.rotation)
        self.rotation = torch.cat((angle.cos(), angle.sin()), dim=-1)


def _norm(x: Tensor | None, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    if x is None:
        return rms_norm(residual, weight, eps)
    return rms_norm(x, weight, eps, residual=residual)


class _Loader:
    """Assembles a Decoder from the tensors of a checkpoint or of a model in memory."""

    def __init__(self, spec: ModelSpec, checkpoint: WeightSource, dtype: torch.dtype, device: torch.device) -> None:
        self.spec, self.checkpoint, self.dtype, self.device = spec, checkpoint, dtype, device
        packed = LinearWeight.allocate(1, 1, dtype, device).packed
        # packed weights are read by kernels that compute in float32 whatever the weights' own dtype
        self.compute_dtype = torch.float32 if packed else dtype

    def decoder(self, origin: str) -> Decoder:
        """``origin`` names the source in errors."""
        spec = self.spec
        embed = self._matrix(["model.embed_tokens"], [spec.vocab_size], spec.hidden_size)
        # as in transformers 5, a head of its own in the checkpoint of a tied model counts where it differs
        tied = spec.tied and self.checkpoint.equal("lm_head.weight", "model.embed_tokens.weight")
        head = embed if tied else self._matrix(["lm_head"], [spec.vocab_size], spec.hidden_size)
        layers = [self._layer(f"model.layers.{i}.") for i in range(spec.layers)]
        norm = self._norm_weight("model.norm", spec.hidden_size)
        # rotary buffers of old exports are derived data; anything else unread would be a wrong model
        unread = sorted(name for name in self.checkpoint.unread if not name.endswith("rotary_emb.inv_freq"))
        if unread:
            raise UnsupportedModel(f"{origin} has tensors this decoder does not use: {unread[:5]}")
        return Decoder(spec, embed, layers, norm, head, self.compute_dtype)

    def _layer(self, prefix: str) -> Layer:
        s = self.spec
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        qkv = [attention + "q_proj", attention + "k_proj", attention + "v_proj"]
        qkv_rows = [s.heads * s.head_dim, s.kv_heads * s.head_dim, s.kv_heads * s.head_dim]
        gate_up, gate_up_rows = [mlp + "gate_proj", mlp + "up_proj"], [s.intermediate_size] * 2
        before_mlp = "pre_feedforward_layernorm" if s.is_gemma else "post_attention_layernorm"
        return Layer(
            qkv=self._matrix(qkv, qkv_rows, s.hidden_size),
            qkv_bias=self._bias(qkv, qkv_rows, s.qkv_bias),
            o=self._matrix([attention + "o_proj"], [s.hidden_size], s.heads * s.head_dim),
            o_bias=self._bias([attention + "o_proj"], [s.hidden_size], s.output_bias),
            gate_up=self._matrix(gate_up, gate_up_rows, s.hidden_size),
            gate_up_bias=self._bias(gate_up, gate_up_rows, s.mlp_bias),
            down=self._matrix([mlp + "down_proj"], [s.hidden_size], s.intermediate_size),
            down_bias=self._bias([mlp + "down_proj"], [s.hidden_size], s.mlp_bias),
            attention_norm=self._norm_weight(prefix + "input_layernorm", s.hidden_size),
            mlp_norm=self._norm_weight(prefix + before_mlp, s.hidden_size),
            q_norm=self._norm_weight(attention + "q_norm", s.head_dim) if s.has_qk_norm else None,
            k_norm=self._norm_weight(attention + "k_norm", s.head_dim) if s.has_qk_norm else None,
            attention_post_norm=self._norm_weight(prefix + "post_attention_layernorm", s.hidden_size)
            if s.is_gemma
            else None,
            mlp_post_norm=self._norm_weight(prefix + "post_feedforward_layernorm", s.hidden_size)
            if s.is_gemma
            else None,
        )

    def _matrix(self, names: list[str], rows: list[int], columns: int) -> LinearWeight:
        weight = LinearWeight.allocate(sum(rows), columns, self.dtype, self.device)
        for name, first, count in zip(names, _offsets(rows), rows, strict=True):
            self.checkpoint.read_into(weight, first, name + ".weight", count)
        return weight

    def _bias(self, names: list[str], rows: list[int], present: bool) -> Tensor | None:
        """The parts' biases as one vector, None where the model has none."""
        if not present:
            return None
        parts = [self.checkpoint.vector(name + ".bias", count) for name, count in zip(names, rows, strict=True)]
        return torch.cat(parts).to(self.device, self.compute_dtype)

    def _norm_weight(self, name: str, size: int) -> Tensor:
        weight = self.checkpoint.vector(name + ".weight", size).to(self.device)
        return weight + 1 if self.spec.is_gemma else weight


def _offsets(rows: list[int]) -> list[int]:
    return [sum(rows[:i]) for i in range(len(rows))]
