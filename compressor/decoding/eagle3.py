"""EAGLE-3: one decoder layer that guesses from the target's own hidden states.

With a_t the hidden states of three blocks at token t, g_t = fc(a_t) and e the target's embedding,
the layer reads [norm(e(x_{t+1})); norm(g_t)], adds what it finds to g_t, and its output o_t both
gives the logits of x_{t+2} and stands in for g_{t+1} when drafting goes on without the target
(Li et al. 2025, arXiv:2503.01840).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

from compressor.decoding.cached import CachedModel
from compressor.decoding.corpus import Head
from compressor.decoding.proposals import Committed, NetworkDraft, descend, extended
from compressor.errors import ModelError
from compressor.model.architecture import Architecture
from compressor.model.files import read_config
from compressor.numerics.speculative import ROOT

WEIGHTS = "model.safetensors"
Kept = tuple[Tensor, Tensor]  # keys and values [B, kv heads, T, head size]


def layer_config(target: Any) -> LlamaConfig:
    """A Llama configuration of one layer in the sizes of a target.

    Args:
        target: a causal language model.
    """
    config = target.config.get_text_config()
    sizes = Architecture.from_config(config.to_dict())
    rope = getattr(config, "rope_parameters", None) or {}
    plain = rope if "rope_type" in rope else {"rope_type": "default", "rope_theta": 10000.0}
    return LlamaConfig(
        vocab_size=sizes.vocab,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=1,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        max_position_embeddings=sizes.max_positions,
        rms_norm_eps=getattr(config, "rms_norm_eps", 1e-5),
        rope_parameters=plain,
        tie_word_embeddings=False,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
    )


class _Attention(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        width, size = 2 * config.hidden_size, config.head_dim
        self.size = size
        self.q_proj = nn.Linear(width, config.num_attention_heads * size, bias=False)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * size, bias=False)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * size, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * size, config.hidden_size, bias=False)

    def project(self, inputs: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Kept]:
        """Queries and, to be kept, keys and values, each [B, heads, T, size]."""
        queries, keys, values = (
            layer(inputs).unflatten(-1, (-1, self.size)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        queries, keys = apply_rotary_pos_emb(queries, keys, *rotary)
        return queries, (keys, values)

    def merge(self, mixed: Tensor) -> Tensor:
        """Heads [B, heads, T, size] side by side, through the last matrix."""
        out: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return out


class _Layer(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = _Attention(config)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(width, eps)
        self.hidden_norm = LlamaRMSNorm(width, eps)
        self.post_attention_layernorm = LlamaRMSNorm(width, eps)


@dataclass(frozen=True)
class _Output:
    """What `CachedModel` asks of a model."""

    logits: Tensor
    hidden_states: tuple[Tensor, ...]


class Eagle3(nn.Module):
    """The head; names of parameters are those of the flat dialect on disk.

    Args:
        config: sizes, as `layer_config` gives them.
        ids: int64 [V_d], the tokens of the target that the draft can propose, ascending.
        embedding: [V, H] of the target; shared, neither trained nor saved.
    """

    def __init__(self, config: LlamaConfig, ids: Tensor, embedding: Tensor) -> None:
        super().__init__()
        width = config.hidden_size
        self.config = config
        self.fc = nn.Linear(3 * width, width, bias=False)
        self.midlayer = _Layer(config)
        self.norm = LlamaRMSNorm(width, config.rms_norm_eps)
        self.lm_head = nn.Linear(width, len(ids), bias=False)
        self.rotary = LlamaRotaryEmbedding(config)
        self.register_buffer("ids", ids, persistent=False)
        self.register_buffer("embedding", embedding.detach(), persistent=False)
        self.ids: Tensor
        self.embedding: Tensor

    def read(self, tokens: Tensor, states: Tensor, positions: Tensor) -> tuple[Tensor, Kept]:
        """Queries, keys and values of the layer.

        Args:
            tokens: x_{t+1}, int64 [B, T].
            states: g_t or what stands in for it, [B, T, H].
            positions: int64 [B, T].
        """
        layer = self.midlayer
        embedded = functional.embedding(tokens, self.embedding)
        inputs = torch.cat([layer.input_layernorm(embedded), layer.hidden_norm(states)], -1)
        return layer.self_attn.project(inputs, self.rotary(states, positions))

    def finish(self, states: Tensor, mixed: Tensor) -> Tensor:
        """o_t [B, T, H] from the states and what attention mixed."""
        layer = self.midlayer
        states = states + layer.self_attn.merge(mixed)
        out: Tensor = states + layer.mlp(layer.post_attention_layernorm(states))
        return out

    def logits(self, outputs: Tensor) -> Tensor:
        """Of outputs o [..., H], over the draft's vocabulary, [..., V_d]."""
        found: Tensor = self.lm_head(self.norm(outputs))
        return found

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None,
        past_key_values: Any,
        states: Tensor,
        **_: Any,
    ) -> _Output:
        """One pass with a cache, as `CachedModel` calls it."""
        queries, kept = self.read(input_ids, states, position_ids)
        keys, values = past_key_values.update(*kept, 0)
        mixed = functional.scaled_dot_product_attention(
            queries, keys, values, attn_mask=attention_mask, enable_gqa=True
        )
        outputs = self.finish(states, mixed)
        return _Output(self.logits(outputs), (outputs,))


