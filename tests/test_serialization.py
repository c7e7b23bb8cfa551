import os

import pytest
import torch
from torch import nn

import gblr_plugin.serialization
from gblr_plugin import ConfigError, GBLRTensor, convert, load, prepare, report, save
from gblr_plugin.conversion import LayerSettings

HALF = LayerSettings("trapezoid", budget=0.5)


def make():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(64, 24, bias=False)
    )


X = torch.randn(2, 3, 4, 4)


@pytest.fixture
def model():
    torch.manual_seed(0)
    network = make()
    network(X)  # statistics of the norm
    prepare(network, settings=HALF)
    return convert(network.eval())


@pytest.fixture
def path(tmp_path, model):
    save(model, tmp_path / "model.pt")
    return tmp_path / "model.pt"


def test_round_trip(model, path):
    loaded = load(path, make)
    assert not loaded.training
    assert torch.equal(loaded(X), model(X))
    assert isinstance(loaded[0].weight, GBLRTensor)
    assert not loaded[4].weight.requires_grad
    assert report(loaded, X) == report(model, X)
    assert os.listdir(path.parent) == ["model.pt"]


def test_skeleton_on_the_meta_device(model, path):
    with torch.device("meta"):
        skeleton = make()
    assert torch.equal(load(path, skeleton)(X), model(X))


def test_a_buffer_that_is_not_saved_cannot_stay_on_the_meta_device(tmp_path):
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.ones(3), persistent=False)

    save(Table(), tmp_path / "table.pt")
    with torch.device("meta"):
        skeleton = Table()
    with pytest.raises(ConfigError, match="'table' of the network is on the meta device"):
        load(tmp_path / "table.pt", skeleton)


def test_it_needs_no_pickled_code(path):
    content = torch.load(path, weights_only=True)
    assert content["format"] == "gblr-plugin"


def test_hugging_face_layers_also_square_ones_stored_dense(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=16, vocab_size=40, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    prepare(model, ["*c_attn", "*c_fc"], settings=HALF)
    prepare(model, ["*attn.c_proj"])  # full widths, and 16 x 16: stored dense, transposed
    convert(model)
    x = torch.randint(0, 40, (2, 6))
    save(model, tmp_path / "gpt.pt")
    loaded = load(tmp_path / "gpt.pt", lambda: transformers.GPT2LMHeadModel(config))
    assert torch.equal(loaded(x).logits, model(x).logits)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    assert report(loaded, x) == report(model, x)


def test_shared_modules_stay_shared(tmp_path):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(16, 16)
            self.b = self.a

        def forward(self, x):
            return self.b(self.a(x))

    model = Shared()
    prepare(model, settings=HALF)
    convert(model)
    save(model, tmp_path / "model.pt")
    loaded = load(tmp_path / "model.pt", Shared)
    x = torch.randn(2, 16)
    assert loaded.a is loaded.b
    assert torch.equal(loaded(x), model(x))


def test_a_model_in_training_is_not_saved(tmp_path):
    network = make()
    prepare(network, settings=HALF)
    with pytest.raises(ConfigError, match="layer '0' is not converted yet"):
        save(network, tmp_path / "model.pt")
    assert os.listdir(tmp_path) == []


def test_a_failing_write_keeps_the_earlier_file(model, path, monkeypatch):
    earlier = path.read_bytes()

    def broken(content, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gblr_plugin.serialization.torch, "save", broken)
    with pytest.raises(OSError, match="No space left"):
        save(model, path)
    assert path.read_bytes() == earlier
    assert os.listdir(path.parent) == ["model.pt"]


def refused(path, network=make):
    with pytest.raises(ConfigError) as caught:
        load(path, network)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("load: ")
    assert str(path) in message
    return message


def test_missing_file(tmp_path):
    assert "no file" in refused(tmp_path / "nothing.pt")


def test_a_folder(tmp_path):
    assert "cannot read" in refused(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_truncated_file(path, share):
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert "damaged" in refused(path)


@pytest.mark.parametrize(
    "content",
    [
        {"weight": torch.ones(3)},
        [1, 2],
        {"format": "gblr-plugin", "version": 1},
        {"format": "gblr-plugin", "version": 1, "state": [], "linear": [], "notes": {}},
        {"format": "gblr-plugin", "version": 1, "state": {}, "linear": [], "notes": {"0": {"forward": "x"}}},
    ],
)
def test_foreign_file(tmp_path, content):
    torch.save(content, tmp_path / "other.pt")
    assert "gblr_plugin model file" in refused(tmp_path / "other.pt")


@pytest.mark.parametrize("change", [lambda lists: lists + 1000, lambda lists: lists - 1, lambda lists: lists[:-5]])
def test_indices_that_do_not_fit_together(model, path, change):
    weight = model[4].weight
    content = torch.load(path, weights_only=True)
    content["state"]["4.weight"] = GBLRTensor(
        weight.factors, change(weight.lists), weight.packing, weight.plan, weight.outer_shape
    )
    torch.save(content, path)
    assert "the indices of '4.weight' do not fit" in refused(path)


def test_text_and_pickled_code(tmp_path):
    (tmp_path / "text.pt").write_text("hello")
    assert "damaged" in refused(tmp_path / "text.pt")
    torch.save(make(), tmp_path / "code.pt")
    assert "damaged" in refused(tmp_path / "code.pt")


def test_later_format(tmp_path):
    torch.save({"format": "gblr-plugin", "version": 2}, tmp_path / "later.pt")
    assert "format version 2, allowed is 1" in refused(tmp_path / "later.pt")


def test_wrong_network(path):
    assert "does not fit the network" in refused(path, lambda: nn.Sequential(nn.Linear(4, 4)))
    other = make()
    other[4] = nn.Linear(64, 25, bias=False)
    assert "4.weight" in refused(path, other)
