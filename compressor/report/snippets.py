"""Code that loads a deliverable, for the report and the card."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

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


_GPTQMODEL = """\
from gptqmodel import GPTQModel

model = GPTQModel.load("{path}")
print(model.tokenizer.decode(model.generate("The capital of France is")[0]))
"""
_CODE: Mapping[str, str] = {
    "Transformers": _TRANSFORMERS,
    "vLLM": "vllm serve {path}",
    "SGLang": "python -m sglang.launch_server --model-path {path}",
    "GPTQModel": _GPTQMODEL,
    "llama.cpp": "llama-server -m {path}/model.gguf",
    "ONNX Runtime": _optimum("onnxruntime", "optimum.onnxruntime", "ORT"),
    "OpenVINO": _optimum("openvino", "optimum.intel", "OV"),
}
"""By the title of the program."""

_PACKAGES: Mapping[str, str] = {
    "gptq": "gptqmodel optimum",
    "awq": "gptqmodel optimum",
    "bitsandbytes": "bitsandbytes accelerate",
}
"""What Transformers needs beside it, by format."""

_DRAFTED = "llama-server -m {target} --spec-type {kind} -md {draft} --spec-draft-n-max {most}"
_KINDS = {"standalone": "draft-simple", "eagle3": "draft-eagle3"}


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
    path: str, form: str, titles: Iterable[str], *, hub: bool = False
) -> dict[str, str]:
    """How to load the checkpoint at `path` (a folder or a Hub id), by program.

    Args:
        path: what stands in the code.
        form: of the deliverable, such as `gptq`.
        titles: of the programs that load it.
        hub: whether `path` is a Hub id, which llama.cpp takes in another way.
    """
    code = dict(_CODE)
    if form in _PACKAGES:
        code["Transformers"] = f"# pip install {_PACKAGES[form]}\n{_TRANSFORMERS}"
    if hub:
        code["llama.cpp"] = "llama-server -hf {path}"
    return {title: code[title].format(path=path) for title in titles}
