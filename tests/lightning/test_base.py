from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import pytorch_lightning

from gblr_plugin.lightning import base


def run_base():
    spec = importlib.util.spec_from_file_location("gblr_plugin.lightning.fresh_base", base.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def twin(monkeypatch):
    """Stands in for the `lightning` package, whose classes are copies of pytorch_lightning's."""
    package, inner = ModuleType("lightning"), ModuleType("lightning.pytorch")
    package.__spec__, package.pytorch = ModuleSpec("lightning", None), inner
    inner.Callback = type("Callback", (), {})
    inner.LightningModule = inner.Trainer = object
    monkeypatch.setitem(sys.modules, "lightning", package)
    monkeypatch.setitem(sys.modules, "lightning.pytorch", inner)
    return inner


def test_a_callback_of_both_packages_where_both_are_installed(twin):
    assert issubclass(run_base().Callback, pytorch_lightning.Callback)
    assert issubclass(run_base().Callback, twin.Callback)


def test_a_callback_of_the_one_that_is_installed(twin, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pytorch_lightning" else found(name))
    assert run_base().Callback is twin.Callback


def test_neither_is_an_error(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install pytorch-lightning"):
        run_base()
