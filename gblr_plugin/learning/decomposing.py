"""Decomposes layers that were trained as dense weights, at the moment when they are to meet their budgets.

The budget of each group of layers is split by what leaving out components would do to the loss, and every weight is
decomposed in the metric of its inputs. Both are measured during the last training steps before that moment.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import distributed
from torch.optim import Optimizer

from ..calibration.allocation import allocate_by_moments
from ..calibration.moments import output_shift
from ..decomposition import initialise
from ..layers import GBLRLayer
from ..matrix.metric import DAMPING, Metric
from ..matrix.structure import StructuredMatrix
from .goals import CostTargets, LayerGoal
from .watching import LayerWatch

__all__ = ["Decomposer"]


class Decomposer:
    """Turns layers that hold their dense weights into structured ones within their budgets, in the midst of a training.

    Args:
        layers: Layers by name, as the initialiser ``"dense"`` makes them.
        goals: A goal for each.
        costs: Groups of the layers.
    """

    def __init__(self, layers: Mapping[str, GBLRLayer], goals: Mapping[str, LayerGoal], costs: CostTargets) -> None:
        self._layers, self._goals, self._costs = dict(layers), dict(goals), costs
        self._watches: dict[str, LayerWatch] = {}
        self._watched = 0

    # -- watching ----------------------------------------------------------------------------------------------------

    def watch(self, restart_after: int | None = None) -> None:
        """Take moments at the layers from now on, if that is not done already; called after each step.

        Args:
            restart_after: Forget the samples after so many steps, where it is not known when the budget is to be met.
        """
        if not self._watches:
            self._watches = {name: LayerWatch(layer) for name, layer in self._layers.items()}
        self._watched += 1
        if restart_after is not None and self._watched > restart_after:
            self._watched = 0
            for watch in self._watches.values():
                watch.reset()

    def unwatch(self) -> None:
        """Forget the moments, and take none."""
        for watch in self._watches.values():
            watch.remove()
        self._watches, self._watched = {}, 0

    def drop_unit_gradients(self) -> None:
        """Drop the gradients of factors that are unit vectors: the other factor is the dense weight."""
        for layer in self._layers.values():
            layer.unit_factor.grad = None

    # -- the decomposition -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def decompose(self, optimizers: Sequence[Optimizer] = ()) -> None:
        """Decompose all layers within their budgets, and take no more moments.

        Under ``torch.distributed`` the moments of all processes count, and the first process decomposes for all.

        Args:
            optimizers: Those that hold the layers' parameters; they forget the state of the factors.
        """
        several = _several()
        if several:
            for watch in self._watches.values():
                watch.all_reduce()
        found: list[Any] = [None]
        if not several or distributed.get_rank() == 0:
            found = [self._decomposed()]
        if several:
            distributed.broadcast_object_list(found)
        for name, matrix in found[0].items():
            self._take(name, matrix, optimizers, keep_shapes=several)
        self.unwatch()

    def _decomposed(self) -> dict[str, StructuredMatrix]:
        metrics = {name: self._metric(name) for name in self._layers}
        matrices = {}
        for name, share in self._shares(metrics).items():
            layer = self._layers[name]
            matrices[name] = initialise(
                layer.to_dense(),
                "gblr",
                row_splits=layer.row_splits,
                budget=share,
                align=layer.align,
                calibration=metrics[name],
            )
        return matrices

    def _metric(self, name: str) -> Metric:
        """The metric of a layer's inputs; the Frobenius norm where none were seen, or they never change."""
        watch = self._watches.get(name)
        if watch is None or not watch.moments.count:
            return Metric()
        square = watch.moments.second(centred=self._layers[name].bias is not None)[1]
        return Metric.from_moment(square, DAMPING) if float(square.diagonal().sum()) > 0 else Metric()

    def _shares(self, metrics: Mapping[str, Metric]) -> dict[str, float]:
        """Relative FLOPs of each layer, from the budget of its group."""
        groups: dict[int, list[str]] = {}
        for name, group in zip(self._layers, self._costs.groups, strict=True):
            groups.setdefault(group, []).append(name)
        shares: dict[str, float] = {}
        for members in groups.values():
            budget = self._goals[members[0]].budget
            assert budget is not None  # the learner has checked it
            shares |= allocate_by_moments(
                {name: self._layers[name].to_dense().detach() for name in members},
                budget,
                {name: metrics[name] for name in members},
                {name: self._watches[name].slope for name in members if name in self._watches},
                bounds={name: (self._goals[name].min_flops, self._goals[name].max_flops) for name in members},
                row_splits={name: self._layers[name].row_splits for name in members},
            )
        return shares

    def _take(self, name: str, matrix: StructuredMatrix, optimizers: Iterable[Optimizer], *, keep_shapes: bool) -> None:
        layer: Any = self._layers[name]
        watch = self._watches.get(name)
        if layer.bias is not None and watch is not None and watch.moments.count:
            mean = watch.moments.mean[1]
            layer.bias += output_shift(layer.to_dense(), matrix.to_dense(), mean, mean).to(layer.bias)
        slots = layer.U.shape[0] // layer.row_splits if keep_shapes else 1
        layer.take_matrix(matrix, optimizers, slots=slots)
        layer.use_low_rank_form()

    # -- stopping and going on ---------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The moments that are being taken."""
        return {"watched": self._watched, "watches": {name: w.state_dict() for name, w in self._watches.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self.unwatch()
        if state["watches"]:
            self.watch()
            for name, watch in self._watches.items():
                watch.load_state_dict(state["watches"][name])
        self._watched = int(state["watched"])


def _several() -> bool:
    """Whether several processes train; those of DistributedDataParallel need parameters of constant shapes."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
