import json

import pytest
import torch

from gblr_plugin.compression import forecast as forecasts
from gblr_plugin.compression.forecast import forecast
from gblr_plugin.huggingface.folders import empty_network
from gblr_plugin.surgery.selection import select_layers

pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def _a_fixed_machine(monkeypatch):
    monkeypatch.setattr(forecasts, "_products_per_second", lambda: 1e9)


@pytest.fixture
def masked(dense_folder):
    network = empty_network(dense_folder("masked"), "test")
    return network, select_layers(network)


def tokens(count):
    return [{"input_ids": torch.zeros(count, 16, dtype=torch.long)}] * 4


def test_layers_and_what_stays_dense(masked):
    network, selection = masked
    found = forecast(network, selection, None)
    assert [row.name for row in found.layers] == list(selection.layers)
    assert found.layers[0].shape == (32, 32)
    reasons = {row.name: row.reason for row in found.skipped}
    assert "tied" in reasons["cls.predictions.decoder"]
    shown = str(found)
    assert "without calibration" in shown
    assert f"{len(selection.layers)} layers" in shown
    assert json.loads(json.dumps(found.to_dict()))["seconds"] == found.seconds


def test_time_and_memory_grow_with_what_is_asked_for(masked):
    plain = forecast(*masked, tokens(8))
    assert plain.tokens == 4 * 8 * 16
    more = forecast(*masked, tokens(64))
    refined = forecast(*masked, tokens(8), refine=50)
    recovered = forecast(*masked, tokens(8), recover=50)
    assert plain.seconds < min(more.seconds, refined.seconds)
    assert refined.seconds < recovered.seconds
    assert plain.peak_bytes < more.peak_bytes
    assert plain.peak_bytes < recovered.peak_bytes


def test_images_count_by_their_patches(dense_folder):
    network = empty_network(dense_folder("images"), "test")
    found = forecast(network, select_layers(network), [{"pixel_values": torch.zeros(3, 3, 16, 16)}])
    assert found.tokens == 3 * 16


@pytest.mark.parametrize(
    ("seconds", "said"), [(12, "12 s"), (300, "5 minutes"), (10_000, "3 hours"), (900_000, "10 days")]
)
def test_durations(seconds, said):
    assert forecasts._duration(seconds) == said
