"""What an engine should say about a checkpoint, and how far its arithmetic may take it from that.

The reference is transformers in fp32 on the weights that were measured. An engine computes in
coarser numbers: bf16, or with the inputs of every matrix rounded to 8 bits as llama.cpp does. How
much that alone moves log-probabilities is measured here, with the same weights and texts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressor.model.load import load_model
from compressor.reload import form_of
from compressor.serving.ask import Question

_BLOCK = 32  # inputs that share a scale in llama.cpp's products


def expected(model: nn.Module, question: Question, first: int) -> Tensor:
    """Log-probabilities [windows, window - first] of the tokens from place `first` on, fp64."""
    rows = torch.tensor(question.windows)
    with torch.inference_mode():
        return torch.stack([_chosen(model, row)[first - 1 :] for row in rows])


def _chosen(model: nn.Module, ids: Tensor) -> Tensor:
    logits: Tensor = model(ids[None]).logits[0, :-1].double()
    return logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0]


def own_error(
    checkpoint: Path, model: nn.Module, question: Question, first: int, dtype: str
) -> Tensor:
    """What an engine's arithmetic alone changes, |Δ log p| [windows, scored tokens].

    Args:
        checkpoint: of the model.
        model: fp32; as it was when this returns.
        question: the texts.
        first: place of the first token that is scored.
        dtype: as `Answer.dtype`.
    """
    exact = expected(model, question, first)
    if dtype == "float32":
        return torch.zeros_like(exact)
    if dtype == "int8":
        with _rounded_inputs(model):
            return (expected(model, question, first) - exact).abs()
    coarse = load_model(checkpoint, dtype=getattr(torch, dtype))
    return (expected(coarse, question, first) - exact).abs()


@contextmanager
def _rounded_inputs(model: nn.Module) -> Iterator[None]:
    """Inputs of every matrix in 8 bits, 32 to a scale, as llama.cpp multiplies (Q8_0)."""

    def rounded(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        states = inputs[0]
        if states.shape[-1] % _BLOCK:
            return inputs
        blocks = states.unflatten(-1, (-1, _BLOCK))
        scale = (blocks.abs().amax(-1, keepdim=True) / 127).half().float()
        steps = (blocks / scale.clamp_min(1e-12)).round() * scale
        return (steps.flatten(-2), *inputs[1:])

    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    hooks = [module.register_forward_pre_hook(rounded) for module in linear]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def greedy_steps(model: nn.Module, prompt: Sequence[int], written: Sequence[int]) -> Tensor:
    """Of every written token, how much less likely it is than the best one, nats, [written]."""
    ids = torch.tensor([[*prompt, *written]])
    with torch.inference_mode():
        logits: Tensor = model(ids).logits[0, len(prompt) - 1 : -1]
    steps = logits.double().log_softmax(-1)
    chosen = steps.gather(1, torch.tensor(list(written))[:, None])[:, 0]
    return steps.amax(-1) - chosen


def greedy(model: Any, prompt: Sequence[int], tokens: int) -> list[int]:
    """What transformers writes."""
    ids = torch.tensor([list(prompt)])
    with torch.inference_mode():
        found = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False
        )
    return [int(token) for token in found[0, ids.shape[1] :]]


def container_of(folder: Path) -> tuple[str, ...]:
    """What lies in a folder, as `capabilities` calls it; several layouts where they are mixed."""
    form = form_of(folder)
    if form != "compressed-tensors":
        return (form,)
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    layouts = [quantization["format"]]
    if layouts == ["mixed-precision"]:
        layouts = [group["format"] for group in quantization["config_groups"].values()]
    return tuple(dict.fromkeys(layouts))
