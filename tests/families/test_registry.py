from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata

import pytest
import torch
from torch import nn

import gblr_plugin as gblr
from gblr_plugin import families
from gblr_plugin.errors import ConfigError
from gblr_plugin.families import registry
from gblr_plugin.families.low_rank import LowRank

OWN = (
    "gblr",
    "low_rank",
    "alds",
    "monarch",
    "block_low_rank",
    "block_sparse",
    "block_diagonal",
    "blast",
    "tucker2",
)


class Thin(LowRank):
    name = "thin"


@pytest.fixture(autouse=True)
def _as_installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(registry, "_REGISTERED", {})
    yield
    registry._installed.cache_clear()


def install(monkeypatch: pytest.MonkeyPatch, **points: str) -> None:
    """As if a package were installed that brings these families."""
    found = [metadata.EntryPoint(name, value, registry.GROUP) for name, value in points.items()]
    monkeypatch.setattr(metadata, "entry_points", lambda group: metadata.EntryPoints(found).select(group=group))
    registry._installed.cache_clear()


def test_names_and_get() -> None:
    assert families.names() == OWN
    for name in families.names():
        assert families.get(name).name == name
    with pytest.raises(ConfigError, match=r"no structure named 'monarc'; allowed are gblr, .*did you mean 'monarch'"):
        families.get("monarc")


def test_a_registered_family_is_chosen_by_name() -> None:
    families.register_family("thin", Thin)
    families.register_family("thin", Thin)  # again
    assert families.names() == (*OWN, "thin")
    model = nn.Sequential(nn.Linear(32, 24))
    gblr.prepare(model, family="thin", budget=0.5)
    assert gblr.report(model, torch.randn(2, 32)).layers[0].structure == "thin"


def test_what_cannot_be_registered() -> None:
    with pytest.raises(ConfigError, match="family 'thin': need a class derived from FamilyMatrix, got <class 'int'>"):
        families.register_family("thin", int)  # type: ignore[arg-type]  # what is refused
    with pytest.raises(ConfigError, match="family 'wide': its class calls itself 'thin'; both names must be the same"):
        families.register_family("wide", Thin)
    families.register_family("thin", Thin)
    for name, other in (("thin", type("Thin", (LowRank,), {"name": "thin"})), ("low_rank", LowRank)):
        with pytest.raises(ConfigError, match=f"family '{name}' is registered already"):
            families.register_family(name, other)


def test_an_installed_package_brings_a_family(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, thin=f"{__name__}:Thin", monarch="nowhere:Monarch")
    assert families.names() == (*OWN, "thin")
    assert families.get("thin") is Thin
    assert families.get("monarch").__module__.startswith("gblr_plugin.")  # ours, whatever others bring
    layers = gblr.prepare(nn.Sequential(nn.Linear(32, 24)), family="thin", budget=0.5)
    assert isinstance(layers["0"].matrix(), Thin)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("gblr_plugin.nowhere:Thin", "family 'thin': its entry point .* cannot be imported: No module named"),
        ("math:Thin", "family 'thin': its entry point 'math:Thin' cannot be imported"),
        ("math:pi", "family 'thin': need a class derived from FamilyMatrix"),
        ("gblr_plugin.families.low_rank:LowRank", "family 'thin': its class calls itself 'low_rank'"),
    ],
)
def test_what_an_installed_package_brings_is_checked(monkeypatch: pytest.MonkeyPatch, value: str, said: str) -> None:
    install(monkeypatch, thin=value)
    with pytest.raises(ConfigError, match=said):
        families.get("thin")
