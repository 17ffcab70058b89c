"""Markdown and JSON of the cells."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from methods import GROUP, OURS

from compressor.evaluation.measure import TokenScores
from compressor.evaluation.results import Estimate, Evaluation, Protocol
from compressor.evaluation.statistics import Bootstrap, Floats
from compressor.formats.atomic import atomic_write_json
from compressor.formats.headers import FLOATING, read_header

# What a table says of the model; any other goes by its folder's name.
MODELS = {
    "SmolLM2-135M-Instruct": "SmolLM2-135M-Instruct without its 4-bit lattice "
    "(`tools/build_smollm2.py --delattice`)",
    "SmolLM2-135M-Instruct-plain": "SmolLM2-135M-Instruct as it is published, its matrices on an "
    "asymmetric 4-bit grid in groups of 32 (`tools/build_smollm2.py`)",
}
Documents = dict[str, list[list[float]]]
"""Of each domain, for each document: tokens, and the sum of their KL."""


def bytes_at_16(files: Iterable[Path]) -> int:
    """Bytes of the tensors if every floating-point one had 16 bits.

    A peer that rounds in fp32 saves embedding and scales in fp32; nobody would deploy those.
    """
    total = 0
    for path in files:
        for info in read_header(path)[0].values():
            total += 2 * info.elements if info.dtype in FLOATING else info.nbytes
    return total


def interval(value: Estimate, digits: int = 4) -> str:
    if value.low is None or value.high is None:
        return f"{value.value:.{digits}f}"
    return f"{value.value:.{digits}f} [{value.low:.{digits}f}, {value.high:.{digits}f}]"


def row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def accuracy(cells: Mapping[str, dict[str, Any]], base: Evaluation) -> list[str]:
    """A row a method: how far from the original."""
    domains = list(base.domains)
    header = ["", "MB", "MB, floats at 16 bits", "mean KL [95 %]", "worst domain's KL", "99.9 % KL",
              "same top token", *(f"perplexity, {domain}" for domain in domains)]  # fmt: skip
    lines = [row(header), row(["---"] * len(header))]
    perplexities = [f"{base.domains[d].perplexity.value:.2f}" for d in domains]
    lines.append(row(["original, bf16", *[""] * 6, *perplexities]))
    for name, cell in cells.items():
        found: Evaluation = cell["evaluation"]
        kl, worst = found.overall.divergence, found.worst
        assert kl is not None
        assert worst is not None
        lines.append(
            row(
                [
                    name,
                    f"{cell['bytes'] / 1e6:.1f}",
                    f"{cell['bytes_16'] / 1e6:.1f}",
                    interval(kl.mean),
                    f"{worst.kl.value:.4f} ({worst.kl_domain})",
                    f"{kl.p999:.2f}",
                    f"{kl.top1_agreement.value:.1%}",
                    *(f"{found.domains[d].perplexity.value:.2f}" for d in domains),
                ]
            )
        )
    return lines


def divergences(
    cells: Mapping[str, dict[str, Any]], base: Evaluation, calibrated: Collection[str]
) -> list[str]:
    """Mean KL by domain; those whose kind of text the calibration lacks are marked."""
    domains = list(base.domains)
    heads = [d if d in calibrated else f"{d} (not in calibration)" for d in domains]
    lines = [row(["mean KL", *heads]), row(["---"] * (len(domains) + 1))]
    for name, cell in cells.items():
        scores = cell["evaluation"].domains
        lines.append(row([name, *(f"{scores[d].divergence.mean.value:.4f}" for d in domains)]))
    return lines


def costs(cells: Mapping[str, dict[str, Any]]) -> list[str]:
    """What it took to make the checkpoints."""
    header = ["", "wall, s", "CPU, s", "peak resident, MB", "load average, before to after",
              "processor"]  # fmt: skip
    lines = [row(header), row(["---"] * len(header))]
    for name, cell in cells.items():
        cost = cell["cost"]
        lines.append(
            row(
                [
                    name,
                    f"{cost['wall_seconds']:.0f}",
                    f"{cost['cpu_seconds']:.0f}",
                    f"{cost['peak_bytes'] / 1e6:.0f}",
                    f"{cost['load_before']:.1f} to {cost['load_after']:.1f}",
                    cell.get("processor", f"{cost['cores']} cores, not recorded"),
                ]
            )
        )
    return lines


def by_document(scores: TokenScores) -> Documents:
    """What a paired interval needs."""
    found: Documents = {}
    for number, domain in enumerate(scores.domains):
        rows = scores.domain == number
        _, document = np.unique(scores.cluster[rows], return_inverse=True)
        sums = np.bincount(document, weights=scores.kl[rows])
        counts = np.bincount(document)
        found[domain] = [[int(n), round(kl, 4)] for n, kl in zip(counts, sums, strict=True)]
    return found


def difference(ours: Documents, theirs: Documents) -> Estimate:
    """Mean KL over domains, ours minus theirs, resampled by document."""
    paired = [
        np.column_stack([np.array(ours[domain]), np.array(theirs[domain])[:, 1]]) for domain in ours
    ]

    def statistic(totals: Floats) -> Floats:
        return np.asarray(((totals[..., 1] - totals[..., 2]) / totals[..., 0]).mean(-1))

    return Bootstrap(paired).interval(statistic)


def paired(cells: Mapping[str, dict[str, Any]]) -> None:
    """Note in each of our cells how far it is from every peer's, where documents are known.

    What was noted on an earlier day stays where they are not.
    """
    for cell in cells.values():
        if cell["peer"] != OURS:
            continue
        noted = cell.setdefault("differences", {})
        for name, other in cells.items():
            if other["peer"] != OURS and "documents" in cell and "documents" in other:
                found = difference(cell["documents"], other["documents"])
                noted[name] = found.model_dump(mode="json")


def pairs(cells: Mapping[str, dict[str, Any]]) -> list[str]:
    """Difference of mean KL, ours minus the peer's; blank where only averages were kept."""
    peers = [name for name, cell in cells.items() if cell["peer"] != OURS]
    lines = [row(["ours minus theirs", *peers]), row(["---"] * (len(peers) + 1))]
    for name, cell in cells.items():
        if cell["peer"] == OURS:
            noted = {peer: Estimate(**found) for peer, found in cell["differences"].items()}
            found = [interval(noted[peer]) if peer in noted else "" for peer in peers]
            lines.append(row([name, *found]))
    return lines


