"""`compress verify DIR`: look at any checkpoint, or at every deliverable of a run, once more.

Nothing is taken from the run that wrote it but the hashes and the dense weights to compare with.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from compressor.errors import CompressorError, ModelError, ResourceError, ResumeError
from compressor.formats import exporters
from compressor.formats.capabilities import ENVIRONMENTS
from compressor.formats.files import checkpoint_files
from compressor.formats.shards import CheckpointReader
from compressor.model.architecture import Architecture
from compressor.model.load import load_model, read_config, resolve
from compressor.provenance import combined_sha256, hash_files
from compressor.reload import form_of
from compressor.report.render import load_report
from compressor.report.schema import Report, Variant
from compressor.requantize import relative_error
from compressor.serving.words import continued
from compressor.verify import used_tensors, value_problems, verify_weights

_OFTEN_ZERO = ("bias", "zero_point", "g_idx", "qzeros", "weight_format")
_CHECKPOINT = (
    "config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "*.gguf",
    "*.onnx",
    "*.xml",
)
_CACHE = (".k_scale", ".v_scale")
_PACKED = ("_packed", "_scale", "_zero_point")  # parts of a packed matrix: of compressed-tensors,
_WORDS = ("qweight", "qzeros", "scales", "g_idx")  # of GPTQ and AWQ,
_PARTS = (*_PACKED, *_WORDS, "absmax", "SCB")  # and of bitsandbytes


@dataclass(frozen=True)
class Check:
    """One look at a checkpoint.

    Attributes:
        folder: of the checkpoint.
        name: `files`, `hash`, `values`, `shapes`, `weights` or `generation`.
        passed: None where it could not be made here.
        detail: what was found.
    """

    folder: str
    name: str
    passed: bool | None
    detail: str


def verify_folder(folder: Path) -> list[Check]:
    """Every check of a checkpoint, or of all deliverables of a run.

    Raises:
        ModelError: there is neither a checkpoint nor a run with deliverables.
        ResumeError: the run is not finished.
    """
    if not (folder / "report.json").is_file():
        if (folder / "recipe.lock.yaml").is_file():
            raise ResumeError(f"the run in {folder} is not finished", f"compress resume {folder}")
        if not any(any(folder.glob(pattern)) for pattern in _CHECKPOINT):
            raise ModelError(
                f"{folder} is neither a run, which has a report.json, nor a checkpoint, which has "
                "a config.json beside its weights, or is one .gguf file",
                "name the folder that `compress` wrote to, or one of its deliverables",
            )
        return list(_verify_checkpoint(folder))
    report = load_report(folder)
    paths = [item.path for item in report.deliverables]
    paths = paths or [v.artifact.path for v in report.variants if v.artifact]
    if not paths:
        raise ModelError(f"the run in {folder} has no deliverable", "compress export RUN --as gguf")
    return [check for path in paths for check in _verify_checkpoint(folder / path)]


def _verify_checkpoint(folder: Path) -> Iterator[Check]:
    """Checks in the order of their cost; later ones make no sense where files are missing."""
    name = folder.name
    try:
        files = checkpoint_files(folder)
    except CompressorError as error:
        yield Check(name, "files", False, error.message)
        return
    total = sum(path.stat().st_size for path in files)
    yield Check(name, "files", True, f"{len(files)} files, {total:,} bytes, whole")
    for check, look in (
        ("hash", _hash),
        ("values", _values),
        ("shapes", _shapes),
        ("weights", _weights),
        ("generation", _generation),
    ):
        try:
            passed, detail = look(folder)
        except CompressorError as error:
            passed, detail = False, error.message
        yield Check(name, check, passed, detail)


Found = tuple[bool | None, str]


def _run_of(folder: Path) -> tuple[Path, Report] | None:
    """The run that a deliverable belongs to, and its report."""
    run = folder.resolve().parent.parent
    return (run, load_report(run)) if (run / "report.json").is_file() else None


def _hash(folder: Path) -> Found:
    sha256 = combined_sha256(hash_files(folder))
    run = _run_of(folder)
    if run is None:
        return None, f"{sha256} (no report to compare it with)"
    recorded = run[1].reproduce.hashes.get(f"{folder.parent.name}/{folder.name}")
    if recorded != sha256:
        return False, f"{sha256}, but the report says {recorded}"
    return True, f"{sha256}, as in the report"


def _stored(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Tensors as they lie in the files, or what a GGUF file holds of each."""
    if form_of(folder) == "gguf":
        read = exporters.exporter("gguf").read
        assert read is not None
        return read(folder)
    return iter(CheckpointReader(folder).items())


def _graph(folder: Path) -> Found | None:
    """What is said of a graph, which only its engine reads."""
    engine = ENVIRONMENTS.get(form_of(folder))
    return (None, f"a graph; compress serve-check --engine {engine}") if engine else None