def unroll(head: Eagle3, features: Tensor, tokens: Tensor, steps: int) -> list[Tensor]:
    """Training-time test: outputs o of every step, each fed with the head's own ones.

    Step 0 at index t reads g_t and x_{t+1} and attends to step 0 up to t; step j reads its own
    output of step j - 1 and x_{t+1+j}, and attends to step 0 up to t and to its own steps at t, as
    when drafting from t.

    Args:
        head: the draft.
        features: a, [B, T, 3·H].
        tokens: x, int64 [B, T].
        steps: J.

    Returns:
        For step j, o [B, T - 1 - j, H], whose logits are those of x_{t+2+j}.
    """
    length = tokens.shape[1]
    states = head.fc(features[:, : length - 1])
    own: list[Kept] = []
    found = []
    for step in range(steps):
        count = length - 1 - step
        states = states[:, :count]
        positions = torch.arange(count, device=tokens.device)[None] + step
        queries, kept = head.read(tokens[:, 1 + step :], states, positions)
        own.append(kept)
        states = head.finish(states, _mixed(queries, own))
        found.append(states)
    return found


def _mixed(queries: Tensor, own: Sequence[Kept]) -> Tensor:
    """Attention of step j: causally to step 0, and to its own index in every later step.

    Args:
        queries: [B, heads, T_j, size].
        own: keys and values of steps 0 … j; earlier ones may be longer.
    """
    count = queries.shape[2]
    keys, values = (torch.cat([kept[i][:, :, :count] for kept in own], 2) for i in (0, 1))
    itself = torch.eye(count, dtype=torch.bool, device=queries.device)
    seen = torch.cat([torch.ones_like(itself).tril(), *[itself] * (len(own) - 1)], 1)
    return functional.scaled_dot_product_attention(
        queries, keys, values, attn_mask=seen, enable_gqa=True
    )


def start_from_target(head: Eagle3, target: Any, rows: Head, highest: int = 2) -> None:
    """Begin as the target's last block on its highest feature, instead of at random.

    The layer then reads only the hidden half of its input; what the embedding adds is learned.

    Args:
        head: changed in place.
        target: with separate q, k, v, gate and up matrices.
        rows: the target's head on the draft's vocabulary.
        highest: which of the three features comes from the highest block.
    """
    architecture = Architecture.from_config(target.config.get_text_config().to_dict())
    block = target.get_submodule(f"{architecture.blocks_path}.{architecture.layers - 1}")
    width, layer = architecture.hidden, head.midlayer
    one = 1.0 if architecture.norm == "rms_plus_one" else 0.0
    with torch.no_grad():
        head.fc.weight.zero_()
        head.fc.weight[:, width * highest : width * (highest + 1)].fill_diagonal_(1.0)
        for name in ("q_proj", "k_proj", "v_proj"):
            weight = getattr(layer.self_attn, name).weight
            weight.zero_()
            weight[:, width:] = getattr(block.self_attn, name).weight
        layer.self_attn.o_proj.weight.copy_(block.self_attn.o_proj.weight)
        for name in ("gate_proj", "up_proj", "down_proj"):
            getattr(layer.mlp, name).weight.copy_(getattr(block.mlp, name).weight)
        layer.hidden_norm.weight.copy_(block.input_layernorm.weight + one)
        layer.post_attention_layernorm.weight.copy_(block.post_attention_layernorm.weight + one)
        final = target.get_submodule(architecture.final_norm.removesuffix(".weight"))
        head.norm.weight.copy_(final.weight + one)
        head.lm_head.weight.copy_(rows.weight / rows.divisor)


