"""The recipes of configs/: counted as published at full size, and run from end to end at a tiny one."""

import io
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from gblr_plugin import ConfigError, report
from gblr_plugin.cli import main
from gblr_plugin.nni import create_compressor
from gblr_plugin.run.context import make_task
from gblr_plugin.run.counting import count_config
from gblr_plugin.run.pipeline import prepare_run
from gblr_plugin.run.settings import RunSettings
from gblr_plugin.run.yaml_config import load_yaml, parse_overrides, read_settings
from gblr_plugin.tasks.base import TrainSettings
from gblr_plugin.tasks.mixer import Mixer
from gblr_plugin.tasks.positions import KernelPositions, split_kernel_positions
from gblr_plugin.utils.console import Console

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = sorted(
    path.stem
    for path in CONFIGS.glob("*.yaml")
    if re.search(r"^task: (vit|mixer|resnet|gpt2|bert)$", path.read_text(encoding="utf-8"), re.MULTILINE)
)
pytestmark = pytest.mark.usefixtures("place")

VIT = {"dataset": "folder", "folder": "images", "image_size": 32, "hidden_size": 16, "num_hidden_layers": 1}
VIT |= {"num_attention_heads": 2, "intermediate_size": 24}
RESNET = {"dataset": "folder", "folder": "images", "image_size": 32, "embedding_size": 8}
RESNET |= {"depths": [1, 1], "hidden_sizes": [8, 12]}
GPT2 = {"folder": "wikitext", "n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 280, "context": 16}
BERT = {"folder": "sst", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
BERT |= {"vocab_size": 30, "context": 8}
TINY = {
    "vit_base": VIT,
    "vit_base_finetune": {**VIT, "pretrained": "vit"},
    "vit_small": VIT,
    "mixer_small": {"folder": "cifar", "image_size": 32, "hidden_size": 16, "num_hidden_layers": 1}
    | {"tokens_mlp_size": 8, "channels_mlp_size": 24},
    "resnet18": RESNET,
    "resnet18_positions": {**RESNET, "depths": [1], "hidden_sizes": [8]},
    "gpt2_small": {**GPT2, "pretrained": "gpt2", "n_positions": 32},
    "gpt2_medium": {**GPT2, "pretrained": "gpt2", "n_positions": 32},
    "gpt2_small_scratch": {**GPT2, "tokenizer": "gpt2-tokens"},
    "bert_base": {**BERT, "pretrained": "bert"},
    "bert_base_scratch": {**BERT, "folder": "wikitext", "tokenizer": "bert-tokens"},
}


def settings_of(name, overrides=(), methods=None):
    located = load_yaml(CONFIGS / f"{name}.yaml")
    parse_overrides(located, list(overrides))
    located.data["methods"] = located.data["methods"][:methods]
    return read_settings(RunSettings, located)


def tiny(name, methods=1):
    """Overrides as a user would write them."""
    model = {**TINY[name], **({} if name.startswith("bert") else {"workers": 0})}
    overrides = [f"model.{key}={json.dumps(value)}" for key, value in model.items()]
    overrides += [f"{phase}.{key}" for phase in ("dense", "finetune") for key in ("epochs=1", "batch_size=4")]
    entries = load_yaml(CONFIGS / f"{name}.yaml").data["config_list"]
    overrides += [  # a search per matrix would be most of the test
        f"config_list.{index}.gblr.initialiser=svd"
        for index, entry in enumerate(entries)
        if "initialiser" in entry.get("gblr", {})
    ]
    return settings_of(name, overrides, methods)


@pytest.fixture
def here(place, monkeypatch):
    monkeypatch.chdir(place)
    return place


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_from_end_to_end(name, here, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gblr_plugin.plot", None)  # figures would be most of the time
    monkeypatch.setattr("gblr_plugin.lightning.callback.log_pictures", lambda *_, **__: None)
    settings = tiny(name)
    settings.threads = 1
    found = prepare_run(settings).run(tmp_path, Console(io.StringIO()))
    dense, gblr = found.methods
    budget = 1 - settings.config_list[0]["sparse_ratio"]
    assert gblr.mean("relative_flops") <= budget + 1e-9
    assert gblr.mean("relative_flops") > 0.6 * budget
    assert dense.mean("relative_flops") == 1.0
    compressed = {layer.name for layer in gblr.layers.layers if layer.structure != "dense"}
    too_small = {layer.name for layer in gblr.layers.layers if "too small" in layer.left_dense}
    assert compressed | too_small == planned(settings)
    if name.startswith("gpt2"):
        assert {name.split(".h.0.")[1] for name in compressed} == {"attn.c_attn", "mlp.c_fc", "mlp.c_proj"}
    if name == "resnet18_positions":
        assert "model.resnet.encoder.stages.0.layers.0.layer.0.convolution.positions.8" in planned(settings)


def test_a_method_starts_from_the_trained_network_or_from_the_initial_one(here, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gblr_plugin.plot", None)
    begun = {}  # by method, of the last compressor made: the first one is of the check

    def spy(name, module, *arguments, **options):
        begun[name] = {key: value.clone() for key, value in module.network.state_dict().items()}
        return create_compressor(name, module, *arguments, **options)

    monkeypatch.setattr("gblr_plugin.run.compression.create_compressor", spy)
    settings = tiny("vit_base_finetune", methods=2)
    assert [method.start for method in settings.methods] == ["initial", "initial"]
    settings.methods[1].start = "trained"
    prepare_run(settings).run(tmp_path, Console(io.StringIO()))
    pretrained = make_task(settings).network().state_dict()
    body = [name for name in pretrained if "classifier" not in name]
    trained = [name for name in body if "mlp" in name]
    assert trained
    assert all(torch.equal(begun["gblr"][name], pretrained[name]) for name in body)
    assert not any(torch.equal(begun["low_rank"][name], pretrained[name]) for name in trained)


def planned(settings):
    return {layer.name for layer in count_config(settings).layers if layer.structure == "planned"}


# -- counting ----------------------------------------------------------------------------------------------------------

# Name: dense multiply-adds as the paper counts, share that the recipe plans of them, dense parameters.
PUBLISHED = {
    "vit_base": (1.72e10, 5.65e9 / 1.72e10, 86_567_656),
    "vit_base_finetune": (1.72e10, 5.65e9 / 1.72e10, 86_567_656),
    "gpt2_small": (9.66e10, 0.437, 124_439_808),
    "gpt2_small_scratch": (9.66e10, 0.437, 124_439_808),
    "resnet18": (1.81e9, 0.5562, 11_689_512),
    "resnet18_positions": (1.81e9, 0.5562, 11_689_512),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_totals_and_budgets(name):
    total, share, parameters = PUBLISHED[name]
    counted = count_config(settings_of(name))
    assert float(f"{counted.published_dense_multiply_adds:.2e}") == total
    assert counted.published_multiply_adds / counted.published_dense_multiply_adds == pytest.approx(share, abs=5e-4)
    assert counted.dense_parameters == parameters


def test_vit_base_by_hand():
    counted = count_config(settings_of("vit_base"))
    tokens, dim = 197, 768
    layers = 12 * tokens * 12 * dim**2
    patches, head = 196 * dim * 3 * 16**2, dim * 1000
    attention = 12 * tokens**2 * dim
    assert counted.published_dense_multiply_adds == layers + patches + head + attention
    assert counted.dense_multiply_adds == layers + patches + head + 2 * attention
    assert (counted.attention_multiply_adds, counted.other_multiply_adds) == (2 * attention, 2 * attention)


def test_gpt2_by_the_papers_own_formula():
    counted = count_config(settings_of("gpt2_small"))
    replaced = 12 * 1024 * (768 * 2304 + 2 * 768 * 3072)
    assert counted.published_dense_multiply_adds == replaced + 12 * (805_306_368 + 603_979_776)
    assert sum(layer.dense_multiply_adds for layer in counted.structured) == replaced
    output = next(layer for layer in counted.layers if layer.output_embedding)
    assert output.multiply_adds == 1024 * 768 * 50257
    assert counted.dense_multiply_adds == replaced + 12 * (2 * 805_306_368 + 603_979_776) + output.multiply_adds


def test_the_papers_share_is_of_the_whole_model():
    """Monarch in four blocks, at 43.75% in the paper, is that share of all 9.66e10, not of the replaced layers."""
    blocks = 4

    def monarch(m, n):  # a block-diagonal n x n factor, then one to m rows
        return (min(m, n) * n + m * min(m, n)) // blocks

    replaced = 12 * 1024 * (monarch(2304, 768) + monarch(3072, 768) + monarch(768, 3072))
    rest = 12 * (805_306_368 + 603_979_776)
    total = count_config(settings_of("gpt2_small")).published_dense_multiply_adds
    assert (replaced + rest) / total == pytest.approx(0.4375, abs=1e-4)


def test_known_widths_by_hand(here):
    """Of a converted layer, multiply-adds are positions times the sum of its widths; the rest is dense."""
    from gblr_plugin import convert, prepare
    from gblr_plugin.surgery.layer_settings import LayerSettings

    network = make_task(tiny("vit_base")).network()
    layers = prepare(network, ["*.mlp.fc1"], settings=LayerSettings("trapezoid", budget=0.6))
    (layer,) = layers.values()
    rows, columns = layer.intervals()
    widths = sum(r + c for r, c in zip(rows.width.tolist(), columns.width.tolist(), strict=True) if r and c)
    tokens, dim, hidden = 5, 16, 24
    dense = tokens * (4 * dim**2 + 2 * dim * hidden) + 4 * dim * 768 + 2 * dim + 2 * tokens**2 * dim
    for network_form in (network, convert(network)):
        counted = report(network_form, torch.zeros(1, 3, 32, 32))
        assert counted.dense_multiply_adds == dense
        assert counted.multiply_adds == dense - tokens * (dim * hidden - widths)
        assert counted.relative_flops == widths / (dim * hidden) <= 0.6


def test_the_command_counts_a_config(capfd):
    assert main(["plan", str(CONFIGS / "vit_base.yaml"), "--set", "config_list.0.sparse_ratio=0.5"]) == 0
    shown = capfd.readouterr()
    assert shown.err == ""
    lines = shown.out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == ["layer", "shape", "structure", "comp.", "mult-adds", "params", "rel.", "share"]
    row = next(line for line in lines if re.match(r"\S*11\.mlp\.fc2 ", line))
    assert row.split()[1:] == ["768x3072", "planned", "-", "232M", "1.18M", "0.500", "2.5%"]
    assert any(line.endswith("of 1.72e+10 dense (51.38%)") for line in lines)
    assert main(["plan", str(CONFIGS / "gpt2_small.yaml"), "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["published_dense_multiply_adds"] == 96636764160
    assert main(["plan", str(CONFIGS / "vit_base.yaml"), "--set", "model.hidden_sise=4"]) == 2
    assert "unknown argument 'hidden_sise' of ViTConfig; did you mean 'hidden_size'?" in capfd.readouterr().err


# -- networks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        {"kernel_size": 3, "stride": 2, "padding": 1, "bias": False},
        {"kernel_size": (2, 5), "stride": (1, 3), "padding": (0, 2), "dilation": (2, 1)},
    ],
)
def test_kernel_positions_are_the_convolution_at_its_cost(arguments):
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv2d(6, 10, **arguments)).double()
    x = torch.randn(2, 6, 11, 13, dtype=torch.float64)
    expected, counted = dense(x), report(dense, x)
    split_kernel_positions(dense)
    assert isinstance(dense[0], KernelPositions)
    torch.testing.assert_close(dense(x), expected)
    again = report(dense, x)
    assert (again.multiply_adds, again.parameters) == (counted.multiply_adds, counted.parameters)


def test_kernel_positions_refuse_what_they_cannot_write():
    for odd in (
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.Conv2d(4, 4, 3, padding_mode="circular"),
    ):
        with pytest.raises(ConfigError, match="groups=1 and zero padding"):
            KernelPositions(odd)


def test_the_mixer_mixes_both_ways():
    """One pixel changed reaches every patch; without the blocks it reaches its own alone."""
    torch.manual_seed(0)
    mixer = Mixer(3, 16, 4, 8, 1, 5, 7).double().eval()
    assert sum(p.numel() for p in Mixer().parameters()) == 18_528_264  # Mixer-S/16
    x = torch.randn(1, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    hidden = mixer.blocks[0](mixer.patch(x).flatten(2).transpose(1, 2))
    reach = torch.autograd.grad(hidden[0, 0].square().sum(), x)[0]
    assert (reach[0].abs().sum(0) > 0).all()
    with pytest.raises(ConfigError, match="patch_size 5 must divide image_size 16"):
        Mixer(3, 16, 5)


def test_pretrained_weights_arrive_and_only_the_head_is_new(here):
    from transformers import ViTForImageClassification

    network = make_task(tiny("vit_base_finetune")).network().model
    saved = ViTForImageClassification.from_pretrained("vit").state_dict()
    mine = network.state_dict()
    same = [name for name in saved if saved[name].shape == mine[name].shape and torch.equal(saved[name], mine[name])]
    assert set(mine) - set(same) == {"classifier.weight", "classifier.bias"}
    assert mine["classifier.weight"].shape == (2, 16)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "vit_base_finetune",
            {"pretrained": "no/such"},
            "'no/such' is neither a folder nor in the hub's local cache; model.download",
        ),
        ("vit_base_finetune", {"pretrained": "images"}, "the folder 'images' cannot be used"),
        ("vit_base_finetune", {"hidden_size": 32}, "pretrained 'vit' has no fitting weights for 'vit."),
        ("vit_base_finetune", {"download": 1}, "download must be true or false"),
        ("vit_base", {"hidden_size": "wide"}, "model: "),
        ("vit_base", {"dataset": "mnist"}, "dataset must be one of imagenet, cifar10, cifar100, folder"),
        ("vit_base", {"dataset": "cifar10", "classes": 5}, "cifar10 has 10 classes, got 5"),
        ("vit_base", {"classes": 5}, "has 2 classes, not 5"),
        ("vit_base", {"workers": -1}, "workers must be a whole number of at least 0"),
        ("mixer_small", {"depth": 3}, "depth"),
        ("mixer_small", {"folder": "images"}, "no CIFAR-10 in 'images'"),
        ("resnet18", {"kernel_positions": 1}, "kernel_positions must be true or false"),
        ("gpt2_small", {"n_embed": 8}, "unknown argument 'n_embed' of GPT2Config; did you mean 'n_embd'?"),
        ("gpt2_small", {"context": 64}, "context 64 is above n_positions 32"),
        ("gpt2_small", {"tokenizer": "nowhere"}, "tokenizer: 'nowhere' is neither a folder"),
        ("gpt2_small_scratch", {"tokenizer": None}, "tokenizer is missing"),
        ("gpt2_small_scratch", {"vocab_size": 30}, "the network vocab_size 30"),
        ("gpt2_small", {"folder": "images"}, "no WikiText-103 in 'images'"),
        ("gpt2_small", {"cache": 3}, "cache must be a path"),
        ("bert_base", {"classes": 3}, "the labels of 'sst' are 0, 1; model.classes is 3"),
        ("bert_base", {"context": 1000}, "context 1000 is above max_position_embeddings 512"),
    ],
)
def test_what_cannot_be_used_is_one_line(name, change, message, here):
    settings = tiny(name)
    settings.model.update(change)
    with pytest.raises(ConfigError) as caught:  # noqa: PT012  # made, then used
        task = make_task(settings)
        task.network()
        task.data(0, 4)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_masked_tokens_are_guessed_and_the_held_out_ones_stay(here):
    settings = tiny("bert_base_scratch")
    data = make_task(settings).data(0, 4)
    windows = data.held_out
    first, again = windows[2], windows[2]
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    shown, target = (
        torch.stack(part) for part in zip(*(windows[i % len(windows)] for i in range(len(windows))), strict=True)
    )
    original = torch.stack([windows.tokens[i * 8 : i * 8 + 8] for i in range(len(windows))])
    asked = target != -100
    assert torch.equal(target[asked], original[asked])
    assert torch.equal(shown[~asked], original[~asked])
    assert asked.any(1).all()
    assert 0.1 < float(asked.float().mean()) < 0.3
    assert float((shown[asked] == windows.mask).float().mean()) > 0.6


def test_padding_changes_nothing(here):
    task = make_task(tiny("bert_base"))
    network = task.network().eval()
    ids = torch.tensor([[2, 7, 8, 3]])
    padded = torch.cat([ids, torch.zeros(1, 4, dtype=torch.int64)], 1)
    torch.testing.assert_close(network(ids), network(padded))


def test_training_settings_are_those_of_the_protocol():
    settings = settings_of("vit_base").dense
    assert all(hasattr(settings, name) for name in TrainSettings.__annotations__)
    assert (settings.epochs, round(settings.warmup_fraction * 110), settings_of("vit_base").methods[0].cooldown) == (
        110,
        5,
        0.0909,
    )


@pytest.mark.parametrize(
    ("name", "package", "extra"), [("vit_base", "transformers", "hf"), ("mixer_small", "PIL", "images")]
)
def test_a_missing_package_is_one_line_that_says_what_to_install(name, package, extra, here, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    settings = tiny(name)
    settings.model.update(dataset="folder", folder="images")
    with pytest.raises(ConfigError, match=rf"pip install 'gblr-plugin\[{extra}\]'$"):
        make_task(settings).data(0, 4)
