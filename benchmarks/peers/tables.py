"""Markdown and JSON of the cells."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from methods import GROUP, OURS

from compressor.evaluation.results import Estimate, Evaluation
from compressor.evaluation.session import BASE, Session
from compressor.evaluation.summary import compare
from compressor.formats.atomic import atomic_write_json
from compressor.formats.headers import FLOATING, read_header


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


def divergences(cells: Mapping[str, dict[str, Any]], base: Evaluation) -> list[str]:
    """Mean KL by domain."""
    domains = list(base.domains)
    lines = [row(["mean KL", *domains]), row(["---"] * (len(domains) + 1))]
    for name, cell in cells.items():
        scores = cell["evaluation"].domains
        lines.append(row([name, *(f"{scores[d].divergence.mean.value:.4f}" for d in domains)]))
    return lines


def costs(cells: Mapping[str, dict[str, Any]]) -> list[str]:
    """What it took to make the checkpoints."""
    header = ["", "wall, s", "CPU, s", "peak resident, MB", "load average, before to after"]
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
                ]
            )
        )
    return lines


def pairs(
    cells: Mapping[str, dict[str, Any]], names: Mapping[str, str], session: Session
) -> list[str]:
    """Difference of mean KL, ours minus the peer's, paired by document."""
    ours = [name for name, cell in cells.items() if cell["peer"] == OURS]
    peers = [name for name, cell in cells.items() if cell["peer"] != OURS]
    scores = {n: session.scores(names[n]) for n in (*ours, *peers)}
    lines = [row(["ours minus theirs", *peers]), row(["---"] * (len(peers) + 1))]
    for own in ours:
        found = []
        for peer in peers:
            pair = compare(scores[peer], scores[own], session.config.resamples, session.config.seed)
            assert pair.overall.delta_kl is not None
            found.append(interval(pair.overall.delta_kl))
        lines.append(row([own, *found]))
    return lines


def page(
    cells: Mapping[str, dict[str, Any]],
    names: Mapping[str, str],
    session: Session,
    command: str,
    calibration: str,
) -> list[str]:
    """The whole Markdown page."""
    if not cells:
        return ["no cell has scores yet"]
    base, first = session.load(BASE), next(iter(cells.values()))
    commits = sorted({cell["commit"] or "unknown" for cell in cells.values()})
    return [
        f"# {first['bits']} bits, calibrated on `{calibration}`",
        "",
        f"`{command}`, cells made at commit {', '.join(f'`{commit}`' for commit in commits)}.",
        "",
        _setting(base),
        "",
        *accuracy(cells, base),
        "",
        "## By domain",
        "",
        *divergences(cells, base),
        "",
        "## Ours minus theirs, mean KL, paired by document",
        "",
        *pairs(cells, names, session),
        "",
        "## Cost",
        "",
        "Whole process: imports, loading, rounding, saving; ours also plans, verifies and compares "
        f"the export with memory. {first['cost']['cores']} cores. Times mean something only where "
        "the load average was near zero before.",
        "",
        *costs(cells),
    ]


def _setting(base: Evaluation) -> str:
    """What all rows share."""
    protocol, overall = base.protocol, base.overall
    return (
        "SmolLM2-135M-Instruct without its 4-bit lattice (`tools/build_smollm2.py --delattice`); "
        f"symmetric codes, groups of {GROUP}, embedding and head kept; calibration tokens (mix, "
        "rows × tokens a row) the same for all. Scored from what was saved, by our evaluation: "
        f"suite `{protocol.suite}`, protocol `{protocol.id}`, windows of {protocol.length}, "
        f"{protocol.dtype}, {overall.tokens} tokens of {overall.documents} documents, text "
        f"{protocol.text_sha256[:12]}. KL to the original in nats per token, the mean over "
        "domains; intervals are 95 %, resampled by document."
    )


def write(folder: Path, name: str, lines: list[str], cells: Mapping[str, dict[str, Any]]) -> None:
    """The page, and everything behind it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text("\n".join(lines) + "\n")
    values = {n: c | {"evaluation": _brief(c["evaluation"])} for n, c in cells.items()}
    atomic_write_json(folder / f"{name}.json", values)


def _brief(evaluation: Evaluation) -> dict[str, Any]:
    """Without the quoted text and the curves."""
    drop = {"worst_tokens": True, "kl_by_position": True, "seconds": True, "peak_bytes": True}
    brief = evaluation.model_dump(mode="json", exclude=drop)
    for score in (brief["overall"], *brief["domains"].values()):
        del score["divergence"]["ccdf"]
    return brief
