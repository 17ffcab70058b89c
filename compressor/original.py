"""Whether the model that a run begins with is what its own files say, looked at before any work."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from compressor.errors import ModelError
from compressor.formats.headers import FLOATING, INDEX, SINGLE, TensorInfo, read_folder
from compressor.model.architecture import Architecture
from compressor.model.files import require_tensors
from compressor.model.load import read_config, read_licence
from compressor.types import TORCH_NAMES


def require_sound(path: Path) -> None:
    """Refuse a model whose files contradict each other; reads headers, and no weight.

    But for a tied head that is stored beside its embedding: the two are compared.

    Where the weights are not on this machine, as for the plan of a model of the Hub, nothing is
    asked of them.

    Raises:
        ModelError: its card is damaged, tensors are missing or have other shapes, its matrices are
            not of the dtype that it names, or a tied head is stored with other values.
    """
    read_licence(path)
    architecture = Architecture.from_config(read_config(path))
    if architecture.quantized or not ((path / INDEX).is_file() or (path / SINGLE).is_file()):
        return
    stored = read_folder(path)
    shapes = {name: info.shape for name, info in stored.items()}
    require_tensors(path, shapes, architecture.tensors())
    _require_dtype(path, architecture, stored)
    if architecture.tied:
        _require_one_head(path, architecture, stored)


def _require_dtype(
    path: Path, architecture: Architecture, stored: Mapping[str, TensorInfo]
) -> None:
    """A run keeps the dtype of `config.json`; transformers would cast other weights at load.

    A configuration that names none goes by the weights, as in transformers.
    """
    config = read_config(path)
    matrices = [one.tensor for one in architecture.matrices]
    dtypes = {name: TORCH_NAMES.get(stored[name].dtype, stored[name].dtype) for name in matrices}
    floating = [dtypes[name] for name in matrices if stored[name].dtype in FLOATING]
    named = architecture.dtype if config.get("dtype") or config.get("torch_dtype") else None
    wanted = named or next(iter(floating), "floating-point")
    wrong = [name for name in matrices if dtypes[name] != wanted]
    if not wrong:
        return
    hint = "save the model in one floating-point dtype, with transformers' save_pretrained()"
    if len(floating) == len(matrices) and len(set(floating)) == 1:
        hint = f'write "dtype": "{dtypes[wrong[0]]}" in its config.json'
    raise ModelError(
        f"{path}: its weights are to be {wanted}, and {len(wrong)} of {len(matrices)} matrices are "
        f"stored as something else, such as {wrong[0]} as {dtypes[wrong[0]]}",
        hint,
    )


def _require_one_head(
    path: Path, architecture: Architecture, stored: Mapping[str, TensorInfo]
) -> None:
    """A copy of the embedding may lie beside it; of other values, transformers would not tie it."""
    untied = architecture.with_config(tie_word_embeddings=False)
    tables = {one.role: one.tensor for one in untied.matrices if one.role in ("embed", "head")}
    if tables["head"] not in stored:
        return
    from compressor.formats.shards import CheckpointReader  # torch, which a plan goes without

    reader = CheckpointReader(path)
    if reader.tensor_sha256(tables["head"]) != reader.tensor_sha256(tables["embed"]):
        raise ModelError(
            f"{path}: config.json ties the head to the embedding, but the weights hold "
            f"{tables['head']} with other values than {tables['embed']}",
            'write "tie_word_embeddings": false in its config.json',
        )
