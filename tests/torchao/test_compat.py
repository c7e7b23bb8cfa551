"""What is used of torchao beyond its documented names still does what it stands for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from torchao.quantization import quantize_

from gblr_plugin.torchao import _compat


@dataclass
class Look(_compat.AOBaseConfig):
    """A config whose handler looks at the call."""


SEEN: list[dict[str, Any]] = []


@_compat.register_quantize_module_handler(Look)
def _look(module: nn.Module, config: Look, *, parameter_name: str = "weight") -> nn.Module:
    SEEN.append({name: _compat.quantize_call()[name] for name in ("model", "config", "filter_fn")})
    return module


def test_a_handler_sees_the_call_of_quantize() -> None:
    SEEN.clear()
    model, config = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), Look()
    quantize_(model, config)
    assert len(SEEN) == 1
    assert SEEN[0]["model"] is model
    assert SEEN[0]["config"] is config
    assert SEEN[0]["filter_fn"] is _compat.default_filter
    assert not _compat.quantize_call()


def test_the_default_filter_takes_linear_layers() -> None:
    assert _compat.default_filter(nn.Linear(4, 4), "")
    assert not _compat.default_filter(nn.Conv2d(4, 4, 1), "")
