import json
import os

import pytest
import torch

from gblr_plugin import ConfigError, GBLRTensor, convert, families, load, prepare, report
from gblr_plugin.conversion import LayerSettings
from gblr_plugin.frozen import FrozenLinear

transformers = pytest.importorskip("transformers")
hf = pytest.importorskip("gblr_plugin.hf")

HALF = LayerSettings("trapezoid", budget=0.5)


def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=32, vocab_size=60, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    prepare(model, ["*c_attn", "*c_fc"], settings=HALF)
    prepare(model, ["*attn.c_proj"])  # full widths of a square weight: stored dense, transposed
    families.replace(model, ["*0.mlp.c_proj"], "monarch", 0.5)
    prepare(model, ["*1.mlp.c_proj"], settings=HALF)
    return families.convert(model), torch.randint(0, 60, (2, 6))


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


@pytest.mark.usefixtures("true_plans")
def test_small_layers_of_a_folder_take_the_matrix_that_they_keep(tmp_path):
    model, x = gpt2()
    hf.save_pretrained(model, tmp_path)
    loaded = load(tmp_path)
    assert any(isinstance(module, FrozenLinear) for module in loaded.modules())
    assert [type(module) for module in loaded.modules()] == [type(module) for module in model.modules()]
    assert report(loaded, x) == report(model, x)


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
