"""A model with a key-value cache from which entries can be taken back, row by row.

Rows of a batch commit different numbers of tokens. What was computed since the last commit stands
at the end of the cache as provisional entries, of which a commit keeps some and drops the others.
Those that only some rows keep stay as gaps in the others, hidden by the mask; when there are many,
all rows are moved together.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from compressor.decoding.partial import going_on_from, leaving_after
from compressor.errors import ModelError
from compressor.model.architecture import Architecture

_SLACK, _GAPS = 1.125, 16  # a cache may be so much wider than its longest row


@dataclass(frozen=True)
class Pass:
    """What one forward pass gives.

    Attributes:
        logits: [B, n, V], or [B, m, V] of the places that were asked for.
        features: [B, n, k·H], the hidden states of the layers asked for side by side, or None.
    """

    logits: Tensor
    features: Tensor | None


@dataclass(frozen=True)
class _Ahead:
    """Tokens that the first blocks have computed and the others have not.

    Attributes:
        ids: int64 [B, a].
        outputs: of each of these blocks, [B, a, H].
    """

    ids: Tensor
    outputs: tuple[Tensor, ...]

    def begins(self, ids: Tensor) -> bool:
        """Whether these tokens are the first of `ids`, [B, n]."""
        count = self.ids.shape[1]
        return ids.shape[1] >= count and torch.equal(ids[:, :count], self.ids)


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
        self._filled = torch.zeros(rows, 0, dtype=torch.bool, device=self.device)
        self.provisional = 0
        self._ahead: _Ahead | None = None

    @cached_property
    def blocks(self) -> Sequence[nn.Module]:
        """The decoder blocks in order."""
        architecture = Architecture.from_config(self.model.config.get_text_config().to_dict())
        found: Sequence[nn.Module] = self.model.get_submodule(architecture.blocks_path)
        return found

    @property
    def lengths(self) -> Tensor:
        """Committed tokens of every row, int64 [B]."""
        return self._filled.sum(-1)

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
        places: Tensor | None = None,
        **inputs: Tensor,
    ) -> Pass:
        """Compute tokens behind what is there; they stay provisional until `commit`.

        Args:
            ids: int64 [B, n].
            visible: bool [B, n, provisional + n], which provisional tokens each new one sees;
                all up to itself by default.
            depth: int64 [B, n], places behind the committed tokens; in order by default.
            places: int64 [m], indices of the tokens whose logits are wanted; all by default.
            inputs: whatever else the model reads.
        """
        ids = ids.to(self.device)
        if places is not None:
            inputs["logits_to_keep"] = places.to(self.device)
        known = self._outputs_ahead(ids, usable=visible is None and depth is None)
        with going_on_from(self.blocks, known) if known else nullcontext():
            output = self.model(
                input_ids=ids,
                past_key_values=self.cache,
                use_cache=True,
                output_hidden_states=bool(self.layers),
                **self._places_of(ids, self.provisional, visible, depth),
                **inputs,
            )
        self.provisional += ids.shape[1]
        features = None
        if self.layers:
            features = torch.cat([output.hidden_states[layer] for layer in self.layers], -1)
        return Pass(output.logits, features)

    def _places_of(
        self, ids: Tensor, before: int, visible: Tensor | None, depth: Tensor | None
    ) -> dict[str, Tensor | None]:
        """Positions and mask of new tokens, of which `before` provisional ones go ahead."""
        rows, new = ids.shape
        if depth is None:
            depth = torch.arange(before, before + new).expand(rows, new)
        return {
            "position_ids": self.lengths[:, None] + depth.to(self.device),
            "attention_mask": self._mask(new, before, visible),
        }

    @torch.inference_mode()
    def leave_early(
        self,
        ids: Tensor,
        blocks: int,
        *,
        visible: Tensor | None = None,
        depth: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, n, V] of a model that ends after its first blocks; norm and head are its own.

        The tokens stand behind the committed ones in the cache of these blocks only. A `forward`
        of tokens that begin with them computes the other blocks for them and all for the rest;
        any other drops them.

        Args:
            ids: int64 [B, n].
            blocks: how many are computed; the same until the next `forward` or `forget`.
            visible: bool [B, n, a + n], which of the a tokens that left before each new one sees.
            depth: int64 [B, n], places behind the committed tokens; in order by default.
        """
        logits: Tensor = self._go_ahead(self.model, ids, blocks, visible, depth).logits
        return logits

    def _go_ahead(
        self, model: Any, ids: Tensor, blocks: int, visible: Tensor | None, depth: Tensor | None
    ) -> Any:
        """A pass of the first blocks; `model` is with its head or without."""
        assert not self.provisional, "tokens leave early behind committed ones only"
        ids, ahead, kept = ids.to(self.device), self._ahead, list[Tensor]()
        with leaving_after(self.blocks, blocks, kept):
            output = model(
                input_ids=ids,
                past_key_values=self.cache,
                use_cache=True,
                **self._places_of(ids, ahead.ids.shape[1] if ahead else 0, visible, depth),
            )
        if ahead is not None:
            ids = torch.cat([ahead.ids, ids], 1)
            pairs = zip(ahead.outputs, kept, strict=True)
            kept = [torch.cat(pair, 1) for pair in pairs]
        self._ahead = _Ahead(ids, tuple(kept))
        return output

    def _outputs_ahead(self, ids: Tensor, usable: bool) -> tuple[Tensor, ...]:
        """What the first blocks give for these tokens, if they left early; nothing otherwise."""
        if self._ahead is None or not usable or not self._ahead.begins(ids):
            self.forget()
            return ()
        rest = ids[:, self._ahead.ids.shape[1] :]
        if rest.shape[1]:  # tokens that were never asked for logits need no head
            self._go_ahead(self.model.base_model, rest, len(self._ahead.outputs), None, None)
        ahead, self._ahead = self._ahead, None
        return ahead.outputs

    def forget(self) -> None:
        """Drop what left early."""
        if self._ahead is not None:
            for layer in self.cache.layers[: len(self._ahead.outputs)]:
                layer.crop(-self._ahead.ids.shape[1])
        self._ahead = None

    def _mask(self, new: int, before: int, visible: Tensor | None) -> Tensor | None:
        """Additive mask [B, 1, n, keys]; None where every new token sees all there is."""
        if visible is None and new == 1 and bool(self._filled.all()):
            return None
        rows, past = len(self._filled), self._filled
        if visible is None:
            seen = torch.ones(new, before + new, dtype=torch.bool).tril(before)
            visible = seen.expand(rows, new, -1)
        both = torch.cat([past[:, None].expand(rows, new, -1), visible.to(self.device)], -1)
        closed = torch.finfo(self.dtype).min
        mask = torch.zeros(both.shape, dtype=self.dtype, device=self.device)
        return mask.masked_fill_(~both, closed)[:, None]

    def commit(self, kept: Sequence[Sequence[int]]) -> None:
        """Keep some of the provisional tokens of every row, in their order, and drop the rest.

        Args:
            kept: by row, ascending indices into what was computed since the last commit.
        """
        self.forget()
        before, width = self._filled, max((1 + max(row, default=-1) for row in kept), default=0)
        self.cache.crop(width - self.provisional)
        self.provisional = 0
        assert all(list(row) == sorted(row) for row in kept), "entries stay in their order"
        added = torch.zeros(len(kept), width, dtype=torch.bool)
        for row, chosen in enumerate(kept):
            added[row, list(chosen)] = True
        self._filled = torch.cat([before, added.to(self.device)], 1)
        if self._filled.shape[1] > _SLACK * int(self.lengths.max()) + _GAPS:
            self._close_gaps()

    def _close_gaps(self) -> None:
        """Move the entries of every row together, to the left."""
        longest = int(self.lengths.max())
        # A stable sort puts filled places first, in their order.
        places = self._filled.sort(dim=-1, descending=True, stable=True).indices[:, :longest]
        for layer in self.cache.layers:
            layer.keys, layer.values = (
                part.gather(
                    2, places[:, None, :, None].expand(-1, part.shape[1], -1, part.shape[3])
                )
                for part in (layer.keys, layer.values)
            )
        self._filled = torch.arange(longest, device=self.device) < self.lengths[:, None]

    def select(self, rows: Sequence[int]) -> None:
        """Go on with some of the rows. Nothing may be provisional."""
        index = torch.tensor(list(rows), dtype=torch.int64, device=self.device)
        self.cache.batch_select_indices(index)
        self._filled = self._filled[index]


def _longest(config: Any) -> int:
    """Tokens that may stand in the cache.

    Masks are built here and know nothing of sliding windows, which do nothing while a sequence is
    shorter than one.
    """
    architecture = Architecture.from_config(config.to_dict())
    window = architecture.sliding_window
    return min(architecture.max_positions, window or architecture.max_positions)
