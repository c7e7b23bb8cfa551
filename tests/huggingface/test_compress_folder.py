import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import gblr_plugin
from gblr_plugin import ConfigError, GBLRTensor, convert, decompose, load, prepare, report
from gblr_plugin.cli import main
from gblr_plugin.families.layers import FamilyLayer
from gblr_plugin.huggingface import compress_folder as sharded
from gblr_plugin.huggingface.compress_folder import CompressSettings, compress_folder
from gblr_plugin.serialization.container import INDEX, entries_of, write_container
from gblr_plugin.serialization.model import flatten_model

transformers = pytest.importorskip("transformers")
FAST = CompressSettings(0.5, method="trapezoid")


def network(**changes):
    torch.manual_seed(0)
    sizes = {"n_layer": 3, "n_head": 2, "n_embd": 32, "vocab_size": 60, "n_positions": 16} | changes
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(bos_token_id=0, eos_token_id=0, **sizes)).eval()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "dense"
    network().save_pretrained(folder, max_shard_size="60KB")
    (folder / "tokenizer.json").write_text("{}")
    assert (folder / INDEX).exists()
    return folder


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def finished(source):
    output = source.parent / "finished"
    compress_folder(source, output, FAST)
    return output


def test_a_folder_that_transformers_and_load_read(source, finished):
    assert {path.name for path in finished.iterdir()} == {path.name for path in source.iterdir()}
    loaded = load(finished)
    kinds = [isinstance(p.data, GBLRTensor) for p in loaded.parameters()]
    assert sum(kinds) == 12  # the tied head stays dense
    tokens = torch.randint(0, 60, (2, 8))
    dense = network()
    for name, module in loaded.named_modules():
        if isinstance(getattr(module, "weight", None), GBLRTensor):
            weight = dense.get_submodule(name).weight
            weight.data = module.weight.to_dense().T.contiguous()
    assert torch.allclose(dense(tokens).logits, loaded(tokens).logits, atol=1e-4)
    again = transformers.AutoModelForCausalLM.from_pretrained(finished)
    assert torch.equal(again(tokens).logits, loaded(tokens).logits)


@pytest.mark.usefixtures("plans")
@pytest.mark.parametrize(("family", "kind"), [("block_low_rank", GBLRTensor), ("monarch", FamilyLayer)])
def test_a_family_gives_the_folder_of_a_converted_model(source, tmp_path, family, kind):
    settings = CompressSettings(0.5, row_splits={"*c_attn": 3}, family=family)
    summary = compress_folder(source, tmp_path / "out", settings)
    model = network()
    prepare(model, ["*c_attn"], family=family, budget=0.5, row_splits=3)
    prepare(model, ["*c_proj", "*c_fc"], family=family, budget=0.5)
    convert(model)
    tokens = torch.randint(0, 60, (2, 8))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tensors, header = flatten_model(model)
    for loaded in (load(tmp_path / "out"), load(tmp_path / "out", network()), theirs):
        found = [m if kind is FamilyLayer else getattr(m, "weight", None) for m in loaded.transformer.h.modules()]
        assert sum(isinstance(value, kind) for value in found) == 12
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)
        written, said = flatten_model(loaded)
        assert (said.families, said.weights.keys(), said.full) == (header.families, header.weights.keys(), header.full)
        assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())
        assert report(loaded, tokens) == report(model, tokens)
    layers = [layer for layer in report(model, tokens).layers if layer.structure != "dense"]
    assert summary.layers == 12
    spent, dense = (sum(getattr(layer, name) for layer in layers) for name in ("multiply_adds", "dense_multiply_adds"))
    assert summary.relative_flops == pytest.approx(spent / dense)


def test_a_family_goes_on_where_it_stopped_and_on_several_processes(source, tmp_path, together, monkeypatch):
    settings, done = CompressSettings(0.5, family="monarch"), []
    compress_folder(source, tmp_path / "finished", settings)
    original = sharded._decompose

    def killed(module, layer, settings):
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(original(module, layer, settings))

    with monkeypatch.context() as patch:
        patch.setattr(sharded, "_decompose", killed)
        with pytest.raises(KeyboardInterrupt):
            compress_folder(source, tmp_path / "out", settings)
    with pytest.raises(ConfigError, match="unfinished work on another source or with other settings"):
        compress_folder(source, tmp_path / "out", CompressSettings(0.5, family="block_low_rank"))
    script = SCRIPT.replace('method="trapezoid"', 'family="monarch"')
    both = [start(source, tmp_path / "out", script=script, RANK=str(rank), **together) for rank in range(2)]
    said = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert files(tmp_path / "out") == files(tmp_path / "finished")


