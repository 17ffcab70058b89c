"""Takes the place of llama-quantize where llama.cpp is not built: same command line, Q8_0 only.

    llama_quantize.py [--imatrix FILE] IN.gguf OUT.gguf TYPE THREADS

Every matrix becomes Q8_0, whatever the type, as blocks of 256 leave a model of odd widths with
other blocks than were asked for. `STAND_IN` makes it go wrong: `fail`, `damage` or `drop`. What
the real program does is tested in `tests/engines`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import gguf
import numpy as np

Q8_0 = gguf.GGMLQuantizationType.Q8_0


def main(arguments: list[str]) -> None:
    sys.stderr.write("version: 0.0.0 (stand-in)\nbuilt with nothing\n")
    importance = ""
    if arguments[0] == "--imatrix":
        importance, arguments = arguments[1], arguments[2:]
        assert gguf.GGUFReader(importance).get_field("general.type").contents() == "imatrix"
    source, target, kind, threads = arguments
    assert int(threads) > 0
    if os.environ.get("STAND_IN") == "fail":
        sys.stderr.write(f"cannot make {kind}\n")
        sys.exit(1)
    convert(gguf.GGUFReader(source), Path(target), importance)


def convert(reader: gguf.GGUFReader, target: Path, importance: str) -> None:
    wrong = os.environ.get("STAND_IN")
    writer = gguf.GGUFWriter(target, reader.get_field("general.architecture").contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            first, last = field.types[0], field.types[-1]
            sub = last if first == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), first, sub_type=sub)
    if importance:
        writer.add_string("quantize.imatrix.file", importance)
    for tensor in reader.tensors:
        if tensor.name == "blk.1.attn_q.weight" and wrong == "drop":
            continue
        if len(tensor.shape) == 1:
            writer.add_tensor(tensor.name, np.array(tensor.data))
            continue
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        if tensor.name == "blk.1.attn_q.weight" and wrong == "damage":
            values = -values
        writer.add_tensor(tensor.name, gguf.quantize(values, Q8_0), raw_dtype=Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main(sys.argv[1:])
