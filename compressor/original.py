"""Whether the model that a run begins with is what its own files say, looked at before any work."""

from __future__ import annotations

from pathlib import Path

from compressor.errors import ModelError
from compressor.formats.headers import FLOATING, INDEX, SINGLE, read_folder
from compressor.model.architecture import Architecture
from compressor.model.load import read_config, read_licence
from compressor.types import TORCH_NAMES


def require_sound(path: Path) -> None:
    """Refuse a model whose files contradict each other; reads headers, and no weight.

    Where the weights are not on this machine, as for the plan of a model of the Hub, nothing is
    asked of them.

    Raises:
        ModelError: its card is damaged, or its matrices are not of the dtype that it names.
    """
    read_licence(path)
    if (path / INDEX).is_file() or (path / SINGLE).is_file():
        _require_dtype(path)


def _require_dtype(path: Path) -> None:
    """A run keeps the dtype of `config.json`; transformers would cast other weights at load.

    A configuration that names none goes by the weights, as in transformers.
    """
    config = read_config(path)
    architecture = Architecture.from_config(config)
    stored = read_folder(path)
    matrices = [one.tensor for one in architecture.matrices if one.tensor in stored]
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
