"""One policy: every way into the package chooses the same layers of models as they are, and says what it leaves."""

from __future__ import annotations

import copy
import importlib
import logging
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torchao.quantization import FqnToConfig, quantize_

import gblr_plugin as gblr
from gblr_plugin import ConfigError, GBLRConfig, GBLRLayer, GBLRTensor, LayerSettings
from gblr_plugin.huggingface.compress_folder import CompressSettings, compress_folder
from gblr_plugin.layers.dense import structurable
from gblr_plugin.layers.separation import is_packed, separated
from gblr_plugin.serialization.container import Container
from gblr_plugin.serialization.header import read_headers
from gblr_plugin.surgery.selection import layer_filter, select_layers

LLAMA = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
BERT = {name: LLAMA[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings")}
BERT |= {"num_hidden_layers": 1, "num_attention_heads": 2}
PIXELS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "num_labels": 5}
TOKENS = {"input_ids": torch.arange(8)[None]}
HALF = LayerSettings("trapezoid", budget=0.5)


def hugging(kind, config, **sizes):
    def make():
        transformers = pytest.importorskip("transformers")
        return getattr(transformers, kind)(getattr(transformers, config)(**sizes)).eval()

    return make


def whisper_encoder():
    sizes = {f"{side}_{name}": 2 for side in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    sizes |= {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 64, "d_model": 32, "num_mel_bins": 8}
    sizes |= dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 0)
    return hugging("WhisperForConditionalGeneration", "WhisperConfig", max_source_positions=8, **sizes)().model.encoder


class ResNeXt(nn.Module):
    """A block with a grouped convolution, and torchvision's names."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.layer1 = nn.Sequential(
            nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 3, padding=1, groups=4), nn.Conv2d(16, 16, 1)
        )
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        return self.fc(self.layer1(self.conv1(x)).mean((2, 3)))


class Plain(nn.Module):
    """What a user writes: a tied pair, a subclass of Linear, a layer too small to gain, and a head."""

    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
        self.first = nn.Linear(16, 16, bias=False)
        self.second = nn.Linear(16, 16, bias=False)
        self.second.weight = self.first.weight
        self.scaled = self.Scaled(16, 16)
        self.small = nn.Linear(16, 1)
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        x = self.scaled(self.second(self.first(self.body(x))))
        return self.head(x), self.small(x)


def encoder():
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 48, batch_first=True), 2, enable_nested_tensor=False)


# Model: how it is made, an input, and what stays dense with a part of the reason.
MODELS = {
    "llama": (hugging("LlamaForCausalLM", "LlamaConfig", **LLAMA), TOKENS, {"lm_head": "head"}),
    "llama, tied": (
        hugging("LlamaForCausalLM", "LlamaConfig", **LLAMA, tie_word_embeddings=True),
        TOKENS,
        {"lm_head": "tied to that of 'model.embed_tokens'"},
    ),
    "gpt2": (
        hugging(
            *("GPT2LMHeadModel", "GPT2Config"),
            **{"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 64, "n_positions": 32},
            **{"bos_token_id": 0, "eos_token_id": 0},
        ),
        TOKENS,
        {"lm_head": "tied to that of 'transformer.wte'"},
    ),
    "bert": (
        hugging("BertForSequenceClassification", "BertConfig", **BERT, num_labels=8),
        TOKENS,
        {"classifier": "head"},
    ),
    "bert, masked": (hugging("BertForMaskedLM", "BertConfig", **BERT), TOKENS, {"cls.predictions.decoder": "tied"}),
    "vit": (
        hugging("ViTForImageClassification", "ViTConfig", **PIXELS, image_size=8, patch_size=4),
        {"pixel_values": torch.ones(1, 3, 8, 8)},
        {"classifier": "head"},
    ),
    "t5": (
        hugging(
            *("T5ForConditionalGeneration", "T5Config"),
            **{"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4},
            decoder_start_token_id=0,
        ),
        {**TOKENS, "decoder_input_ids": torch.arange(4)[None]},
        {"lm_head": "tied to that of 'shared'"},
    ),
    "whisper": (whisper_encoder, {"input_features": torch.ones(1, 8, 16)}, {}),
    "mixtral": (
        hugging("MixtralForCausalLM", "MixtralConfig", **LLAMA | {"num_hidden_layers": 1}, num_local_experts=4),
        TOKENS,
        {
            "model.layers.0.mlp.gate": "a MixtralTopKRouter cannot be structured",
            "model.layers.0.mlp.experts.gate_up_proj": "several experts in one parameter",
            "model.layers.0.mlp.experts.down_proj": "several experts in one parameter",
            "lm_head": "head",
        },
    ),
    "gemma": (
        hugging("Gemma3ForCausalLM", "Gemma3TextConfig", **LLAMA, head_dim=8, layer_types=["full_attention"] * 2),
        TOKENS,
        {"lm_head": "tied to that of 'model.embed_tokens'"},
    ),
    "encoder": (encoder, torch.ones(1, 8, 32), {}),
    "resnext": (ResNeXt, torch.ones(1, 3, 8, 8), {"layer1.1": "groups=4", "fc": "head"}),
    "plain": (
        Plain,
        torch.ones(2, 16),
        {
            "first": "tied to that of 'second'",
            "second": "tied to that of 'first'",
            "scaled": "subclass of Linear",
            "small": "too small",
            "head": "head",
        },
    ),
}


@pytest.fixture(params=MODELS)
def case(request):
    make, example, left = MODELS[request.param]
    torch.manual_seed(0)
    return make, make().eval(), example, left


def kinds(model, kind):
    """Layers by what they became."""
    found = []
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if isinstance(module, GBLRLayer) if kind is GBLRLayer else isinstance(getattr(weight, "data", None), kind):
            found.append(name)
    return found


def expected(model, left):
    with separated(model):
        return [name for name, module in model.named_modules() if structurable(module) and name not in left]


def packed(model):
    """Layers that are made of packed projections where the whole model is at hand."""
    return {name for name in expected(model, ()) if is_packed(model.get_submodule(name.rpartition(".")[0]))}


def output(model, example):
    with torch.no_grad():
        out = model(**example) if isinstance(example, dict) else model(example)
    return out[0]


def test_what_is_left_dense_is_listed_with_reason_and_share(case, caplog):
    _make, model, _example, left = case
    selection = select_layers(model)
    assert list(selection.layers) == expected(model, left)
    assert [one.name for one in selection.skipped] == list(left)
    for one in selection.skipped:
        assert left[one.name] in one.reason
        assert 0 < one.share < 1
    with caplog.at_level(logging.WARNING):
        gblr.prepare(model, settings=HALF)
    said = caplog.text
    assert len(caplog.records) == len({one.reason for one in selection.skipped})
    for one in selection.skipped:
        assert one.reason in said


def test_prepare(case):
    _make, model, example, left = case
    chosen, before = expected(model, left), output(model, example)
    assert list(gblr.prepare(model)) == chosen
    assert torch.allclose(output(model, example), before, rtol=1e-3, atol=1e-4)


def test_replace(case):
    _make, model, _example, left = case
    chosen = expected(model, left)
    assert list(gblr.prepare(model, None, family="low_rank", budget=0.5)) == chosen


def test_quantize_with_our_filter(case):
    _make, model, example, left = case
    chosen, copied = expected(model, left), copy.deepcopy(model)
    quantize_(model, GBLRConfig(step="convert", budget=0.5, method="trapezoid"), filter_fn=layer_filter(model))
    assert kinds(model, GBLRTensor) == chosen
    assert torch.isfinite(output(model, example)).all()
    quantize_(copied, GBLRConfig(step="prepare"), filter_fn=layer_filter(copied))
    assert kinds(copied, GBLRLayer) == chosen
    quantize_(copied, GBLRConfig(step="convert"), filter_fn=layer_filter(copied))
    assert not kinds(copied, GBLRLayer)


def test_quantize_with_torchaos_filter(case, caplog):
    """It takes linear layers alone, which is said; of them those of the others."""
    _make, model, _example, left = case
    apart = packed(model)
    chosen = [n for n in expected(model, left) if n not in apart and isinstance(model.get_submodule(n), nn.Linear)]
    others = set(expected(model, left)) - set(chosen)
    shared = [(a, b) for a, x in model.named_modules() for b, y in model.named_modules() if tied(x, y)]
    with caplog.at_level(logging.WARNING):
        quantize_(model, GBLRConfig(step="convert", budget=0.5, method="trapezoid"))
    assert kinds(model, GBLRTensor) == chosen
    assert all(tied(model.get_submodule(a), model.get_submodule(b)) for a, b in shared)
    for phrase in left.values():
        assert phrase in caplog.text
    assert ("takes linear layers only" in caplog.text) == bool(others)


def tied(x, y):
    weight = x._parameters.get("weight")
    return x is not y and weight is not None and weight is y._parameters.get("weight")


def test_nni(case, caplog):
    settings = pytest.importorskip("gblr_plugin.nni.settings")
    _make, model, _example, left = case
    types = ["Linear", "Conv1d", "Conv2d", "Conv1D", "MultiheadAttention"]
    plan = settings.read_config(model, [{"op_types": types, "sparse_ratio": 0.5}])
    # An evaluator records optimizers by the names of parameters, so that packed projections are named and left.
    assert not packed(model) or "packs its projections" in caplog.text
    # Whether a layer is too small is known when its row_splits are: the pruner leaves it dense later.
    chosen = [name for name in expected(model, left) if name not in packed(model)]
    assert [name for name in plan.layers if name != "small"] == chosen


def test_callback(case):
    for name in ("pytorch_lightning", "lightning.pytorch"):
        if importlib.util.find_spec(name.partition(".")[0]):
            pl = importlib.import_module(name)
            break
    else:
        pytest.skip("needs Lightning")
    _make, model, _example, left = case
    chosen = expected(model, left)

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = model

    module = Module()
    callback = gblr.lightning.GBLRCallback(budget=0.5, initialiser="trapezoid")
    trainer = SimpleNamespace(strategy=None, callbacks=[callback])
    callback.setup(trainer, module, "fit")
    assert kinds(module, GBLRLayer) == [f"network.{name}" for name in chosen]


def test_compress_folder(case, tmp_path, caplog):
    save_model = pytest.importorskip("safetensors.torch").save_model
    make, model, _example, left = case
    (tmp_path / "dense").mkdir()
    save_model(model, str(tmp_path / "dense" / "model.safetensors"))
    with torch.device("meta"):
        network = make()
    with caplog.at_level(logging.WARNING):
        compress_folder(tmp_path / "dense", tmp_path / "out", CompressSettings(0.5, method="svd"), model=network)
    container = Container(tmp_path / "out" / "model.safetensors")
    structured = {name.removesuffix(".weight") for name in read_headers([container]).weights}
    container.close()
    assert structured == set(expected(model, left)) - packed(model)
    for phrase in (*left.values(), *(["packs its projections"] if packed(model) else [])):
        assert phrase in caplog.text


def test_the_report_lists_what_is_left(case):
    _make, model, example, left = case
    before = gblr.report(model, example)
    gblr.prepare(model, settings=HALF)
    counted = gblr.report(model, example)
    dense = {layer.name: layer for layer in counted.layers if layer.structure == "dense"}
    assert list(dense) == list(left)
    products = {layer.name: layer.multiply_adds for layer in before.layers}
    assert {layer.name: layer.dense_multiply_adds for layer in counted.layers} == products
    for name, layer in dense.items():
        assert left[name] in layer.left_dense
        assert layer.multiply_adds > 0
        assert "".join(layer.left_dense.split()) in "".join(str(counted).split())


# -- by name -----------------------------------------------------------------------------------------------------------


def by_name(name):
    """Every way in which a layer is asked for by its full name."""
    config = GBLRConfig(step="convert", budget=0.5, method="trapezoid")

    def nni(model):
        read_config = pytest.importorskip("gblr_plugin.nni.settings").read_config
        return read_config(model, [{"op_names": [name], "sparse_ratio": 0.5}]).layers

    return {
        "prepare": lambda model: gblr.prepare(model, [name], settings=HALF),
        "replace": lambda model: gblr.prepare(model, [name], family="low_rank", budget=0.5),
        "nni": nni,
        "filter": lambda model: quantize_(model, config, filter_fn=layer_filter(model, [name])),
        "fqn": lambda model: quantize_(model, FqnToConfig({name: config}), filter_fn=None),
    }


@pytest.mark.parametrize("way", by_name(""))
def test_a_tied_weight_that_is_asked_for_by_name_is_an_error(way):
    model = MODELS["llama, tied"][0]()
    with pytest.raises(ConfigError, match="layer 'lm_head': its weight is tied to that of 'model"):
        by_name("lm_head")[way](model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("way", by_name(""))
def test_a_head_that_is_asked_for_by_name_is_structured(way):
    model = MODELS["llama"][0]()
    made = by_name("lm_head")[way](model)
    weight = getattr(model.lm_head, "weight", None)
    assert list(made or ()) == ["lm_head"] or isinstance(getattr(weight, "data", None), GBLRTensor)


@pytest.mark.parametrize("pattern", ["lm_*", "*"])
def test_a_pattern_is_no_name(pattern):
    model = MODELS["llama"][0]()
    assert "lm_head" not in select_layers(model, [pattern, "*q_proj"]).layers
    tied_model = MODELS["llama, tied"][0]()
    assert "lm_head" not in select_layers(tied_model, [pattern, "*q_proj"]).layers


def test_a_filter_of_the_callers_is_no_name_either(caplog):
    model = MODELS["llama"][0]()
    quantize_(model, GBLRConfig(step="convert", budget=0.5), filter_fn=lambda module, name: name == "lm_head")
    assert not kinds(model, GBLRTensor)
    assert "lm_head" in caplog.text
    assert "output head" in caplog.text