def test_the_index_names_every_tensor_where_it_is(finished):
    index = json.loads((finished / INDEX).read_text())
    for name in set(index["weight_map"].values()):
        held = load_file(finished / name)
        assert {key for key, file in index["weight_map"].items() if file == name} == set(held)


def test_command_line(source, tmp_path, capfd):
    arguments = ["compress", str(source), "--budget", "0.5", "--method", "svd", "--output", str(tmp_path / "out")]
    arguments += ["--layers", "*c_attn", "*c_fc", "--exclude", "*.0.*", "--row-splits", "*c_attn=3", "--align", "2"]
    assert main([*arguments, "--factor-dtype", "int8"]) == 0
    said = capfd.readouterr().out
    assert said.startswith("4 layers at relative FLOPs 0.")
    weight = load(tmp_path / "out").transformer.h[1].attn.c_attn.weight
    assert weight.factor_dtype == "int8"
    assert len(weight.packing.split_sizes) == 3
    assert main(arguments) == 2
    assert "is not empty; give a new folder" in capfd.readouterr().err
    assert main(["compress", str(source), "--budget", "2", "--output", str(tmp_path / "o")]) == 2
    assert main(["compress", str(source), "--budget", ".5", "--output", "o", "--row-splits", "3"]) == 2
    assert "need PATTERN=N" in capfd.readouterr().err


SCRIPT = """
import sys, time
from gblr_plugin.huggingface import compress_folder as sharded
from gblr_plugin.huggingface.compress_folder import CompressSettings, compress_folder
slow = float(sys.argv[3])
original = sharded.write_container
def slowly(path, entries, metadata, read):
    def late(name):
        time.sleep(slow)
        return read(name)
    original(path, entries, metadata, late)
sharded.write_container = slowly
print("begun", flush=True)
compress_folder(sys.argv[1], sys.argv[2], CompressSettings(0.5, method="trapezoid"))
"""


