"""A model as evaluation sees it: final hidden states, and the head that turns them into logits.

Keeping the two apart is what makes exact divergences cheap: the base's hidden states are stored
(H numbers per token) and its logits (V numbers per token, V some 100 H) are recomputed on demand.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from compressor.errors import ModelError
from compressor.model.architecture import Architecture
from compressor.model.load import load_model, read_config
from compressor.model.walk import BlockWalk
from compressor.progress import Observer
from compressor.types import TokenBatch


class Scorer(Protocol):
    """What evaluation asks of a model.

    Attributes:
        vocab: number of logits.
        dtype: precision of the forward pass, for example "float32".
        backend: library, version and device, for example "torch 2.13.0 cpu".
        device: where `logits` expects its input.
    """

    vocab: int
    dtype: str
    backend: str
    device: torch.device

    def states(self, batches: Sequence[TokenBatch]) -> Iterator[Tensor]:
        """Per batch, the states [B, T, H] that the model's head reads, after the final norm.

        Rows are padded on the right; a state must not depend on what follows it.
        """
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [N, V] of states [N, H], as the model itself would return them."""
        ...

    def close(self) -> None:
        """Free the memory."""
        ...


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The precision behind `auto`, `float32` or `bfloat16` on `device`."""
    if name == "auto":
        name = "float32" if device.type == "cpu" else "bfloat16"
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def backend_name(device: torch.device) -> str:
    """Library, version and device: what must agree before two measurements are paired."""
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"torch {torch.__version__.split('+')[0]} {place}"


class TransformersScorer:
    """Any causal language model that `AutoModelForCausalLM` loads, packed ones included.

    The head is applied by the model's own `forward`, with its decoder replaced by the given
    states. So a soft cap (Gemma), a scaling (Granite, Cohere) or whatever a family does after the
    head is done by that family's code.

    Args:
        path: checkpoint directory.
        device: where it runs.
        dtype: precision of weights and arithmetic.

    Raises:
        ModelError: the model does not split into decoder and head.
    """

    def __init__(
        self,
        path: Path | str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.device = torch.device(device)
        self.dtype = str(dtype).removeprefix("torch.")
        self.backend = backend_name(self.device)
        self._model: Any = load_model(Path(path), self.device, dtype)
        self._decoder: Any = self._model.get_decoder()
        self.vocab: int = int(self._model.config.get_text_config().vocab_size)
        self._check_split()

    def states(self, batches: Sequence[TokenBatch]) -> Iterator[Tensor]:
        """States [B, T, H] of every batch."""
        return map(self._hidden, batches)

    @torch.inference_mode()
    def _hidden(self, batch: TokenBatch) -> Tensor:
        """The mask is not needed: attention is causal and padding is last."""
        ids = batch.input_ids.to(self.device)
        states: Tensor = self._decoder(input_ids=ids, use_cache=False).last_hidden_state
        return states

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [N, V]."""
        with _returning(self._decoder, hidden[None]):
            ids = torch.zeros(1, len(hidden), dtype=torch.int64, device=self.device)
            logits: Tensor = self._model(input_ids=ids, use_cache=False).logits[0]
        return logits

    def close(self) -> None:
        """Drop the model."""
        self._model = self._decoder = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _check_split(self) -> None:
        """The head on the decoder's states must equal the whole model."""
        ids = torch.arange(8, device=self.device)[None] % self.vocab
        batch = TokenBatch(ids, torch.ones_like(ids, dtype=torch.bool), ("",))
        with torch.inference_mode():
            whole = self._model(input_ids=ids, use_cache=False).logits[0]
        if not torch.allclose(self.logits(self._hidden(batch)[0]), whole, atol=1e-4, rtol=1e-3):
            raise ModelError(
                f"{type(self._model).__name__} does more between decoder and logits than a head; "
                "its logits cannot be recomputed from stored states"
            )


class _States(BaseModelOutputWithPast):  # type: ignore[misc]
    """A decoder's output that has nothing but states, whatever else a family asks it for."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


@contextmanager
def _returning(decoder: nn.Module, states: Tensor) -> Iterator[None]:
    """Within the block, calling `decoder` yields `states` [1, N, H] and computes nothing."""
    output = _States(last_hidden_state=states)
    decoder.forward = lambda *_, **__: output
    try:
        yield
    finally:
        del decoder.forward


class StreamingScorer:
    """A plain checkpoint of a known family, one block in memory at a time.

    Every block is read once and sees all batches before the next one is read, so memory is one
    block, the residual stream of all tokens (spilled to disk past a budget) and the head. The
    arithmetic is that of the model's own modules; states and logits equal `TransformersScorer`'s.

    Args:
        path: checkpoint directory.
        device, dtype: where and in what precision blocks are computed.
        scratch: folder for what is spilled; emptied afterwards.
        budget: bytes of activations held in memory.
        observer: told when a block is done.

    Raises:
        ModelError: the checkpoint is packed or of an unknown family.
    """

    def __init__(
        self,
        path: Path,
        device: torch.device,
        dtype: torch.dtype,
        *,
        scratch: Path,
        budget: int,
        observer: Observer,
    ) -> None:
        self.device = device
        self.dtype = str(dtype).removeprefix("torch.")
        self.backend = backend_name(device)
        self._path, self._dtype = path, dtype
        self._scratch, self._budget, self._observer = scratch, budget, observer
        self._head: BlockWalk = self._walk(())
        self.vocab = self._head.architecture.vocab

    def states(self, batches: Sequence[TokenBatch]) -> Iterator[Tensor]:
        """States [B, T, H] of every batch; computed for all of them before the first is given."""
        if not batches:
            return
        walk = self._walk(batches)
        with self._observer.task("blocks", walk.architecture.layers) as task:
            for _ in walk.blocks():
                task.advance()
        yield from walk.final_hidden()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [N, V]."""
        return self._head.logits(hidden)

    def has_head_of(self, other: StreamingScorer) -> bool:
        """Whether the same states would have the same logits: one head in memory is enough."""
        return self._dtype == other._dtype and self._head.same_head(other._head)

    def close(self) -> None:
        """Drop the head."""
        del self._head

    def _walk(self, batches: Sequence[TokenBatch]) -> BlockWalk:
        return BlockWalk(
            self._path,
            batches,
            device=self.device,
            dtype=self._dtype,
            scratch=self._scratch,
            memory_budget=self._budget,
        )


def can_stream(path: Path) -> bool:
    """Whether `StreamingScorer` takes the checkpoint: plain weights of a known family."""
    try:
        return not Architecture.from_config(read_config(path)).quantized
    except ModelError:
        return False
