"""Drafts of a run: measured against their target, delivered beside it, told in the report."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from compressor.decoding.assisted import settings
from compressor.decoding.binding import Kind, read_binding, tokenizer_sha256
from compressor.decoding.cached import CachedModel
from compressor.decoding.early_exit import TrackedExitDraft
from compressor.decoding.load import load_draft
from compressor.decoding.measure import Protocol, measure_draft, measure_early_exit
from compressor.decoding.prompts import as_prompt
from compressor.decoding.proposals import Tree
from compressor.decoding.results import WORTHWHILE, DraftMeasurement, Outlook
from compressor.evaluation.session import Session
from compressor.formats import exporters
from compressor.formats.atomic import atomic_write_bytes, atomic_write_json
from compressor.formats.shards import CheckpointReader
from compressor.model.architecture import Architecture
from compressor.model.files import read_config
from compressor.model.load import load_model
from compressor.numerics.speculative import limiting_term, paying_scale
from compressor.report.schema import Draft
from compressor.report.snippets import draft_snippets
from compressor.stages.draft_base import DraftConfig
from compressor.variants import Variant
from compressor.verify import used_tensors, verify_weights

_GENERATION = "generation_config.json"
_PROMPT_TOKENS = 32
_TIMED = 8  # prompts whose decoding is timed


def measure(variant: Variant, session: Session) -> DraftMeasurement:
    """Decode evaluation text with a draft and without; the result is stored at once.

    Args:
        variant: the finished draft stage; its parent is the target.
        session: whose text and precision are used.

    Raises:
        ModelError: the draft belongs to another target.
    """
    stage, parent = variant.stage, variant.parent
    assert isinstance(stage, DraftConfig)
    assert parent is not None
    model = load_model(parent.checkpoint, session.device, session.dtype)
    draft = load_draft(variant.checkpoint, model, tokenizer_sha256(parent.checkpoint))
    prompts = _prompts(session, stage.prompts)
    protocol = Protocol(stage.drafted, stage.new_tokens, _tree(stage), _TIMED, stage.seed)
    if isinstance(draft, TrackedExitDraft):
        measurement = measure_early_exit(
            CachedModel(model), draft, prompts, protocol, session.observer
        )
    else:
        target, before = (
            CachedModel(model, draft.layers),
            stage.untrained(model, variant.checkpoint),
        )
        measurement = measure_draft(target, draft, before, prompts, protocol, session.observer)
    atomic_write_json(_path(variant, session), measurement.model_dump(mode="json"))
    return measurement


def holds(variant: Variant, session: Session) -> bool:
    """Whether the measurement of a draft is on disk, and whole."""
    try:
        load(variant, session)
    except (FileNotFoundError, ValidationError):
        return False
    return True


def load(variant: Variant, session: Session) -> DraftMeasurement:
    """What `measure` stored.

    Raises:
        FileNotFoundError: it stored nothing.
        ValidationError: the file has been damaged since.
    """
    return DraftMeasurement.model_validate_json(_path(variant, session).read_bytes())


def _path(variant: Variant, session: Session) -> Path:
    return session.folder / f"{variant.id}.json"


def _tree(stage: DraftConfig) -> Tree | None:
    return Tree(stage.drafted, stage.tree_width, stage.tree_nodes) if stage.tree_nodes else None


def _prompts(session: Session, count: int) -> dict[str, list[list[int]]]:
    """The beginnings of the first documents of every evaluation domain."""
    tokenizer = session.tokenizer
    return {
        domain: [
            as_prompt(tokenizer, _beginning(tokenizer, document.text))
            for document in documents[:count]
        ]
        for domain, documents in session.text.domains.items()
    }


def _beginning(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, truncation=True, max_length=_PROMPT_TOKENS)["input_ids"])


def deliver(variant: Variant, measurement: DraftMeasurement, out: Path) -> None:
    """Copy a draft to where it is deployed from, with the best number of tokens to draft.

    Args:
        variant: the draft stage.
        measurement: of this draft.
        out: folder, written anew.
    """
    for path in sorted(variant.checkpoint.rglob("*")):
        if path.is_file():
            atomic_write_bytes(out / path.relative_to(variant.checkpoint), path.read_bytes())
    drafted = measurement.speeds[0].drafted
    _propose_in_speculators(out / "speculators" / "config.json", drafted)
    path = out / _GENERATION
    known = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    atomic_write_json(path, known | settings(drafted, measurement.exit))


def _propose_in_speculators(path: Path, drafted: int) -> None:
    """The same number in the dialect that has a place of its own for it."""
    if path.is_file():
        config = json.loads(path.read_text("utf-8"))
        (proposal,) = config["speculators_config"]["proposal_methods"]
        proposal["speculative_tokens"] = drafted
        atomic_write_json(path, config)


def deliver_gguf(variant: Variant, out: Path) -> Path | None:
    """Write a draft as a GGUF file too, read it back and compare every weight.

    Args:
        variant: the draft stage.
        out: folder of the delivered draft; the file goes into `gguf` below it.

    Returns:
        The file; None for drafts that llama.cpp does not know.

    Raises:
        VerificationError: the file does not hold the draft's weights.
    """
    kind, written = read_binding(out).kind, out / "gguf"
    required = None
    if kind == "standalone":
        gguf = exporters.exporter("gguf")
        assert gguf.read is not None
        gguf.write(exporters.Source(variant.checkpoint, {}, 0, "gguf"), written)
        stored, required = gguf.read(written), used_tensors(variant.checkpoint)
    elif kind == "eagle3":
        stored = _write_eagle3(variant, written)
    else:
        return None
    verify_weights(stored, variant.checkpoint, (), written.name, required)
    (file,) = written.glob("*.gguf")
    return file


def _write_eagle3(variant: Variant, out: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the file; the one that it does not hold is what the draft has."""
    from compressor.formats import gguf_eagle3

    assert variant.parent is not None
    gguf_eagle3.write(variant.checkpoint, variant.parent.checkpoint, out)
    left = "t2d", CheckpointReader(variant.checkpoint)["t2d"]
    return chain(gguf_eagle3.read(out), [left])


