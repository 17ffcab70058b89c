"""Code that loads a deliverable, for the report and the card."""

from __future__ import annotations

from collections.abc import Mapping

_TRANSFORMERS = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{path}")
model = AutoModelForCausalLM.from_pretrained("{path}", dtype="auto")
inputs = tokenizer("The capital of France is", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))
"""


def _optimum(extra: str, module: str, prefix: str) -> str:
    """The same with a class of optimum, which has its own environment."""
    name = f"{prefix}ModelForCausalLM"
    code = _TRANSFORMERS.replace(', dtype="auto"', "").replace("AutoModelForCausalLM", name)
    head = f"from {module} import {name}\nfrom transformers import AutoTokenizer"
    return f"# pip install optimum[{extra}]\n" + head + code.partition("AutoTokenizer")[2]


_VLLM = "vllm serve {path}"
_SGLANG = "python -m sglang.launch_server --model-path {path}"
_SERVED = {"Transformers": _TRANSFORMERS, "vLLM": _VLLM}
_GPTQMODEL = {"Transformers": "# pip install gptqmodel optimum\n" + _TRANSFORMERS, "vLLM": _VLLM}
_FORMATS: Mapping[str, Mapping[str, str]] = {
    "compressed-tensors": _SERVED,
    "dense": {**_SERVED, "SGLang": _SGLANG},
    "gptq": _GPTQMODEL,
    "awq": _GPTQMODEL,
    "bitsandbytes": {
        "Transformers": "# pip install bitsandbytes accelerate\n" + _TRANSFORMERS,
        "vLLM": _VLLM,
    },
    "gguf": {"llama.cpp": "llama-server -m {path}/model.gguf"},
    "onnx": {"ONNX Runtime": _optimum("onnxruntime", "optimum.onnxruntime", "ORT")},
    "openvino": {"OpenVINO": _optimum("openvino", "optimum.intel", "OV")},
}

_DRAFTED = "llama-server -m {target} --spec-type {kind} -md {draft} --spec-draft-n-max {most}"
_KINDS = {"standalone": "draft-simple", "eagle3": "draft-eagle3"}
_ON_HUB: Mapping[str, Mapping[str, str]] = {"gguf": {"llama.cpp": "llama-server -hf {path}"}}


def draft_snippets(target: str, draft: str, drafted: int, kind: str) -> dict[str, str]:
    """How to decode with a draft, by library.

    Args:
        target: path of the target's GGUF file.
        draft: path of the draft's.
        drafted: tokens to draft before each pass of the target.
        kind: of the draft, as its binding names it.
    """
    line = _DRAFTED.format(target=target, draft=draft, most=drafted, kind=_KINDS[kind])
    return {"llama.cpp": line}


def load_snippets(
    path: str, form: str = "compressed-tensors", *, hub: bool = False
) -> dict[str, str]:
    """How to load the checkpoint at `path` (a folder or a Hub id), by library.

    Args:
        path: what stands in the code.
        form: of the deliverable, such as `gptq`.
        hub: whether `path` is a Hub id, which llama.cpp takes in another way.
    """
    known = _ON_HUB if hub and form in _ON_HUB else _FORMATS
    return {name: code.format(path=path) for name, code in known[form].items()}
