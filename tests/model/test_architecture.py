from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open

from compressor.errors import ModelError
from compressor.model.architecture import Architecture
from compressor.model.families import FAMILIES
from compressor.model.matrices import Matrix
from compressor.types import WeightScheme
from tests.model.conftest import SIZES, VARIANTS, config_of

W4 = WeightScheme(4, 16)


def architecture(model_type: str = "llama", **changes: object) -> Architecture:
    return Architecture.from_config({"model_type": model_type, **SIZES, **changes})


def shapes_on_disk(folder: Path) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_table_equals_what_transformers_writes(
    variant: str, checkpoints: Callable[..., Path]
) -> None:
    folder = checkpoints(variant)
    on_disk = shapes_on_disk(folder)
    table = Architecture.from_config(config_of(folder))
    assert dict(table.tensors()) == on_disk
    assert len(list(table.tensors())) == len(on_disk)
    assert table.parameters == sum(torch.Size(shape).numel() for shape in on_disk.values())
    assert table.bytes == 4 * table.parameters


def test_every_family_is_tested() -> None:
    assert {model_type for model_type, _ in VARIANTS.values()} == set(FAMILIES)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_defaults_equal_those_of_transformers(model_type: str) -> None:
    table = Architecture.from_config({"model_type": model_type})
    config = transformers.AutoConfig.for_model(model_type)
    head_dim = getattr(config, "head_dim", None)
    assert table.layers == config.num_hidden_layers
    assert table.hidden == config.hidden_size
    assert table.heads == config.num_attention_heads
    assert table.kv_heads == (getattr(config, "num_key_value_heads", None) or table.heads)
    assert table.head_dim == (head_dim or config.hidden_size // config.num_attention_heads)
    assert table.vocab == config.vocab_size
    assert table.max_positions == config.max_position_embeddings
    assert table.tied == config.tie_word_embeddings
    assert table.sliding_window == getattr(config, "sliding_window", None)
    assert table.logits_softcap == getattr(config, "final_logit_softcapping", None)


@pytest.mark.parametrize("model_type", [name for name, row in FAMILIES.items() if not row.experts])
def test_sizes_of_default_models_are_exact(model_type: str) -> None:
    config = transformers.AutoConfig.for_model(model_type, num_hidden_layers=1)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    table = Architecture.from_config({"model_type": model_type}).with_config(num_hidden_layers=1)
    assert table.parameters == model.num_parameters()


def test_matrices_that_see_the_same_input_share_a_group() -> None:
    groups = [[matrix.role for matrix in members] for members in architecture().groups(1).values()]
    assert groups == [["q", "k", "v"], ["o"], ["gate", "up"], ["down"]]


def test_each_expert_has_groups_of_its_own() -> None:
    table = architecture("mixtral", num_local_experts=2)
    groups = {
        group: [(matrix.role, matrix.expert) for matrix in members]
        for group, members in table.groups(0).items()
        if "experts" in group
    }
    assert groups == {
        "model.layers.0.experts.0.in": [("gate", 0), ("up", 0)],
        "model.layers.0.experts.0.out": [("down", 0)],
        "model.layers.0.experts.1.in": [("gate", 1), ("up", 1)],
        "model.layers.0.experts.1.out": [("down", 1)],
    }
    assert table.experts_per_token == 2


def test_kv_cache_of_llama_3_8b() -> None:
    table = Architecture.from_config(
        {
            "model_type": "llama",
            "hidden_size": 4096,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_hidden_layers": 32,
            "intermediate_size": 14336,
            "vocab_size": 128256,
            "torch_dtype": "bfloat16",
        }
    )
    assert table.parameters == 8_030_261_248
    assert table.bytes == 16_060_522_496
    assert table.kv_bytes_per_token == 131_072


@pytest.mark.parametrize(
    ("model_type", "prenorm"), [("llama", True), ("gemma2", False), ("olmo2", False), ("opt", True)]
)
def test_prenorm(model_type: str, prenorm: bool) -> None:
    assert architecture(model_type).prenorm is prenorm


def test_post_norm_opt_is_not_prenorm() -> None:
    assert not architecture("opt", do_layer_norm_before=False).prenorm


def test_logits_transform() -> None:
    assert architecture("gemma2").logits_softcap == 30.0
    assert architecture("granite", logits_scaling=8).logits_divisor == 8.0
    assert architecture().logits_softcap is None


def test_gpt2_is_stored_transposed() -> None:
    table = architecture("gpt2", n_embd=32)
    matrix = table.matrix("transformer.h.0.mlp.c_fc")
    assert matrix.shape == (128, 32)
    assert matrix.disk_shape == (32, 128)


class TestSelect:
    def names(self, *patterns: str, **changes: object) -> list[str]:
        return [matrix.name for matrix in architecture(**changes).select(patterns).matrices]

    def test_role(self) -> None:
        expected = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
        assert self.names("q") == expected

    def test_linear_leaves_out_routers_embedding_and_head(self) -> None:
        chosen = architecture("qwen3_moe", num_experts=2).select(["linear"]).matrices
        assert {matrix.role for matrix in chosen} == {"q", "k", "v", "o", "gate", "up", "down"}

    def test_all_adds_embedding_and_head(self) -> None:
        assert len(self.names("all")) == len(self.names("linear")) + 2

    def test_glob_and_regular_expression(self) -> None:
        assert self.names("*.0.mlp.*") == self.names(r"re:model\.layers\.0\.mlp\.")

    def test_role_sets(self) -> None:
        assert sorted(self.names("attention", "mlp")) == sorted(self.names("linear"))

    def test_order_is_that_of_the_model(self) -> None:
        assert self.names("down", "q")[0].endswith("0.self_attn.q_proj")

    @pytest.mark.parametrize(
        ("pattern", "suggestion"),
        [
            ("dwon", "did you mean 'down'?"),
            ("model.layers.0.mlp.down", "did you mean 'model.layers.0.mlp.down_proj'?"),
            ("re:(", "not a regular expression: missing ), unterminated subpattern at position 0"),
            ("head", "the head is tied to the embedding and has no matrix of its own; untie it"),
            ("zzzzz", "roles of this model: all, attention, down, embed"),
        ],
    )
    def test_nothing_matched(self, pattern: str, suggestion: str) -> None:
        selection = architecture(tie_word_embeddings=True).select([pattern, "q"])
        assert [item.pattern for item in selection.unmatched] == [pattern]
        assert selection.unmatched[0].suggestion.startswith(suggestion)
        assert len(selection.matrices) == 2


def test_with_scheme_touches_only_what_is_named() -> None:
    table = architecture().with_scheme(["model.layers.0.mlp.up_proj"], W4)
    assert [m.name for m in table.matrices if m.scheme] == ["model.layers.0.mlp.up_proj"]
    with pytest.raises(ModelError, match=r"no matrix 'model\.layers\.0\.mlp\.up'"):
        table.with_scheme(["model.layers.0.mlp.up"], W4)


def test_with_config_keeps_grids_and_changes_shapes() -> None:
    table = architecture().with_scheme(["model.layers.0.mlp.up_proj"], W4)
    changed = table.with_config(intermediate_size=32, num_hidden_layers=1)
    up = changed.matrix("model.layers.0.mlp.up_proj")
    assert up == Matrix(up.name, (32, 32), "up", 0, "model.layers.0.mlp.in", scheme=W4, rounding=1)
    assert changed.layers == 1
    assert table.matrix(up.name).shape == (48, 32)


def test_with_config_knows_the_names_of_gpt2() -> None:
    assert architecture("gpt2", **{"n_layer": 3}).with_config(num_hidden_layers=1).layers == 1


def test_untying_adds_the_head() -> None:
    tied = architecture(tie_word_embeddings=True)
    untied = tied.with_config(tie_word_embeddings=False)
    assert untied.parameters - tied.parameters == 96 * 32


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"model_type": "mamba"}, "unknown model family 'mamba'"),
        ({}, "no model_type"),
        ({"model_type": "whisper", "is_encoder_decoder": True}, "'whisper' has an encoder"),
        ({"model_type": "gemma3", "text_config": {}}, "'gemma3' has parts besides"),
        ({"model_type": "llama", "hidden_size": "big"}, "'hidden_size' must be a positive"),
        ({"model_type": "llama", "dtype": "int4"}, "dtype 'int4'"),
    ],
)
def test_what_cannot_be_described_is_refused(config: dict[str, object], sentence: str) -> None:
    with pytest.raises(ModelError, match=sentence):
        Architecture.from_config(config)


def test_hint_lists_the_families_that_work() -> None:
    with pytest.raises(ModelError) as caught:
        Architecture.from_config({"model_type": "mamba"})
    assert all(name in caught.value.hint for name in FAMILIES)


def test_no_torch_is_imported() -> None:
    code = (
        "import sys, compressor.model.load, compressor.model.architecture as a;"
        "a.Architecture.from_config({'model_type': 'llama'});"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
