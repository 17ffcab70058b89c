"""Edges: what may be scaled in which family, and why not."""

from __future__ import annotations

import pytest
import transformers

from compressor.model.architecture import Architecture
from compressor.model.edges import _NORMS_BEFORE, EDGE_KINDS, Rows, edges, missing
from compressor.model.families import FAMILIES
from tests.model.conftest import SIZES, VARIANTS

LACKING = {
    "olmo2": {"norm_attention", "norm_mlp"},
    "opt-postnorm": {"norm_attention", "norm_mlp"},
    "opt-plain": {"norm_attention", "norm_mlp"},
    "gpt_neox": {"up_down"},
    "gpt_neox-sequential": {"up_down"},
    "gpt2": {"up_down"},
    "gpt2-untied": {"up_down"},
}


def architecture(variant: str, **changes: object) -> Architecture:
    model_type, options = VARIANTS[variant]
    config = transformers.AutoConfig.for_model(model_type, **{**SIZES, **options, **changes})
    return Architecture.from_config(config.to_dict())


def test_every_family_is_in_the_table() -> None:
    assert set(_NORMS_BEFORE) == set(FAMILIES)


@pytest.mark.parametrize("variant", VARIANTS)
def test_edges_are_complete_and_name_tensors_that_exist(variant: str) -> None:
    model = architecture(variant)
    tensors = {name for name, _ in model.tensors()}
    lacking = {kind for kind in EDGE_KINDS if missing(model, kind)}
    assert lacking == LACKING.get(variant, set())
    for block in range(model.layers):
        found = list(edges(model, block))
        assert {edge.kind for edge in found} == set(EDGE_KINDS) - lacking
        readers = [reader.name for edge in found for reader in edge.readers]
        assert len(readers) == len(set(readers))
        for edge in found:
            assert f"{edge.source}.weight" in tensors
            width = edge.readers[0].shape[1]
            share = edge.heads[1] if edge.heads else 1
            if edge.rows is not None:
                assert len(edge.rows.indices()) * share == width
                assert max(edge.rows.indices()) < model.matrix(edge.source).shape[0]
            assert all(matrix.shape[1] == width for matrix in (*edge.readers, *edge.followers))


def test_all_readers_of_a_norm_are_scaled() -> None:
    (edge,) = (e for e in edges(architecture("mixtral"), 0) if e.kind == "norm_mlp")
    assert [matrix.role for matrix in edge.followers] == ["router"]
    assert len(edge.readers) == 2 * 3
    assert {matrix.role for matrix in edge.readers} == {"gate", "up"}
    assert edge.parent == "mlp"  # block_sparse_moe on disk


def test_a_gate_is_never_a_source() -> None:
    for variant in VARIANTS:
        model = architecture(variant)
        for edge in edges(model, 0):
            if edge.rows is not None and edge.kind == "up_down":
                assert model.matrix(edge.source).role in {"up", "gate_up", "fc_in"}


def test_rows_of_fused_matrices() -> None:
    def rows(variant: str, kind: str) -> Rows | None:
        return next(e.rows for e in edges(architecture(variant), 0) if e.kind == kind)

    assert rows("phi3", "value_output") == Rows(32 + 16, 16)
    assert rows("phi3", "up_down") == Rows(48, 48)
    assert rows("gpt2", "value_output") == Rows(64, 32)
    neox = rows("gpt_neox", "value_output")
    assert neox is not None
    assert neox.indices()[:9] == [16, 17, 18, 19, 20, 21, 22, 23, 40]


def test_scales_pass_through_relu_only() -> None:
    assert not missing(architecture("opt"), "up_down")
    assert "gelu" in missing(architecture("opt", activation_function="gelu"), "up_down")
    assert not missing(architecture("gpt_neox", hidden_act="relu"), "up_down")


@pytest.mark.parametrize(
    ("variant", "words"),
    [("olmo2", "behind"), ("opt-postnorm", "behind"), ("opt-plain", "no weight")],
)
def test_reasons(variant: str, words: str) -> None:
    assert words in missing(architecture(variant), "norm_attention")
