"""The key ``trainer`` of a run: arguments of Lightning's Trainer, but for those that a run sets itself."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch

from ..errors import ConfigError, first_line
from ..utils.validation import check_count, did_you_mean

__all__ = ["accumulated", "check_trainer", "device_of", "trainer_options"]

_EPOCHS = "the length of a training stands in dense, finetune and training"
_OURS = "a run sets it"
_DATA = "a run evaluates by itself, see evaluate_on"
_REFUSED = {
    "max_epochs": _EPOCHS,
    "min_epochs": _EPOCHS,
    "max_steps": _EPOCHS,
    "min_steps": _EPOCHS,
    "max_time": _EPOCHS,
    "limit_train_batches": _EPOCHS,
    "overfit_batches": _EPOCHS,
    "fast_dev_run": _EPOCHS,
    "logger": _OURS,
    "callbacks": _OURS,
    "enable_checkpointing": _OURS,
    "enable_progress_bar": _OURS,
    "enable_model_summary": _OURS,
    "default_root_dir": "the output folder of a run is its --output",
    "barebones": "a run needs its logger and its callbacks",
    "limit_val_batches": _DATA,
    "limit_test_batches": _DATA,
    "limit_predict_batches": _DATA,
    "val_check_interval": _DATA,
    "check_val_every_n_epoch": _DATA,
    "num_sanity_val_steps": _DATA,
    "inference_mode": _DATA,
    "use_distributed_sampler": "a run is one process",
    "num_nodes": "a run is one process; train on several with GBLRCallback in a script of your own",
}
_ALONE = "a run is one process on one device; train on several with GBLRCallback in a script of your own"


def trainer_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of Lightning's Trainer that the key ``trainer`` states, with one device where it names none.

    Raises:
        ConfigError: For an argument that the Trainer does not have, or that is not for a run.
    """
    known = inspect.signature(pl.Trainer).parameters
    for name in given:
        if name not in known:
            raise ConfigError(f"trainer: Lightning's Trainer has no {name!r}{did_you_mean(name, known)}")
        if name in _REFUSED:
            raise ConfigError(f"trainer: leave {name} out: {_REFUSED[name]}")
    devices = given.get("devices", 1)
    if devices != 1 and not (isinstance(devices, list) and len(devices) == 1):
        raise ConfigError(
            f"trainer: devices must be 1, or a list with the number of one device, got {devices!r}: {_ALONE}"
        )
    if "strategy" in given and given["strategy"] not in ("auto", "single_device"):
        raise ConfigError(f"trainer: strategy must be auto, got {given['strategy']!r}: {_ALONE}")
    check_count("trainer: accumulate_grad_batches", given.get("accumulate_grad_batches", 1))
    return {"accelerator": "auto", "devices": 1, "log_every_n_steps": 10, **given}


def accumulated(given: Mapping[str, Any]) -> int:
    """Batches whose gradients make one optimizer step."""
    return int(given.get("accumulate_grad_batches", 1))


def check_trainer(given: Mapping[str, Any]) -> None:
    """Make a Trainer once.

    Raises:
        ConfigError: If that is not possible here, for whatever reason Lightning has.
    """
    device_of(given)


def device_of(given: Mapping[str, Any]) -> torch.device:
    """The device on which a Trainer with these options trains.

    Raises:
        ConfigError: If there is no such Trainer.
    """
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    options = trainer_options(given)
    try:
        device: torch.device = pl.Trainer(**options, **quiet).strategy.root_device
    except Exception as error:  # Lightning and its plugins raise many kinds
        raise ConfigError(f"trainer: Lightning refuses it: {first_line(error)}") from error
    return device
