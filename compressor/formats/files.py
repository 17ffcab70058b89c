"""Which files make a checkpoint besides its tensors, and what they weigh. No torch."""

from __future__ import annotations

from pathlib import Path

from compressor.disk import link_or_copy
from compressor.formats.atomic import atomic_write_bytes
from compressor.formats.headers import INDEX, SINGLE, read_folder

# Copied from the parent byte for byte: nothing here depends on the weights, and rewriting a
# tokenizer through a library changes it.
PARENT_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
)
_BESIDE = ("quantize_config.json",)  # of GPTQ, for programs that do not read config.json
GRAPHS = {"model.onnx": "onnx", "openvino_model.xml": "openvino"}
"""Files that tell a folder of a graph, and its format."""
_TEMPLATES = "additional_chat_templates"


def copy_parent_files(source: Path, target: Path) -> None:
    """Copy tokenizer, generation config and chat templates byte for byte.

    Raises:
        ResourceError: the file system refused.
    """
    for path in parent_files(source):
        atomic_write_bytes(target / path.relative_to(source), path.read_bytes())


def parent_files(folder: Path) -> list[Path]:
    """The files beside weights and `config.json` that loading model and tokenizer reads."""
    named = [folder / name for name in PARENT_FILES if (folder / name).is_file()]
    return named + sorted((folder / _TEMPLATES).glob("*.jinja"))


def checkpoint_files(folder: Path) -> list[Path]:
    """Every file needed to load the checkpoint: weights, index, configuration, tokenizer.

    Of a GGUF deliverable that is the file itself, of a graph everything beside it.

    Raises:
        ModelError: the weights are missing or damaged.
    """
    if whole := sorted(folder.glob("*.gguf")):
        return whole
    if any((folder / name).is_file() for name in GRAPHS):
        return sorted(path for path in folder.rglob("*") if path.is_file())
    weights = {info.file for info in read_folder(folder).values()}
    index = [folder / INDEX] if folder / SINGLE not in weights else []
    extra = [folder / name for name in _BESIDE if (folder / name).is_file()]
    return sorted([*weights, *index, folder / "config.json", *extra, *parent_files(folder)])


def link_checkpoint(checkpoint: Path, folder: Path) -> None:
    """The same checkpoint in another folder: links where the file system has them."""
    for path in checkpoint_files(checkpoint):
        link_or_copy(path, folder / path.relative_to(checkpoint))


def checkpoint_bytes(folder: Path) -> int:
    """Bytes on disk of every file needed to load the checkpoint.

    Raises:
        ModelError: the weights are missing or damaged.
    """
    return sum(path.stat().st_size for path in checkpoint_files(folder))
