"""Memory is bounded by a block, in GPTQ and in the walk: twice the depth, the same peak.

The peak is `VmHWM`, the largest resident set the kernel saw, mapped files included: the
strictest measure, which also catches a mapping of the checkpoint held open.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from compressor.model.architecture import Architecture

HIDDEN, INTERMEDIATE = 512, 1536
WORK = """
import sys
from pathlib import Path
import torch
from compressor.calibration import CalibrationSet
from compressor.model.walk import BlockWalk
from compressor.progress import SilentObserver
from compressor.stages.context import StageContext
from compressor.stages.quantize_gptq import QuantizeGptq
from compressor.types import TokenBatch

def peak():
    fields = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(fields["VmHWM"].split()[0])

torch.set_num_threads(1)
checkpoint, scratch, leak = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "leak"
ids = torch.arange(64).reshape(1, 64)
batches = [TokenBatch(ids, torch.ones_like(ids, dtype=torch.bool), ("prose",))] * 2
context = StageContext(
    folder=scratch / "out", scratch=scratch / "stage", device=torch.device("cpu"),
    dtype=torch.float32, activation_budget=0, finished=(),
    block_done=lambda record: None, observer=SilentObserver(),
)
stage = QuantizeGptq(group_size=64, grid="minmax", sweeps=0, targets=("attention", "gate"))
stage.run(checkpoint, CalibrationSet(tuple(batches), (), {}, ""), context)

kept = []
walk = BlockWalk(scratch / "out", batches, scratch=scratch / "walk", memory_budget=0)
for block in walk.blocks():
    state = block.state()
    if leak:
        kept.append({name: tensor.float() for name, tensor in state.items()})
for hidden in walk.final_hidden():
    walk.logits(hidden)
print(peak())
"""


def random_checkpoint(folder: Path, layers: int) -> Path:
    config = {
        "model_type": "llama",
        "vocab_size": 256,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "max_position_embeddings": 512,
        "dtype": "bfloat16",
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    ones = torch.ones(INTERMEDIATE * HIDDEN)
    tensors = {
        name: ones[: torch.Size(shape).numel()].view(shape).bfloat16() / HIDDEN
        for name, shape in Architecture.from_config(config).tensors()
    }
    save_file(tensors, folder / "model.safetensors")
    return folder


def peak(checkpoint: Path, scratch: Path, mode: str = "") -> int:
    """KiB."""
    command = [sys.executable, "-c", WORK, str(checkpoint), str(scratch), mode]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_twice_the_depth_takes_no_more_memory(tmp_path: Path) -> None:
    shallow = peak(random_checkpoint(tmp_path / "12", 12), tmp_path / "a")
    deep = random_checkpoint(tmp_path / "24", 24)
    assert peak(deep, tmp_path / "b") < 1.1 * shallow
    # The test notices blocks that stay alive as the fp32 they are computed with.
    assert peak(deep, tmp_path / "c", "leak") > 1.15 * shallow


HOLD = """
import ctypes, os, sys
sys.path.insert(0, sys.argv[1])
from compressor.model.memory import memory_returned, return_memory

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = libc.memset.argtypes = None

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20

def use():
    places = [ctypes.c_void_p(libc.malloc(8 << 20)) for _ in range(8)]
    for place in places:
        libc.memset(place, 1, ctypes.c_size_t(8 << 20))
    for place in places:
        libc.free(place)

before = resident()
with memory_returned():
    use()
    at_once = resident() - before
use()
held = resident() - before
return_memory()
print(at_once, held, resident() - before)
"""


def freed(**environment: str) -> list[int]:
    """MiB of 64 that stay: freed while a model comes, freed at any other time, and given back."""
    root = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", HOLD, root]
    mine = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env=mine | environment
    )
    return [int(word) for word in done.stdout.split()]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks glibc")
def test_freed_memory_stays_until_it_is_given_back() -> None:
    at_once, held, returned = freed()
    assert at_once < 8
    assert held > 56
    assert returned < 8
    _, said, _ = freed(MALLOC_TRIM_THRESHOLD_="131072")
    assert said < 8
