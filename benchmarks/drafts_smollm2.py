#!/usr/bin/env python3
"""Train a draft for SmolLM2-135M-Instruct within some minutes and say what it is worth here.

    python benchmarks/drafts_smollm2.py --minutes 60 --steps 1500 [--kind eagle3] [--model DIR]
        [--precision bf16] [--decode float32 bfloat16] [--tree DEPTH WIDTH NODES] [--prompts 8]
        [-o out/drafts-smollm2] [--results FILE.md]

A quarter of the time goes into text that the target writes, requests and answers, and a bit more
than half into training in bf16; the rest is for reading the text. Then τ at γ = 5 on held-out chat
and code prompts, and wall-clock speed-up over plain decoding beside prompt lookup, the untrained
draft and transformers' assisted generation with the same draft. transformers has no EAGLE-3; for
its loop take `--kind standalone`. Killed, the same command goes on: options are kept in OUT.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from bench import stage
from drafting import finished

from compressor.calibration import CalibrationConfig, CalibrationSet, build_batches
from compressor.decoding.binding import read_binding, tokenizer_sha256
from compressor.decoding.cached import CachedModel
from compressor.decoding.load import load_draft
from compressor.decoding.measure import Protocol, measure_draft
from compressor.decoding.proposals import Tree
from compressor.decoding.results import WORTHWHILE, DraftMeasurement
from compressor.meter import Meter
from compressor.model.load import load_model, load_tokenizer, resolve
from compressor.numerics.speculative import limiting_term
from compressor.progress import Observer, observer

DRAFTED = 5
ROW = 256  # tokens of a row of text
WRITING, TRAINING = 0.27, 0.55  # shares of the time
MOST = 15_000  # tokens a minute; more are never written
CHAT = (
    "What is the difference between weather and climate?",
    "Write a short letter to a neighbour whose dog barks at night.",
    "Explain to a ten-year-old why the sky is blue.",
    "Give me three ideas for a cheap dinner with potatoes.",
    "How does a bicycle stay upright?",
    "Summarise the story of Romeo and Juliet in four sentences.",
    "What should I see in Lisbon in two days?",
    "List the steps to change a flat tyre.",
)
CODE = (
    "Write a Python function that returns the n-th Fibonacci number.",
    "Write a Python function that checks whether a string is a palindrome.",
    "Write a SQL query that counts the orders of every customer.",
    "Write a Python class for a stack with push, pop and peek.",
    "Write a JavaScript function that removes duplicates from an array.",
    "Write a Python function that reads a CSV file and sums its second column.",
    "Write a shell script that renames all .txt files in a folder to .md.",
    "Write a Python function that merges two sorted lists.",
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--steps", type=int, required=True, help="if the time suffices")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument(
        "--decode", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"]
    )
    parser.add_argument("--batches", type=int, nargs="+", default=(1, 4))
    parser.add_argument("--kind", choices=("eagle3", "standalone"), default="eagle3")
    parser.add_argument("--model", default="cache/SmolLM2-135M-Instruct")
    parser.add_argument(
        "--tree", type=int, nargs=3, metavar=("DEPTH", "WIDTH", "NODES"), help="tried beside chains"
    )
    parser.add_argument("--prompts", type=int, default=8, help="of each kind, at most 8")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("-o", "--out", type=Path, default=Path("out/drafts-smollm2"))
    parser.add_argument("--results", type=Path)
    return parser.parse_args()


def chosen(options: argparse.Namespace) -> dict[str, Any]:
    """Options of the stage; those of an earlier attempt if there was one."""
    path: Path = options.out / "stage.json"
    if not path.is_file():
        settings = {
            "method": f"draft.{options.kind}", "length": ROW, "batch_size": 8,
            "tokens": int(options.minutes * MOST), "generated": 0.75, "requests": "own",
            "writing_minutes": options.minutes * WRITING, "steps": options.steps,
            "minutes": options.minutes * TRAINING, "precision": options.precision,
            "drafted": DRAFTED, "seed": 0,
        }  # fmt: skip
        path.write_text(json.dumps(settings, indent=1))
    return dict(json.loads(path.read_text()))


def chat_prompts(tokenizer: Any, count: int) -> dict[str, list[list[int]]]:
    """Questions as the model expects them."""

    def one(text: str) -> list[int]:
        if not tokenizer.chat_template:
            return list(tokenizer(text)["input_ids"])
        found = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}],
            add_generation_prompt=True, tokenize=True, return_dict=True,
        )  # fmt: skip
        return list(found["input_ids"])

    return {
        name: [one(text) for text in texts[:count]]
        for name, texts in (("chat", CHAT), ("code", CODE))
    }


def main() -> None:
    options = arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    base = resolve(options.model).path
    tokenizer = load_tokenizer(base)
    drafter = stage(chosen(options))
    samples = max(16, min(768, drafter.tokens // 512))  # type: ignore[attr-defined]
    with observer(quiet=False) as watcher:
        calibration = build_batches(CalibrationConfig(samples=samples, length=256), tokenizer)
        folder, cost = made(options.out, drafter, base, calibration, watcher)
        prompts = chat_prompts(tokenizer, options.prompts)
        lines = []
        for name in options.decode:
            found = measured(options, base, drafter, folder, prompts, name, watcher)
            lines += [*report(options, folder, found, name), ""]
        lines.append(
            f"Text and training: {cost['seconds'] / 60:.0f} minutes (the attempt that ended them), "
            f"{cost['peak_bytes'] / 2**30:.1f} GiB at the peak."
        )
    text = "\n".join(lines)
    print(text)
    if options.results:
        options.results.write_text(text)


def made(
    out: Path, drafter: Any, base: Path, calibration: CalibrationSet, watcher: Observer
) -> tuple[Path, dict[str, float]]:
    """The draft, and what the attempt that ended it cost."""
    path = out / "cost.json"
    with Meter() as meter:
        folder = finished(drafter, base, calibration, out / "draft", watcher)
    if not path.is_file():
        path.write_text(json.dumps({"seconds": meter.seconds, **meter.peaks()}))
    return folder, dict(json.loads(path.read_text()))


def measured(
    options: argparse.Namespace,
    base: Path,
    drafter: Any,
    folder: Path,
    prompts: dict[str, list[list[int]]],
    precision: str,
    watcher: Observer,
) -> DraftMeasurement:
    """Target and draft decode in this precision; what OUT holds is not measured again."""
    tree = Tree(*options.tree) if options.tree else None
    shape = "-".join(map(str, ("tree", *options.tree))) if options.tree else "chains"
    path: Path = options.out / f"measurement-{precision}-{shape}.json"
    if not path.is_file():
        model = load_model(base, torch.device("cpu"), getattr(torch, precision))
        draft = load_draft(folder, model, tokenizer_sha256(base))
        timed = sum(map(len, prompts.values()))
        found = measure_draft(
            CachedModel(model, draft.layers),
            draft,
            drafter.untrained(model, folder),
            prompts,
            Protocol(DRAFTED, options.new_tokens, tree, timed, 0, options.batches),
            watcher,
        )
        path.write_text(found.model_dump_json(indent=1))
    return DraftMeasurement.model_validate_json(path.read_text())


def report(
    options: argparse.Namespace, folder: Path, found: DraftMeasurement, precision: str
) -> list[str]:
    """Acceptance by kind of prompt, then speed."""
    binding, speed = read_binding(folder), found.speeds[0]
    limit = limiting_term(found.greedy.by_position, speed.draft_cost, speed.verify_costs)
    verdict = "pays" if found.worthwhile else f"no speed-up, do not deploy: {limit.term}"
    lines = [
        f"`python benchmarks/drafts_smollm2.py --minutes {options.minutes:g} --steps "
        f"{options.steps} --kind {options.kind}`: {binding.trained_tokens} training tokens in "
        f"{options.precision}; decoded in {precision} by {torch.get_num_threads()} threads, "
        f"{speed.plain_tokens_per_second:.1f} plain tokens a second; same text in "
        f"{found.identical} of {found.prompts}, largest margin {found.largest_margin:.2g}",
        "",
        f"| prompts | τ at γ = {DRAFTED}, greedy | sampled | predicted at γ = {speed.drafted} "
        "| measured |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, domain in found.domains.items():
        gain = speed.domains[name]
        lines.append(
            f"| {name} | {domain.greedy.length:.2f} | {domain.sampled.length:.2f} "
            f"| {gain.predicted:.2f} | {gain.measured:.2f} |"
        )
    assisted = "not there for EAGLE-3" if speed.assisted is None else f"{speed.assisted:.2f}"
    untrained = "–" if speed.untrained is None else f"{speed.untrained:.2f}"
    lines += [
        "",
        "| way of decoding | speed-up over plain |",
        "| --- | --- |",
        f"| this draft, γ = {speed.drafted} (predicted {speed.predicted:.2f}) "
        f"| {speed.measured:.2f} |",
        *tree_row(options, found),
        f"| the same before training | {untrained} |",
        f"| prompt lookup | {speed.lookup:.2f} |",
        f"| transformers' assisted generation, same draft | {assisted} |",
        "",
        f"c = {speed.draft_cost:.3f}, v = {', '.join(f'{v:.2f}' for v in speed.verify_costs)}; "
        f"wanted is {WORTHWHILE}: {verdict}. Accepted by position: "
        f"{', '.join(f'{share:.2f}' for share in found.greedy.by_position)}.",
    ]
    lines += [
        f"Batch {more.batch}: {more.measured:.2f} at γ = {more.drafted} (predicted "
        f"{more.predicted:.2f}), {'' if more.tree is None else f'tree {more.tree:.2f}, '}"
        f"prompt lookup {more.lookup:.2f}."
        for more in found.speeds[1:]
    ]
    if binding.curve is not None and binding.curve.fit is not None:
        points = ", ".join(f"{p.tokens}: {p.length:.2f}" for p in binding.curve.points)
        lines.append(
            f"τ by training tokens: {points}; {binding.curve.fit.slope:+.3f} · ln(tokens)."
        )
    return lines


def tree_row(options: argparse.Namespace, found: DraftMeasurement) -> list[str]:
    """Of the table of speeds, where a tree was tried."""
    gain = found.speeds[0].tree
    if gain is None:
        return []
    depth, width, nodes = options.tree
    return [
        f"| a tree of {nodes} proposals, {depth} deep, {width} wide (τ = {found.tree_length:.2f}) "
        f"| {gain:.2f} |"
    ]


if __name__ == "__main__":
    main()
