"""Method name -> configuration class, imported only when asked for.

The table below is the whole list of what a recipe may name. A package of somebody else's adds
methods through the entry point group `compressor.stages`, one entry per method:

    [project.entry-points."compressor.stages"]
    "quantize.mine" = "their_package.stage:MineConfig"
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module, metadata
from typing import TYPE_CHECKING

from compressor.errors import ResourceError, UsageError

if TYPE_CHECKING:
    from compressor.stages.base import StageConfig

ENTRY_POINTS = "compressor.stages"

FAMILIES = {
    "prune": "remove weights, heads, channels or layers",
    "recover": "train what pruning left until it is accurate again",
    "transform": "rewrite the weights without changing the function, so that they round better",
    "allocate": "choose the bits of every matrix under a budget",
    "quantize": "round weights to integer codes",
    "draft": "make a small model that speculates for the compressed one",
}
"""What each family does, in the order in which a recipe applies them."""

STRATEGIES = {
    "structure": "take whole heads, channels or layers away",
    "recovery": "train what is left",
    "rotation": "spread outliers over all channels; same function",
    "salience": "scale what matters up before rounding; same function",
    "allocation": "spend bits where they matter",
    "baseline": "round every weight, or group of weights, by itself",
    "compensation": "let the weights still open make up for each error",
    "optimization": "learn which way to round",
    "cache": "round what attention remembers",
    "drafting": "guess ahead with a small model",
}
"""What methods of post-training compression have in common, as surveys sort them.

