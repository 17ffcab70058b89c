"""Any deliverable as a checkpoint that transformers runs, from its own files alone.

What transformers does not load by itself (`gptq` and `awq` without their kernels, `gguf`) is read
back by our reader of the format, and written as ordinary weights into a folder for the time being.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.errors import ModelError, UsageError, VerificationError
from compressor.formats import exporters
from compressor.formats.atomic import atomic_write_json
from compressor.formats.files import GRAPHS
from compressor.formats.headers import read_json
from compressor.formats.shards import SHARD_BYTES, CheckpointWriter, shard_name
from compressor.model.load import load_model, load_tokenizer
from compressor.model.quiet import quiet

PROMPT = "The"
TOKENS = 8
_LOADED_BY_TRANSFORMERS = ("dense", "compressed-tensors", "bitsandbytes")


def form_of(folder: Path) -> str:
    """The format of a checkpoint, by what lies in its folder."""
    if any(folder.glob("*.gguf")):
        return "gguf"
    if graph := next((form for name, form in GRAPHS.items() if (folder / name).is_file()), None):
        return graph
    method = (read_json(folder / "config.json").get("quantization_config") or {}).get(
        "quant_method", "dense"
    )
    return str(method)


def continued(folder: Path) -> str:
    """Load a deliverable and let it write a few tokens; what it wrote, the prompt included.

    Raises:
        UsageError: only an engine of its own reads it.
        ModelError: it cannot be loaded.
        VerificationError: it computes NaN or infinity.
    """
    with quiet(), as_checkpoint(folder) as checkpoint:
        tokenizer, model = load_tokenizer(checkpoint), load_model(checkpoint)
        inputs: Any = tokenizer(PROMPT, return_tensors="pt")
        with torch.inference_mode():
            logits = model(**inputs).logits
            ids = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)[0]
    if not torch.isfinite(logits).all():
        raise VerificationError(f"{folder} computes NaN or infinity")
    return str(tokenizer.decode(ids))


@contextmanager
def as_checkpoint(folder: Path, like: Path | None = None) -> Iterator[Path]:
    """A checkpoint that our loader reads, with the weights that the folder holds.

    Args:
        folder: of any format that has a reader.
        like: checkpoint with configuration and tokenizer; by default those of the folder.

    Raises:
        UsageError: only an engine of its own reads it.
        ModelError: a GGUF file is of a family that transformers does not read.
    """
    form = form_of(folder)
    if form in _LOADED_BY_TRANSFORMERS:
        yield folder
        return
    if form in GRAPHS.values():
        raise UsageError(
            f"{folder} is a graph for {form}, from which nothing here reads weights",
            "name the run that it belongs to",
        )
    with tempfile.TemporaryDirectory(prefix="compress-reload-") as work:
        beside = like or (_described(folder, Path(work) / "like") if form == "gguf" else folder)
        unpack(folder, beside, Path(work) / "dense", 1)
        yield Path(work) / "dense"


def _described(folder: Path, out: Path) -> Path:
    """Configuration and tokenizer of a GGUF file, as transformers reads them from it."""
    import transformers

    (file,) = folder.glob("*.gguf")
    options: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    try:
        with quiet():
            config = transformers.AutoConfig.from_pretrained(folder, **options).to_dict()
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
    except (OSError, ValueError, KeyError, NotImplementedError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"transformers does not read {file.name}: {first}",
            f"compress serve-check {folder} --engine llama.cpp",
        ) from None
    tokenizer.save_pretrained(out)
    config.pop("quantization_config", None)
    atomic_write_json(out / "config.json", config)
    return out


def unpack(folder: Path, like: Path, out: Path, logical_parameters: int) -> None:
    """A dense fp32 checkpoint of what a deliverable computes with, so that it can be measured.

    Args:
        folder: of a format with a reader.
        like: checkpoint with configuration and tokenizer.
        out: folder to write.
        logical_parameters: of the model, ties once.
    """
    writer, part, size = CheckpointWriter(out), 0, 0
    tensors: dict[str, Tensor] = {}
    read = exporters.exporter(form_of(folder)).read
    assert read is not None
    for name, value in read(folder):
        if tensors and size > SHARD_BYTES:
            writer.write_shard(shard_name(part), tensors)
            part, size, tensors = part + 1, 0, {}
        tensors[name] = value.to(torch.float32).contiguous()
        size += tensors[name].nbytes
    writer.write_shard(shard_name(part), tensors)
    config = read_json(like / "config.json") | {"dtype": "float32"}
    for key in ("torch_dtype", "quantization_config"):
        config.pop(key, None)
    writer.finish(config, like, logical_parameters)
