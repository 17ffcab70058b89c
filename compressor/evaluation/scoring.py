"""A model as evaluation sees it: final hidden states, and the head that turns them into logits.

Keeping the two apart is what makes exact divergences cheap: the base's hidden states are stored
(H numbers per token) and its logits (V numbers per token, V some 100 H) are recomputed on demand.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPast

from compressor.errors import ModelError
from compressor.model.families import FAMILIES
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

    def hidden(self, batch: TokenBatch) -> Tensor:
        """States [B, T, H] that the model's head reads, after the final norm.

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
        head_only: load the head and nothing else; `hidden` is then refused.

    Raises:
        ModelError: the model does not split into decoder and head.
    """

    def __init__(
        self,
        path: Path | str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        head_only: bool = False,
    ) -> None:
        self.device = torch.device(device)
        self.dtype = str(dtype).removeprefix("torch.")
        self.backend = backend_name(self.device)
        self._head_only = head_only
        load = _load_head if head_only else _load_all
        self._model: Any = load(Path(path), dtype, self.device)
        self._model.eval()
        self._decoder: Any = self._model.get_decoder()
        self.vocab: int = int(self._model.config.get_text_config().vocab_size)
        if not head_only:
            self._check_split()

    @torch.inference_mode()
    def hidden(self, batch: TokenBatch) -> Tensor:
        """States [B, T, H]. The mask is not needed: attention is causal and padding is last."""
        if self._head_only:
            raise ModelError("this scorer holds the head only; it cannot compute hidden states")
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
        if not torch.allclose(self.logits(self.hidden(batch)[0]), whole, atol=1e-4, rtol=1e-3):
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


def _load_all(path: Path, dtype: torch.dtype, device: torch.device) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device)


def _load_head(path: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """The model with its body on the meta device and only the output matrix in memory."""
    config = AutoConfig.from_pretrained(path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    head = model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    tied = bool(config.get_text_config().tie_word_embeddings)
    source = model.get_input_embeddings() if tied else head
    family = FAMILIES.get(config.model_type)
    for leaf, _ in list(head.named_parameters(recurse=False)):
        owner = source if leaf == "weight" else head
        name = f"{names[id(owner)]}.{leaf}"
        for on_disk, in_modules in family.renames if family else ():
            name = name.replace(in_modules, on_disk)  # GPT-NeoX's head
        value = _read_tensor(path, name).to(device, dtype)
        setattr(head, leaf, nn.Parameter(value, requires_grad=False))
    return model


def _read_tensor(path: Path, name: str) -> Tensor:
    index = path / "model.safetensors.index.json"
    shard = json.loads(index.read_text())["weight_map"].get(name) if index.is_file() else None
    with safe_open(path / (shard or "model.safetensors"), framework="pt") as file:
        if name not in file.keys():  # noqa: SIM118 - safe_open has no __contains__
            raise ModelError(f"{path} has no tensor {name!r} for the output head")
        value: Tensor = file.get_tensor(name)
    return value