class Eagle3Draft(NetworkDraft):
    """An EAGLE-3 head that proposes for its target.

    After every pass of the target, what was drafted is forgotten and the committed tokens are read
    again with the target's real features.

    Args:
        head: in evaluation mode.
        layers: entries of the target's `hidden_states` that it fuses.
    """

    def __init__(self, head: Eagle3, layers: tuple[int, ...]) -> None:
        self.layers = layers
        self.head = head
        self.model = CachedModel(head, (0,))
        self.start(1)

    def start(self, rows: int) -> None:
        """A new batch begins."""
        self.model.start(rows)
        self._tokens: list[list[int]] = [[] for _ in range(rows)]
        self._features: list[list[Tensor]] = [[] for _ in range(rows)]
        self._states = torch.empty(0)
        self._ancestry = torch.empty(0)

    def observe(self, committed: Committed) -> None:
        """Remember committed tokens with the features of the ones before them."""
        assert committed.features is not None
        self.model.commit([[]] * len(self._tokens))
        for row, (inputs, following) in enumerate(
            zip(committed.inputs, committed.following, strict=True)
        ):
            self._tokens[row] += [*inputs[1:], following]
            self._features[row].append(committed.features[row])

    def select(self, rows: Sequence[int]) -> None:
        """Go on with some of the rows."""
        self.model.select(rows)
        self._tokens = [self._tokens[row] for row in rows]
        self._features = [self._features[row] for row in rows]

    def root(self) -> Tensor:
        """Read what was committed since; logits after the last token."""
        counts = torch.tensor([len(tokens) for tokens in self._tokens])
        ids = pad_sequence([torch.tensor(tokens) for tokens in self._tokens], batch_first=True)
        features = pad_sequence([torch.cat(parts) for parts in self._features], batch_first=True)
        found = self.model.forward(ids, states=self.head.fc(features.to(self.head.fc.weight.dtype)))
        self.model.commit([range(int(count)) for count in counts])
        rows = torch.arange(len(counts))
        assert found.features is not None
        # Places 0 … hold the states of grown nodes; the root's stands before them.
        self._states = found.features[rows, counts - 1][:, None]
        self._ancestry = torch.zeros(len(counts), 0, 0, dtype=torch.bool)
        self._tokens = [[] for _ in rows]
        self._features = [[] for _ in rows]
        return self._over_all(found.logits[rows, counts - 1])

    def grow(self, tokens: Tensor, parents: Tensor) -> Tensor:
        """Logits after new nodes, which read their parents' outputs."""
        visible = descend(self._ancestry, parents)
        places = (parents - ROOT).to(self._states.device)  # the root stands at 0
        states = self._states.gather(1, places[..., None].expand(-1, -1, self._states.shape[-1]))
        found = self.model.forward(
            tokens, visible=visible, depth=visible.sum(-1) - 1, states=states
        )
        assert found.features is not None
        self._states = torch.cat([self._states, found.features], 1)
        self._ancestry = extended(self._ancestry, visible)
        return self._over_all(found.logits)

    def _over_all(self, logits: Tensor) -> Tensor:
        """Over the target's vocabulary: -inf for what the draft cannot say."""
        shape = (*logits.shape[:-1], self.head.config.vocab_size)
        whole = torch.full(shape, -torch.inf)
        whole[..., self.head.ids.cpu()] = logits.float().cpu()
        return whole


def load_eagle3(folder: Path, target: Any, layers: Sequence[int]) -> Eagle3Draft:
    """A head in the flat dialect, ready to propose.

    Args:
        folder: of the draft.
        target: loaded; lends its embedding.
        layers: features of the target that the draft fuses.

    Raises:
        ModelError: the folder holds no EAGLE-3 head.
    """
    config = read_config(folder)
    if "draft_vocab_size" not in config:
        raise ModelError(f"{folder} holds no EAGLE-3 head: no draft_vocab_size in config.json")
    tensors = load_file(folder / WEIGHTS)
    shift = tensors.pop("d2t")
    del tensors["t2d"]
    table = target.get_input_embeddings().weight
    ids = (shift + torch.arange(len(shift))).to(table.device)
    known = {name: config[name] for name in LlamaConfig().to_dict() if name in config}
    head = Eagle3(LlamaConfig(**known), ids, table)
    head.load_state_dict({name: value.to(table.dtype) for name, value in tensors.items()})
    return Eagle3Draft(head.to(table.device, table.dtype).eval(), tuple(layers))


def draft_vocabulary(counts: Tensor, size: int) -> Tensor:
    """The most frequent tokens, ids ascending, int64 [size]; ties go to the smaller id.

    Args:
        counts: how often the target says each token, [V].
        size: at most V.
    """
    order = torch.sort(counts, descending=True, stable=True).indices
    return order[:size].sort().values
