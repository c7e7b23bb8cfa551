import os

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import gblr_plugin as gblr
import gblr_plugin.serialization.container
from gblr_plugin import ConfigError, GBLRTensor, convert, decompose, families, load, prepare, report, save
from gblr_plugin.families.layers import trainable
from gblr_plugin.kernels import compiled
from gblr_plugin.kernels.buffers import interval_facts
from gblr_plugin.kernels.plan import Plan, dense_plan
from gblr_plugin.surgery.layer_settings import LayerSettings

pytestmark = pytest.mark.usefixtures("plans")
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
    save(model, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_round_trip(model, path):
    loaded = load(path, make)
    assert not loaded.training
    assert torch.equal(loaded(X), model(X))
    assert isinstance(loaded[0].weight, GBLRTensor)
    assert not loaded[4].weight.requires_grad
    assert report(loaded, X) == report(model, X)
    assert os.listdir(path.parent) == ["model.safetensors"]


def test_skeleton_on_the_meta_device(model, path):
    with torch.device("meta"):
        skeleton = make()
    assert torch.equal(load(path, skeleton)(X), model(X))


def test_a_buffer_that_is_not_saved_cannot_stay_on_the_meta_device(tmp_path):
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.ones(3), persistent=False)

    save(Table(), tmp_path / "table.safetensors")
    with torch.device("meta"):
        skeleton = Table()
    with pytest.raises(ConfigError, match="'table' of the network is on the meta device"):
        load(tmp_path / "table.safetensors", skeleton)


def test_any_reader_of_safetensors_sees_plain_tensors(path):
    with safe_open(path, "pt") as file:
        assert file.metadata()["format"] == "pt"
        assert set(file.keys()) >= {"0.weight_factors", "0.weight_intervals", "0.bias", "1.running_mean"}


def test_a_file_holds_the_factors_and_little_else(model, path, tmp_path):
    save(make(), tmp_path / "dense.safetensors")
    assert path.stat().st_size < (tmp_path / "dense.safetensors").stat().st_size
    with safe_open(path, "pt") as file:
        assert file.get_slice("4.weight_factors").get_shape() == [model[4].weight.stored]


@pytest.mark.parametrize("family", families.names())
def test_every_family_comes_back_into_a_dense_skeleton(tmp_path, family):
    torch.manual_seed(0)
    network = make()
    network(X)
    gblr.prepare(network, ["0"] if family == "tucker2" else None, family=family, budget=0.6)
    network = gblr.convert(network.eval())
    save(network, tmp_path / "model.safetensors")
    with torch.device("meta"):
        empty = make()
    for skeleton in (make(), empty):
        loaded = load(tmp_path / "model.safetensors", skeleton)
        assert torch.equal(loaded(X), network(X))
        assert report(loaded, X) == report(network, X)
        assert not any(p.requires_grad for n, p in loaded[0].named_parameters() if n != "bias")


def test_stacked_families_and_lone_layers(tmp_path):
    layer = trainable(families.get("monarch"), nn.Linear(24, 36), 0.5, row_splits=3)
    layer = gblr.convert(layer.eval())
    save(layer, tmp_path / "model.safetensors")
    loaded = load(tmp_path / "model.safetensors", nn.Linear(24, 36))
    x = torch.randn(2, 24)
    assert torch.equal(loaded(x), layer(x))


def test_weights_of_torchao_beside_ours(tmp_path):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
    prepare(network, ["0"], settings=HALF)
    convert(network.eval())
    quantize_(network, Int8WeightOnlyConfig(version=2))
    save(network, tmp_path / "model.safetensors")
    loaded = load(tmp_path / "model.safetensors", nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32)))
    x = torch.randn(2, 64)
    assert type(loaded[2].weight.data) is type(network[2].weight.data) is not torch.Tensor
    assert loaded[0].weight.factor_dtype == "int8"
    assert torch.equal(loaded(x), network(x))


@pytest.mark.parametrize("plan", [None, Plan(8, 16), dense_plan()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, "int8"])
def test_weights_come_back_bit_by_bit(tmp_path, plan, dtype, monkeypatch):
    monkeypatch.setattr(
        "gblr_plugin.tensor.gblr_tensor.missing", lambda *_: False
    )  # the kernel that the plan names is here
    torch.manual_seed(0)
    layer = nn.Linear(33, 30)
    matrix = decompose(layer.weight.detach(), 0.5, row_splits=3)
    matrix = matrix if dtype == "int8" else matrix.to(dtype=dtype)
    weight = GBLRTensor.from_structured(matrix, plan=plan, factor_dtype="int8" if dtype == "int8" else None)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    save(layer, tmp_path / "model.safetensors")
    again = load(tmp_path / "model.safetensors", nn.Linear(33, 30)).weight
    assert torch.equal(again.factors, weight.factors)
    assert torch.equal(again.lists, weight.lists)
    assert (again.scales is None) == (weight.scales is None)
    assert weight.scales is None or torch.equal(again.scales, weight.scales)
    assert (again.packing, again.plan) == (weight.packing, weight.plan)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), ("int8", 1e-5)])
