"""What it costs how long OpenMP's threads spin while they wait, alone and beside busy processes.

    python benchmarks/waiting_threads.py --busy 1

Small feed-forward halves of SmolLM2-135M's size (64 tokens), each four operations that all threads
share, so that most of the time somebody waits. Each row is a process of its own.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from contextlib import ExitStack

COUNTS = (300_000, 30_000, 10_000, 3_000, 1_000, 0)  # the first is GNU's default, the last passive


def work(passes: int) -> None:
    """Print wall and processor seconds of so many passes."""
    import torch

    width, inner = 576, 1536
    tokens = torch.randn(64, width)
    up, down = torch.randn(width, inner), torch.randn(inner, width) / inner
    wall, processor = time.perf_counter(), time.process_time()
    for _ in range(passes):
        hidden = torch.nn.functional.rms_norm(tokens, (width,)) @ up
        tokens = tokens + torch.nn.functional.silu(hidden) @ down
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    print(f"{wall:.1f} s, {processor:.1f} s of processors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--busy", type=int, default=0, help="processes that never wait, beside")
    parser.add_argument("--passes", type=int, default=2000)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.passes)
        return
    mine = [sys.executable, __file__, "--work", "--passes", str(options.passes)]
    with ExitStack() as stack:
        for _ in range(options.busy):
            busy = stack.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
            stack.callback(busy.kill)
        for count in COUNTS:
            print(f"{count:>7} turns: ", end="", flush=True)
            subprocess.run(mine, env=os.environ | {"GOMP_SPINCOUNT": str(count)}, check=True)


if __name__ == "__main__":
    main()
