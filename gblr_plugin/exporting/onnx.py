"""ONNX files of converted models, in standard operators alone."""

from __future__ import annotations

import copy
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError
from ..families.layers import FamilyLinear
from ..kernels.buffers import block_values
from ..kernels.packing import pack
from ..kernels.plan import candidates
from ..layers.dense import replace_modules
from ..matrix.structure import StructuredMatrix
from ..tensor.gblr_tensor import GBLRTensor

__all__ = ["export_onnx"]

_LARGE = 1_500_000_000  # bytes of weights from which on they go to a second file; a model file holds at most 2 GB


class _Blocks(nn.Module):
    """A linear layer by blocks of rows and columns: products, and one gather or scatter where lists need it."""

    def __init__(self, matrix: StructuredMatrix, bias: Tensor | None, order: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("order", order)  # order of the outputs; None for that of the matrix
        plan = candidates(matrix, kernel="blocks")[0]
        layout, values, index = pack(matrix, plan.block_rows, plan.block_cols)
        self.components = layout.num_components
        self.columns = [(block.start, block.stop) for block in layout.col_blocks]
        self.v, self.v_lists = _parameters(layout.col_blocks, values, index)
        self.u, self.u_lists = _parameters(layout.row_blocks, values, index)
        every = torch.arange(self.components)
        self.scattered = len(self.v) > 1 or not torch.equal(self.v_lists[0], every)
        self.gathered = [not torch.equal(members, every) for members in self.u_lists]
        self.register_buffer("place", torch.cat(list(self.v_lists)))
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        """``x W^T + b`` for x of shape (..., n)."""
        sums = [x[..., a:b] @ v.t() for (a, b), v in zip(self.columns, self.v, strict=True)]
        z = sums[0] if len(sums) == 1 else torch.cat(sums, -1)
        if self.scattered:
            place: Any = self.place
            z = x.new_zeros(*x.shape[:-1], self.components).scatter_add(-1, place.expand(z.shape), z)
        y = torch.cat(
            [
                (z.index_select(-1, members) if gathered else z) @ u
                for u, members, gathered in zip(self.u, self.u_lists, self.gathered, strict=True)
            ],
            -1,
        )
        bias: Any = self.bias
        order: Any = self.order
        y = y if order is None else y.index_select(-1, order)
        return y if bias is None else y + bias


def _parameters(blocks: Any, values: Tensor, index: Tensor) -> tuple[nn.ParameterList, nn.ParameterList]:
    """Factors and component lists of an axis."""
    factors = nn.ParameterList(nn.Parameter(block_values(values, b).clone(), requires_grad=False) for b in blocks)
    lists = nn.ParameterList(
        nn.Parameter(index.narrow(0, b.list_at, b.size).long(), requires_grad=False) for b in blocks
    )
    return factors, lists


class _Convolutions(nn.Module):
    """A convolution by its column factors, and one of 1 x 1 by its row factors."""

    def __init__(self, conv: Any, matrix: StructuredMatrix) -> None:
        super().__init__()
        dims = conv.weight.dim() - 2
        self.first: Any = copy.copy(conv)  # geometry and padding
        self.first._parameters = dict(conv._parameters)
        self.first.bias = None
        self.first.weight = nn.Parameter(matrix.v.reshape(-1, *conv.weight.shape[1:]), requires_grad=False)
        point = torch.block_diag(*[u.t() for u in matrix.u.split(matrix.split_sizes)])
        self.point = nn.Parameter(point.reshape(*point.shape, *(1,) * dims), requires_grad=False)
        self.bias = conv.bias
        self.convolve = F.conv1d if dims == 1 else F.conv2d

    def forward(self, x: Tensor) -> Tensor:
        """The convolution of x."""
        return self.convolve(self.first(x), self.point, self.bias)


def _plain(module: Any) -> nn.Module:
    """A module of plain tensors and products in place of a converted one; int8 factors become floating point."""
    if isinstance(module, FamilyLinear):  # a fixed order of rows, which ONNX cannot compute
        family: Any = module.frozen_matrix()
        return _Blocks(family.to_structured(), module.bias, torch.argsort(family.row_order))
    weight = module.weight.data
    if not weight.packing.dense:
        matrix = weight.to_structured()
        convolution = isinstance(module, (nn.Conv1d, nn.Conv2d))
        return _Convolutions(module, matrix) if convolution else _Blocks(matrix, module.bias)
    dense = copy.copy(module)
    dense._parameters = {**module._parameters, "weight": nn.Parameter(weight.to_dense().clone(), requires_grad=False)}
    return dense  # type: ignore[no-any-return]  # a module


def export_onnx(
    model: nn.Module,
    args: tuple[Any, ...],
    path: str | os.PathLike[str],
    *,
    kwargs: dict[str, Any] | None = None,
    **options: Any,
) -> None:
    """Write a converted model as an ONNX file in standard operators, which any runtime reads.

    Structured layers become the products of their factors' blocks (MatMul, Gather, ScatterElements, Conv), so that
    the file has about as many weights and multiply-adds as the model. int8 factors are written as floating point.

    Args:
        model: A model with converted layers, which is not changed.
        args: Example inputs, as in ``torch.onnx.export``.
        path: Path of the ``.onnx`` file; weights of more than 1.5 GB go to ``path.data`` beside it.
        kwargs: Example inputs by name.
        options: Options of ``torch.onnx.export``, such as ``dynamic_shapes``, ``input_names`` and ``opset_version``
            (default 20).

    Raises:
        ConfigError: If onnx and onnxscript are not installed, or an operation of the model cannot be expressed.
        OSError: If the file cannot be written.
    """
    plain = copy.deepcopy(model).eval()
    replaced = {
        id(module): _plain(module)
        for module in plain.modules()
        if isinstance(module._parameters.get("weight"), GBLRTensor)
        or (isinstance(module, FamilyLinear) and module.geometry.row_order is not None)
    }
    plain = replace_modules(plain, replaced)
    path = Path(path)
    options = {"opset_version": 20, "verbose": False, **options}
    try:
        program: Any = torch.onnx.export(plain, args, kwargs=kwargs, dynamo=True, **options)
    except ImportError as error:
        raise ConfigError(
            f"export_onnx: needs onnx and onnxscript (pip install 'gblr-plugin[onnx]'): {error}"
        ) from error
    except torch.onnx.errors.OnnxExporterError as error:
        lines = [line for line in str(error).splitlines() if line.startswith("<class")] or str(error).splitlines()
        raise ConfigError(f"export_onnx: the model cannot be expressed in ONNX: {lines[-1]}") from error
    size = sum(tensor.nbytes for tensor in plain.state_dict().values())
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        program.save(os.path.join(folder, path.name), external_data=size > _LARGE)
        for written in sorted(Path(folder).iterdir(), reverse=True):  # the weights before the file that needs them
            with written.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(written, path.parent / written.name)
