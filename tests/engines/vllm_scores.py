"""Runs inside vLLM's own environment: log-probabilities of a text and greedy continuations.

python vllm_scores.py CHECKPOINT < request.json > answer.json
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def main() -> None:
    request = json.load(sys.stdin)
    answer_file = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the engine's chatter goes to standard error
    from vllm import LLM, SamplingParams

    engine = LLM(
        sys.argv[1],
        dtype=request["dtype"],
        max_model_len=request["length"],
        enforce_eager=True,
        enable_prefix_caching=False,
        max_num_seqs=4,
    )
    prompts: list[Any] = [{"prompt_token_ids": ids} for ids in request["texts"]]
    scored = engine.generate(prompts, SamplingParams(max_tokens=1, prompt_logprobs=0))
    prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
    written = engine.generate(prompts, SamplingParams(max_tokens=request["tokens"], temperature=0))
    answer = {
        "logprobs": [_logprobs(output) for output in scored],
        "greedy": [list(output.outputs[0].token_ids) for output in written],
    }
    json.dump(answer, answer_file)
    answer_file.close()


def _logprobs(output: Any) -> list[float]:
    """Of every token but the first, given those before."""
    ids = output.prompt_token_ids
    return [
        entry[token].logprob
        for token, entry in zip(ids[1:], output.prompt_logprobs[1:], strict=True)
    ]


if __name__ == "__main__":
    main()
