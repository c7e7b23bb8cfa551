"""What ``gblr_plugin.load`` makes of a path alone; files and folders are tested where they are read."""

from __future__ import annotations

import pytest
from torch import nn

from gblr_plugin import ConfigError, load, save


def test_a_network_must_be_given_for_a_file(tmp_path):
    path = tmp_path / "model.safetensors"
    save(nn.Linear(3, 2), path)
    assert load(path, nn.Linear(3, 2)).in_features == 3
    assert load(path, network=lambda: nn.Linear(3, 2)).in_features == 3
    with pytest.raises(ConfigError, match="holds weights, not a network; give the dense network"):
        load(path)
    with pytest.raises(ConfigError, match="no file"):
        load(tmp_path / "other.safetensors")


def test_options_are_for_folders(tmp_path):
    with pytest.raises(ConfigError, match="option 'dtype' is for folders that transformers loads"):
        load(tmp_path / "model.safetensors", nn.Linear(3, 2), dtype=None)
