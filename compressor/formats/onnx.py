"""ONNX for ONNX Runtime: `model.onnx`, weights in fp32, through optimum-onnx."""

from __future__ import annotations

from pathlib import Path

from compressor.formats import graphs
from compressor.formats.exporters import Source
from compressor.formats.graphs import check

__all__ = ["ENGINE", "check", "write"]

ENGINE = "onnxruntime"


def write(source: Source, out: Path) -> None:
    """Write the graph; see `graphs.write`."""
    graphs.write(source, out, ENGINE, "onnx", ("--dtype", "fp32"))
