"""ONNX and OpenVINO: the last variant as a graph of its computation, made by optimum.

optimum's exporters pin a transformers older than ours, so that they run in an environment of their
own (`tools/engines/install.py`). They get the dense checkpoint, whose weights are already rounded,
and write them as fp32: a graph is for programs that read nothing else, and is not smaller. What the
engine computes from it is compared with memory before it counts.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compressor.errors import ModelError, UsageError
from compressor.formats.atomic import atomic_write_json
from compressor.formats.exporters import Source
from compressor.formats.files import copy_parent_files, link_checkpoint
from compressor.formats.headers import read_json
from compressor.programs import PROGRAMS, EngineFailed, run

_OPTIMUM = "optimum.commands.optimum_cli"


def write(source: Source, out: Path, engine: str, form: str, options: Sequence[str]) -> None:
    """Let optimum write the graph of a checkpoint.

    Args:
        source: its dense checkpoint is what counts; codes are not packed.
        out: a folder that does not exist yet.
        engine: of `PROGRAMS`, in whose environment optimum is.
        form: as optimum's command line names it.
        options: of that command.

    Raises:
        ResourceError: the environment is not there.
        ModelError: optimum cannot export this model.
    """
    python = PROGRAMS[engine].find()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".graph-", dir=out.parent) as work:
        model, made = Path(work) / "model", Path(work) / "made"
        link_checkpoint(source.checkpoint, model)
        config = older_config(read_json(model / "config.json"))
        (model / "config.json").unlink()  # a link: the checkpoint's own stays as it is
        atomic_write_json(model / "config.json", config)
        task = ("--task", "text-generation-with-past", *options)
        try:
            run([python, "-m", _OPTIMUM, "export", form, "--model", model, *task, made])
        except EngineFailed as error:
            raise ModelError(f"optimum makes no graph of this model: {error.message}") from None
        copy_parent_files(source.checkpoint, made)
        shutil.move(made, out)


def older_config(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration as transformers 4 reads it: rotary settings have names of their own.

    transformers 5 has them together under `rope_parameters`, which 4 ignores, and would then take
    its defaults in silence.
    """
    rope = dict(config.get("rope_parameters") or {})
    if not rope:
        return config
    theta = rope.pop("rope_theta", None)
    plain = rope.get("rope_type", "default") == "default"
    older = {"rope_scaling": None if plain else rope}
    return {**config, **older} | ({} if theta is None else {"rope_theta": theta})


def check(model: Path) -> None:
    """Refuse what `older_config` cannot say.

    Raises:
        UsageError: the model's layers differ in their rotary settings.
    """
    rope = json.loads((model / "config.json").read_text(encoding="utf-8")).get("rope_parameters")
    if any(isinstance(value, dict) for value in (rope or {}).values()):
        raise UsageError(
            f"the layers of {model} differ in their rotary settings, which optimum's transformers "
            "names otherwise",
            "export `dense`, and convert that with a tool that knows the family",
        )
