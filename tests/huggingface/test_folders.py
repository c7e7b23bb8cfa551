import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import gblr_plugin as gblr
from gblr_plugin import ConfigError, GBLRConfig, GBLRTensor, convert, load, prepare, report, save
from gblr_plugin.surgery.layer_settings import LayerSettings
from gblr_plugin.tensor.frozen import FrozenLinear

transformers = pytest.importorskip("transformers")
hf = pytest.importorskip("gblr_plugin.huggingface.folders")

HALF = LayerSettings("trapezoid", budget=0.5)


def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=32, vocab_size=60, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    prepare(model, ["*c_attn", "*c_fc"], settings=HALF)
    prepare(model, ["*attn.c_proj"])  # full widths of a square weight: stored dense, transposed
    gblr.prepare(model, ["*0.mlp.c_proj"], family="monarch", budget=0.5)
    prepare(model, ["*1.mlp.c_proj"], settings=HALF)
    return gblr.convert(model), torch.randint(0, 60, (2, 6))


def vit():
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=16,
        patch_size=4,
        num_labels=5,
    )
    model = transformers.ViTForImageClassification(config).eval()
    prepare(model, settings=HALF)  # the patch embedding, a convolution, too
    return convert(model), torch.randn(2, 3, 16, 16)


@pytest.fixture(params=[gpt2, vit])
def made(request):
    return request.param()


@pytest.mark.usefixtures("plans")
@pytest.mark.parametrize("most", [10**9, 10_000])
def test_a_folder_comes_back_in_one_call(tmp_path, made, most):
    model, x = made
    hf.save_pretrained(model, tmp_path, max_shard_bytes=most)
    shards = [name for name in os.listdir(tmp_path) if name.endswith(".safetensors")]
    assert (len(shards) > 1) == (most < 10**9)
    loaded = load(tmp_path)
    assert type(loaded) is type(model)
    assert not loaded.training
    assert torch.equal(loaded(x).logits, model(x).logits)
    assert report(loaded, x) == report(model, x)
    if hasattr(model, "lm_head"):
        assert loaded.lm_head.weight is loaded.transformer.wte.weight


def test_small_layers_of_a_folder_take_the_matrix_that_they_keep(tmp_path):
    model, x = gpt2()
    hf.save_pretrained(model, tmp_path)
    loaded = load(tmp_path)
    assert any(isinstance(module, FrozenLinear) for module in loaded.modules())
    assert [type(module) for module in loaded.modules()] == [type(module) for module in model.modules()]
    assert report(loaded, x) == report(model, x)


@pytest.mark.usefixtures("plans")
def test_transformers_reads_and_writes_it_by_itself(tmp_path):
    model, x = gpt2()
    hf.save_pretrained(model, tmp_path / "ours")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert torch.equal(theirs(x).logits, model(x).logits)
    theirs.save_pretrained(tmp_path / "theirs")
    assert torch.equal(load(tmp_path / "theirs")(x).logits, model(x).logits)


def test_a_folder_fills_a_network_of_ones_own(tmp_path):
    model, x = gpt2()
    hf.save_pretrained(model, tmp_path, max_shard_bytes=10_000)
    again = load(tmp_path, transformers.GPT2LMHeadModel(model.config))
    assert torch.equal(again(x).logits, model(x).logits)


def test_dtype_of_transformers(tmp_path, made):
    model, x = made
    hf.save_pretrained(model, tmp_path)
    half = load(tmp_path, dtype=torch.bfloat16)
    logits = half(x if x.dtype == torch.int64 else x.bfloat16()).logits
    assert logits.dtype == torch.bfloat16
    assert torch.allclose(logits.float(), model(x).logits, atol=0.05)


def test_saved_small(tmp_path):
    model, _ = vit()
    hf.save_pretrained(model, tmp_path)
    config = transformers.ViTForImageClassification(model.config)
    dense = sum(p.numel() for p in config.parameters()) * 4
    assert (tmp_path / "model.safetensors").stat().st_size < 0.9 * dense
    assert sum(isinstance(p.data, GBLRTensor) for p in load(tmp_path).parameters()) > 4


