"""Two gloo processes against one: the same losses, structures and parameters."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import gblr_plugin as gblr
from gblr_plugin import ConfigError
from gblr_plugin.layers.distributed_parameters import full_tensor, write_full_tensor
from gblr_plugin.tensor.distributed import ComponentParallel, component_part

WORKER = Path(__file__).parent / "distributed_worker.py"


def load_worker():
    spec = importlib.util.spec_from_file_location("distributed_worker", WORKER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


worker = load_worker()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    package = str(Path(gblr.__file__).parents[1])
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([package, environment.get("PYTHONPATH", "")])
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(folder), str(rank), "2"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
    return folder


@pytest.fixture(scope="module")
def both(folder):
    return [torch.load(folder / f"results{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def alone():
    model, learner = worker.make()
    optimizer = worker.optimizer_of(model)
    learner.attach_all([optimizer])
    losses = worker.train(model, learner, optimizer, 0, worker.STEPS)
    result = {"losses": losses.clone(), **worker.state_of(model, learner)}
    result["parameters"] = {name: value.clone() for name, value in result["parameters"].items()}
    result["more"] = worker.train(model, learner, optimizer, worker.STEPS, worker.STEPS + 2)
    result["later"] = worker.state_of(model, learner)
    return result


def assert_same(found, expected):
    assert found["costs"] == expected["costs"]
    assert found["frozen"]
    assert found["relative_flops"] == expected["relative_flops"] <= 0.4
    assert found["parameters"].keys() == expected["parameters"].keys()
    for name, value in expected["parameters"].items():
        assert torch.allclose(found["parameters"][name], value, atol=1e-9), name


@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_two_processes_learn_what_one_learns(both, alone, way):
    for results in both:
        assert torch.allclose(results[way]["losses"], alone["losses"], atol=1e-9)
        assert_same(results[way], alone)


def test_a_structure_frozen_before_ddp_trains_on(both, alone):
    for results in both:
        found = results["ddp_of_one_frozen_before"]
        assert torch.allclose(found["losses"], alone["more"], atol=1e-9)
        assert_same(found, alone["later"])


def test_a_sharded_checkpoint_resumes(both, alone):
    for results in both:
        assert_same(results["fsdp2_resumed"], alone)


def test_a_sharded_checkpoint_resumes_on_one_process(folder, alone):
    model, learner = worker.make()
    optimizer = worker.optimizer_of(model)
    learner.attach_all([optimizer])
    worker.resume(model, optimizer, learner, folder / "checkpoint")
    worker.train(model, learner, optimizer, worker.HALFWAY, worker.STEPS)
    assert_same(worker.state_of(model, learner), alone)


@pytest.mark.parametrize("way", ["frozen_ddp", "frozen_fsdp2"])
def test_a_converted_model_trains_its_biases(both, way):
    model = worker.converted()
    expected = worker.fine_tuned(model, model, 0, 1)
    for results in both:
        assert torch.allclose(results[way]["losses"], expected["losses"], atol=1e-12)
        for name, bias in expected["biases"].items():
            assert torch.allclose(results[way]["biases"][name], bias, atol=1e-12)


def test_components_on_two_processes_give_the_same_output_and_gradients(both):
    model = worker.converted()
    x = worker.batch(0)[0].requires_grad_()
    y = model(x)
    y.square().sum().backward()
    for results in both:
        found = results["frozen_tensor_parallel"]
        assert torch.allclose(found["output"], y, atol=1e-12)
        assert torch.allclose(found["gradient"], x.grad, atol=1e-12)
        assert torch.allclose(found["bias"], model[0].bias.grad, atol=1e-12)
        assert 0.4 < found["share"] < 0.6


@pytest.mark.parametrize("factor_dtype", [None, "int8"])
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_parts_sum_to_the_weight(parts, factor_dtype):
    torch.manual_seed(0)
    matrix = gblr.decompose(torch.randn(24, 18), 0.6, row_splits=2)
    weight = gblr.GBLRTensor.from_structured(matrix, factor_dtype=factor_dtype)
    pieces = [component_part(weight, part, parts) for part in range(parts)]
    assert sum(piece.stored for piece in pieces) == weight.stored
    assert max(p.stored for p in pieces) < 1.5 * weight.stored / parts
    tolerance = 1e-5 if factor_dtype is None else 0.1  # rounded once more
    assert torch.allclose(sum(piece.to_dense() for piece in pieces), weight.to_dense(), atol=tolerance)


def test_what_has_no_components_is_refused():
    with pytest.raises(ConfigError, match="without a structured weight"):
        ComponentParallel()._apply(nn.Linear(2, 2), None)
    weight = gblr.GBLRTensor.from_structured(gblr.decompose(torch.randn(8, 8), 1.0))
    with pytest.raises(ConfigError, match="stored dense has no components"):
        component_part(weight, 0, 2)


def test_plain_parameters_are_whole():
    parameter = nn.Parameter(torch.zeros(2, 3))
    write_full_tensor(parameter, torch.ones(2, 3))
    assert torch.equal(full_tensor(parameter), torch.ones(2, 3))
    assert not full_tensor(parameter).requires_grad


def test_widths_too_coarse_for_intervals():
    model, _ = worker.make()
    layer = model[0]
    layer.widths = nn.Parameter(layer.widths.detach().bfloat16())
    with pytest.raises(gblr.GBLRError, match="too coarse for intervals"):
        layer(torch.randn(2, 16, dtype=torch.float64))


def test_hosts_that_would_cut_a_frozen_weight_are_told_what_to_do():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for wrap in (DistributedDataParallel, fully_shard):
            with pytest.raises(gblr.GBLRError, match="keep_frozen_local"):
                wrap(worker.converted())
    finally:
        dist.destroy_process_group()
