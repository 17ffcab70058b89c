#!/usr/bin/env python3
"""Tokens per second in vLLM: the original, its 4 bits, and the same with each kind of draft.

    python benchmarks/engines_vllm.py [--model builtin:tiny] [--kinds standalone eagle3]
        [--minutes 1] [--drafted 3] [--timed 32] [--rounds 3] [--threads 1] [--clock processor]
        [-o out/vllm] [--results FILE.md]

The model is rounded (GPTQ, 4 bits, groups of 64) and packed as compressed-tensors; a draft of each
kind writes text for `--minutes` and then learns from it for as long. vLLM runs in its own
environment (`tools/engines/install.py vllm`) and is asked as `compress serve-check` asks it:
log-probabilities, which stand beside ours, greedy text, and the speed of one text at a time. Rows
take turns, `--rounds` times, so that what else the machine does falls on all of them. With
`--clock processor` a speed is by the processor time of the process that computes, for a machine
that is busy otherwise. What OUT holds already is not done again.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bench import Kept, parameters, stage
from drafting import finished

from compressor.calibration import CalibrationConfig, build_batches
from compressor.formats import exporters
from compressor.formats.codes import CodesReader
from compressor.formats.exporters import Source
from compressor.model.architecture import Architecture
from compressor.model.files import read_config
from compressor.model.load import load_tokenizer, resolve
from compressor.programs import PROGRAMS
from compressor.progress import observer
from compressor.serving.ask import Question, ask_python, make_question
from compressor.serving.check import compare, judge

METHODS = {"standalone": "draft_model", "eagle3": "eagle3"}  # as vLLM names them
FORM = "compressed-tensors"
CLOCKS = {
    "wall": "the clock",
    "processor": "the processor time of the process that computes, which waits for its next step "
    "busily, so that it counts some of its waiting too",
}
ROUNDER = {  # as recipes/w4-gptq.yaml
    "method": "quantize.gptq", "bits": 4, "group_size": 64, "symmetry": "full_range",
    "propagate": 0.5,
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """What vLLM is asked about.

    Attributes:
        name: in the table.
        folder: that vLLM loads.
        checkpoint: with the same weights, for transformers.
        draft: options of speculative decoding; none without a draft.
    """

    name: str
    folder: Path
    checkpoint: Path
    draft: dict[str, Any] = field(default_factory=dict)

    @property
    def megabytes(self) -> float:
        """Of the weights, a draft's included."""
        folders = [self.folder, *([Path(self.draft["model"])] if self.draft else [])]
        files = [file for folder in folders for file in folder.glob("*.safetensors")]
        return sum(file.stat().st_size for file in files) / 1e6


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="builtin:tiny")
    parser.add_argument("--kinds", choices=METHODS, nargs="+", default=["standalone"])
    parser.add_argument("--minutes", type=float, default=1, help="of writing, and of training")
    parser.add_argument("--drafted", type=int, default=3, help="tokens before each pass")
    parser.add_argument("--timed", type=int, default=32, help="tokens to measure the speed with")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=("wall", "processor"), default="wall")
    parser.add_argument("-o", "--out", type=Path, default=Path("out/vllm"))
    parser.add_argument("--results", type=Path)
    return parser.parse_args()


def make(options: argparse.Namespace, base: Path) -> list[Row]:
    """Everything that the rows are made of, in OUT."""
    out: Path = options.out.resolve()
    calibration = build_batches(CalibrationConfig(samples=32, length=256), load_tokenizer(base))
    rounder = stage(ROUNDER)
    with observer(quiet=False) as watcher:
        quantized = finished(rounder, base, calibration, out / "quantized", watcher)
        drafts = {
            kind: finished(
                drafter(kind, options), quantized, calibration, out / f"draft-{kind}", watcher
            )
            for kind in options.kinds
        }
    packed = out / FORM
    if not packed.is_dir():
        source = Source(quantized, CodesReader(quantized), parameters(base), "auto")
        exporters.exporter(FORM).write(source, packed)
    rows = [Row("dense", base, base), Row("W4", packed, quantized)]
    for kind, folder in drafts.items():
        draft = {"method": METHODS[kind], "model": str(folder)}
        draft |= {"num_speculative_tokens": options.drafted}
        rows.append(Row(f"W4 + {kind}", packed, quantized, draft))
    return rows