def page(
    cells: Mapping[str, dict[str, Any]],
    base: Evaluation,
    model: str,
    command: str,
    calibration: str,
    calibrated: Collection[str],
) -> list[str]:
    """The whole Markdown page.

    Args:
        cells: rows of the tables, by name.
        base: scores of the original.
        model: name of its folder.
        command: that made the page.
        calibration: mix, rows and tokens a row, in one word.
        calibrated: domains of the mix.
    """
    if not cells:
        return ["no cell has scores yet"]
    first = next(iter(cells.values()))
    commits = sorted({cell["commit"] or "unknown" for cell in cells.values()})
    return [
        f"# {first['bits']} bits, calibrated on `{calibration}`",
        "",
        f"`{command}`, cells made at commit {', '.join(f'`{commit}`' for commit in commits)}.",
        "",
        _setting(base, model),
        "",
        *accuracy(cells, base),
        "",
        "## By domain",
        "",
        *divergences(cells, base, calibrated),
        "",
        "## Ours minus theirs, mean KL, paired by document",
        "",
        *pairs(cells),
        "",
        "## Cost",
        "",
        "Whole process: imports, loading, rounding, saving; ours also plans, verifies and compares "
        "the export with memory. Times of one processor compare, and mean something only where the "
        "load average was near zero before.",
        "",
        *costs(cells),
    ]


def _setting(base: Evaluation, model: str) -> str:
    """What all rows share."""
    protocol, overall = base.protocol, base.overall
    return (
        f"{MODELS.get(model, model)}; symmetric codes, groups of {GROUP}, embedding and head kept; "
        "calibration tokens (mix, rows × tokens a row) the same for all. Scored from what was "
        f"saved, by our evaluation: suite `{protocol.suite}`, protocol `{protocol.id}`, windows of "
        f"{protocol.length}, {protocol.dtype}, {overall.tokens} tokens of {overall.documents} "
        f"documents, text {protocol.text_sha256[:12]}. KL to the original in nats per token, the "
        "mean over domains; intervals are 95 %, resampled by document."
    )


def write(folder: Path, name: str, lines: list[str], cells: Mapping[str, dict[str, Any]]) -> None:
    """The page, and everything behind it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text("\n".join(lines) + "\n")
    values = {n: c | {"evaluation": _brief(c["evaluation"])} for n, c in cells.items()}
    atomic_write_json(folder / f"{name}.json", values)


def read(path: Path, protocol: Protocol) -> dict[str, dict[str, Any]]:
    """The cells that `write` left, as far as they were scored as those of today are."""
    if not path.is_file():
        return {}
    cells = json.loads(path.read_text())
    found = {
        name: cell | {"evaluation": _whole(cell["evaluation"])} for name, cell in cells.items()
    }
    return {name: cell for name, cell in found.items() if cell["evaluation"].protocol == protocol}


# What would make the file long, and no table shows.
_LEFT_OUT = {"worst_tokens": [], "kl_by_position": [], "seconds": 0.0, "peak_bytes": 0}


def _brief(evaluation: Evaluation) -> dict[str, Any]:
    """Without the quoted text and the curves."""
    brief = evaluation.model_dump(mode="json", exclude=set(_LEFT_OUT))
    for score in (brief["overall"], *brief["domains"].values()):
        del score["divergence"]["ccdf"]
    return brief


def _whole(brief: dict[str, Any]) -> Evaluation:
    """With nothing in their places."""
    for score in (brief["overall"], *brief["domains"].values()):
        score["divergence"]["ccdf"] = []
    return Evaluation.model_validate(brief | _LEFT_OUT)
