"""Runs inside vLLM's own environment: log-probabilities of texts, greedy continuations, speed.

python serve_vllm.py CHECKPOINT < request.json > answer.json

`compressor.serving.ask` says what request and answer hold. Knows nothing of this package.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any


def main() -> None:
    """Answer one request."""
    request = json.load(sys.stdin)
    answer_file = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the engine's chatter goes to standard error
    json.dump(answer(sys.argv[1], request), answer_file)
    answer_file.close()


def answer(checkpoint: str, request: dict[str, Any]) -> dict[str, Any]:
    """Load the checkpoint and do what is asked."""
    import vllm

    start = time.perf_counter()
    engine = vllm.LLM(
        checkpoint,
        dtype=request["dtype"],
        max_model_len=request["length"],
        enforce_eager=True,
        enable_prefix_caching=False,
        max_num_seqs=4,
        disable_log_stats=False,
        **request.get("options", {}),
    )
    loaded = time.perf_counter() - start
    scored = _generate(engine, request["texts"], max_tokens=1, prompt_logprobs=0)
    written = _generate(engine, request["prompts"], max_tokens=request["tokens"])
    return {
        "version": vllm.__version__,
        "dtype": str(engine.llm_engine.model_config.dtype).removeprefix("torch."),
        "load_seconds": loaded,
        "logprobs": [_logprobs(output) for output in scored],
        "greedy": [list(output.outputs[0].token_ids) for output in written],
        "tokens_per_second": _speed(engine, request),
        "counters": _counters(engine),
    }


def _generate(engine: Any, texts: list[list[int]], **options: Any) -> list[Any]:
    from vllm import SamplingParams

    prompts: list[Any] = [{"prompt_token_ids": ids} for ids in texts]
    found: list[Any] = engine.generate(
        prompts, SamplingParams(temperature=0, **options), use_tqdm=False
    )
    return found


def _speed(engine: Any, request: dict[str, Any]) -> float | None:
    """Tokens a second of one text at a time, after its first token; the best of each attempt."""
    tokens, prompts = request.get("timed", 0), request["prompts"]
    if not tokens or not prompts:
        return None
    seconds = {}
    for count in (1, tokens):
        seconds[count] = sum(
            min(_seconds(engine, ids, count) for _ in range(request.get("repeats", 2)))
            for ids in prompts
        )
    return float(len(prompts) * (tokens - 1) / (seconds[tokens] - seconds[1]))


def _seconds(engine: Any, ids: list[int], count: int) -> float:
    start = time.perf_counter()
    _generate(engine, [ids], max_tokens=count, ignore_eos=True)
    return time.perf_counter() - start


def _logprobs(output: Any) -> list[float]:
    """Of every token but the first, given those before."""
    ids = output.prompt_token_ids
    return [
        entry[token].logprob
        for token, entry in zip(ids[1:], output.prompt_logprobs[1:], strict=True)
    ]


def _counters(engine: Any) -> dict[str, float]:
    """What the engine counted of speculative decoding; empty without."""
    found = {}
    for metric in engine.get_metrics():
        name = metric.name.removeprefix("vllm:spec_decode_num_")
        if name != metric.name and hasattr(metric, "value"):
            found[name] = float(metric.value)
    return found


if __name__ == "__main__":
    main()
