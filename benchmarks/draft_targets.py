#!/usr/bin/env python3
"""Which model should a draft be distilled against: the original, or the quantized one it serves?

    python benchmarks/draft_targets.py [--model builtin:tiny] [--kind standalone] [--bits 4]
        [--tokens 8192] [--steps 80] [--prompts 4] [-o out/draft-targets] [--results FILE.md]

The model is quantized (GPTQ, groups of 64). One draft is trained against the original and one
against the quantized model, with the same options and seed, and each is asked to draft for both.
What OUT holds already is not done again; training goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from bench import Kept, stage
from drafting import beginnings, difference, finished, lengths, per_pass

from compressor import resources
from compressor.calibration import CalibrationConfig, build_batches
from compressor.decoding.binding import read_binding
from compressor.decoding.cached import CachedModel
from compressor.decoding.eagle3 import load_eagle3
from compressor.decoding.proposals import Draft, ModelDraft
from compressor.model.load import load_model, load_tokenizer, resolve
from compressor.progress import observer
from compressor.text import calibration_documents, domains

HEATS = (0.0, 1.0)
NAMES = ("original", "quantized")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="builtin:tiny")
    parser.add_argument("--kind", choices=("standalone", "eagle3"), default="standalone")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--prompts", type=int, default=4, help="of each domain")
    parser.add_argument("--new-tokens", type=int, default=40)
    parser.add_argument("--drafted", type=int, default=5)
    parser.add_argument("-o", "--out", type=Path, default=Path("out/draft-targets"))
    parser.add_argument("--results", type=Path)
    return parser.parse_args()


def prompts_of(tokenizer: Any, count: int) -> list[list[int]]:
    """Beginnings of development documents of every domain, which calibration never sees."""
    texts = []
    for domain in domains(resources.calibration(), "development"):
        documents = iter(calibration_documents(domain, "development"))
        texts += [next(documents).text for _ in range(count)]
    return beginnings(tokenizer, texts)


def loaded(folder: Path, target: Any) -> Draft:
    """A draft on any target of the same shape: here drafts are meant to meet the wrong one."""
    binding = read_binding(folder)
    if binding.kind == "eagle3":
        return load_eagle3(folder, target, binding.layers)
    return ModelDraft(CachedModel(load_model(folder, torch.device("cpu"), torch.float32)))


def main() -> None:
    options = arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    base = resolve(options.model).path
    tokenizer = load_tokenizer(base)
    calibration = build_batches(CalibrationConfig(samples=32, length=256), tokenizer)
    rounder = stage({"method": "quantize.gptq", "bits": options.bits, "group_size": 64})
    drafter = stage(
        {
            "method": f"draft.{options.kind}", "tokens": options.tokens, "steps": options.steps,
            "drafted": options.drafted, "probes": 0,
        }
    )  # fmt: skip
    with observer(quiet=False) as watcher:
        quantized = finished(rounder, base, calibration, options.out / "quantized", watcher)
        targets = dict(zip(NAMES, (base, quantized), strict=True))
        drafts = {
            name: finished(drafter, path, calibration, options.out / f"draft-of-{name}", watcher)
            for name, path in targets.items()
        }
    kept, prompts = Kept(options.out / "cells.jsonl"), prompts_of(tokenizer, options.prompts)

    def measured(draft: str, target: str, heat: float) -> dict[str, Any]:
        model = load_model(targets[target], torch.device("cpu"), torch.float32)
        one = loaded(drafts[draft], model)
        return {"rows": lengths(model, one, prompts, options.drafted, options.new_tokens, heat)}

    cells = {
        (draft, target, heat): kept.get(
            f"{draft} for {target} at {heat}", measured, draft, target, heat
        )
        for target in NAMES
        for draft in NAMES
        for heat in HEATS
    }
    text = "\n".join(report(options, cells))
    print(text)
    if options.results:
        options.results.write_text(text + "\n")


def report(
    options: argparse.Namespace, cells: dict[tuple[str, str, float], dict[str, Any]]
) -> list[str]:
    """A row for every target and temperature: both drafts, and what the right one gains."""
    lines = [
        f"`python benchmarks/draft_targets.py --model {options.model} --kind {options.kind} "
        f"--bits {options.bits} --tokens {options.tokens} --steps {options.steps} "
        f"--prompts {options.prompts} --new-tokens {options.new_tokens}`",
        "",
        f"Tokens a pass with {options.drafted} drafted, {options.prompts} prompts a domain, "
        f"{options.new_tokens} new tokens. Gain: the draft of the same target minus the other, "
        "with the 95 % interval from resampled prompts.",
        "",
        "| target | temperature | draft of the original | draft of the quantized | gain |",
        "| --- | --- | --- | --- | --- |",
    ]
    for target in NAMES:
        for heat in HEATS:
            found = {name: cells[name, target, heat]["rows"] for name in NAMES}
            (other,) = set(NAMES) - {target}
            gain, low, high = difference(found[target], found[other])
            shown = [f"{per_pass(found[name]):.3f}" for name in NAMES]
            gained = f"{gain:+.3f} ({low:+.3f} to {high:+.3f})"
            lines.append(f"| {target} | {heat:g} | {' | '.join(shown)} | {gained} |")
    return lines


if __name__ == "__main__":
    main()
