"""The arguments of the callback that are rarely needed, with their checks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ..errors import ConfigError
from ..families.registry import get
from ..learning.non_finite import NON_FINITE
from ..surgery.layer_settings import DENSE, INITIALISERS, UNBUDGETED, LayerSettings
from ..utils.validation import check_choice, check_count, check_flag, check_number, did_you_mean, is_number, is_whole

__all__ = ["CallbackSettings", "check_moment", "read_options"]

# Arguments that a fixed structure has no use for.
_LEARNED = ("structure_lr", "compact", "freeze_at_end", "non_finite")


@dataclass(frozen=True)
class CallbackSettings:
    """Rarely needed arguments of :class:`~gblr_plugin.lightning.GBLRCallback`, which takes them by name.

    Args:
        structure_lr: Learning rate of widths and locations; default that of the group they come from.
        pace: How far factors move in a step of an optimizer that normalises gradients, see
            :class:`~gblr_plugin.learning.pace.FactorPace`. Default: 8 where layers begin as decompositions at the
            budget or are decomposed at the cool-down, otherwise, and with ``family``, 1.
        log_every_n_steps: Optimizer steps between scalars; default the Trainer's.
        picture_every_n_epochs: Epochs between pictures; there is also one at the start, at the freeze and at the end. 0
            draws none at all.
        picture_every_n_steps: Also a picture each so many optimizer steps (for training in few, long epochs).
        picture_size: Longest side of a picture, in pixels.
        compact: At the freeze, also drop dead components from the parameters and the optimizers' state, which makes
            the cool-down cheaper. Leave it off where something else holds tensors of the parameters' shapes (moving
            averages of the weights). Not done while several processes train.
        freeze_at_end: Whether training that ends before the cool-down began (early stopping) freezes the structure
            within the budget all the same. By default it stays trainable, for a later fit to go on from.
        non_finite: ``"stop"`` with an error that names the layer where gradients are NaN or infinite, or ``"skip"``
            that optimizer step; see :class:`~gblr_plugin.StructureLearner`. Details are saved in the Trainer's
            ``default_root_dir``.
        family: Name of a structure family, see :func:`gblr_plugin.families.names`: its layers take the place of the
            dense ones at the budget, and keep their structure while their factors train.
        family_options: The family's own, see its class.
        replay: Whether going on within an epoch fetches the batches that it has had, and drops them, so that the data
            go on where they stopped. Loaders with a ``state_dict`` need it not, and are left alone.

    Raises:
        ConfigError: For a value out of range.
    """

    structure_lr: float | None = None
    pace: float | None = None
    log_every_n_steps: int | None = None
    picture_every_n_epochs: int = 10
    picture_every_n_steps: int | None = None
    picture_size: int = 512
    compact: bool = False
    freeze_at_end: bool = False
    non_finite: str = "stop"
    replay: bool = True
    family: str | None = None
    family_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.structure_lr is not None:
            check_number("callback: structure_lr", self.structure_lr, "(0, inf)")
        for name in ("log_every_n_steps", "picture_every_n_steps"):
            if getattr(self, name) is not None:
                check_count(f"callback: {name}", getattr(self, name))
        if self.pace is not None:
            check_number("callback: pace", self.pace, "[1, inf)")
        check_count("callback: picture_every_n_epochs", self.picture_every_n_epochs, 0)
        check_count("callback: picture_size", self.picture_size, 16)
        for name in ("compact", "freeze_at_end", "replay"):
            check_flag(f"callback: {name}", getattr(self, name))
        check_choice("callback: non_finite", self.non_finite, NON_FINITE)
        if self.family is not None:
            get(self.family)
        elif self.family_options:
            raise ConfigError("callback: family_options are those of a family; give its name too")
        for name in ("row_splits", "calibration"):
            if name in self.family_options:
                raise ConfigError(f"callback: family_options cannot have {name!r}; allowed are the family's own")

    @property
    def draws(self) -> bool:
        """Whether there are pictures at all."""
        return bool(self.picture_every_n_epochs or self.picture_every_n_steps)


def read_options(
    options: Mapping[str, Any], budget: float | None, *, drives: bool
) -> tuple[CallbackSettings, dict[str, Any]]:
    """The callback's own settings among the arguments given by name, and those of :class:`LayerSettings`.

    Args:
        options: Fields of both by name; ``initial_budget`` stands for the budget of :class:`LayerSettings`.
        budget: Of the callback, at which initialisers start that need a budget.
        drives: Whether the callback structures layers, and does not only watch them.

    Raises:
        ConfigError: For an unknown name, or a value out of range.
    """
    of_callback = {field.name for field in fields(CallbackSettings)}
    of_layers = {field.name for field in fields(LayerSettings)} - {"budget"} | {"initial_budget"}
    for name in options:
        if name not in of_callback | of_layers:
            hint = did_you_mean(name, of_callback | of_layers)
            raise ConfigError(f"callback: unknown argument {name!r}{hint}")
    settings = CallbackSettings(**{name: value for name, value in options.items() if name in of_callback})
    layer = {name: value for name, value in options.items() if name in of_layers}
    if settings.family is not None:
        if budget is None:
            raise ConfigError(f"callback: family {settings.family!r} needs a budget, relative FLOPs in (0, 1]")
        for name in (*_LEARNED, *sorted(of_layers - {"row_splits"})):
            if name in options:
                raise ConfigError(f"callback: family {settings.family!r} has a fixed structure; leave {name} out")
        return settings, layer
    shrinks = budget is None or "num_components" in layer or layer.get("initial_budget") is not None
    initialiser = layer.setdefault("initialiser", "svd" if shrinks or not drives else DENSE)
    check_choice("callback: initialiser", initialiser, INITIALISERS)
    if initialiser == DENSE and budget is None and drives:
        raise ConfigError("callback: initialiser 'dense' needs a budget; a fixed threshold shrinks full widths ('svd')")
    layer["budget"] = layer.pop("initial_budget", None)
    if layer["budget"] is None and initialiser not in UNBUDGETED:
        if budget is None and drives:
            raise ConfigError(f"callback: initialiser {initialiser!r} needs an initial_budget")
        layer["budget"] = budget
    return settings, layer


def check_moment(name: str, value: float) -> float:
    """Refuse what is neither an optimizer step (int) nor a fraction of all steps (float)."""
    if not is_number(value) or value < 0:
        raise ConfigError(f"callback: {name} must be a step (int) or a fraction of all steps (float), got {value!r}")
    if not is_whole(value) and value > 1:
        raise ConfigError(f"callback: {name} as a fraction must lie in [0, 1], got {value}; give steps as an int")
    return value
