"""The importance matrix as llama.cpp stores it: mean squared inputs of every matrix, in GGUF.

Of each matrix with `n` inputs: `NAME.in_sum2` F32 [1, n], the sum of squares over all tokens, and
`NAME.counts` F32 [1, 1], how many tokens. `llama-quantize --imatrix` weighs errors
with their ratio.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from torch import Tensor

from compressor.formats.atomic import replacing
from compressor.formats.gguf import gguf_name


@dataclass(frozen=True)
class Importance:
    """What entered a matrix.

    Attributes:
        squares: fp32 [in], sum of squared inputs over tokens.
        tokens: how many.
    """

    squares: Tensor
    tokens: int


def write_imatrix(path: Path, found: Mapping[str, Importance], *, dataset: str, chunk: int) -> None:
    """Write `found` (module name -> importance) whole or not at all.

    Args:
        path: file to write.
        found: matrices by their Hugging Face names, without `.weight`.
        dataset: name of the text.
        chunk: tokens of a window.

    Raises:
        ModelError: llama.cpp has no name for a matrix.
        ResourceError: the file system refused.
    """
    tokens = max(entry.tokens for entry in found.values())
    with replacing(path) as temporary:
        writer = gguf.GGUFWriter(temporary, "")
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", [dataset])
        writer.add_uint32("imatrix.chunk_count", max(1, tokens // chunk))
        writer.add_uint32("imatrix.chunk_size", chunk)
        for module, entry in found.items():
            name = gguf_name(f"{module}.weight")
            writer.add_tensor(f"{name}.in_sum2", entry.squares.float().numpy()[None])
            writer.add_tensor(f"{name}.counts", np.array([[entry.tokens]], dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
