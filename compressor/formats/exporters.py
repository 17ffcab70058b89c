"""One seam for every deliverable: the format's name -> who writes it and who reads it back.

A writer packs the codes that a rounder left; nothing is rounded twice. A reader gives back, from
the written files alone, the dense tensors by their Hugging Face names, so that the engine can
compare each with the checkpoint the export was made from. Formats that transformers loads by
itself have no reader here: they are loaded whole, and their logits compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

from torch import Tensor

from compressor.errors import ResourceError
from compressor.formats.capabilities import PACKAGES, Container
from compressor.formats.gguf_types import GgufType
from compressor.types import ActivationScheme, QTensor


@dataclass(frozen=True)
class Source:
    """What a deliverable is made from.

    Attributes:
        checkpoint: dense; its quantized matrices equal `QTensor.dequantize()`.
        codes: module name (matrix on disk without `.weight`) to codes.
        logical_parameters: weights of the model, ties once.
        container: what to write; the layout, for formats with several.
        activations: how the inputs of matrices are rounded while the model runs, by module name.
        cache: scales of keys and of values, by attention module, where the cache is rounded.
        embedding: type of block to which GGUF rounds an embedding and a head that have no codes;
            None keeps them as they are.
    """

    checkpoint: Path
    codes: Mapping[str, QTensor]
    logical_parameters: int
    container: Container
    activations: Mapping[str, ActivationScheme] = field(default_factory=dict)
    cache: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    embedding: GgufType | None = None


Writer = Callable[[Source, Path], None]
Reader = Callable[[Path], Iterator[tuple[str, Tensor]]]


@dataclass(frozen=True)
class Exporter:
    """How a format is written, and read back.

    Attributes:
        write: fill a folder that does not exist yet.
        read: every tensor of the dense checkpoint from that folder, one at a time; None when
            transformers loads it.
        check: refuse, before any work, a model whose files beside the weights the format cannot
            express.
        engine: of `programs.PROGRAMS`, where nothing else than it loads the result.
    """

    write: Writer
    read: Reader | None
    check: Callable[[Path], None]
    engine: str | None = None


_MODULES: Mapping[str, str] = {
    "dense": "compressor.formats.dense",
    "compressed-tensors": "compressor.formats.compressed_tensors",
    "gptq": "compressor.formats.gptq",
    "awq": "compressor.formats.awq",
    "gguf": "compressor.formats.gguf",
    "bitsandbytes": "compressor.formats.bitsandbytes",
    "onnx": "compressor.formats.onnx",
    "openvino": "compressor.formats.openvino",
}


def exporter(name: str) -> Exporter:
    """The exporter of a format, its library loaded only now.

    Raises:
        ResourceError: the format needs a package that is not installed.
    """
    try:
        module = import_module(_MODULES[name])
    except ImportError as error:
        package = PACKAGES.get(name)
        if package is None or error.name != package:
            raise
        raise ResourceError(
            f"{name} export needs the package {package}", f"pip install {package}"
        ) from None
    return Exporter(
        module.write,
        getattr(module, "read", None),
        getattr(module, "check", _accept),
        getattr(module, "ENGINE", None),
    )


def _accept(_: Path) -> None:
    """Most formats copy what stands beside the weights as it is."""


def names() -> tuple[str, ...]:
    """Every format there is."""
    return tuple(_MODULES)
