"""vLLM, for `answer.py`."""

from __future__ import annotations

from typing import Any

import vllm


def load(checkpoint: str, request: dict[str, Any]) -> Vllm:
    """The checkpoint, as `compressor.serving.ask` wants it loaded."""
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
    return Vllm(engine, vllm.__version__)


class Vllm:
    """A loaded model."""

    def __init__(self, engine: Any, version: str) -> None:
        self._engine = engine
        self.version = version
        self.dtype = str(engine.llm_engine.model_config.dtype).removeprefix("torch.")

    def logprobs(self, texts: list[list[int]]) -> list[list[float]]:
        """Of every token of a text but the first, given those before."""
        return [
            _logprobs(found) for found in self._generate(texts, max_tokens=1, prompt_logprobs=0)
        ]

    def write(self, prompts: list[list[int]], tokens: int, whole: bool = False) -> list[list[int]]:
        """Greedy continuations; `whole` goes on after the end of a text."""
        written = self._generate(prompts, max_tokens=tokens, ignore_eos=whole)
        return [list(found.outputs[0].token_ids) for found in written]

    def counters(self) -> dict[str, float]:
        """What the engine counted of speculative decoding; empty without."""
        found = {}
        for metric in self._engine.get_metrics():
            name = metric.name.removeprefix("vllm:spec_decode_num_")
            if name != metric.name and hasattr(metric, "value"):
                found[name] = float(metric.value)
        return found

    def _generate(self, texts: list[list[int]], **options: Any) -> list[Any]:
        prompts: list[Any] = [{"prompt_token_ids": ids} for ids in texts]
        greedy = vllm.SamplingParams(temperature=0, **options)
        found: list[Any] = self._engine.generate(prompts, greedy, use_tqdm=False)
        return found


def _logprobs(output: Any) -> list[float]:
    ids = output.prompt_token_ids
    return [
        entry[token].logprob
        for token, entry in zip(ids[1:], output.prompt_logprobs[1:], strict=True)
    ]