def _values(folder: Path) -> Found:
    if graph := _graph(folder):
        return graph
    count = 0
    for name, tensor in _stored(folder):
        count += 1
        for problem in value_problems(name, tensor, may_be_zero=name.endswith(_OFTEN_ZERO)):
            return False, problem
        if name.endswith(_CACHE) and not (tensor > 0).all():
            return False, f"{name} is not positive"
    return True, f"{count} tensors, none with NaN or infinity, none all zero"


def _shapes(folder: Path) -> Found:
    """Every matrix that the configuration calls for is there, dense or packed."""
    if graph := _graph(folder):
        return graph
    if form_of(folder) == "gguf":
        return _gguf_shapes(folder)
    architecture = Architecture.from_config(read_config(folder))
    reader = CheckpointReader(folder)
    parts = [name for name in reader if name.endswith(_PARTS) and not name.endswith(_CACHE)]
    packed = {name.rpartition(".")[0].removesuffix(".weight") for name in parts}
    scaled = {name for name in reader if name.endswith(_CACHE)}
    for name, shape in architecture.tensors():
        if name.removesuffix(".weight") in packed:
            continue
        if name not in reader:
            return False, f"{name} is missing"
        if reader.shape(name) != tuple(shape):
            return False, f"{name} is {list(reader.shape(name))}, not {list(shape)}"
    quantization = read_config(folder).get("quantization_config") or {}
    if quantization.get("kv_cache_scheme"):
        wanted = {f"{path}{part}" for path in architecture.cached_attention for part in _CACHE}
        if wanted != scaled:
            return False, f"{min(wanted ^ scaled)} is missing, or of no attention"
    found = f"as config.json says; {len(packed)} matrices are packed"
    return True, found + (f", {len(scaled)} scales of the cache" if scaled else "")


def _gguf_shapes(folder: Path) -> Found:
    """Every tensor of the model that a GGUF file describes is there, in the shape it says."""
    from compressor.formats.gguf import described

    config, shapes = described(folder)
    wanted = {name: tuple(shape) for name, shape in Architecture.from_config(config).tensors()}
    for name in sorted(wanted.keys() | shapes.keys()):
        if name not in shapes or name not in wanted:
            return False, f"{name} is {'missing' if name in wanted else 'of no such model'}"
        if shapes[name] != wanted[name]:
            return False, f"{name} is {list(shapes[name])}, not {list(wanted[name])}"
    return True, f"as the file's own description says; {len(shapes)} tensors"


def _weights(folder: Path) -> Found:
    """Dense weights of the files against those of the run's last stage."""
    if graph := _graph(folder):
        return graph
    run = _run_of(folder)
    found = _left(*run) if run else None
    if run is None or found is None:
        return None, "no stage beside it to compare with"
    last, quantizer = found, _quantizer(run[1], folder)
    if quantizer is not None:
        error = relative_error(folder, last)
        return True, f"rounded by {quantizer}: {error:.3g} of the norm of those of {last.name}"
    read = exporters.exporter(form_of(folder)).read
    checkpoint = CheckpointReader(last)
    stored = read(folder) if read else _loaded(folder, set(checkpoint))
    modules = {name.removesuffix(".weight") for name in checkpoint if name.endswith(".weight")}
    difference = verify_weights(stored, last, modules, folder.name, used_tensors(last))
    return True, f"those of {last.name}, to {difference:.3g} of the largest in their matrix"


def _left(run: Path, report: Report) -> Path | None:
    """What the last stage left, or the model where there was none; None where it is not here."""
    folders = [run / "stages" / one.id for one in report.variants[1:] if not _is_export(one)]
    if folders:
        return folders[-1] if folders[-1].is_dir() else None
    here = report.base.id.startswith("builtin:") or Path(report.base.id).is_dir()
    return resolve(report.base.id).path if here else None


def _is_export(variant: Variant) -> bool:
    return variant.artifact is not None and variant.artifact.quantizer is not None


def _quantizer(report: Report, folder: Path) -> str | None:
    """The program that rounded a deliverable, where that was not us."""
    path = f"{folder.parent.name}/{folder.name}"
    return next((item.quantizer for item in report.deliverables if item.path == path), None)


def _loaded(folder: Path, names: set[str]) -> Iterator[tuple[str, Tensor]]:
    """Weights as transformers unpacks them."""
    for name, tensor in load_model(folder).state_dict().items():
        if name in names:
            yield name, tensor


def _generation(folder: Path) -> Found:
    try:
        return True, repr(continued(folder))
    except ResourceError as error:  # an engine that is not on this machine says nothing of files
        return None, f"{error.message}: {error.hint}"
