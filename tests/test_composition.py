"""The table of what may be combined, row by row: what is refused, why, and what works instead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from compressor.errors import CompressorError, ModelError
from compressor.formats.exchange import container_problems
from compressor.model.architecture import Architecture
from compressor.model.edges import edges
from compressor.order import CAUTIONS, FORBIDDEN, forbidden
from compressor.plan import Plan
from compressor.stages.packing import target_of
from compressor.types import WeightScheme
from tests.runs import TINY, load, plan

OLMO: dict[str, Any] = TINY | {"model_type": "olmo2"}
GEMMA: dict[str, Any] = TINY | {"model_type": "gemma2"}
MIXTRAL: dict[str, Any] = TINY | {"model_type": "mixtral", "num_local_experts": 4}
ODD: dict[str, Any] = TINY | {"hidden_size": 322, "num_attention_heads": 7, "head_dim": 46}
NARROW: dict[str, Any] = TINY | {"hidden_size": 336, "num_attention_heads": 4, "head_dim": 84}

GPTQ = "{method: quantize.gptq, bits: 4, group_size: 64}"
RTN = "{method: quantize.rtn, bits: 4, group_size: 64}"
AUTOROUND = "{method: quantize.autoround, bits: 4, group_size: 64}"
ROTATE = "{method: transform.rotate}"
AWQ = "{method: transform.awq, bits: 4, group_size: 64}"
SMOOTH = "{method: transform.smoothquant}"
PRUNE = "{method: prune.obs, ratio: 0.2}"
RECOVER = "{method: recover.distill, tokens: 1024, mix: default, windows: 64, length: 64}"
ALLOCATE = "{method: allocate.bits, target_bpw: 4, counting: linear, group_sizes: [64]}"
SPEND = "{method: quantize.gptq}"
W8A8 = "{method: quantize.gptq, bits: 8, group_size: channel, activations: int8}"
KV = "{method: quantize.kv}"
PACKED = "{format: compressed-tensors}"
DRAFT = "{method: draft.standalone}"


def made(folder: Path, stages: Sequence[str], config: dict[str, Any], export: str = "") -> Plan:
    lines = [f"  - {stage}" for stage in stages]
    head = ["calibration: {samples: 4, length: 64}", "stages:", *lines]
    rounds_inputs = any(word in line for word in ("int8", "activations: fp8") for line in lines)
    export = export or f"{{format: {'compressed-tensors' if rounds_inputs else 'dense'}}}"
    return plan(folder, "\n".join([*head, f"export: [{export}]", ""]), config)


@dataclass(frozen=True)
class Row:
    """What is forbidden, words of the reason, words of the hint, and what is allowed instead."""

    stages: tuple[str, ...]
    reason: str
    works: tuple[str, ...]
    hint: str = ""
    config: dict[str, Any] = field(default_factory=lambda: TINY)
    other: dict[str, Any] | None = None
    export: str = ""


def row(name: str, stages: Sequence[str], reason: str, works: Sequence[str], **more: Any) -> Any:
    return pytest.param(Row(tuple(stages), reason, tuple(works), **more), id=name)


QUERY_HIGH = (
    '{method: quantize.gptq, bits: 4, group_size: 64, overrides: [{pattern: "*.q_proj", bits: 8}]}'
)
ALL_HIGH = "{method: quantize.gptq, bits: 4, group_size: 64, overrides: [{pattern: q, bits: 8}, "
ALL_HIGH += "{pattern: k, bits: 8}, {pattern: v, bits: 8}]}"
VLLM = "{format: compressed-tensors, engines: [vllm]}"
CPU = "{format: compressed-tensors, engines: [vllm-cpu]}"
GGUF = "{format: gguf}"
ORDERED = "order that works"

ROWS = [
    # Two rounders on one tensor; a weight edit after rounding; rounding again.
    row("two-rounders", [GPTQ, RTN], "adds its error to the first",
        ["{method: quantize.gptq, bits: 4, group_size: 64, targets: [attention]}",
         "{method: quantize.rtn, bits: 4, group_size: 64, targets: [mlp]}"],
        hint="round every matrix once"),
    row("prune-after", [GPTQ, PRUNE], "codes no longer fit", [PRUNE, GPTQ], hint=ORDERED),
    row("recover-after", [GPTQ, RECOVER], "off the grid", [RECOVER, GPTQ], hint=ORDERED),
    row("rotate-after", [GPTQ, ROTATE], "rounded already", [ROTATE, GPTQ], hint=ORDERED),
    row("awq-after", [GPTQ, AWQ], "rounded already", [AWQ, GPTQ], hint=ORDERED),
    row("smooth-after", [W8A8, SMOOTH], "rounded already", [SMOOTH, W8A8], hint=ORDERED),
    row("allocate-after", [GPTQ, ALLOCATE], "before they are spent", [ALLOCATE, SPEND],
        hint=ORDERED),
    row("quantized", [GPTQ], "quantized already", [GPTQ], hint="original weights",
        config=TINY | {"quantization_config": {"quant_method": "gptq"}}, other=TINY),
    # Order of what comes before.
    row("recover-prune", [RECOVER, PRUNE], "is lost", [PRUNE, RECOVER], hint=ORDERED),
    row("rotate-prune", [ROTATE, PRUNE], "misjudges", [PRUNE, ROTATE], hint=ORDERED),
    row("awq-recover", [AWQ, RECOVER], "equivalence", [RECOVER, AWQ], hint=ORDERED),
    row("allocate-rotate", [ALLOCATE, ROTATE, SPEND], "the transform changes",
        [ROTATE, ALLOCATE, SPEND], hint=ORDERED),
    row("allocate-prune", [ALLOCATE, PRUNE, SPEND], "pruning removes", [PRUNE, ALLOCATE, SPEND],
        hint=ORDERED),
    row("two-allocations", [ALLOCATE, ALLOCATE, SPEND], "replaces what the first",
        [ALLOCATE, SPEND], hint="keep one"),
    row("allocate-recover", [ALLOCATE, RECOVER, SPEND], "training changes",
        [RECOVER, ALLOCATE, SPEND], hint=ORDERED),
    row("unspent", [ALLOCATE], "no stage after it rounds", [ALLOCATE, SPEND], hint="add quantize"),
    row("draft-first", [DRAFT, GPTQ], "changes its target", [GPTQ, DRAFT], hint=ORDERED),
    # Scaling before rotation cancels.
    row("awq-rotate", [AWQ, ROTATE, GPTQ], "cancels the scales", [ROTATE, AWQ, GPTQ], hint=ORDERED),
    row("smooth-rotate", [SMOOTH, ROTATE, W8A8], "cancels the scales", [ROTATE, SMOOTH, W8A8],
        hint=ORDERED),
    # One scaling; linear edges only; routers follow.
    row("awq-smooth", [AWQ, SMOOTH, GPTQ], "same edges", [AWQ, GPTQ], hint="keep one of the two"),
    row("smooth-awq", [SMOOTH, AWQ, W8A8], "same edges", [SMOOTH, W8A8],
        hint="keep one of the two"),
    row("awq-twice", [AWQ, AWQ, GPTQ], "balanced already", [AWQ, GPTQ], hint="keep one"),
    row("smooth-twice", [SMOOTH, SMOOTH, W8A8], "balanced already", [SMOOTH, W8A8],
        hint="keep one"),
    row("gate-down", ["{method: transform.awq, edges: [gate_down], group_size: 64}", GPTQ],
        "gate_down", ["{method: transform.awq, edges: [up_down], group_size: 64}", GPTQ]),
    row("post-norm-awq", ["{method: transform.awq, edges: [norm_mlp], group_size: 64}", GPTQ],
        "norms behind the halves", ["{method: transform.awq, edges: [up_down], group_size: 64}",
                                    GPTQ], config=OLMO, hint="edges: [value_output, up_down]"),
    # What rotation asks of a model.
    row("post-norm", [ROTATE, GPTQ], "post-norm",
        ["{method: transform.rotate, where: heads}", GPTQ], config=OLMO, hint="where: heads"),
    row("gemma", [ROTATE, GPTQ], "1 + w", ["{method: transform.rotate, where: heads}", GPTQ],
        config=GEMMA, hint="where: heads"),
    row("no-hadamard", [ROTATE], "no Hadamard matrix",
        ["{method: transform.rotate, kind: orthogonal}"], config=ODD, hint="kind: orthogonal"),
    row("online", ["{method: transform.rotate, where: online}"], "where",
        ["{method: transform.rotate, where: all}"]),
    # Grids are searched by the rounder, never by clamping weights before it.
    row("clamp", ["{method: transform.awq, clip: true, group_size: 64}", GPTQ], "clip",
        [AWQ, "{method: quantize.gptq, bits: 4, group_size: 64, grid: mse}"]),
    # Sizes.
    row("group", ["{method: quantize.gptq, group_size: 128}"], "do not divide the 320", [GPTQ],
        hint="group sizes that divide"),
    row("awq-group", ["{method: transform.awq, group_size: 128}", GPTQ], "do not divide the 320",
        [AWQ, GPTQ], hint="channel"),
    row("gguf", ["{method: quantize.gptq, group_size: 16}"], "blocks of GGUF have 32", [GPTQ],
        export=GGUF, hint="dense"),
    row("vllm-cpu", ["{method: quantize.gptq, group_size: channel}"], "multiples of 32", [GPTQ],
        config=NARROW, other=TINY, export=CPU, hint="vllm-cpu"),
    # Fused matrices, act-order, zero-points.
    row("fused", [QUERY_HIGH], "one fused layer", [ALL_HIGH], export=VLLM, hint="vllm"),
    row("act-order", ["{method: quantize.gptq, act_order: dynamic, group_size: 64}"], "act_order",
        ["{method: quantize.gptq, act_order: true, group_size: 64}"]),
    row("float-zero", ["{method: quantize.rtn, symmetry: float, group_size: 64}"], "symmetry",
        ["{method: quantize.rtn, symmetry: asymmetric, group_size: 64}"]),
    # The cache's scales are measured last.
    row("kv-round", [KV, GPTQ], "moves its keys", [GPTQ, KV], hint=ORDERED, export=PACKED),
    row("kv-rotate", [KV, ROTATE], "moves its keys", [ROTATE, GPTQ, KV], export=PACKED),
    row("kv-twice", [GPTQ, KV, KV], "replaces the scales", [GPTQ, KV], hint="keep one",
        export=PACKED),
    row("kv-prune", [KV, PRUNE], "moves its keys", [PRUNE, KV], hint=ORDERED, export=PACKED),
    row("kv-recover", [KV, RECOVER], "moves its keys", [RECOVER, KV], hint=ORDERED,
        export=PACKED),
    row("kv-allocate", [KV, ALLOCATE, SPEND], "moves its keys", [ALLOCATE, SPEND, KV],
        hint=ORDERED, export=PACKED),
    # Two bits.
    row("two-bits", ["{method: quantize.rtn, bits: 2, group_size: 64}"], "ruins a model",
        ["{method: quantize.rtn, bits: 2, group_size: 64, force: true}"], hint="force: true"),
    row("two-bits-awq", [AWQ, "{method: quantize.rtn, bits: 2, group_size: 64}"], "ruins a model",
        [AWQ, "{method: quantize.gptq, bits: 2, group_size: 64}"], hint="quantize.gptq"),
    row("two-bits-allotted",
        ["{method: allocate.bits, target_bpw: 2.5, counting: linear, bits: [2], group_sizes: [64]}",
         RTN], "ruins a model",
        ["{method: allocate.bits, target_bpw: 2.5, counting: linear, bits: [2], group_sizes: [64]}",
         SPEND], hint="quantize.gptq"),
    row("two-bits-embedding",
        ["{method: quantize.gptq, group_size: 64, embeddings: quantize, embedding_bits: 2}"],
        "rounded to nearest", ["{method: quantize.gptq, group_size: 64, embeddings: quantize}"],
        hint="force: true"),
    # Rounded inputs.
    row("inputs", ["{method: quantize.gptq, weights: fp8, activations: int8}"], "do not multiply",
        ["{method: quantize.gptq, weights: fp8, activations: fp8}"], hint="none, fp8"),
    row("experts", [W8A8], "does not round the inputs of experts", [GPTQ], config=MIXTRAL,
        hint="activations: none"),
    row("embedding", ["{method: quantize.gptq, group_size: 64, embeddings: quantize}"],
        "only when every quantized matrix has one scheme",
        ['{method: quantize.gptq, group_size: 64, embeddings: quantize, overrides: '
         "[{pattern: embed, group_size: channel}]}"],
        export="{format: compressed-tensors}", hint="dense"),
]  # fmt: skip


@pytest.mark.parametrize("case", ROWS)
def test_what_is_forbidden_is_refused_and_what_is_said_to_work_works(
    case: Row, tmp_path: Path
) -> None:
    with pytest.raises(CompressorError) as caught:
        made(tmp_path, case.stages, case.config, case.export)
    problems = getattr(caught.value, "problems", None) or [caught.value]
    found = [problem for problem in problems if case.reason in str(problem)]
    assert found, [str(problem) for problem in problems]
    assert case.hint in found[0].hint
    if case.hint == ORDERED:
        assert found[0].hint == f"{ORDERED}: {' → '.join(methods_of(case.works))}"
    works = made(tmp_path, case.works, case.other or case.config, case.export)
    assert [stage.method for stage in works.stages] == methods_of(case.works)


def methods_of(stages: Sequence[str]) -> list[str]:
    return [stage.split("method: ")[1].split(",")[0].strip("}") for stage in stages]


def test_every_rule_of_order_is_walked() -> None:
    pairs = [p for case in ROWS for p in combinations(methods_of(case.values[0].stages), 2)]
    walked = {id(rule) for pair in pairs if (rule := forbidden(*pair))}
    assert [rule for rule in FORBIDDEN if id(rule) not in walked] == []


@pytest.mark.parametrize(
    "stages",
    [
        [ROTATE, GPTQ],
        [ROTATE, AUTOROUND],
        [AWQ, GPTQ],
        [AWQ, AUTOROUND],
        [SMOOTH, W8A8],
        [PRUNE, RECOVER, ROTATE, AWQ, ALLOCATE, SPEND, DRAFT],
    ],
    ids=lambda stages: str(len(stages)),
)
def test_what_is_allowed_is_planned(stages: list[str], tmp_path: Path) -> None:
    plan = made(tmp_path, stages, TINY, "{format: compressed-tensors}")
    assert len(plan.stages) == len(stages)
    assert plan.exports[0].ratio > 1.2


def test_rotation_unties_what_is_tied(tmp_path: Path) -> None:
    rotated, alone = (made(tmp_path, [stage, GPTQ], TINY).stages[0] for stage in (ROTATE, AWQ))
    assert rotated.parameters == alone.parameters + TINY["vocab_size"] * TINY["hidden_size"]
    assert "unties the head" in rotated.remarks[0]


def test_values_are_scaled_alike_for_all_query_heads_of_a_group() -> None:
    for kv_heads, heads in ((TINY["num_attention_heads"], None), (1, (1, 5))):
        config = TINY | {"num_key_value_heads": kv_heads}
        found = edges(Architecture.from_config(config), 0)
        (edge,) = (edge for edge in found if edge.kind == "value_output")
        assert edge.heads == heads


def test_no_edge_passes_a_function_and_routers_follow() -> None:
    for config in (TINY, MIXTRAL):
        architecture = Architecture.from_config(config)
        found = list(edges(architecture, 0))
        roles = {m.name: m.role for m in architecture.matrices}
        assert {roles.get(edge.source) for edge in found} == {None, "v", "up"}
        (norm,) = (edge for edge in found if edge.kind == "norm_mlp")
        assert [m.role for m in norm.followers] == ["router"] * (config is MIXTRAL)


def test_zero_points_of_gptq_files_do_not_underflow() -> None:
    """Version 1 of the format cannot say 0, so that asymmetric grids go into version 2."""
    from compressor.formats.gptq import quantization_config

    for symmetry, version in (("symmetric", "gptq"), ("asymmetric", "gptq_v2")):
        written = quantization_config({"m": WeightScheme(4, 64, symmetry)}, [])  # type: ignore[arg-type]
        assert written["checkpoint_format"] == version


def test_a_model_that_is_quantized_is_not_rounded_again(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="add up the errors"):
        made(tmp_path, [GPTQ], TINY | {"quantization_config": {"bits": 4}})


CAUTIONED = [
    ([ROTATE, "{method: quantize.gptq, weights: nvfp4}"], "94.7 %"),
    (["{method: quantize.gptq, weights: nvfp4}"], None),
    ([ROTATE, "{method: quantize.gptq, weights: mxfp4}"], None),
    ([W8A8], "with the outliers that they have"),
    ([SMOOTH, W8A8], None),
    ([SMOOTH, GPTQ], "transform.awq is made for"),
    ([AWQ, GPTQ], None),
    ([GPTQ], None),
]


@pytest.mark.parametrize(("stages", "words"), CAUTIONED)
def test_what_runs_at_a_risk_is_said_in_the_plan(
    stages: list[str], words: str | None, tmp_path: Path
) -> None:
    remarks = made(tmp_path, stages, TINY).stages[-1].remarks
    cautions = [caution.remark for caution in CAUTIONS if caution.remark in remarks]
    assert len(cautions) == (words is not None)
    assert words is None or words in cautions[0]


def test_every_caution_is_walked() -> None:
    said = [words for _, words in CAUTIONED if words]
    assert len(said) == len(CAUTIONS)
    assert all(any(words in caution.remark for words in said) for caution in CAUTIONS)


def test_targets_know_what_their_container_refuses() -> None:
    """The rules of containers see what the plan sees."""
    architecture = Architecture.from_config(TINY)
    name = architecture.matrices[1].name
    narrow = architecture.with_scheme([name], WeightScheme(4, 16))
    targets = [target_of(matrix, narrow) for matrix in narrow.matrices]
    assert "groups of 16" in container_problems(targets, "gguf", "llama")[0]
    assert not container_problems(targets, "auto", "llama")


FORETOLD = [
    (["{method: transform.awq}", GPTQ], (4, 64, "symmetric"), ""),
    (["{method: transform.awq}", W8A8], (8, "channel", "symmetric"), ""),
    (["{method: transform.awq}", "{method: quantize.gptq, weights: nvfp4}"],
     (4, 16, "symmetric"), ""),
    (["{method: transform.awq, bits: 2, group_size: 64}", GPTQ], (2, 64, "symmetric"), "bits: 2"),
    (["{method: transform.awq, bits: 4, group_size: 64}", ALLOCATE, SPEND],
     (4, 64, "symmetric"), ""),
    (["{method: transform.rotate, learn: 4, bits: 3}", GPTQ], (3, 64), "bits: 3"),
    (["{method: transform.rotate}", GPTQ], (4, 128), ""),
    ([ALLOCATE, SPEND], ("gptq", 0.1), ""),
    ([ALLOCATE, "{method: quantize.gptq, damping: 0.02}"], ("gptq", 0.02), ""),
    ([ALLOCATE, "{method: quantize.rtn}"], ("rtn", 0.1), ""),
    ([ALLOCATE.replace("counting", "rounder: rtn, counting"), SPEND], ("rtn", 0.1), "rounder: rtn"),
]  # fmt: skip


@pytest.mark.parametrize(("stages", "options", "words"), FORETOLD)
def test_what_is_chosen_for_a_rounding_is_chosen_for_the_one_that_follows(
    stages: list[str], options: tuple[Any, ...], words: str, tmp_path: Path
) -> None:
    """Options that are left out follow the rounder; others are remarked upon."""
    made_of = load(
        tmp_path, "\n".join(["calibration: {}", "stages:", *(f"  - {s}" for s in stages)])
    )
    names = (
        ("rounder", "damping") if "allocate" in stages[0] else ("bits", "group_size", "symmetry")
    )
    assert tuple(getattr(made_of.stages[0], name) for name in names[: len(options)]) == options
    remarks = made(tmp_path, stages, TINY, PACKED).stages[0].remarks
    said = [remark for remark in remarks if "is not what follows" in remark]
    assert len(said) == bool(words)
    assert all(f"`{words}`" in remark for remark in said)