def drafter(kind: str, options: argparse.Namespace) -> Any:
    """A draft that time bounds, not text."""
    limits = {"tokens": 200_000, "steps": 10_000, "probes": 0, "drafted": options.drafted}
    minutes = {"minutes": options.minutes, "writing_minutes": options.minutes}
    return stage({"method": f"draft.{kind}", **limits, **minutes})


def ask(row: Row, question: Question) -> dict[str, Any]:
    """One answer of vLLM, and how far its log-probabilities are from ours."""
    given = {"speculative_config": row.draft} if row.draft else {}
    python = PROGRAMS["vllm"].find()
    answer = ask_python(("serve_vllm",), python, row.folder, replace(question, options=given))
    found = compare(row.checkpoint, question, answer)
    return {
        "version": answer.version,
        "speed": answer.tokens_per_second,
        "counters": dict(answer.counters),
        "verdict": judge(found)[0],
        **{name: found[name] for name in ("difference", "allowed", "same_text", "prompts")},
    }


def table(rows: Sequence[Row], cells: dict[str, list[dict[str, Any]]]) -> list[str]:
    """The rows as Markdown; speeds are medians, with the lowest and the highest."""
    speeds = {name: [cell["speed"] for cell in found] for name, found in cells.items()}
    dense = statistics.median(speeds["dense"])
    lines = [
        "| | MB | tokens/s | lowest, highest | times dense | accepted | tokens a pass | nats to us "
        "| allowed | same text |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        measured, first = speeds[row.name], cells[row.name][0]
        median = statistics.median(measured)
        line = [
            row.name, f"{row.megabytes:.1f}", f"{median:.1f}",
            f"{min(measured):.1f}, {max(measured):.1f}", f"{median / dense:.2f}",
            *accepted(cells[row.name]), f"{first['difference']:.4f}", f"{first['allowed']:.4f}",
            f"{first['same_text']} of {first['prompts']}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(line)} |")
    return lines


def accepted(cells: Sequence[dict[str, Any]]) -> tuple[str, str]:
    """Accepted of all drafted tokens, and tokens that a pass of the target gives."""
    counted = [cell["counters"] for cell in cells]
    passes, drafted, right = (
        sum(one.get(name, 0) for one in counted)
        for name in ("drafts", "draft_tokens", "accepted_tokens")
    )
    if not drafted:
        return "–", "1"
    return f"{right:.0f} of {drafted:.0f}", f"{1 + right / passes:.2f}"


def report(
    options: argparse.Namespace, rows: Sequence[Row], cells: dict[str, list[dict[str, Any]]]
) -> list[str]:
    """The command, the table, and what it means."""
    version = cells["dense"][0]["version"]
    wrong = [name for name, found in cells.items() if found[0]["verdict"] == "FAIL"]
    return [
        f"`python benchmarks/engines_vllm.py --model {options.model} --kinds "
        f"{' '.join(options.kinds)} --minutes {options.minutes:g} --drafted {options.drafted} "
        f"--timed {options.timed} --rounds {options.rounds} --threads {options.threads} "
        f"--clock {options.clock}`",
        "",
        f"vLLM {version} on CPU, bf16, one text at a time, {options.threads} thread(s); "
        f"{options.timed} tokens after each of three prompts, the better of two attempts, median "
        f"of {options.rounds} rounds, by {CLOCKS[options.clock]}. Drafts wrote text and learned "
        f"for {options.minutes:g} minutes each, and draft {options.drafted} tokens before each "
        "pass. Nats: mean difference of log-probabilities to transformers in fp32 on the same "
        "weights; allowed is four times what bf16 alone changes.",
        *([f"Outside what is allowed: {', '.join(wrong)}."] if wrong else []),
        "",
        *table(rows, cells),
    ]


def main() -> None:
    options = arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    # Else vLLM takes a thread a core, each bound to it, whatever else the machine does.
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    base = resolve(options.model).path
    rows = make(options, base)
    positions = Architecture.from_config(read_config(base)).max_positions
    question = make_question(
        load_tokenizer(base), positions, timed=options.timed, clock=options.clock
    )
    kept = Kept(options.out / "cells.jsonl")
    cells: dict[str, list[dict[str, Any]]] = {row.name: [] for row in rows}
    for number in range(options.rounds):
        for row in rows:
            key = f"{row.name}, round {number}"
            cells[row.name].append(kept.get(key, ask, row, question))
    text = "\n".join(report(options, rows, cells))
    print(text)
    if options.results:
        options.results.write_text(text + "\n")


if __name__ == "__main__":
    main()
