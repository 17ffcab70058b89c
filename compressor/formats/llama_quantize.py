"""llama.cpp's own quantizer, called as a program: where it is, and how it is run. No torch.

A recipe cannot name the program: a recipe from somebody else must not choose what is executed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from compressor.errors import ResourceError
from compressor.formats.atomic import replacing
from compressor.formats.gguf_types import QuantType

PROGRAM = "llama-quantize"
VARIABLE = "LLAMA_QUANTIZE"
HINT = (
    "python tools/engines/build_llama_cpp.py builds it in a checkout; or install llama.cpp so that "
    f"{PROGRAM} is on PATH, or name its file in {VARIABLE}"
)
_BUILT = Path(__file__).resolve().parents[2] / "cache" / "engines" / "llama.cpp" / "bin" / PROGRAM
_VERSION = re.compile(r"version: (.+)")
_LAST = 600  # characters of what a failed program said


def find_program() -> Path | None:
    """The quantizer: named in `LLAMA_QUANTIZE`, or built below `cache/engines`, or on PATH."""
    named = os.environ.get(VARIABLE)
    candidates = [named] if named else [str(_BUILT), PROGRAM]
    found = (shutil.which(candidate) for candidate in candidates)
    return next((Path(path).resolve() for path in found if path), None)


def require_program() -> Path:
    """The same, or a refusal.

    Raises:
        ResourceError: it is not on this machine.
    """
    program = find_program()
    if program is None:
        raise ResourceError(f"{missing()}", HINT)
    return program


def missing() -> str:
    """Why nothing can be quantized; the variable is named where it points nowhere."""
    named = os.environ.get(VARIABLE)
    if named:
        return f"{VARIABLE} names {named}, which is no program"
    return f"{PROGRAM}, llama.cpp's own quantizer, is not on this machine"


def command(
    program: Path, dense: Path, out: Path, kind: QuantType, importance: Path | None, threads: int
) -> list[str]:
    """The command line; paths are names in the folder that the files lie in.

    The program writes the path of the importance matrix into the file as it was given, so that a
    full one would tell of this machine and change the bytes from folder to folder.
    """
    weighed = [] if importance is None else ["--imatrix", importance.name]
    return [str(program), *weighed, dense.name, str(out), kind, str(threads)]


def quantize(
    program: Path,
    dense: Path,
    out: Path,
    kind: QuantType,
    *,
    importance: Path | None = None,
    threads: int = 1,
) -> str:
    """Round a GGUF file of dense weights to a type; `out` is written whole or not at all.

    Args:
        program: the quantizer.
        dense: file of BF16, F16 or F32 weights.
        out: file to write.
        kind: what to round to.
        importance: file of mean squared inputs, in the folder of `dense`.
        threads: at once.

    Returns:
        What the program says of itself, such as `0.6.0-dev (build 11434, commit b11434)`.

    Raises:
        ResourceError: the program failed; what it said last is told.
    """
    with replacing(out.resolve()) as temporary:
        line = command(program, dense, temporary, kind, importance, threads)
        done = subprocess.run(line, cwd=dense.parent, capture_output=True, text=True, check=False)
        if done.returncode:
            said = (done.stdout + done.stderr).strip()[-_LAST:]
            raise ResourceError(f"{PROGRAM} could not round to {kind}: {said}")
    match = _VERSION.search(done.stdout + done.stderr)
    return match[1].strip() if match else "of unknown version"