def test_without_its_kernel_a_weight_comes_back_under_a_plan_of_this_machine(tmp_path, dtype, tolerance, monkeypatch):
    torch.manual_seed(0)
    layer, x = nn.Linear(33, 30, bias=False), torch.randn(5, 33)
    matrix = decompose(layer.weight.detach(), 0.5, row_splits=3)
    matrix = matrix if dtype == "int8" else matrix.to(dtype=dtype)
    named = Plan(8, 16, ((1, "blocks"), (1024, "compiled")))
    weight = GBLRTensor.from_structured(matrix, plan=named, factor_dtype="int8" if dtype == "int8" else None)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    save(layer, tmp_path / "model.safetensors")
    expected = x.to(matrix.u.dtype).double() @ weight.to_dense().double().t()
    monkeypatch.setattr(compiled, "_installed", lambda kind: False)
    loaded = load(tmp_path / "model.safetensors", nn.Linear(33, 30, bias=False))
    assert not any(name == "compiled" for _, name in loaded.weight.plan.kernels)
    same, original = loaded.weight.to_structured(), weight.to_structured()
    assert torch.equal(same.rows.start, original.rows.start)
    torch.testing.assert_close(same.u, original.u)
    y = loaded(x.to(matrix.u.dtype))
    assert float((y - expected).norm()) <= tolerance * float(expected.norm())


@pytest.mark.parametrize("dtype", [None, "int8"])
@pytest.mark.parametrize("part", ["factors", "lists", "order", "scales"])
def test_damaged_buffers_are_named_not_saved(tmp_path, part, dtype):
    layer = nn.Linear(40, 30)
    weight = GBLRTensor.from_structured(decompose(layer.weight.detach(), 0.5), factor_dtype=dtype)
    if part == "scales":
        if dtype is None:
            pytest.skip("no scales")
        weight.scales = weight.scales[:1]
    elif part == "factors":
        weight.factors = weight.factors[:-1]
    elif part == "lists":
        weight.lists[0] = (1 << 20) + 77
    else:
        words = interval_facts(weight.packing, weight.lists).numel() // (2 if weight.packing.narrow else 1)
        weight.lists[weight.packing.intervals_at + words - 1] = 5
    layer.weight = nn.Parameter(weight, requires_grad=False)
    with pytest.raises(ConfigError, match="save: 'weight' is damaged: GBLR tensor: its"):
        save(layer, tmp_path / "model.safetensors")
    assert not (tmp_path / "model.safetensors").exists()


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
    save(model, tmp_path / "gpt.safetensors")
    loaded = load(tmp_path / "gpt.safetensors", lambda: transformers.GPT2LMHeadModel(config))
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
    save(model, tmp_path / "model.safetensors")
    loaded = load(tmp_path / "model.safetensors", Shared)
    x = torch.randn(2, 16)
    assert loaded.a is loaded.b
    assert torch.equal(loaded(x), model(x))


def test_a_model_in_training_is_not_saved(tmp_path):
    network = make()
    prepare(network, settings=HALF)
    with pytest.raises(ConfigError, match="layer '0' is not converted yet"):
        save(network, tmp_path / "model.safetensors")
    assert os.listdir(tmp_path) == []


def test_a_failing_write_keeps_the_earlier_file(model, path, monkeypatch):
    earlier = path.read_bytes()

    def broken(tensor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gblr_plugin.serialization.container, "_bytes", broken)
    with pytest.raises(OSError, match="No space left"):
        save(model, path)
    assert path.read_bytes() == earlier
    assert os.listdir(path.parent) == ["model.safetensors"]


def refused(path, network=make):
    with pytest.raises(ConfigError) as caught:
        load(path, network)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("load: ")
    assert str(path) in message
    return message


def test_missing_file(tmp_path):
    assert "no file" in refused(tmp_path / "nothing.safetensors")


def test_a_folder(tmp_path):
    assert "no model.safetensors" in refused(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_truncated_file(path, share):
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert "damaged" in refused(path)


def test_text_and_pickled_code(tmp_path):
    (tmp_path / "text.pt").write_text("hello")
    assert "damaged" in refused(tmp_path / "text.pt")
    torch.save(make(), tmp_path / "code.pt")
    assert "torch.save" in refused(tmp_path / "code.pt")


def test_wrong_network(path):
    assert "does not fit the network" in refused(path, lambda: nn.Sequential(nn.Linear(4, 4)))
    other = make()
    other[4] = nn.Linear(64, 25, bias=False)
    assert "4.weight" in refused(path, other)
