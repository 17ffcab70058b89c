"""OpenVINO's intermediate representation, weights in fp32, through optimum-intel."""

from __future__ import annotations

from pathlib import Path

from compressor.formats import graphs
from compressor.formats.exporters import Source
from compressor.formats.graphs import check

__all__ = ["ENGINE", "check", "write"]

ENGINE = "openvino"


def write(source: Source, out: Path) -> None:
    """Write the graph; see `graphs.write`."""
    # Without the option, optimum rounds the weights of large models to 8 bits on its own.
    graphs.write(source, out, ENGINE, "openvino", ("--weight-format", "fp32"))
