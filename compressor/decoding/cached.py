"""A model with a key-value cache from which entries can be taken back, row by row.

Rows of a batch commit different numbers of tokens. The cache therefore keeps every row flush left
with a length of its own; what was computed since the last commit stands behind the longest row as
provisional entries, of which a commit keeps some and drops the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from compressor.errors import ModelError
from compressor.model.architecture import Architecture


@dataclass(frozen=True)
class Pass:
    """What one forward pass gives.

    Attributes:
        logits: [B, n, V], or [B, 1, V] of each row's last token when only that was asked for.
        features: [B, n, k·H], the hidden states of the layers asked for side by side, or None.
    """

    logits: Tensor
    features: Tensor | None


class CachedModel:
    """A causal language model and its cache.

    Args:
        model: as `load_model` gives it.
        layers: which of transformers' `hidden_states` to return as features; 0 is the embedding.

    Raises:
        ModelError: the last entry is asked for, which transformers gives after the final norm and
            inference engines before it.
    """

    def __init__(self, model: Any, layers: Sequence[int] = ()) -> None:
        self.model = model
        self.layers = tuple(layers)
        config = model.config.get_text_config()
        if any(not 0 <= layer < config.num_hidden_layers for layer in self.layers):
            raise ModelError(
                f"features of layers {list(self.layers)} cannot be read: the model has "
                f"{config.num_hidden_layers} blocks, and the output of the last is not among them"
            )
        self.device: torch.device = next(model.parameters()).device
        self.dtype: torch.dtype = next(model.parameters()).dtype
        self.vocab = int(config.vocab_size)
        self.longest = _longest(config)
        self.start(1)

    def start(self, rows: int) -> None:
        """Forget everything; the next batch has so many rows."""
        self.cache = DynamicCache()
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=self.device)
        self.provisional = 0

    @property
    def room(self) -> int:
        """Tokens that the longest row may still take."""
        return self.longest - int(self.lengths.max())

    @torch.inference_mode()
    def forward(
        self,
        ids: Tensor,
        *,
        visible: Tensor | None = None,
        depth: Tensor | None = None,
        **inputs: Tensor,
    ) -> Pass:
        """Compute tokens behind what is there; they stay provisional until `commit`.

        Args:
            ids: int64 [B, n].
            visible: bool [B, n, provisional + n], which provisional tokens each new one sees;
                all up to itself by default.
            depth: int64 [B, n], places behind the committed tokens; in order by default.
            inputs: whatever else the model reads.
        """
        ids = ids.to(self.device)
        rows, new = ids.shape
        committed = int(self.lengths.max())
        if depth is None:
            depth = torch.arange(self.provisional, self.provisional + new).expand(rows, new)
        output = self.model(
            input_ids=ids,
            position_ids=self.lengths[:, None] + depth.to(self.device),
            attention_mask=self._mask(committed, new, visible),
            past_key_values=self.cache,
            use_cache=True,
            output_hidden_states=bool(self.layers),
            **inputs,
        )
        self.provisional += new
        features = None
        if self.layers:
            features = torch.cat([output.hidden_states[layer] for layer in self.layers], -1)
        return Pass(output.logits, features)

    def _mask(self, committed: int, new: int, visible: Tensor | None) -> Tensor | None:
        """Additive mask [B, 1, n, keys]; None where every new token sees all there is."""
        level = bool((self.lengths == committed).all())
        if level and visible is None and new == 1:
            return None
        rows = len(self.lengths)
        past = torch.arange(committed, device=self.device) < self.lengths[:, None]
        if visible is None:
            seen = torch.ones(new, self.provisional + new, dtype=torch.bool).tril(self.provisional)
            visible = seen.expand(rows, new, -1)
        both = torch.cat([past[:, None].expand(rows, new, -1), visible.to(self.device)], -1)
        closed = torch.finfo(self.dtype).min
        mask = torch.zeros(both.shape, dtype=self.dtype, device=self.device)
        return mask.masked_fill_(~both, closed)[:, None]

    def commit(self, kept: Sequence[Sequence[int]]) -> None:
        """Keep some of the provisional tokens of every row, in this order, and drop the rest.

        Args:
            kept: by row, indices into what was computed since the last commit.
        """
        committed = int(self.lengths.max())
        counts = torch.tensor([len(row) for row in kept], device=self.device)
        lengths = self.lengths + counts
        prefix = all(list(row) == list(range(len(row))) for row in kept)
        if prefix and bool((self.lengths == committed).all()):
            drop = committed + self.provisional - int(lengths.max())
            self.cache.crop(-drop)
        else:
            self._gather(self._places(kept, lengths, committed))
        self.lengths, self.provisional = lengths, 0

    def _places(self, kept: Sequence[Sequence[int]], lengths: Tensor, committed: int) -> Tensor:
        """Where each entry of the new cache stands in the old one, [B, longest]."""
        places = torch.zeros(len(kept), int(lengths.max()), dtype=torch.int64)
        for row, chosen in enumerate(kept):
            old = int(self.lengths[row])
            places[row, :old] = torch.arange(old)
            places[row, old : old + len(chosen)] = committed + torch.tensor(
                list(chosen), dtype=torch.int64
            )
        return places.to(self.device)

    def _gather(self, places: Tensor) -> None:
        for layer in self.cache.layers:
            shape = (-1, layer.keys.shape[1], -1, layer.keys.shape[3])
            index = places[:, None, :, None].expand(shape)
            layer.keys = layer.keys.gather(2, index)
            shape = (-1, layer.values.shape[1], -1, layer.values.shape[3])
            layer.values = layer.values.gather(2, places[:, None, :, None].expand(shape))

    def select(self, rows: Sequence[int]) -> None:
        """Go on with some of the rows. Nothing may be provisional."""
        index = torch.tensor(list(rows), dtype=torch.int64, device=self.device)
        self.cache.batch_select_indices(index)
        self.lengths = self.lengths[index]
        drop = self.cache.get_seq_length() - int(self.lengths.max())
        self.cache.crop(-drop)


def _longest(config: Any) -> int:
    """Tokens that may stand in the cache.

    Masks are built here and know nothing of sliding windows, which do nothing while a sequence is
    shorter than one.
    """
    architecture = Architecture.from_config(config.to_dict())
    window = architecture.sliding_window
    return min(architecture.max_positions, window or architecture.max_positions)
