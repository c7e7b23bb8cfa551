"""Compresses a pretrained network in place: choose, split the budget, fit block by block, refine, recover, convert."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.allocation import allocate
from ..calibration.batches import Calibration
from ..calibration.refinement import Refinement, refine
from ..calibration.sequential import FittedPiece, fit_pieces
from ..errors import ConfigError
from ..families.registry import get
from ..layers import GBLRLayer, StructuredLayer
from ..layers.dense import can_gain, replace_modules, weight_matrix
from ..layers.separation import separated
from ..matrix.metric import Metric
from ..surgery.conversion import convert, split_by_family
from ..surgery.layer_settings import FamilySettings, LayerSettings, structured_from
from ..surgery.row_splits import RowSplits, row_splits_of
from ..surgery.selection import SMALL, Skipped, log_skipped, select_layers
from ..tensor.gblr_tensor import GBLRTensor
from ..utils.running import run_example
from .kept import KeptBlocks, fingerprint
from .recovery import output_loss, recover_from, trainable_layers
from .report import BlockRow, CompressionReport, LayerRow, SkippedRow
from .settings import REFINE, CompressionSettings
from .stages import Stages

__all__ = ["compress"]

START = "trapezoid"
"""Decomposition of GBLR layers. In the metric of their inputs little is left for blocks beside the low-rank part."""

Each = Mapping[str, LayerSettings | FamilySettings]
Evaluate = Callable[[nn.Module], Mapping[str, float]]


def compress(
    model: nn.Module,
    budget: float,
    calibration: Sequence[Any] | Calibration | None = None,
    *,
    family: str = "gblr",
    layers: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    allocation: str | None = None,
    align: int = 1,
    row_splits: RowSplits = 1,
    refine: int | None = None,
    recover: int = 0,
    factor_dtype: str | None = None,
    seed: int = 0,
    resume: str | Path | None = None,
    evaluate: Evaluate | None = None,
) -> CompressionReport:
    """Compress a pretrained network in place, without labels and without a training loop.

    The layers are chosen and the budget is split over them. With calibration batches, each layer is then fitted to its
    outputs over the inputs that its compressed predecessors give, and each block of a chain of blocks is refined: its
    factors, biases and norms are fitted by gradient to what the dense block returns. With ``recover`` the network is
    distilled from the dense one at the end. The compressed layers are frozen modules of the kinds they were.

    Args:
        model: Changed in place; keeps its class. Other parameters keep their ``requires_grad``.
        budget: Relative FLOPs of the compressed layers together, in (0, 1].
        calibration: Batches as the model takes them: a table is passed as ``model(**batch)``, a tuple as
            ``model(*batch)``, anything else as ``model(batch)``; positions that a table's ``attention_mask`` leaves out
            do not count. Or a :class:`~gblr_plugin.calibration.batches.Calibration`. ``None``: weights alone are
            approximated. Refinement takes one batch a step: batches of one to two thousand tokens suit it.
        family: Name of a structure family.
        layers: Full names, glob patterns or types of layers; ``None``: every layer that can gain. Tied weights and
            output heads stay dense, see :func:`~gblr_plugin.surgery.selection.select_layers`.
        exclude: Layers that stay dense.
        allocation: Rule by which the budget is split, see :func:`~gblr_plugin.calibration.allocation.allocate`.
            ``None``: ``"uniform"``, and the family's own rule where it has one.
        align: Tile of rows and columns to which intervals of GBLR matrices snap.
        row_splits: Number of matrices packed along the rows (packed query, key, value: 3), of all layers or by pattern,
            their numbers of rows, or ``"auto"``; see :func:`~gblr_plugin.surgery.row_splits.row_splits_of`.
        refine: Steps of refinement for each block; ``None``: 256; 0: none.
        recover: Steps of distillation; needs Lightning, and memory for a copy of the dense network.
        factor_dtype: ``"int8"``: factors are rounded to 8 bits; blocks after a rounded one make up for it.
        seed: Seed of everything that is drawn.
        resume: Folder in which finished blocks are kept. A call with the same arguments goes on where an interrupted
            one was, and gives the same network.
        evaluate: Measures of quality; called with the dense and with the compressed model.

    Returns:
        What was done, what it cost, and what was left dense.

    Raises:
        ConfigError: If an argument cannot be used; the model is then as it was, unless blocks were finished before.

    Example:
        >>> model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
        >>> report = compress(model, 0.5, [torch.randn(64, 32) for _ in range(4)])
        >>> report.relative_flops <= 0.5
        True
    """
    settings = CompressionSettings(
        budget=budget,
        family=family,
        layers=None if layers is None else tuple(layers),
        exclude=tuple(exclude),
        allocation=allocation,
        align=align,
        row_splits=row_splits,
        refine=REFINE if refine is None else refine,
        recover=recover,
        factor_dtype=factor_dtype,
        seed=seed,
    )
    with separated(model):
        return _Compression(model, settings, _calibration(calibration, settings)).run(resume, evaluate)


def _calibration(given: Sequence[Any] | Calibration | None, settings: CompressionSettings) -> Calibration | None:
    if given is None:
        if settings.recover:
            raise ConfigError("compress: recover needs calibration batches")
        return None
    if isinstance(given, Calibration):
        return replace(given, sequential=True)
    return Calibration(given, run_example, damping=settings.damping)


class _Compression:
    """One compression, step by step.

    Args:
        model: Changed in place.
        settings: What is asked for.
        calibration: The batches, or ``None``.
    """

    def __init__(self, model: nn.Module, settings: CompressionSettings, calibration: Calibration | None) -> None:
        get(settings.family)
        self.model, self.settings, self.calibration = model, settings, calibration
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        self.stages = Stages(device)
        self.layers, self.skipped = self._selected()
        self.blocks: list[BlockRow] = []
        self.kept: KeptBlocks | None = None

    def _selected(self) -> tuple[dict[str, nn.Module], list[Skipped]]:
        selection = select_layers(self.model, self.settings.layers, self.settings.exclude)
        self.splits = row_splits_of(self.model, selection.layers, self.settings.row_splits)
        small = [name for name, module in selection.layers.items() if not can_gain(module, self.splits[name])]
        if len(small) == len(selection.layers):
            raise ConfigError(f"compress: layer {small[0]!r}: {SMALL}, and so are all others")
        total = sum(weight_matrix(module).numel() for module in selection.layers.values())
        shares = {name: weight_matrix(selection.layers[name]).numel() / total for name in small}
        skipped = [*selection.skipped, *(Skipped(name, SMALL, shares[name]) for name in small)]
        log_skipped(skipped)
        return {name: module for name, module in selection.layers.items() if name not in small}, skipped

    def run(self, resume: str | Path | None, evaluate: Evaluate | None) -> CompressionReport:
        """All stages."""
        quality: dict[str, Any] = {}
        with self.stages("evaluation"):
            if evaluate is not None:
                quality["before"] = dict(evaluate(self.model))
        dense = copy.deepcopy(self.model) if self.settings.recover else None
        with self.stages("allocation"):
            each = self._settings_of_layers()
        if self.calibration is None:
            self._fit_weights(each)
        else:
            self._fit_outputs(self.calibration, each, resume)
        if dense is not None and self.calibration is not None:
            self._recover(dense, self.calibration)
        with self.stages("evaluation"):
            if evaluate is not None:
                quality["after"] = dict(evaluate(self.model))
        return CompressionReport(
            settings=self.settings.to_dict(),
            layers=tuple(_row(name, self.model.get_submodule(name), self.settings.family) for name in self.layers),
            skipped=tuple(SkippedRow(row.name, row.reason, row.share) for row in self.skipped),
            blocks=tuple(self.blocks),
            stages=self.stages.rows(),
            quality=_quality(quality),
        )

    def _settings_of_layers(self) -> dict[str, LayerSettings | FamilySettings]:
        """What each layer is to become, with its share of the budget."""
        asked = self.settings
        splits = {name: self.splits[name] for name in self.layers}
        if asked.allocation is None:
            family = split_by_family(self.layers, FamilySettings(asked.family, asked.budget), splits)
            shares = {name: setting.budget for name, setting in family.items()}
        else:
            calibration = self.calibration
            if calibration is not None and asked.allocation == "sensitivity":
                calibration = replace(calibration, forward=partial(output_loss, calibration))
            shares = allocate(
                self.model, self.layers, asked.budget, asked.allocation, calibration=calibration, row_splits=splits
            )
        if asked.family == "gblr":
            return {
                name: LayerSettings(START, None, splits[name], asked.align, share, asked.seed)
                for name, share in shares.items()
            }
        return {name: FamilySettings(asked.family, share, splits[name]) for name, share in shares.items()}

    def _structured(self, each: Each, name: str, target: Tensor | None = None, metric: Metric | None = None) -> Any:
        """The trainable layer that takes a layer's place; its structure is fixed."""
        with self.stages("decomposition"):
            layer = structured_from(self.layers[name], each[name], target, metric)
            if isinstance(layer, GBLRLayer):
                layer.freeze_structure()
            return layer

    @torch.no_grad()
    def _fit_weights(self, each: Each) -> None:
        made = {}
        for name, module in self.layers.items():
            try:
                made[id(module)] = self._structured(each, name)
            except ConfigError as error:
                raise ConfigError(f"layer {name!r}: {error}") from error
        replace_modules(self.model, made)
        self._convert(self.model)

    def _fit_outputs(
        self,
        calibration: Calibration,
        each: Each,
        resume: str | Path | None,
    ) -> None:
        if resume is not None:
            mark = fingerprint(self.settings.to_dict(), self.layers, calibration.batches)
            self.kept = KeptBlocks(Path(resume), mark)
        outside: dict[int, nn.Module] = {}
        with self.stages("calibration"):
            fit = partial(self._structured, each)
            for piece in fit_pieces(self.model, self.layers, calibration, fit, restore=self._restore):
                made = {id(self.layers[name]): _with_bias(*found) for name, found in piece.fitted.items()}
                if piece.present is None:
                    outside |= made
                else:
                    replace_modules(self.model, made)
                    self._finish(piece, calibration)
        replace_modules(self.model, outside)
        self._convert(self.model)

    def _finish(self, piece: FittedPiece[Any], calibration: Calibration) -> None:
        """Refine, convert and keep a block whose layers are structured."""
        assert piece.present is not None
        block = piece.present.block
        inside = {id(module) for module in block.modules()}
        elsewhere = {
            id(p) for module in self.model.modules() if id(module) not in inside for p in module._parameters.values()
        }
        with self.stages("refinement"):
            settings = Refinement(self.settings.refine, self.settings.refine_lr, self.settings.seed)
            fixed = [parameter for parameter in block.parameters() if id(parameter) in elsewhere]
            before, after = refine(piece.present, piece.targets, calibration, settings, fixed=fixed)
        if isinstance(block, StructuredLayer):
            self.model.set_submodule(piece.name, self._convert(block))
        else:
            self._convert(block)
        row = BlockRow(piece.name, before, after)
        self.blocks.append(row)
        if self.kept is not None:
            self.kept.save(self.model, piece.name, {"before": before, "after": after})
            self.kept.restore(self.model, piece.name)  # a call that goes on begins from the very same block

    def _restore(self, name: str) -> bool:
        about = None if self.kept is None else self.kept.restore(self.model, name)
        if about is not None:
            self.blocks.append(BlockRow(name, **about))
        return about is not None

    def _convert(self, module: nn.Module) -> nn.Module:
        with self.stages("conversion"):
            return convert(module, factor_dtype=self.settings.factor_dtype)

    def _recover(self, dense: nn.Module, calibration: Calibration) -> None:
        with self.stages("recovery"):
            trainable_layers(self.model, self.layers, self.settings.align)
            recover_from(
                self.model,
                dense,
                calibration,
                steps=self.settings.recover,
                lr=self.settings.recover_lr,
                seed=self.settings.seed,
            )
        self._convert(self.model)


def _quality(found: Mapping[str, Mapping[str, float]]) -> dict[str, Any] | None:
    """The figures of an evaluation as a report holds them, the first one as its measure."""
    pairs = {name: {"before": value, "after": found["after"][name]} for name, value in found.get("before", {}).items()}
    if not pairs:
        return None
    metric = next(iter(pairs))
    others = {name: pair for name, pair in pairs.items() if name != metric}
    return {"metric": metric, **pairs[metric], **({"others": others} if others else {})}


def _with_bias(layer: Any, bias: Tensor | None) -> nn.Module:
    if bias is not None:
        layer.bias.data.copy_(bias)
    found: nn.Module = layer
    return found


def _row(name: str, module: nn.Module, family: str) -> LayerRow:
    if isinstance(module, StructuredLayer):
        return LayerRow(name, module.matrix_shape, family, module.relative_flops, module.num_components)
    weight: Any = module.weight
    if isinstance(weight, GBLRTensor):
        matrix = weight.to_structured()
        return LayerRow(name, matrix.shape, family, matrix.relative_flops, matrix.num_components)
    shape = weight_matrix(module).shape
    return LayerRow(name, (shape[0], shape[1]), "dense", 1.0, 0)
