"""One file of a model for another runtime, and how far its outputs are from the model's."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, first_line
from ..utils.files import write_atomic
from .onnx import export_onnx
from .program import export

__all__ = ["FORMATS", "Tensors", "export_file"]

FORMATS = ("onnx", "program", "aoti")
"""An ONNX file, a program of ``torch.export``, a package of AOTInductor for the device of the model."""


class Tensors(nn.Module):
    """A model of transformers that takes tensors in an order, and returns its logits or last hidden states.

    Args:
        model: Its outputs have ``logits`` or ``last_hidden_state``.
        names: Names of its arguments, in the order.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, tuple(names)

    def forward(self, *inputs: Tensor) -> Tensor:
        """What the model says of the inputs."""
        found = self.model(**dict(zip(self.names, inputs, strict=True)))
        logits: Tensor | None = getattr(found, "logits", None)
        states: Tensor = found.last_hidden_state if logits is None else logits
        return states


@torch.no_grad()
def export_file(
    model: nn.Module, args: tuple[Tensor, ...], path: Path, kind: str, *, dynamic: bool = False
) -> float | None:
    """Write a model that takes and returns tensors to a file, and run the file.

    Args:
        model: Converted or dense, in evaluation mode; not changed.
        args: Example inputs, each with the batch first; at least two of them where the batch is dynamic.
        path: Written whole or not at all.
        kind: One of :data:`FORMATS`.
        dynamic: Whether the file takes batches of any size, from 2 on.

    Returns:
        The largest difference between the file's outputs and the model's, over the largest of the model's; ``None``
        where onnxruntime is not installed.

    Raises:
        ConfigError: If the model cannot be expressed.
        OSError: If the file cannot be written.
    """
    batch = torch.export.Dim("batch", min=2, max=1 << 16)
    shapes = (tuple({0: batch} for _ in args),) if isinstance(model, Tensors) else tuple({0: batch} for _ in args)
    options: dict[str, Any] = {"dynamic_shapes": shapes} if dynamic else {}
    if kind == "onnx":
        export_onnx(model, args, path, **options)
        again = _run_onnx(path, args)
    else:
        try:
            program = export(model, args, **options)
        except (RuntimeError, ValueError, TypeError, NotImplementedError, torch._dynamo.exc.TorchDynamoException) as e:
            raise ConfigError(f"export: the model cannot be exported: {first_line(e)}") from e
        if kind == "program":
            write_atomic(path, partial(torch.export.save, program))
            again = program.module()(*args)
        else:
            again = _compile(program, path)(*args)
    if again is None:
        return None
    expected = model(*args)
    return float((again - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def _compile(program: Any, path: Path) -> Any:
    """Write a package of AOTInductor, and load it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        made = torch._inductor.aoti_compile_and_package(program, package_path=os.path.join(folder, "model.pt2"))
        os.replace(made, path)
    return torch._inductor.aoti_load_package(os.fspath(path))


def _run_onnx(path: Path, args: tuple[Tensor, ...]) -> Tensor | None:
    try:
        import onnxruntime
    except ImportError:
        return None
    session = onnxruntime.InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])
    given = {name.name: tensor.numpy() for name, tensor in zip(session.get_inputs(), args, strict=True)}
    return torch.from_numpy(session.run(None, given)[0])
