"""Kernels of accelerators: interpreted beside the loops they stand for, and compiled for CUDA.

Neither needs an accelerator. Triton comes with torch for CUDA; for the processor's torch, `make
test` puts it into a folder of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
APART = Path(sys.prefix) / "triton"

pytestmark = pytest.mark.skipif(
    not (find_spec("triton") or APART.is_dir()), reason="no Triton; `make test` installs it"
)

COMPILED = """\
from itertools import product

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from compressor.numerics import kernels

names = kernels._settle.arg_names
types = {"width": "i32", "lowest": "fp32", "highest": "fp32"}
without = {"plain": ("aim", "old", "drift", "met"), "revisited": ("drift", "met"),
           "drifted": ("aim", "old")}
grids = {"symmetric": ("zero", None), "asymmetric": (None, None), "fp4": ("zero", 4),
         "fp8": ("zero", 8)}
every = product((80, 90), grids.values(), without.values(), kernels._STORED.values())
for capability, (zero, bits), absent, stored in every:
    fixed = {"COUNT": 32, "PADDED": 32, "ROWS": kernels._ROWS, "FLOAT": bits, "STORED": stored}
    fixed |= dict.fromkeys(absent) | ({zero: None} if zero else {})
    signature = {n: "constexpr" if n in fixed else types.get(n, "*fp32") for n in names}
    places = {(names.index(name),): value for name, value in fixed.items()}
    source = ASTSource(kernels._settle, signature, places)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert ".local" not in made.asm["ptx"], "registers spill"
    print(capability, len(made.asm["cubin"]), made.metadata.shared)
"""


def run(*words: str, **environment: str) -> str:
    path = os.pathsep.join(map(str, (ROOT, APART)))
    done = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.returncode, (done.stdout + done.stderr)[-5000:]
    return done.stdout


def test_kernels_round_like_the_loops_they_stand_for() -> None:
    cases = ("tests/kernel_cases.py", "-q", "-p", "no:cacheprovider")
    assert " passed" in run("-m", "pytest", *cases, TRITON_INTERPRET="1")


def test_kernels_compile_for_cuda(tmp_path: Path) -> None:
    sizes = run("-c", COMPILED, TRITON_CACHE_DIR=str(tmp_path)).split()
    assert len(sizes) == 3 * 2 * 4 * 3 * 3