def start(source, output, argument=0.0, script=SCRIPT, **environment):
    package = str(Path(gblr_plugin.__file__).parents[1])
    path = os.pathsep.join([package, os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-c", script, str(source), str(output), str(argument)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_killed_and_started_again_it_gives_the_same_bytes(source, finished, tmp_path):
    output = tmp_path / "out"
    process = start(source, output, 0.03)
    assert process.stdout.readline() == "begun\n"
    while not (output / ".gblr" / "task.json").exists():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.5)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (output / "config.json").exists()
    with pytest.raises(ConfigError, match="unfinished work on another source or with other settings"):
        compress_folder(source, output, CompressSettings(0.25, method="trapezoid"))
    compress_folder(source, output, FAST)
    assert files(output) == files(finished)


def test_killed_while_it_tidies_up(source, finished, tmp_path, monkeypatch):
    def killed(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            compress_folder(source, tmp_path / "out", FAST)
    compress_folder(source, tmp_path / "out", FAST)
    assert files(tmp_path / "out") == files(finished)


@pytest.fixture
def together():
    """What the environment of two processes has in common."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo"}


def test_two_processes_give_the_same_bytes(source, finished, tmp_path, together):
    both = [start(source, tmp_path / "out", RANK=str(rank), **together) for rank in range(2)]
    said = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert files(tmp_path / "out") == files(finished)


UNEVEN = """
import os, sys, time
from datetime import timedelta
from torch import distributed as dist
from torch.distributed import distributed_c10d
from gblr_plugin.huggingface import compress_folder as sharded
from gblr_plugin.huggingface.compress_folder import CompressSettings, compress_folder
short = timedelta(seconds=1)  # in place of half an hour
distributed_c10d._get_default_timeout = lambda backend: short
if sys.argv[3] == "joined":
    dist.init_process_group("gloo", timeout=timedelta(minutes=2))
    distributed_c10d._set_pg_timeout(short)
original = sharded._decompose
def slowly(module, layer, settings):
    if os.environ["RANK"] == "1" and not os.environ.get("SLEPT"):
        if sys.argv[3] == "failing":
            raise OSError("no space left")
        os.environ["SLEPT"] = "1"
        time.sleep(3)
    original(module, layer, settings)
sharded._decompose = slowly
compress_folder(sys.argv[1], sys.argv[2], CompressSettings(0.5, method="trapezoid"))
assert dist.is_initialized() == (sys.argv[3] == "joined")  # as it was
"""


@pytest.mark.parametrize("case", ["alone", "joined"])
def test_processes_wait_for_one_that_takes_longer_than_the_usual_limit(case, source, finished, tmp_path, together):
    both = [start(source, tmp_path / "out", case, script=UNEVEN, RANK=str(rank), **together) for rank in range(2)]
    said = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert files(tmp_path / "out") == files(finished)


def test_processes_do_not_wait_for_one_that_has_failed(source, tmp_path, together):
    both = [start(source, tmp_path / "out", "failing", script=UNEVEN, RANK=str(rank), **together) for rank in range(2)]
    said = [process.communicate(timeout=300)[0] for process in both]
    assert "no space left" in said[1]
    assert all(process.returncode for process in both)


MEMORY = """
import resource, sys
from gblr_plugin import GBLRTensor
from gblr_plugin.huggingface import compress_folder as sharded, folders as hf
from gblr_plugin.huggingface.compress_folder import CompressSettings, compress_folder
import torch
torch.linalg.svd(torch.randn(64, 64))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
compress_folder(sys.argv[1], sys.argv[2], CompressSettings(0.5, ("*.mlp.c_fc",), method="svd"))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_memory_follows_the_largest_layer_not_the_model(tmp_path):
    config = transformers.GPT2Config(
        n_layer=12, n_head=2, n_embd=96, n_inner=8192, vocab_size=8, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in transformers.GPT2LMHeadModel(config).state_dict().items()}
    source, weight_map, total = tmp_path / "dense", {}, 0
    for layer in range(12):  # a shard a layer; never the whole model at once
        names = [n for n in shapes if n.startswith(f"transformer.h.{layer}.")]
        names += [] if layer else [n for n in shapes if ".h." not in n and n != "lm_head.weight"]
        tensors = {name: torch.randn(shapes[name]) * 0.02 for name in names}
        file = f"model-{layer + 1:05d}-of-00012.safetensors"
        write_container(source / file, entries_of(tensors), {"format": "pt"}, tensors.__getitem__)
        weight_map.update(dict.fromkeys(names, file))
        total += sum(tensor.nbytes for tensor in tensors.values())
    (source / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (source / "config.json").write_text(json.dumps({**config.to_dict(), "architectures": ["GPT2LMHeadModel"]}))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(Path(gblr_plugin.__file__).parents[1]), environment.get("PYTHONPATH", "")]
    )
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(source), str(tmp_path / "out")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    peak = float(done.stdout.split()[-1])
    assert total > 70e6
    assert peak < 0.5 * total / 1e6  # measured: 0.21


def test_what_is_refused(source, tmp_path):
    with pytest.raises(ConfigError, match="no folder"):
        compress_folder(tmp_path / "nothing", tmp_path / "out", FAST)
    with pytest.raises(ConfigError, match="same folder"):
        compress_folder(source, source, FAST)
    with pytest.raises(ConfigError, match="tied to"):
        compress_folder(source, tmp_path / "out", CompressSettings(0.5, ("lm_head",)))
    with pytest.raises(ConfigError, match="matches no module"):
        compress_folder(source, tmp_path / "out", CompressSettings(0.5, ("nothing*",)))
    with pytest.raises(ConfigError, match="row_splits: pattern 'x' matches no chosen layer"):
        compress_folder(source, tmp_path / "out", CompressSettings(0.5, row_splits={"x": 3}))
    with torch.device("meta"):
        other, deeper = network(n_embd=16), network(n_layer=4)
    with pytest.raises(ConfigError, match="has shape"):
        compress_folder(source, tmp_path / "out", FAST, model=other)
    with pytest.raises(ConfigError, match=r"has no tensor 'transformer\.h\.3"):
        compress_folder(source, tmp_path / "out", FAST, model=deeper)
    with pytest.raises(ConfigError, match=r"layer 'transformer\.h\.0.*tucker2: only for Conv1d and Conv2d"):
        compress_folder(source, tmp_path / "out", CompressSettings(0.5, family="tucker2"))
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="row_splits 5 does not divide"):
        compress_folder(source, tmp_path / "out", CompressSettings(0.5, row_splits=5))
    for bad in (
        {"budget": 0},
        {"budget": 0.5, "method": "x"},
        {"budget": 0.5, "factor_dtype": "int4"},
        {"budget": 0.5, "align": 0},
        {"budget": 0.5, "row_splits": {"*": "3"}},
        {"budget": 0.5, "family": "monarch", "method": "svd"},
        {"budget": 0.5, "family": "monarch", "align": 8},
        {"budget": 0.5, "family": "block_low_rank", "seed": 1},
        {"budget": 0.5, "family": "block_low_rank", "factor_dtype": "int8"},
    ):
        with pytest.raises(ConfigError, match=r"^compress: "):
            CompressSettings(**bad)


