import pytest
import torch
from torch import nn

import gblr_plugin as gblr
from gblr_plugin import ConfigError, LayerSettings
from gblr_plugin.surgery.row_splits import check_row_splits_given, row_splits_of
from gblr_plugin.surgery.selection import select_layers

transformers = pytest.importorskip("transformers")
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}


def phi(shared=1):
    return transformers.Phi3ForCausalLM(transformers.Phi3Config(**SIZES, **SPECIAL, num_key_value_heads=shared))


def layers_of(model):
    return select_layers(model).layers


def test_rows_are_divided_into_splits_of_their_greatest_common_divisor():
    model = nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 32))
    layers = layers_of(model)
    assert row_splits_of(model, layers, 2) == {"0": 2, "1": 2}
    assert row_splits_of(model, layers, {"0": (32, 8, 8)}) == {"0": 6, "1": 1}
    assert row_splits_of(model, layers, {"Linear": 4}) == {"0": 4, "1": 4}
    assert row_splits_of(model, layers, "auto") == {"0": 1, "1": 1}
    with pytest.raises(ConfigError, match=r"layer '1': row_splits \[32, 8, 8\] are 48 rows, its weight has 32"):
        row_splits_of(model, layers, [32, 8, 8])
    with pytest.raises(ConfigError, match="row_splits: pattern '2' matches no chosen layer"):
        row_splits_of(model, layers, {"2": 3})


@pytest.mark.parametrize("given", [0, "three", [], [8, 0], {"0": "a"}, {"0": [1, -1]}, None, 1.5])
def test_what_no_model_could_take(given):
    with pytest.raises(ConfigError, match="row_splits"):
        check_row_splits_given("row_splits", given)


def test_no_component_reaches_from_the_queries_into_the_keys():
    model = phi()
    layer = gblr.prepare(model, ["*.qkv_proj"], settings=LayerSettings("trapezoid", budget=0.5), row_splits="auto")[
        "model.layers.0.self_attn.qkv_proj"
    ]
    assert layer.matrix_shape == (48, 32)
    assert layer.row_splits == 6  # 32 rows of queries, 8 of keys, 8 of values
    u = layer.structure().u
    assert u.shape[1] == 8


def test_types_of_models_are_known(caplog):
    expected = {
        "phi3": (phi(2), {"self_attn.qkv_proj": 4, "mlp.gate_up_proj": 2}),
        "gpt2": (
            transformers.GPT2LMHeadModel(
                transformers.GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64, n_positions=16, **SPECIAL)
            ),
            {"attn.c_attn": 3},
        ),
        "modernbert": (
            transformers.ModernBertModel(
                transformers.ModernBertConfig(**SIZES, **SPECIAL, cls_token_id=1, sep_token_id=1)
            ),
            {"attn.Wqkv": 3, "mlp.Wi": 2},
        ),
        "gpt_bigcode": (
            transformers.GPTBigCodeForCausalLM(
                transformers.GPTBigCodeConfig(n_layer=1, n_embd=32, n_head=4, vocab_size=64, n_positions=16, **SPECIAL)
            ),
            {"attn.c_attn": 6},
        ),
    }
    for model, splits in expected.values():
        inside = nn.ModuleDict({"network": model})  # its config is found inside another module too
        found = {name: count for name, count in row_splits_of(inside, layers_of(inside), "auto").items() if count > 1}
        assert {".".join(name.split(".")[-2:]): count for name, count in found.items()} == splits
    assert not caplog.text


def test_rows_that_alternate_by_heads_are_named(caplog):
    model = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SIZES, **SPECIAL))
    assert set(row_splits_of(model, layers_of(model), "auto").values()) == {1}
    assert "gpt_neox.layers.0.attention.query_key_value stay one matrix each" in caplog.text


def test_every_entry_takes_them():
    splits = {"*.qkv_proj": (32, 8, 8)}
    name = "model.layers.0.self_attn.qkv_proj"
    model = phi()
    assert gblr.prepare(model, family="low_rank", budget=0.5, row_splits=splits)[name].geometry is not None
    model = phi()
    report = gblr.compress(model, 0.5, row_splits="auto")
    assert name in [row.name for row in report.layers]
    assert model.get_submodule(name).weight.to_structured().row_splits == 6
    read_config = pytest.importorskip("gblr_plugin.nni.settings").read_config
    model = phi()
    entry = {"op_names": ["*.qkv_proj"], "sparse_ratio": 0.5}
    assert read_config(model, [{**entry, "gblr": {"row_splits": [32, 8, 8]}}]).layers[name].settings.row_splits == 6
    assert read_config(model, [{**entry, "gblr_row_splits": "auto"}]).layers[name].settings.row_splits == 6
    with pytest.raises(ConfigError, match="row_splits"):
        read_config(model, [{**entry, "gblr_row_splits": "some"}])


def test_generation_is_that_of_the_layers():
    model = phi()
    torch.manual_seed(0)
    tokens = torch.randint(64, (1, 6))
    gblr.prepare(model, settings=LayerSettings("trapezoid", budget=0.7), row_splits="auto")
    before = model.eval()(tokens).logits
    torch.testing.assert_close(gblr.convert(model)(tokens).logits, before, rtol=1e-3, atol=1e-4)
