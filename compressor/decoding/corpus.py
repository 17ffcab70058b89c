"""What a draft is distilled on, as its target sees it.

Stored are token ids and hidden states in half precision, never logits: the head is applied again
when they are needed, on as many rows of the vocabulary as are needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from compressor.model.activations import ActivationStore
from compressor.model.architecture import Architecture
from compressor.progress import Observer
from compressor.team import ALONE, Team
from compressor.types import TokenBatch


class Corpus:
    """Batches of tokens with the target's hidden states at each of them.

    A process of several reads, keeps and gives its share of the rows of every batch.

    Args:
        target: a model in evaluation mode.
        batches: right-padded; causal attention keeps padding out of what is before it.
        layers: entries of transformers' `hidden_states` to keep as features.
        folder: for what exceeds the memory budget.
        budget: bytes held in memory.
        observer: progress.
        team: processes that share the rows.
    """

    def __init__(
        self,
        target: Any,
        batches: Sequence[TokenBatch],
        layers: Sequence[int],
        folder: Path,
        budget: int,
        observer: Observer,
        team: Team = ALONE,
    ) -> None:
        self.batches, self.team = tuple(batches), team
        self._own = [share(batch, team) for batch in self.batches]
        own = folder / f"process-{team.rank}"
        self._features = ActivationStore(own / "features", budget // 2)
        self._hidden = ActivationStore(own / "hidden", budget // 2)
        self.device: torch.device = next(target.parameters()).device
        with observer.task("read text", len(self.batches)) as task, torch.inference_mode():
            for batch in self._own:
                states = self._states(target, batch)
                self._hidden.append(self._half(states[-1]))
                if layers:
                    self._features.append(self._half(torch.cat([states[i] for i in layers], -1)))
                task.advance()

    def _states(self, target: Any, batch: TokenBatch) -> tuple[Tensor, ...]:
        """The last entry is behind the final norm: it is what the head reads."""
        output = target(
            batch.input_ids.to(self.device), output_hidden_states=True, use_cache=False,
            logits_to_keep=1,
        )  # fmt: skip
        states: tuple[Tensor, ...] = output.hidden_states
        return states

    def _half(self, states: Tensor) -> Tensor:
        """In half the bytes: fp16 has three more bits of mantissa than bf16, where its range does.

        What does not fit in one process does not in any: all round alike, however many they are.
        """
        outside = (states.abs().max() >= torch.finfo(torch.float16).max).float()
        fits = float(self.team.add(outside)) == 0
        return states.to(torch.float16 if fits else torch.bfloat16)

    @property
    def tokens(self) -> int:
        """Without padding, of all rows."""
        return sum(int(batch.mask.sum()) for batch in self.batches)

    def at(self, step: int, seed: int) -> int:
        """The batch of a training step: every one once, in a new order each time round."""
        round_, place = divmod(step, len(self.batches))
        generator = torch.Generator().manual_seed(seed + round_)
        return int(torch.randperm(len(self.batches), generator=generator)[place])

    def ids(self, number: int) -> Tensor:
        """Token ids int64 [B, T]."""
        return self._own[number].input_ids.to(self.device)

    def mask(self, number: int) -> Tensor:
        """False on padding, bool [B, T]."""
        return self._own[number].mask.to(self.device)

    def hidden(self, number: int) -> Tensor:
        """What the target's head read, fp32 [B, T, H]."""
        return self._hidden[number].to(self.device, torch.float32)

    def features(self, number: int) -> Tensor:
        """Hidden states of the layers side by side, fp32 [B, T, k·H]."""
        return self._features[number].to(self.device, torch.float32)

    def delete(self) -> None:
        """Free memory and files."""
        self._features.delete()
        self._hidden.delete()


def share(batch: TokenBatch, team: Team) -> TokenBatch:
    """A process's rows; where there is none, one that does not count, as all compute alike.

    Args:
        batch: the same on every process.
        team: who shares it.
    """
    rows = list(team.share(range(len(batch.mask))))
    if rows:
        domains = tuple(batch.domains[row] for row in rows)
        return TokenBatch(batch.input_ids[rows], batch.mask[rows], domains)
    return TokenBatch(batch.input_ids[:1], torch.zeros_like(batch.mask[:1]), batch.domains[:1])


@dataclass(frozen=True)
class Head:
    """The target's last step, on all of its vocabulary or on some rows.

    Attributes:
        weight: [rows, H], in the precision of the product.
        bias: [rows] in the same, or None.
        divisor: logits are divided by it.
        softcap: and squashed into ± this, if any.
    """

    weight: Tensor
    bias: Tensor | None
    divisor: float
    softcap: float | None

    @classmethod
    def of(cls, model: Any, dtype: torch.dtype = torch.float32) -> Head:
        """The head of a model with all rows, in a precision of its own."""
        architecture = Architecture.from_config(model.config.get_text_config().to_dict())
        layer = model.get_output_embeddings()
        bias = getattr(layer, "bias", None)
        return cls(
            layer.weight.detach().to(dtype),
            None if bias is None else bias.detach().to(dtype),
            architecture.logits_divisor,
            architecture.logits_softcap,
        )

    def rows(self, ids: Tensor) -> Head:
        """On these tokens only."""
        bias = None if self.bias is None else self.bias[ids]
        return replace(self, weight=self.weight[ids], bias=bias)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., rows] of what the head reads, [..., H]."""
        logits = functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias)
        logits = logits / self.divisor
        if self.softcap is None:
            return logits
        return torch.tanh(logits / self.softcap) * self.softcap