def test_a_compressed_folder_is_not_compressed_again(finished, tmp_path):
    with pytest.raises(ConfigError, match=r"cannot be used|is of a compressed model"):
        compress_folder(finished, tmp_path / "out", FAST)


def test_one_file_and_a_network_of_ones_own(tmp_path):
    torch.manual_seed(0)
    dense = torch.nn.Sequential(torch.nn.Linear(32, 24), torch.nn.ReLU(), torch.nn.Linear(24, 8))
    (tmp_path / "dense").mkdir()
    tensors = {**dense.state_dict(), "of.another": torch.ones(3)}  # which the network lacks
    write_container(tmp_path / "dense" / "model.safetensors", entries_of(tensors), {}, tensors.__getitem__)
    with torch.device("meta"):
        network = torch.nn.Sequential(torch.nn.Linear(32, 24), torch.nn.ReLU(), torch.nn.Linear(24, 8))
    summary = compress_folder(tmp_path / "dense", tmp_path / "out", CompressSettings(0.6, method="svd"), model=network)
    assert summary.layers == 2
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.safetensors"}
    assert "of.another" not in load_file(tmp_path / "out" / "model.safetensors")

    def make():
        return torch.nn.Sequential(torch.nn.Linear(32, 24), torch.nn.ReLU(), torch.nn.Linear(24, 8))

    loaded, x = load(tmp_path / "out" / "model.safetensors", make), torch.randn(4, 32)
    assert all(isinstance(loaded[i].weight, GBLRTensor) for i in (0, 2))
    again = make()
    for i in (0, 2):
        again[i].weight.data, again[i].bias.data = loaded[i].weight.to_dense(), dense[i].bias.data
    torch.testing.assert_close(loaded(x), again(x))


@pytest.mark.parametrize("family", [None, "block_low_rank", "monarch"])
def test_a_layer_in_two_places(tmp_path, family):
    def make():
        shared = torch.nn.Linear(32, 32)
        return torch.nn.Sequential(shared, torch.nn.ReLU(), shared).eval()

    dense = make()
    tensors = {name: value for name, value in dense.state_dict().items() if name.startswith("0.")}
    write_container(tmp_path / "dense" / "model.safetensors", entries_of(tensors), {}, tensors.__getitem__)
    compress_folder(tmp_path / "dense", tmp_path / "out", CompressSettings(0.5, family=family), model=make())
    loaded = load(tmp_path / "out", make())
    assert loaded[0] is loaded[2]
    eye = torch.eye(32)
    if family is None:
        expected = torch.nn.functional.linear(eye, decompose(dense[0].weight.detach(), 0.5).to_dense(), dense[0].bias)
    else:
        expected = convert(torch.nn.Sequential(*prepare(dense, family=family, budget=0.5).values()))(eye)
    torch.testing.assert_close(loaded[0](eye), expected)


def test_what_a_killed_process_left_is_removed_and_a_damaged_note_is_no_note(source, finished, tmp_path, monkeypatch):
    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sharded, "_write_shard", killed)
        with pytest.raises(KeyboardInterrupt):
            compress_folder(source, tmp_path / "out", FAST)
    work = tmp_path / "out" / sharded.WORK
    for folder in (tmp_path / "out", work):
        (folder / ".half.safetensors.x1y2").write_bytes(b"half")
        (folder / ".a.b.folder").mkdir()  # not what such a process leaves
    note = (work / "task.json").read_text()
    (work / "task.json").write_text(note[:-9])
    with pytest.raises(ConfigError, match="holds unfinished work on another source or with other settings"):
        compress_folder(source, tmp_path / "out", FAST)
    (work / "task.json").write_text(note)
    compress_folder(source, tmp_path / "out", FAST)
    (tmp_path / "out" / ".a.b.folder").rmdir()
    assert files(tmp_path / "out") == files(finished)


def test_a_folder_of_something_else_is_left_alone(source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="is not empty; give a new folder"):
        compress_folder(source, tmp_path / "out", FAST)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]
