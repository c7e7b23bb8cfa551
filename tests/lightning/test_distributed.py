"""A Trainer on two gloo processes, with DDP and with FSDP2: one structure, one set of parameters."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gblr_plugin

WORKER = Path(__file__).parent / "distributed_worker.py"


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    package = str(Path(gblr_plugin.__file__).parents[1])
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([package, environment.get("PYTHONPATH", "")])
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(folder), str(rank)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
    return [torch.load(folder / f"results{rank}.pt") for rank in range(2)]


def test_all_end_with_one_structure_within_the_budget(both):
    first = both[0]["ddp"]
    assert 0.39 < first["relative_flops"] <= 0.4
    assert first["steps"] == 12  # of 24 batches, half on each process
    for result in (both[0]["fsdp2"], both[1]["ddp"], both[1]["fsdp2"]):
        assert result["relative_flops"] == first["relative_flops"]
        assert result["steps"] == first["steps"]
        assert result["parameters"].keys() == first["parameters"].keys()
        for name, value in first["parameters"].items():
            assert torch.allclose(result["parameters"][name], value, atol=1e-9), name


def test_dense_weights_are_decomposed_alike_in_all_processes(both):
    first, second = both[0]["dense first"], both[1]["dense first"]
    assert 0.35 < first["relative_flops"] <= 0.4
    assert first["steps"] == 12
    for name, value in first["parameters"].items():
        assert torch.equal(second["parameters"][name], value), name


def test_each_process_goes_on_with_its_random_numbers_and_data(both):
    for result in both:
        for name, value in result["going on"]["whole"].items():
            assert torch.equal(result["going on"]["resumed"][name], value), name
