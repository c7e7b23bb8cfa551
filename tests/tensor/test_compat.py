"""What is used of torch and torchao beyond their documented names still does what it stands for."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchao.quantization import quantize_

from gblr_plugin.tensor import _compat
from gblr_plugin.tensor.gblr_tensor import GBLRTensor


def test_the_handler_of_torchao_quantizes_dense_layers() -> None:
    by_handler = _compat.int8_handler(nn.Linear(64, 32), _compat.Int8WeightOnlyConfig())
    by_name = nn.Sequential(nn.Linear(64, 32))
    quantize_(by_name, _compat.Int8WeightOnlyConfig())
    assert type(by_handler.weight) is type(by_name[0].weight)
    assert type(by_handler.weight.data) is not torch.Tensor


def test_a_class_has_functions_for_copies_of_its_own() -> None:
    found = _compat.aten_functions(GBLRTensor)
    assert {torch.ops.aten.copy_.default, torch.ops.aten.clone.default, torch.ops.aten.detach.default} <= set(found)
    with pytest.raises(AttributeError):
        _compat.aten_functions(_compat.TorchAOBaseTensor)


def test_a_mode_at_work_is_seen() -> None:
    assert not _compat.is_in_torch_dispatch_mode()
    with FlopCounterMode(display=False):
        assert _compat.is_in_torch_dispatch_mode()


def test_a_skipped_function_runs_in_compiled_code_without_a_break() -> None:
    seen = []

    @_compat.skip
    def look(x: torch.Tensor) -> None:
        seen.append(torch.compiler.is_compiling())

    class Weight:
        def holds(self, x: torch.Tensor) -> None:
            look(x)

    Weight().holds(torch.ones(1))
    assert seen == [False]