def test_what_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="need a model of transformers"):
        hf.save_pretrained(torch.nn.Linear(2, 2), tmp_path / "a")
    model, _ = vit()
    hf.save_pretrained(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("os.system", "Trainer", None, 5):
        (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": [name]}))
        with pytest.raises(ConfigError, match=r"no model of transformers|cannot be used"):
            load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be used"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = tmp_path / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ConfigError, match="does not match its checksum"):
        load(tmp_path)
    weights.write_bytes(data[:-100])
    with pytest.raises(ConfigError, match="damaged"):
        load(tmp_path)
    weights.unlink()
    with pytest.raises(ConfigError, match=r"no model\.safetensors"):
        load(tmp_path)
    with pytest.raises(ConfigError, match="option 'dtype' is for folders"):
        load(weights, vit, dtype=torch.float64)


# -- transformers' own save_pretrained, right after a conversion -----------------------------------------------------


def llama(dtype=torch.float32):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=60,
        tie_word_embeddings=True,
        pad_token_id=0,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)  # positions stay in single precision
    return model.eval(), torch.randint(1, 60, (2, 6))


def projection(module, name):
    return isinstance(module, torch.nn.Linear) and name.endswith("_proj")


def projection_of(name):
    return lambda _, layer: layer.endswith(name)


def by_convert(model):
    prepare(model, ["*_proj"], settings=LayerSettings("random", budget=0.5))
    return convert(model)


def by_quantize(model):
    quantize_(model, GBLRConfig(step="convert", budget=0.5, method="svd"), filter_fn=projection)
    return model


def to_int8(model):
    config = GBLRConfig(step="convert", budget=0.5, method="svd", factor_dtype="int8")
    quantize_(model, config, filter_fn=projection)
    return model


def to_families(model):
    gblr.prepare(model, ["*_proj"], family="monarch", budget=0.5)
    return gblr.convert(model)


@pytest.mark.parametrize("size", ["5GB", "8KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", [by_convert, by_quantize, to_int8, to_families])
def test_transformers_saves_what_was_just_converted(tmp_path, way, dtype, size):
    model, x = llama(dtype)
    model = way(model)
    attributes = set(vars(model))
    model.save_pretrained(tmp_path, max_shard_size=size)
    assert set(vars(model)) == attributes  # the model itself is as before
    assert not hasattr(model.config, "quantization_config")
    assert ((tmp_path / "model.safetensors.index.json").exists()) == (size == "8KB")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == dtype
    assert torch.equal(loaded(x).logits, model(x).logits)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert type(loaded.lm_head.weight.data) is torch.Tensor
    for (name, old), (other, new) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert (name, type(old.data), old.dtype) == (other, type(new.data), new.dtype)
        assert getattr(old, "factor_dtype", None) == getattr(new, "factor_dtype", None)
    tokens = {"input_ids": x, "attention_mask": torch.ones_like(x), "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(loaded.generate(**tokens), model.generate(**tokens))
    assert torch.equal(load(tmp_path)(x).logits, model(x).logits)


def test_transformers_saves_other_kinds_of_networks(tmp_path, made):
    model, x = made
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(loaded(x).logits, model(x).logits)
    assert report(loaded, x) == report(model, x)


def test_part_of_a_model_and_a_model_filled_by_load_are_saved(tmp_path):
    model, x = llama()
    by_convert(model)
    model.model.save_pretrained(tmp_path / "part")
    part = transformers.AutoModel.from_pretrained(tmp_path / "part")
    assert torch.equal(part(x).last_hidden_state, model.model(x).last_hidden_state)
    save(model, tmp_path / "model.safetensors")
    filled = load(tmp_path / "model.safetensors", llama()[0])
    filled.save_pretrained(tmp_path / "whole")
    assert torch.equal(load(tmp_path / "whole")(x).logits, model(x).logits)


def test_what_cannot_be_saved_leaves_nothing_behind(tmp_path):
    model, _ = llama()
    by_convert(model)
    quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda _, name: name == "lm_head")
    with pytest.raises(ConfigError, match=r"'lm_head\.weight' is quantized by torchao, .* use gblr_plugin\.save"):
        model.save_pretrained(tmp_path / "torchao")
    model, _ = llama()
    by_convert(model)
    model.hf_quantizer = SimpleNamespace(quantization_config=SimpleNamespace(quant_method="bitsandbytes"))
    with pytest.raises(ConfigError, match="is quantized by bitsandbytes; a folder names one method"):
        model.save_pretrained(tmp_path / "other")
    model, _ = llama()
    quantize_(model, GBLRConfig(step="convert", budget=0.5, method="svd"), filter_fn=projection_of("q_proj"))
    prepare(model, ["*down_proj"], settings=LayerSettings("random", budget=0.5))
    with pytest.raises(ConfigError, match=r"'model\.layers\.0\.mlp\.down_proj' is not converted yet"):
        model.save_pretrained(tmp_path / "in part")
    assert os.listdir(tmp_path) == []


def test_models_without_frozen_structure_are_saved_as_ever(tmp_path):
    model, x = llama()
    model.save_pretrained(tmp_path / "dense")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert "quantization_config" not in config
    assert torch.equal(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")(x).logits, model(x).logits)
    prepare(model, ["*_proj"], settings=LayerSettings("random", budget=0.5))
    model.save_pretrained(tmp_path / "trained")  # a checkpoint of training
    assert "quantization_config" not in json.loads((tmp_path / "trained" / "config.json").read_text())


@pytest.mark.parametrize("first", ["gblr_plugin", "transformers"])
def test_importing_the_package_is_enough_to_load_a_folder(tmp_path, first):
    model, x = llama()
    by_convert(model).save_pretrained(tmp_path / "folder")
    torch.save((x, model(x).logits), tmp_path / "expected.pt")
    second = {"gblr_plugin": "transformers", "transformers": "gblr_plugin"}[first]
    code = (
        f"import {first}, {second}, sys, torch\n"
        "assert 'gblr_plugin.huggingface.folders' not in sys.modules\n"
        f"x, expected = torch.load({str(tmp_path / 'expected.pt')!r})\n"
        f"model = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / 'folder')!r})\n"
        "assert torch.equal(model(x).logits, expected)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


@pytest.mark.parametrize("step", ["prepare", "convert"])
def test_torchaos_config_of_transformers(tmp_path, step):
    model, x = llama()
    model.save_pretrained(tmp_path / "dense")
    config = GBLRConfig(step=step, initialiser="random", method="random", budget=0.5, align=(1, 2))
    wrapped = transformers.TorchAoConfig(config)
    again = transformers.TorchAoConfig.from_dict(json.loads(json.dumps(wrapped.to_dict())))
    assert again.quant_type == config
    made = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=again)
    expected = llama()[0]
    quantize_(expected, config, filter_fn=projection)
    assert torch.equal(made(x).logits, expected(x).logits)
    assert made.lm_head.weight is made.model.embed_tokens.weight
    made = convert(made)
    made.save_pretrained(tmp_path / "converted")
    assert torch.equal(load(tmp_path / "converted")(x).logits, made(x).logits)
