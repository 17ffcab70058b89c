"""Runs inside an engine's own environment: engines whose models look like those of transformers.

python serve_hugging_face.py LOADER CHECKPOINT < request.json > answer.json

`compressor.serving.ask` says what request and answer hold. Knows nothing of this package.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

Loaded = tuple[Any, str, str]  # model, version of the engine, dtype it computes in


def main() -> None:
    """Answer one request."""
    request = json.load(sys.stdin)
    answer_file = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the engine's chatter goes to standard error
    json.dump(answer(sys.argv[1], sys.argv[2], request), answer_file)
    answer_file.close()


def answer(loader: str, checkpoint: str, request: dict[str, Any]) -> dict[str, Any]:
    """Load the checkpoint and do what is asked."""
    import torch

    start = time.perf_counter()
    model, version, dtype = LOADERS[loader](checkpoint, request)
    loaded = time.perf_counter() - start
    with torch.no_grad():
        return {
            "version": version,
            "dtype": dtype,
            "load_seconds": loaded,
            "logprobs": [_logprobs(model, ids) for ids in request["texts"]],
            "greedy": [_written(model, ids, request["tokens"]) for ids in request["prompts"]],
            "tokens_per_second": _speed(model, request),
            "counters": {},
        }


def _transformers(checkpoint: str, request: dict[str, Any]) -> Loaded:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=request["dtype"], local_files_only=True
    )
    return model.eval(), transformers.__version__, _dtype(model)


def _gptqmodel(checkpoint: str, request: dict[str, Any]) -> Loaded:
    import torch
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
    import torch

    row = torch.tensor([ids])
    return {"input_ids": row, "attention_mask": torch.ones_like(row)}


def _logprobs(model: Any, ids: list[int]) -> list[float]:
    """Of every token but the first, given those before."""
    import torch

    logits = model(**_inputs(ids)).logits[0, :-1].float()
    chosen = logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    return [float(value) for value in chosen]


def _written(model: Any, ids: list[int], tokens: int, **options: Any) -> list[int]:
    found = model.generate(**_inputs(ids), max_new_tokens=tokens, do_sample=False, **options)
    return [int(token) for token in found[0, len(ids) :]]


def _speed(model: Any, request: dict[str, Any]) -> float | None:
    """Tokens a second of one text at a time, after its first token; the best of each attempt."""
    tokens, prompts = request.get("timed", 0), request["prompts"]
    if not tokens or not prompts:
        return None
    seconds = {}
    for count in (1, tokens):
        seconds[count] = sum(
            min(_seconds(model, ids, count) for _ in range(request.get("repeats", 2)))
            for ids in prompts
        )
    return float(len(prompts) * (tokens - 1) / (seconds[tokens] - seconds[1]))


def _seconds(model: Any, ids: list[int], count: int) -> float:
    start = time.perf_counter()
    _written(model, ids, count, min_new_tokens=count)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
