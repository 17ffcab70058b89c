"""What comes out of a run: written from the codes, read back from disk, compared with memory."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressor import requantize
from compressor.errors import ModelError
from compressor.formats import exporters
from compressor.formats.codes import CodesReader
from compressor.formats.files import checkpoint_files
from compressor.formats.support import loading
from compressor.journal import Event
from compressor.model.architecture import Architecture
from compressor.model.files import read_config
from compressor.provenance import combined_sha256, hash_files
from compressor.reload import unpack
from compressor.report.schema import Artifact
from compressor.report.snippets import load_snippets
from compressor.requantize import Requantized
from compressor.sections import ExportConfig
from compressor.serving.check import prove
from compressor.serving.record import record_event
from compressor.stages.packing import targets_of
from compressor.state import RunState
from compressor.variants import Variant
from compressor.verify import used_tensors, verify_export, verify_weights

_DIFFERENCES = ("max_logit_difference", "max_weight_difference", "max_logprob_difference")


@dataclass(frozen=True)
class Deliverables:
    """Writes what the recipe exports; each is skipped when the journal says it is done.

    A deliverable is written whole: what an interrupted run left of it, or somebody changed since,
    goes.
    """

    run: RunState

    def add(self, config: ExportConfig) -> None:
        """Make one deliverable, and tell the run of it.

        Raises:
            ResourceError: a program or package that the format needs is missing or failed.
            VerificationError: what was written is not the model.
        """
        if config.rounds:
            self._requantize(config)
        else:
            self._export(config)

    def _export(self, config: ExportConfig) -> None:
        """Pack the codes as they are."""

        def write(out: Path) -> dict[str, float | None]:
            exporter, source = exporters.exporter(config.format), self._source(config)
            exporter.write(source, out)
            return self._read_back(exporter, source, out)

        event = self._written(config, write)
        differences = {key: event.get(key) for key in _DIFFERENCES}
        reload_ok = any(value is not None for value in differences.values())
        self._artifact(config, event["sha256"], reload_ok, **differences)

    def _requantize(self, config: ExportConfig) -> None:
        """Let another quantizer round: read back, and measured like what a stage leaves."""
        run, name, scratch = self.run, config.name, self.run.folder / "scratch" / "gguf"

        def write(out: Path) -> dict[str, Any]:
            source, text = self._source(config), self._text(config)
            return requantize.write(config, source, out, scratch, text, run.observer)

        event = self._written(config, write)
        if not run.is_evaluated(name):
            dense = scratch / name
            unpack(self._folder(config), run.last.checkpoint, dense, run.plan.parameters)
            run.evaluate(Variant(name, dense))
            shutil.rmtree(dense)
        run.evaluations[name] = run.session.load(name)
        facts = {"quantizer": event["quantizer"], "embedding": config.blocks}
        artifact = self._artifact(config, event["sha256"], True, **facts)
        run.requantized.append(Requantized(config, run.last.id, event, artifact))

    def _written(self, config: ExportConfig, write: Callable[[Path], dict[str, Any]]) -> Event:
        """The journal's event of a deliverable, which is made now unless it is there and intact."""
        name, out = config.name, self._folder(config)
        event = self.run.journal.find("exported", format=name)
        if event is not None and _is_intact(out, event["sha256"]):
            return event
        self.run.observer.event("export", format=name)
        shutil.rmtree(out, ignore_errors=True)
        facts = write(out)
        sha256 = combined_sha256(hash_files(out))
        return self.run.journal.append("exported", format=name, sha256=sha256, **facts)

    def _folder(self, config: ExportConfig) -> Path:
        return self.run.folder / "deliverable" / config.name

    def _source(self, config: ExportConfig) -> exporters.Source:
        run, checkpoint = self.run, self.run.last.checkpoint
        final = self._final()
        scales = final.cache.scales if final.cache else ()
        return exporters.Source(
            checkpoint,
            CodesReader(*(v.checkpoint for v in run.variants if v.stage)),
            run.plan.stages[-1].parameters if run.plan.stages else run.plan.parameters,
            config.container,
            final.activations,
            dict(zip(final.cached_attention, scales, strict=False)),
            config.blocks,
        )

    def _final(self) -> Architecture:
        """What the last stage left, with the grids of the codes that are packed."""
        final = Architecture.from_config(read_config(self.run.last.checkpoint))
        for variant in self.run.variants:
            codes = CodesReader(variant.checkpoint)
            _require_codes(variant, codes)
            if variant.stage and codes:
                final = final.with_schemes({name: codes.scheme(name) for name in codes})
        return final

    def _text(self, config: ExportConfig) -> requantize.Text | None:
        """For an importance matrix."""
        tokens, mix = self.run.calibration, self.run.recipe.calibration
        wanted = config.type is not None and config.imatrix
        return requantize.Text(mix, tokens) if wanted and mix and tokens else None

    def _read_back(
        self, exporter: exporters.Exporter, source: exporters.Source, out: Path
    ) -> dict[str, float | None]:
        """Compare an export with memory: by its weights where only another program loads it.

        A graph is run by its engine, and what that says is compared.
        """
        run = self.run
        if exporter.engine is not None:
            checked = prove(exporter.engine, source.checkpoint, out, run.source.path, run.observer)
            record_event(run.journal, checked)
            return {_DIFFERENCES[2]: checked.largest}
        if exporter.read is None:
            return {_DIFFERENCES[0]: self._difference(source.checkpoint, out)}
        stored, required = exporter.read(out), used_tensors(source.checkpoint)
        found = verify_weights(stored, source.checkpoint, source.codes, out.name, required)
        return {_DIFFERENCES[1]: found}

    def _difference(self, checkpoint: Path, export: Path) -> float | None:
        """Between the logits of the two, loaded whole; None if memory does not hold them."""
        # The export first: it takes more memory, and the other's logits need not lie beside it.
        disk, memory = self.run.probe.whole(export), self.run.probe.whole(checkpoint)
        if memory is None or disk is None:
            return None
        return verify_export(memory, disk, export.name)

    def _artifact(
        self, config: ExportConfig, sha256: str, reload_ok: bool, **facts: Any
    ) -> Artifact:
        """A deliverable, as the report has it; kept in the order of the recipe."""
        out, final = self._folder(config), self._final()
        loads = loading(targets_of(final), config.container, final.cache)
        path = out.relative_to(self.run.folder).as_posix()
        made = Artifact(
            path=path,
            format=config.format,
            sha256=sha256,
            reload_ok=reload_ok,
            bytes_on_disk=sum(file.stat().st_size for file in checkpoint_files(out)),
            load_snippets=load_snippets(path, config.format, loads.titles),
            refusals=dict(loads.refusals),
            **(dict.fromkeys(_DIFFERENCES) | facts),
        )
        self.run.artifacts.append(made)
        return made


def _is_intact(folder: Path, sha256: str) -> bool:
    """Whether a deliverable is still what was verified."""
    try:
        return combined_sha256(hash_files(folder)) == sha256
    except ModelError:  # it is gone, or lacks a file
        return False


def _require_codes(variant: Variant, codes: CodesReader) -> None:
    """Without its codes a matrix would be packed dense, and nobody told.

    Raises:
        ModelError: codes that a stage has written are gone.
    """
    if variant.stage is None or variant.result is None or not variant.stage.rounds_weights:
        return
    rounded = [metric.module for metric in variant.result.metrics]
    if gone := [module for module in rounded if module not in codes]:
        raise ModelError(
            f"{variant.checkpoint} has no codes of {gone[0]} ({len(gone)} of {len(rounded)} "
            "matrices), which its stage has written",
        )
