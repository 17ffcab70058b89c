"""The same job from Python.

from compressor import Pipeline
from compressor.calibration import CalibrationConfig
from compressor.stages.quantize_gptq import QuantizeGptq

pipeline = Pipeline(
    stages=[QuantizeGptq(bits=4, group_size=64)],
    calibration=CalibrationConfig(samples=16, length=256),
)
print(pipeline.plan("builtin:tiny").seconds)
outcome = pipeline.run("builtin:tiny", "out/python")
print(outcome.report.verdict)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.efforts import DEFAULT, EffortName
from compressor.model.files import read_config
from compressor.model.load import resolve
from compressor.plan import Plan, make_plan
from compressor.recipe import load_recipe, make_recipe
from compressor.report.schema import Report
from compressor.stages.base import StageConfig

if TYPE_CHECKING:
    from compressor.engine import RunOutcome
    from compressor.progress import Observer


class Pipeline:
    """A recipe that can be planned and run.

    Args:
        stages: configured stages in order, or mappings such as
            `{"method": "quantize.gptq", "bits": 3}`.
        sections: the other sections of a recipe by name (`calibration`, `evaluate`, `gates`,
            `export`, `seed`), as objects or mappings.

    Raises:
        RecipeError: a section breaks a rule; carries every problem found.
    """

    def __init__(self, stages: Sequence[StageConfig | Mapping[str, Any]], **sections: Any) -> None:
        self.recipe = make_recipe(stages, **sections)
        self._outcome: RunOutcome | None = None

    @classmethod
    def from_recipe(
        cls,
        path_or_name: str | Path,
        overrides: Sequence[str] = (),
        *,
        effort: EffortName = DEFAULT,
    ) -> Pipeline:
        """From a recipe's file or shipped name.

        Args:
            path_or_name: such as `recipes/quickstart.yaml` or `quickstart`.
            overrides: `dotted.path=value`, as given to `--set`.
            effort: `light`, `default` or `best`, as given to `--effort`.

        Raises:
            RecipeError: carries every problem found.
        """
        pipeline = cls.__new__(cls)
        pipeline.recipe = load_recipe(path_or_name, overrides, effort=effort)
        pipeline._outcome = None
        return pipeline

    def plan(self, model: str) -> Plan:
        """Check the recipe against a model and price it; reads `config.json` only.

        Raises:
            PlanError: the recipe, or its chain on this model, cannot work.
        """
        source = resolve(model, config_only=True)
        return make_plan(self.recipe, read_config(source.path), model)

    def run(self, model: str, out: str | Path, *, observer: Observer | None = None) -> RunOutcome:
        """Run, or resume what `out` holds; see `compressor.engine.run_recipe`."""
        from compressor.engine import run_recipe

        command = f"Pipeline.run({model!r}, {str(out)!r})"
        self._outcome = run_recipe(
            self.recipe, model, Path(out), observer=observer, command=command
        )
        return self._outcome

    @property
    def report(self) -> Report:
        """Of the last run.

        Raises:
            AttributeError: nothing has been run yet.
        """
        if self._outcome is None:
            raise AttributeError("no report yet: call run() first")
        return self._outcome.report