def facts(
    variant: Variant,
    measurement: DraftMeasurement,
    out: Path,
    folder: Path,
    *,
    gguf: Path | None = None,
    target: str = "",
) -> Draft:
    """The draft's place in the report.

    Args:
        variant: the draft stage.
        measurement: of this draft.
        out: where it was delivered.
        folder: of the run.
        gguf: the same draft for llama.cpp, if there is one.
        target: path of the GGUF file that it speculates for.
    """
    stage, parent, done = variant.stage, variant.parent, variant.stage_facts()
    assert stage is not None
    assert parent is not None
    assert done is not None
    binding = read_binding(out)
    own = None if gguf is None else gguf.relative_to(folder).as_posix()
    return Draft(
        id=variant.id,
        label=stage.label,
        target=parent.id,
        stage=done,
        path=out.relative_to(folder).as_posix(),
        gguf=own,
        load_snippets=draft_snippets(target, own, measurement.speeds[0].drafted, binding.kind)
        if own
        else {},
        bytes_on_disk=sum(path.stat().st_size for path in out.glob("*") if path.is_file()),
        target_sha256=binding.target_sha256,
        trained_tokens=binding.trained_tokens,
        measurement=measurement,
        worthwhile=measurement.worthwhile,
        outlook=None
        if measurement.worthwhile
        else outlook(measurement, parent.checkpoint, binding.kind),
        curve=binding.curve,
    )


def outlook(measurement: DraftMeasurement, target: Path, kind: Kind) -> Outlook:
    """Why a draft does not pay at batch 1, and from which size of target on it would.

    What the formula leaves out, measured over predicted speed-up, is taken as it is.

    Args:
        measurement: of the draft.
        target: its checkpoint.
        kind: of the draft; a standalone one stays as it is on a larger target, others grow with it.
    """
    speed, shares = measurement.speeds[0], measurement.greedy.by_position
    limit = limiting_term(shares, speed.draft_cost, speed.verify_costs)
    wanted = WORTHWHILE * speed.predicted / speed.measured
    scale = paying_scale(shares, speed.draft_cost, speed.verify_costs, wanted)
    if kind != "standalone":
        scale = None
    parameters = Architecture.from_config(read_config(target)).parameters
    return Outlook(
        limit=limit.term,
        better_cost=limit.better_cost,
        better_verify=limit.better_verify,
        better_acceptance=limit.better_acceptance,
        paying_parameters=None if scale is None else _two_digits(scale * parameters),
    )


def _two_digits(count: float) -> int:
    """More would pretend to know what the formula leaves out."""
    return int(float(f"{count:.1e}"))
