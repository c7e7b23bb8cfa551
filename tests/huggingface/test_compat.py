"""What the undocumented names of transformers stand for, seen through what it does in public."""

from __future__ import annotations

import json

import pytest
import torch

transformers = pytest.importorskip("transformers")
compat = pytest.importorskip("gblr_plugin.huggingface._compat")


def bert():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    return transformers.BertModel(config)


def test_a_marked_tensor_keeps_its_values_when_weights_are_initialised():
    model = bert()
    layer = model.encoder.layer[0].output.dense
    with torch.no_grad():
        layer.weight.fill_(7.0)
    compat.mark_initialised(layer.weight)
    model.init_weights()
    assert torch.equal(layer.weight, torch.full_like(layer.weight, 7.0))


def test_a_quantizer_is_asked_for_the_tensors_and_leaves_the_model_as_it_was(tmp_path):
    class Config(transformers.utils.quantization_config.QuantizationConfigMixin):
        def __init__(self):
            self.quant_method = "mine"

    class Quantizer(transformers.quantizers.base.HfQuantizer):
        def is_serializable(self):
            return True

        @property
        def is_trainable(self):
            return True

        def get_state_dict_and_metadata(self, saved):
            asked.append(saved)
            return saved.state_dict(), {"format": "pt"}

    model, asked = bert(), []
    quantizer = Quantizer(Config())
    with compat.quantized_by(model, quantizer):
        model.save_pretrained(tmp_path)
    assert asked == [model]
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"] == {"quant_method": "mine"}
    assert not {"hf_quantizer"} & vars(model).keys()
    assert not {"quantization_config"} & vars(model.config).keys()


def test_every_model_is_saved_through_the_wrapper(tmp_path, monkeypatch):
    from transformers.modeling_utils import PreTrainedModel

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", PreTrainedModel.save_pretrained)
    seen = []

    def wrap(save):
        def save_pretrained(self, *args, **kwargs):
            seen.append(type(self).__name__)
            return save(self, *args, **kwargs)

        return save_pretrained

    compat.wrap_save_pretrained(wrap)
    bert().save_pretrained(tmp_path)
    assert seen == ["BertModel"]
    assert (tmp_path / "model.safetensors").exists()
