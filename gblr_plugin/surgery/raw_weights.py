"""Count multiply-adds of weights that belong to no layer: projections inside attention modules, and experts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import nn

from .matrices import WeightMatrix

__all__ = ["RawWeights"]


class RawWeights:
    """Splits the products that a module makes with weights of its own over these weights.

    Args:
        matrices: The weights.
        model: The model that holds them.
        operations: Operations of torch that multiply by a weight.

    Attributes:
        modules: The modules that multiply by these weights; their calls are to be passed to :meth:`add`.
    """

    def __init__(self, matrices: Iterable[WeightMatrix], model: nn.Module, operations: Collection[Any]) -> None:
        # Attention multiplies by the weight of its output projection without calling it.
        attention = [module for module in model.modules() if isinstance(module, nn.MultiheadAttention)]
        users: dict[int, nn.Module] = {id(module.out_proj): module for module in attention}
        self._operations = operations
        self._used_by: dict[int, list[WeightMatrix]] = {}
        self._made: Counter[int] = Counter()
        self.modules: list[nn.Module] = []
        for matrix in matrices:
            user = users.get(id(matrix.module), matrix.module)
            if id(user) not in self._used_by:
                self.modules.append(user)
            self._used_by.setdefault(id(user), []).append(matrix)

    def add(
        self, module: nn.Module, made: Counter[Any], args: Iterable[Any], kwargs: Mapping[str, Any]
    ) -> Counter[Any]:
        """Split the products of one call over the module's weights.

        The products of attention follow from its inputs. Those of other modules are split by the sizes of the weights.

        Args:
            module: One of ``modules``.
            made: FLOPs of the call by operation, without those of layers inside the module.
            args: Positional arguments of the call.
            kwargs: Keyword arguments of the call.

        Returns:
            The products with weights among those made.
        """
        matrices = self._used_by[id(module)]
        if isinstance(module, nn.MultiheadAttention):
            made = Counter({operation: flops for operation, flops in made.items() if operation in self._operations})
            given = dict(zip(("query", "key", "value"), args, strict=False)) | dict(kwargs)
            queries, keys, values = (given[name].shape[:-1].numel() for name in ("query", "key", "value"))
            each = {"q_proj_weight": queries, "k_proj_weight": keys, "v_proj_weight": values, "weight": queries}
            for matrix in matrices:
                packed = matrix.entries // 3 * (queries + keys + values)
                self._made[id(matrix)] += matrix.entries * each.get(matrix.parameter, 0) or packed
            return made
        left, entries = made.total() // 2, sum(matrix.entries for matrix in matrices)
        for matrix in matrices:
            made_here = left * matrix.entries // max(entries, 1)  # of what is left: all of it is shared out
            self._made[id(matrix)] += made_here
            left, entries = left - made_here, entries - matrix.entries
        return made

    def multiply_adds(self, matrix: WeightMatrix) -> int:
        """Multiply-adds of one weight, in all calls."""
        return self._made[id(matrix)]
