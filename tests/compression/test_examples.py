import pytest
import torch

from gblr_plugin import ConfigError
from gblr_plugin.compression.examples import example_inputs
from gblr_plugin.huggingface.folders import empty_network


@pytest.mark.parametrize("kind", ["encoder", "masked", "classes", "decoder"])
def test_text(dense_folder, kind):
    network = empty_network(dense_folder(kind), "test")
    example = example_inputs(network, 3, 5)
    assert {name: tuple(tensor.shape) for name, tensor in example.items()} == {
        "input_ids": (3, 5),
        "attention_mask": (3, 5),
    }
    assert example["input_ids"].device.type == "meta"
    assert example_inputs(network)["input_ids"].shape[1] == (64 if kind == "decoder" else 32)  # the model's longest


def test_images(dense_folder):
    network = empty_network(dense_folder("images"), "test").to(torch.bfloat16)
    pixels = example_inputs(network, 2)["pixel_values"]
    assert (pixels.shape, pixels.dtype) == ((2, 3, 16, 16), torch.bfloat16)


def test_numbers_out_of_range(dense_folder):
    network = empty_network(dense_folder("encoder"), "test")
    with pytest.raises(ConfigError, match="--batch must be a whole number of at least 1"):
        example_inputs(network, 0)
    with pytest.raises(ConfigError, match="--length must be at most the model's 32 tokens"):
        example_inputs(network, 1, 33)
