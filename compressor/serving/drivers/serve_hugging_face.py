"""Engines whose models look like those of transformers, for `answer.py`; LOADER names which."""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch

Loaded = tuple[Any, str, str]  # model, version of the engine, dtype it computes in


def load(checkpoint: str, request: dict[str, Any], loader: str) -> HuggingFace:
    """The checkpoint, as `compressor.serving.ask` wants it loaded."""
    return HuggingFace(*LOADERS[loader](checkpoint, request))


class HuggingFace:
    """A loaded model."""

    def __init__(self, model: Any, version: str, dtype: str) -> None:
        self._model = model
        self.version = version
        self.dtype = dtype

    def logprobs(self, texts: list[list[int]]) -> list[list[float]]:
        """Of every token of a text but the first, given those before."""
        return [self._logprobs(ids) for ids in texts]

    def write(self, prompts: list[list[int]], tokens: int, whole: bool = False) -> list[list[int]]:
        """Greedy continuations; `whole` goes on after the end of a text."""
        options = {"min_new_tokens": tokens} if whole else {}
        return [self._written(ids, max_new_tokens=tokens, **options) for ids in prompts]

    def counters(self) -> dict[str, float]:
        """Nothing is counted."""
        return {}

    def _logprobs(self, ids: list[int]) -> list[float]:
        with torch.no_grad():
            logits = self._model(**_inputs(ids)).logits[0, :-1].float()
        chosen = logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        return [float(value) for value in chosen]

    def _written(self, ids: list[int], **options: Any) -> list[int]:
        found = self._model.generate(**_inputs(ids), do_sample=False, **options)
        return [int(token) for token in found[0, len(ids) :]]


def _transformers(checkpoint: str, request: dict[str, Any]) -> Loaded:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=request["dtype"], local_files_only=True
    )
    return model.eval(), transformers.__version__, _dtype(model)


def _gptqmodel(checkpoint: str, request: dict[str, Any]) -> Loaded:
    from gptqmodel import GPTQModel

    dtype = request["dtype"]
    chosen = dtype if dtype == "auto" else getattr(torch, dtype)
    model = GPTQModel.load(checkpoint, device="cpu", dtype=chosen).model
    return model.eval(), metadata.version("gptqmodel"), _dtype(model)


def _onnx(checkpoint: str, _: dict[str, Any]) -> Loaded:
    from optimum.onnxruntime import ORTModelForCausalLM

    model = ORTModelForCausalLM.from_pretrained(checkpoint, local_files_only=True)
    return model, metadata.version("onnxruntime"), "float32"


def _openvino(checkpoint: str, _: dict[str, Any]) -> Loaded:
    from optimum.intel import OVModelForCausalLM

    precision = {"INFERENCE_PRECISION_HINT": "f32"}  # else some processors compute in bf16
    model = OVModelForCausalLM.from_pretrained(
        checkpoint, device="CPU", ov_config=precision, local_files_only=True
    )
    return model, metadata.version("openvino"), "float32"


LOADERS: dict[str, Callable[[str, dict[str, Any]], Loaded]] = {
    "transformers": _transformers,
    "gptqmodel": _gptqmodel,
    "onnxruntime": _onnx,
    "openvino": _openvino,
}


def _dtype(model: Any) -> str:
    """Of its floating-point parameters: those of norms and embeddings, where others are packed."""
    found = next(p.dtype for p in model.parameters() if p.is_floating_point())
    return str(found).removeprefix("torch.")


def _inputs(ids: list[int]) -> dict[str, Any]:
    row = torch.tensor([ids])
    return {"input_ids": row, "attention_mask": torch.ones_like(row)}
