"""Dense checkpoints that are compressed while they are loaded, and what their folders then say."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch

import gblr_plugin as gblr
from gblr_plugin import ConfigError, GBLRTensor

transformers = pytest.importorskip("transformers")
GBLRHfConfig = pytest.importorskip("gblr_plugin.huggingface").GBLRHfConfig

IDS = torch.arange(8)[None]
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    torch.manual_seed(0)
    config = transformers.Phi3Config(**SIZES, num_key_value_heads=2, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    folder = tmp_path_factory.mktemp("dense")
    transformers.Phi3ForCausalLM(config).save_pretrained(folder)
    return folder


def load(folder, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def structured(model):
    return [name for name, module in model.named_modules() if isinstance(weight_of(module), GBLRTensor)]


def weight_of(module):
    return getattr(module._parameters.get("weight"), "data", None)


@pytest.mark.parametrize("device_map", [None, "cpu"])
def test_a_dense_checkpoint_is_compressed_while_it_is_loaded(dense, tmp_path, device_map):
    config = GBLRHfConfig(0.5, exclude=["*.o_proj"], row_splits="auto", method="trapezoid", factor_dtype="int8")
    model = load(dense, quantization_config=config, device_map=device_map)
    by_hand = load(dense)
    gblr.prepare(
        by_hand, None, ["*.o_proj"], family="gblr", budget=0.5, method="trapezoid", row_splits="auto", align=1, seed=0
    )
    gblr.convert(by_hand, factor_dtype="int8")
    assert [name.rpartition(".")[2] for name in structured(model)] == ["qkv_proj", "gate_up_proj", "down_proj"]
    assert torch.equal(model(IDS).logits, by_hand(IDS).logits)
    assert weight_of(model.model.layers[0].self_attn.qkv_proj).factors.dtype == torch.int8
    model.save_pretrained(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert said == {
        **{"quant_method": "gblr", "budget": 0.5, "layers": None, "exclude": ["*.o_proj"], "family": "gblr"},
        **{"method": "trapezoid", "align": 1, "row_splits": "auto", "factor_dtype": "int8", "seed": 0},
    }
    again = load(tmp_path)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert again.config.quantization_config.to_dict() == said
    assert torch.equal(gblr.load(tmp_path)(IDS).logits, model(IDS).logits)


def test_in_half_precision_and_by_a_family(dense):
    model = load(dense, quantization_config=GBLRHfConfig(0.5, family="low_rank"), dtype=torch.bfloat16)
    assert len(structured(model)) == 4
    assert weight_of(model.model.layers[0].mlp.down_proj).dtype == torch.bfloat16
    assert torch.isfinite(model(IDS).logits).all()


def test_without_a_budget(dense, tmp_path):
    with pytest.raises(ConfigError, match="the folder holds a dense model; give its quantization config a budget"):
        load(dense, quantization_config=GBLRHfConfig())
    model = load(dense)
    gblr.prepare(model, family="gblr", budget=0.5, method="svd")
    gblr.convert(model).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"] == {"quant_method": "gblr"}


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"budget": 1.5}, "gblr: budget"),
        ({"budget": 0.5, "bugdet": 1}, r"gblr: unknown setting 'bugdet'; did you mean 'budget'"),
        ({"budget": 0.5, "method": "magic"}, "gblr: method"),
        ({"budget": 0.5, "family": "magic"}, "magic"),
        ({"budget": 0.5, "align": 0}, "gblr: align"),
        ({"budget": 0.5, "seed": -1}, "gblr: seed"),
        ({"budget": 0.5, "row_splits": "many"}, "gblr: row_splits"),
        ({"budget": 0.5, "factor_dtype": "int4"}, "gblr: factor_dtype"),
    ],
)
def test_settings_are_checked(values, says):
    with pytest.raises(ConfigError, match=says):
        GBLRHfConfig(**values)


def test_weights_that_are_not_at_hand_are_refused(dense):
    from gblr_plugin.huggingface.config import compress_loaded

    model = load(dense)
    model.model.layers[0].mlp.down_proj.to("meta")
    with pytest.raises(ConfigError, match=r"down_proj.weight' is offloaded; compress the folder with `gblr compress`"):
        compress_loaded(model, GBLRHfConfig(0.5))


def test_push_to_hub_uploads_the_folder(dense, tmp_path, monkeypatch):
    """Nothing is sent: the functions that would are replaced."""
    hub = transformers.utils.hub
    sent = {}

    def upload(self, working_dir, repo_id, files_timestamps, **options):
        for file in ("config.json", "model.safetensors"):
            shutil.copy(f"{working_dir}/{file}", tmp_path / file)
        sent["repo"] = repo_id

    api = SimpleNamespace(create_repo=lambda repo_id, **options: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(hub, "hf_api", lambda: api)
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *args, **options: SimpleNamespace(save=lambda p: None))
    monkeypatch.setattr(transformers.PreTrainedModel, "_upload_modified_files", upload)
    model = load(dense, quantization_config=GBLRHfConfig(0.5, method="svd"))
    model.push_to_hub("someone/compressed")
    assert sent == {"repo": "someone/compressed"}
    assert torch.equal(load(tmp_path)(IDS).logits, model(IDS).logits)


def test_adapters_of_peft_train_on_frozen_weights_and_are_not_merged(dense, tmp_path):
    peft = pytest.importorskip("peft")
    model = load(dense, quantization_config=GBLRHfConfig(0.5, method="svd"))
    before = model(IDS).logits.detach()
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["qkv_proj", "down_proj"]))
    torch.testing.assert_close(adapted(IDS).logits, before)
    frozen = weight_of(model.model.layers[0].mlp.down_proj.base_layer).to_dense().clone()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = adapted(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert torch.equal(weight_of(model.model.layers[0].mlp.down_proj.base_layer).to_dense(), frozen)
    adapted.save_pretrained(tmp_path)
    expected = adapted.eval()(IDS).logits
    again = peft.PeftModel.from_pretrained(load(dense, quantization_config=GBLRHfConfig(0.5, method="svd")), tmp_path)
    assert torch.equal(again.eval()(IDS).logits, expected)
    with pytest.raises(ValueError, match="required to re-quantize the base layer after merging"):
        adapted.merge_and_unload()
