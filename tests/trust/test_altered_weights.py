"""Weights that somebody altered are refused before anything is multiplied, whichever way they came; no process crashes.

``GBLR_ALTERED=10000`` alters as many as docs/notes/inputs.md says.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gblr_plugin as gblr
from gblr_plugin.kernels.compiled import available

COMPILED = available(torch.device("cpu"), torch.float32)
CASES = int(os.environ.get("GBLR_ALTERED", "480"))
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")


def in_a_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    package = str(Path(gblr.__file__).parents[1])
    path = os.pathsep.join([package, os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True, timeout=60 + CASES)


def test_no_altered_weight_crashes_a_process_or_multiplies_wrongly() -> None:
    seed = os.environ.get("GBLR_ALTERED_SEED", "0")
    script = str(Path(__file__).with_name("altering.py"))
    done = in_a_process(script, "--cases", str(CASES), "--seed", seed)
    assert done.stdout, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["failures"] == []
    assert done.returncode == 0
    assert sum(sum(outcomes.values()) for outcomes in told["counts"].values()) == CASES
    for way, outcomes in told["counts"].items():  # each way refuses, and lets what is sound through
        assert any(what.startswith("refused") for what in outcomes), way
        assert outcomes.get("multiplied") or (way == "operator" and not COMPILED), way


CRASHES = """
import copy, io, pickle, sys
import torch
from torch import nn
from torch.nn import functional as F
from gblr_plugin import GBLRTensor
from gblr_plugin.errors import ConfigError
from gblr_plugin.kernels.plan import Plan
from gblr_plugin.matrix.structure import StructuredMatrix

torch.manual_seed(0)
matrix = StructuredMatrix.from_factors(torch.randn(20, 48), torch.randn(20, 64))

def sound():
    return GBLRTensor.from_structured(matrix, plan=Plan(16, 16))

def altered():
    weight = sound()
    weight.lists.view(torch.int16)[: weight.packing.list_entries] = 32767
    return weight

def loaded(weight, **options):
    buffer = io.BytesIO()
    torch.save({"weight": weight}, buffer, **options)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)

def module(weight):
    result = nn.Linear(64, 48, bias=False)
    result.weight = nn.Parameter(weight, requires_grad=False)
    return result

def state():
    return module(loaded(altered())["weight"])

def old_format():
    return module(loaded(altered(), _use_new_zipfile_serialization=False)["weight"])

def assigned():
    result = module(sound())
    result.load_state_dict(loaded(altered()), assign=True)
    return result

def copied():
    result = module(sound())
    result(torch.randn(3, 64))
    result.load_state_dict(loaded(altered()))
    return result

def pickled():
    return pickle.loads(pickle.dumps(module(altered())))

def whole_module():
    buffer = io.BytesIO()
    torch.save(module(altered()), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)

def deep_copy():
    return copy.deepcopy(module(altered()))

def unflattened():
    weight = altered()
    parts = {"factors": weight.factors, "lists": weight.lists}
    facts = {"packing": weight.packing, "plan": weight.plan, "outer_shape": weight.outer_shape}
    return module(GBLRTensor.__tensor_unflatten__(parts, facts, None, None))

def in_place():
    result = module(sound())
    with torch.no_grad():
        result(torch.randn(3, 64))
    result.weight.lists.view(torch.int16)[:20] = 32767
    return result

def by_an_alias():
    result = module(sound())
    result.state_dict()["weight"].lists.view(torch.int16)[:20] = 32767
    return result

for grad in (False, True):
    torch.set_grad_enabled(grad)
    for way in (%s,):
        try:
            network = way()
            for tokens in (1, 3, 70) * 20:
                network(torch.randn(tokens, 64, requires_grad=grad))
        except (ConfigError, RuntimeError) as error:
            assert "its lists are damaged" in str(error), error
            print("refused")
"""
WAYS = ["state", "old_format", "assigned", "copied", "pickled", "whole_module", "deep_copy", "unflattened"]


@pytest.mark.parametrize("ways", [WAYS, ["in_place", "by_an_alias"]], ids=["brought in", "in place"])
def test_altered_lists_are_refused_where_they_ended_in_a_segmentation_fault(ways: list[str]) -> None:
    done = in_a_process("-c", CRASHES % ", ".join(ways))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["refused"] * 2 * len(ways)
