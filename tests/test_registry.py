"""Names of methods: lazy, unique, and helpful on a typo."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest

from compressor.errors import ResourceError, UsageError
from compressor.registry import BUILTIN, FAMILIES, STRATEGIES, Method, Registry, methods, registry
from compressor.stages.base import StageConfig


@pytest.mark.parametrize("name", [method.name for method in BUILTIN])
def test_every_builtin_resolves_to_a_configuration_of_that_name(name: str) -> None:
    found = registry().get(name)
    assert issubclass(found, StageConfig)
    assert found.model_fields["method"].default == name
    assert found.__doc__
    assert found.source


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("quantize.gtpq", "quantize.gptq"),
        ("quantise.rtn", "quantize.rtn"),
        ("gptq", "quantize.gptq"),
        ("GPTQ.quantize", ""),
    ],
)
def test_unknown_method_names_the_nearest_and_all(typo: str, meant: str) -> None:
    with pytest.raises(UsageError) as caught:
        registry().get(typo)
    assert repr(typo) in caught.value.message
    assert (f"did you mean {meant!r}" in caught.value.message) is bool(meant)
    assert "quantize.rtn" in caught.value.hint


def test_a_name_is_registered_once() -> None:
    table = Registry(BUILTIN)
    with pytest.raises(UsageError, match="registered twice"):
        table.register(Method("quantize.rtn", "elsewhere:Other", "a second one"))


def test_a_family_must_be_known() -> None:
    with pytest.raises(UsageError, match="family"):
        Registry([Method("squeeze.hard", "elsewhere:Other", "no such family")])


@pytest.mark.parametrize("target", ["no_such_module:Thing", "compressor.types:NoSuchClass"])
def test_a_broken_target_is_an_environment_error(target: str) -> None:
    table = Registry([Method("quantize.broken", target, "cannot be imported")])
    with pytest.raises(ResourceError, match=r"quantize\.broken"):
        table.get("quantize.broken")


def test_installed_packages_add_methods_but_do_not_replace_ours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    theirs = EntryPoint("quantize.mine", "json:JSONDecoder", "compressor.stages")
    monkeypatch.setattr("compressor.registry.metadata.entry_points", lambda group: [theirs])
    registry.cache_clear()
    try:
        assert registry().get("quantize.mine").__name__ == "JSONDecoder"
        clash = EntryPoint("quantize.rtn", "json:JSONDecoder", "compressor.stages")
        monkeypatch.setattr("compressor.registry.metadata.entry_points", lambda group: [clash])
        registry.cache_clear()
        with pytest.raises(UsageError, match="registered twice"):
            registry()
    finally:
        registry.cache_clear()


def test_methods_come_in_the_order_of_families() -> None:
    ranks = [list(FAMILIES).index(method.family) for method in methods()]
    assert ranks == sorted(ranks)
    assert all(method.summary for method in methods())


def test_describing_imports_nothing_and_getting_no_torch() -> None:
    code = """
import sys
from compressor.registry import methods, registry
assert methods()
assert "compressor.stages.quantize_gptq" not in sys.modules
for method in methods():
    registry().get(method.name)
assert "compressor.stages.quantize_gptq" in sys.modules
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_method_that_ships_has_a_strategy_and_is_listed_under_it() -> None:
    from compressor.console import listing, listing_text

    assert {method.strategy for method in BUILTIN} == set(STRATEGIES)
    rows = listing("methods")
    assert {row.name for row in rows} == {method.name for method in registry()}
    groups = [row.group for row in rows]
    assert [group.partition(":")[0] for group in dict.fromkeys(groups)] == list(STRATEGIES)
    text = listing_text(rows).splitlines()
    compensation = next(i for i, line in enumerate(text) if line.startswith("compensation: "))
    assert text[compensation - 1] == ""
    assert text[compensation + 1].startswith("quantize.gptq ")