Rotation, salience, compensation and optimization are the strategies of "Benchmarking Post-Training
Quantization in LLMs", 2025, which finds compensation behind one of the others the best chain.
"""


@dataclass(frozen=True)
class Method:
    """One algorithm that a stage can name.

    Attributes:
        name: `family.name`, as written in a recipe.
        target: `module:Class` of its configuration; imported by `Registry.get`.
        summary: one line for `compress ls methods`.
        strategy: one of `STRATEGIES`; empty for methods of other packages.
    """

    name: str
    target: str
    summary: str
    strategy: str = ""

    @property
    def family(self) -> str:
        """The part before the first dot: what kind of change it makes."""
        return self.name.partition(".")[0]


BUILTIN = (
    Method(
        "prune.depth",
        "compressor.stages.prune_depth:PruneDepth",
        "remove whole decoder blocks, those whose absence moves the outputs least",
        "structure",
    ),
    Method(
        "prune.width",
        "compressor.stages.prune_width:PruneWidth",
        "remove heads and channels by a score (wanda, flap, magnitude, taylor); the baselines",
        "structure",
    ),
    Method(
        "prune.obs",
        "compressor.stages.prune_obs:PruneObs",
        "remove heads and channels and refit the others by least squares; no training",
        "structure",
    ),
    Method(
        "prune.experts",
        "compressor.stages.prune_experts:PruneExperts",
        "remove whole experts of a mixture, those that the text asks least of",
        "structure",
    ),
    Method(
        "prune.hidden",
        "compressor.stages.prune_hidden:PruneHidden",
        "remove channels of the residual stream everywhere, and set its norms right",
        "structure",
    ),
    Method(
        "prune.search",
        "compressor.stages.prune_search:PruneSearch",
        "try mixes of fewer blocks, heads and channels, and keep the best on held-out text",
        "structure",
    ),
    Method(
        "prune.dro",
        "compressor.stages.prune_dro:PruneDro",
        "learn masks of blocks, heads and channels while training on what the worst domain needs",
        "structure",
    ),
    Method(
        "recover.distill",
        "compressor.stages.recover_distill:RecoverDistill",
        "train the smaller model to predict what the original predicts",
        "recovery",
    ),
    Method(
        "transform.rotate",
        "compressor.stages.transform_rotate:TransformRotate",
        "rotate channels so that outliers spread out and weights round better; same function",
        "rotation",
    ),
    Method(
        "transform.awq",
        "compressor.stages.transform_awq:TransformAwq",
        "scale inputs that matter up before rounding; folded, so the function stays the same",
        "salience",
    ),
    Method(
        "transform.smoothquant",
        "compressor.stages.transform_smoothquant:TransformSmoothquant",
        "move outliers of activations into the weights, for 8-bit activations",
        "salience",
    ),
    Method(
        "allocate.bits",
        "compressor.stages.allocate_bits:AllocateBits",
        "mixed precision: the bits of every matrix that cost the model least within a budget",
        "allocation",
    ),
    Method(
        "quantize.rtn",
        "compressor.stages.quantize_rtn:QuantizeRtn",
        "round to nearest on a searched grid; no calibration text, seconds",
        "baseline",
    ),
    Method(
        "quantize.hqq",
        "compressor.stages.quantize_hqq:QuantizeHqq",
        "fit scales and zero-points to most weights, let outliers miss; no calibration text",
        "baseline",
    ),
    Method(
        "quantize.bnb",
        "compressor.stages.quantize_bnb:QuantizeBnb",
        "NF4 and LLM.int8 as bitsandbytes rounds and stores them; no calibration text",
        "baseline",
    ),
    Method(
        "quantize.gptq",
        "compressor.stages.quantize_gptq:QuantizeGptq",
        "round column by column, each error compensated in the columns that follow",
        "compensation",
    ),
    Method(
        "quantize.autoround",
        "compressor.stages.quantize_autoround:QuantizeAutoround",
        "learn which way to round every weight, block by block; slow, best at 2 bits",
        "optimization",
    ),
    Method(
        "quantize.kv",
        "compressor.stages.quantize_kv:QuantizeKv",
        "keep keys and values in 8 bits: half the memory of long contexts; changes no weight",
        "cache",
    ),
    Method(
        "draft.early_exit",
        "compressor.stages.draft_early_exit:DraftEarlyExit",
        "the model drafts for itself with its first blocks; no training and no second model",
        "drafting",
    ),
    Method(
        "draft.eagle3",
        "compressor.stages.draft_eagle3:DraftEagle3",
        "one layer on the target's hidden states, trimmed vocabulary; for SGLang, vLLM, llama.cpp",
        "drafting",
    ),
    Method(
        "draft.standalone",
        "compressor.stages.draft_standalone:DraftStandalone",
        "a few blocks of the target, distilled; a plain model that any engine takes as a draft",
        "drafting",
    ),
)


class Registry:
    """A table of methods that suggests on a typo and refuses two methods of one name."""

    def __init__(self, methods: Iterable[Method] = ()) -> None:
        self._methods: dict[str, Method] = {}
        for method in methods:
            self.register(method)

    def __iter__(self) -> Iterator[Method]:
        return iter(self._methods.values())

    def __contains__(self, name: object) -> bool:
        return name in self._methods

    def register(self, method: Method) -> None:
        """Add a method.

        Raises:
            UsageError: the name is taken, or its family is not one that the plan can order.
        """
        if taken := self._methods.get(method.name):
            raise UsageError(
                f"method {method.name!r} is registered twice: {taken.target} and {method.target}",
                "rename one of them, or uninstall the package that brings the second",
            )
        if method.family not in FAMILIES:
            raise UsageError(
                f"method {method.name!r} ({method.target}) has no known family",
                f"name it family.name with a family of: {', '.join(FAMILIES)}",
            )
        self._methods[method.name] = method

    def suggest(self, name: str) -> str:
        """The nearest known name, or an empty string when nothing is near.

        A name without its family, such as `gptq`, counts as near.
        """
        bare = {known.partition(".")[2]: known for known in self._methods}
        near = difflib.get_close_matches(name, [*self._methods, *bare], n=1, cutoff=0.6)
        return bare.get(near[0], near[0]) if near else ""

    def describe(self, name: str) -> Method:
        """The entry of a method, without importing it.

        Raises:
            UsageError: no such method; names the nearest and lists all.
        """
        if name in self._methods:
            return self._methods[name]
        near = self.suggest(name)
        guess = f"; did you mean {near!r}?" if near else ""
        raise UsageError(f"unknown method {name!r}{guess}", f"methods: {', '.join(self._methods)}")

    def get(self, name: str) -> type[StageConfig]:
        """The configuration class of a method, imported now.

        Raises:
            UsageError: no such method.
            ResourceError: its module or class cannot be imported.
        """
        method = self.describe(name)
        module, _, attribute = method.target.partition(":")
        try:
            found: type[StageConfig] = getattr(import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise ResourceError(
                f"method {name!r} cannot be loaded from {method.target}: {error}",
                "install or repair the package that brings it",
            ) from error
        return found


def _entry_points() -> Iterator[Method]:
    for point in metadata.entry_points(group=ENTRY_POINTS):
        package = point.dist.name if point.dist else "an unknown package"
        yield Method(point.name, point.value, f"from {package}")


@cache
def registry() -> Registry:
    """The methods that ship, followed by those of installed packages.

    Raises:
        UsageError: an installed package claims a name that is taken.
    """
    return Registry([*BUILTIN, *_entry_points()])


def methods() -> tuple[Method, ...]:
    """Every method, in the order of the families."""
    order = list(FAMILIES)
    return tuple(sorted(registry(), key=lambda method: order.index(method.family)))
