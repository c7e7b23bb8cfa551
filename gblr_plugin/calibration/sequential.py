"""Fits the layers of a model in order, each over the inputs that the compressed layers before it produce.

Where the model has a chain of blocks (:mod:`.chains`), the hidden states at one border of its blocks are kept, of the
dense and of the compressed network, and each block is run alone: time grows with the number of blocks, and not with its
square. Layers outside of chains are fitted by passes over the model in which finished chains are bypassed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..layers.dense import check_structurable, weight_matrix
from ..matrix.metric import Metric
from ..utils.progress import track
from ..utils.running import evaluating
from .batches import Calibration
from .chains import Chain, find_chains, without_cache
from .inputs import fitting_mask, input_rows, layer_inputs, shared_inputs
from .layer_moments import layer_moments
from .moments import Moments, corrected_target, output_shift
from .streams import StandIns, Stream

__all__ = ["FittedPiece", "fit_layers", "fit_pieces"]

_logger = logging.getLogger(__name__)


class _Dense(Protocol):
    """Whatever approximates a weight."""

    def to_dense(self) -> Tensor:
        """The (m, n) matrix."""


M = TypeVar("M", bound=_Dense)
Fit = Callable[[str, Tensor, Metric], M]


@dataclass(frozen=True, eq=False)
class Piece:
    """Layers that are fitted by running the same piece of the model: a block of a chain, or the model.

    Args:
        groups: Names of layers, those that share an input together, in order of execution.
        chain: Holds the block; ``None`` for layers outside of chains.
        place: Number of the block.
    """

    groups: list[list[str]]
    chain: Chain | None = None
    place: int = 0

    @property
    def name(self) -> str:
        """Full name of the block, or ``None``."""
        return "" if self.chain is None else self.chain.names[self.place]


@dataclass(frozen=True, eq=False)
class FittedPiece(Generic[M]):
    """A piece whose layers are fitted, before the compressed stream has passed it.

    Args:
        name: Full name of the block; empty for layers outside of chains.
        fitted: By layer name, in order of execution: the approximation, and the (m,) corrected bias.
        present: The compressed stream before the block; ``None`` outside of chains.
        targets: Hidden states after the dense block, by batch.
    """

    name: str
    fitted: dict[str, tuple[M, Tensor | None]]
    present: Stream | None = None
    targets: Sequence[Tensor] = ()


@torch.no_grad()
def fit_layers(
    model: nn.Module, layers: Mapping[str, nn.Module], calibration: Calibration, fit: Fit[M]
) -> dict[str, tuple[M, Tensor | None]]:
    """Approximate the layers of a model by whatever ``fit`` makes, each in the metric of its output.

    Moments leave padding out; where a layer has a bias they are centred and the bias is corrected. Each layer is fitted
    against the inputs that its compressed predecessors produce, with the corrected target (see
    ``gblr_plugin.calibration.moments``). Layers that share an input share its moments. Costs two passes, each up to the
    layer, per distinct input and batch: over its block where the model has a chain of blocks, otherwise over the model;
    one pass over the model in all where the calibration is not sequential.

    Args:
        model: In any training mode; unchanged on return.
        layers: Modules of the model by name: Linear, Conv1d, Conv2d or Hugging Face ``Conv1D``.
        calibration: The batches.
        fit: ``fit(name, target, metric)`` approximates an (m, n) float64 matrix in a metric of its inputs.

    Returns:
        By name, in order of first execution: the approximation, and the (m,) corrected bias in the weight's dtype,
        ``None`` for layers without a bias.

    Raises:
        ConfigError: If a layer cannot be structured, is never run, or cannot be fitted; the message names the layer.
    """
    found: dict[str, tuple[M, Tensor | None]] = {}
    for piece in fit_pieces(model, layers, calibration, fit):
        found |= piece.fitted
    return found


@torch.no_grad()
def fit_pieces(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    calibration: Calibration,
    fit: Fit[M],
    *,
    restore: Callable[[str], bool] | None = None,
) -> Iterator[FittedPiece[M]]:
    """Fit layers as :func:`fit_layers` does, one piece of the model at a time.

    While a piece is looked at, the layers of its block may be replaced by other modules for good, and other parameters
    of the block may change: the compressed stream then passes what is there. Layers outside of chains must be left as
    they are until the end.

    Args:
        model: As :func:`fit_layers` takes it.
        layers: The same.
        calibration: The same.
        fit: The same.
        restore: Called with the name of each block before it is fitted; if it puts a finished block into the model and
            returns true, the block is not fitted.

    Yields:
        Each piece, except blocks that were restored.
    """
    for name, module in layers.items():
        check_structurable(module, name)
    slopes = layer_moments(model, layers, calibration, gradients=True)[1] if calibration.loss else {}
    with evaluating(model), without_cache(model):
        walk = _Walk(model, layers, calibration, fit, slopes)
        pieces = walk.pieces()
        names = iter(track([name for piece in pieces for group in piece.groups for name in group], "decomposing"))
        for piece in pieces:
            yield from walk.through(piece, names, restore)
        next(names, None)  # the progress line is taken away


class _Walk(Generic[M]):
    """The way through a model, piece by piece.

    Arguments are those of :func:`fit_layers`, and the moments of loss gradients at the layers' outputs.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        calibration: Calibration,
        fit: Fit[M],
        slopes: Mapping[str, Tensor],
    ) -> None:
        self.model, self.layers, self.calibration = model, layers, calibration
        self.fit, self.slopes = fit, slopes
        self.outside = StandIns()
        self.streams: tuple[Stream, ...] = ()  # dense and present, of the last chain begun
        self.finished: list[tuple[Stream, ...]] = []
        self.once: set[str] = set()

    def pieces(self) -> list[Piece]:
        """All pieces in the order in which they run; blocks without layers too, which the streams have to pass."""
        batch = self.calibration.batches[0]
        run = partial(self.calibration.forward, self.model, batch)
        groups, self.once = shared_inputs(self.model, self.layers, run)
        if not self.calibration.sequential:
            return [Piece(groups)]
        chains, reason = find_chains(self.model, self.layers, groups, run)
        if not chains and len(groups) > 1:
            _logger.warning("calibration runs the whole model for every layer, since %s", reason)
        owners = {name: _owner(chains, layer) for name, layer in self.layers.items()}
        pieces: list[Piece] = []
        begun: set[int] = set()
        for group in groups:
            for chain in [owner[0] for owner in map(owners.get, group) if owner is not None]:
                if id(chain) not in begun:
                    begun.add(id(chain))
                    pieces += [Piece([], chain, place) for place in range(len(chain.names))]
            for owner in dict.fromkeys(owners[name] for name in group):
                alike = [name for name in group if owners[name] == owner]
                if owner is None:
                    pieces.append(Piece([alike]))
                else:
                    next(p for p in pieces if (p.chain, p.place) == owner).groups.append(alike)
        return pieces

    def through(
        self, piece: Piece, names: Iterator[str], restore: Callable[[str], bool] | None
    ) -> Iterator[FittedPiece[M]]:
        """Fit one piece, and let both streams pass it."""
        if piece.chain is None:
            yield FittedPiece("", self._fitted(piece, self.outside, names))
            return
        if piece.place == 0:
            self._begin(piece.chain)
        dense, present = self.streams
        inside = StandIns()
        if piece.groups and restore is not None and self._restored(piece, restore):
            for _ in (name for group in piece.groups for name in group):
                next(names)
        else:
            fitted = self._fitted(piece, inside, names)
            dense.advance()
            if piece.groups:
                yield FittedPiece(piece.name, fitted, present, dense.states)
        inside.keep_in(present.block)
        with inside.active():
            present.advance()
        if present.place == len(piece.chain.names):
            self.finished.append(self.streams)

    def _restored(self, piece: Piece, restore: Callable[[str], bool]) -> bool:
        """Whether the finished block is in the model now; the dense stream has passed the dense block before that."""
        dense = self.streams[0]
        kept = list(dense.states)
        dense.advance()
        if restore(piece.name):
            return True
        dense.states, dense.place = kept, piece.place
        return False

    def _begin(self, chain: Chain) -> None:
        count = range(len(self.calibration.batches))
        dense = Stream.begin(chain, (partial(self._run_model, batch, False) for batch in count))
        changed = len(self.outside) or self.finished
        runs = (partial(self._run_model, batch, True) for batch in count)
        self.streams = dense, Stream.begin(chain, runs) if changed else dense.copy()

    def _run_model(self, batch: int, present: bool) -> None:
        """Run the model on a batch, without the blocks of finished chains."""
        with ExitStack() as stack:
            for streams in self.finished:
                stack.enter_context(streams[present].bypassed(batch))
            if present:
                stack.enter_context(self.outside.active())
            self.calibration.forward(self.model, self.calibration.batches[batch])

    def _fitted(self, piece: Piece, done: StandIns, names: Iterator[str]) -> dict[str, tuple[M, Tensor | None]]:
        """Fit the layers of a piece, group by group; ``done`` gets those fitted."""
        results: dict[str, tuple[M, Tensor | None]] = {}
        for stage in [[group] for group in piece.groups] if self.calibration.sequential else [piece.groups]:
            moments = self._moments(piece, stage, done)
            for group in stage:
                held = moments.pop(group[0])
                input_metric = cache(partial(_input_metric, held, self.calibration.damping))
                for name in group:
                    next(names)
                    module = self.layers[name]
                    try:
                        metric = input_metric(module.bias is not None)
                        target, metric = _task(module, held, metric, self.calibration, self.slopes.get(name))
                        matrix = self.fit(name, target, metric)
                    except ConfigError as error:
                        raise ConfigError(f"layer {name!r}: {error}") from error
                    bias: Any = module.bias
                    estimate = matrix.to_dense()
                    shift = None if bias is None else output_shift(weight_matrix(module), estimate, *held.mean)
                    results[name] = matrix, None if shift is None else (bias.double() + shift).to(bias.dtype)
                    if self.calibration.sequential:
                        done.add(module, estimate, shift)
        return results

    def _moments(self, piece: Piece, stage: Sequence[Sequence[str]], done: StandIns) -> dict[str, Moments]:
        """Moments of the original and the present inputs of each group's first layer, by the name of that layer."""
        firsts = {group[0]: self.layers[group[0]] for group in stage}
        stop = set(firsts) <= self.once
        moments: dict[str, Moments] = {}
        for batch in range(len(self.calibration.batches)):
            original = layer_inputs(self.model, firsts, partial(self._run, piece, batch), stop=stop)
            present = original
            if self._differs(piece, batch, done):
                present = layer_inputs(self.model, firsts, partial(self._run, piece, batch, done), stop=stop)
            valid = self.calibration.valid(self.calibration.batches[batch])
            for name, module in firsts.items():
                for x0, x1 in zip(original[name], present[name], strict=True):
                    rows = input_rows(module, x0)
                    held = moments.setdefault(name, Moments(rows.shape[-1], rows.device))
                    held.add(rows, None if x1 is x0 else input_rows(module, x1), fitting_mask(valid, rows))
        return moments

    def _run(self, piece: Piece, batch: int, done: StandIns | None = None) -> None:
        """Run a piece on a batch, of the dense network, or with ``done`` of the compressed one."""
        if piece.chain is None:
            self._run_model(batch, done is not None)
            return
        with nullcontext() if done is None else done.active():
            self.streams[done is not None].run(batch)

    def _differs(self, piece: Piece, batch: int, done: StandIns) -> bool:
        """Whether the inputs of a piece's layers in the compressed network are not those in the dense one."""
        if len(done) or piece.chain is None:
            return bool(len(done) or self.finished)
        dense, compressed = self.streams
        return compressed.states[batch] is not dense.states[batch]


def _owner(chains: Sequence[Chain], layer: nn.Module) -> tuple[Chain, int] | None:
    """The chain and the number of the block that hold a layer."""
    for chain in chains:
        place = chain.owner(layer)
        if place is not None:
            return chain, place
    return None


def _input_metric(held: Moments, damping: float, centred: bool) -> Metric:
    """The metric of a layer's inputs; the Frobenius norm if the inputs never change."""
    square = held.second(centred=centred)[1]
    return Metric.from_moment(square, damping) if float(square.diagonal().sum()) > 0 else Metric()


def _task(
    module: nn.Module, held: Moments, metric: Metric, calibration: Calibration, slope: Tensor | None
) -> tuple[Tensor, Metric]:
    """The (m, n) float64 matrix that a layer's approximation is fitted to, and the metric of the fit.

    Args:
        module: The layer.
        held: Moments of its inputs.
        metric: The metric of its inputs.
        calibration: How layers are fitted.
        slope: (m, m) moment of the loss gradients at its output, or ``None``.
    """
    target = weight_matrix(module).double()
    if calibration.sequential and metric.root is not None:
        target = corrected_target(target, held.second(centred=module.bias is not None)[0], metric)
    return target, metric if slope is None else metric.weighted(slope, calibration.damping)
