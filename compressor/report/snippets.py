"""Code that loads a deliverable, for the report and the card."""

from __future__ import annotations

_TRANSFORMERS = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{path}")
model = AutoModelForCausalLM.from_pretrained("{path}", dtype="auto")
inputs = tokenizer("The capital of France is", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))
"""

_ENGINES = {
    "vLLM": "vllm serve {path}",
    "SGLang": "python -m sglang.launch_server --model-path {path}",
}


def load_snippets(path: str, engines: tuple[str, ...] = ("vLLM",)) -> dict[str, str]:
    """How to load the checkpoint at `path` (a folder or a Hub id), by library.

    Args:
        path: what stands in the code.
        engines: serving engines that read the format, among vLLM and SGLang.
    """
    found = {"Transformers": _TRANSFORMERS.format(path=path)}
    return found | {name: _ENGINES[name].format(path=path) for name in engines}
