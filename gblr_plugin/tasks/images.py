"""Image classification with the papers' networks: ViT, MLP-Mixer and ResNet on ImageNet, CIFAR or own folders."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..data.cifar import load_cifar
from ..data.images import ArrayImages, image_folders
from ..errors import ConfigError
from ..utils.validation import check_choice, check_flag
from .base import BuiltInTask, PairsDataModule, check_sizes, make_network
from .hf import HFNetwork, Logits
from .mixer import Mixer
from .positions import split_kernel_positions

__all__ = ["HFImageTask", "MixerTask", "ResNetTask", "ViTTask"]

_CLASSES = {"imagenet": 1000, "cifar10": 10, "cifar100": 100, "folder": None}


class ImageTask(BuiltInTask):
    """What the image classifiers share: their data.

    Args:
        dataset: ``"imagenet"``, ``"cifar10"``, ``"cifar100"``, or ``"folder"`` for own images in train/ and val/.
        folder: Where it is.
        image_size: Side of the input, in pixels.
        classes: Number of classes; needed for an own folder only before it is there.
        workers: Processes that load.
    """

    def __init__(
        self,
        dataset: str = "imagenet",
        folder: str | None = None,
        image_size: int = 224,
        classes: int | None = None,
        workers: int = 0,
    ) -> None:
        check_choice("model: dataset", dataset, _CLASSES)
        check_sizes(image_size=image_size, **({} if classes is None else {"classes": classes}))
        check_sizes(0, workers=workers)
        known = _CLASSES[dataset]
        if known is not None and classes not in (None, known):
            raise ConfigError(f"model: {dataset} has {known} classes, got {classes}")
        self.dataset, self.folder, self.image_size, self.workers = dataset, folder, image_size, workers
        self._classes = known if known is not None else classes

    @property
    def classes(self) -> int:
        """Number of classes; of an own folder those that are there."""
        if self._classes is None:
            self._classes = len(image_folders(self.folder, self.image_size, imagenet=False)[0].classes)
        return self._classes

    def data(self, seed: int, batch_size: int) -> PairsDataModule:
        """The data set's own split; the seed shuffles.

        Raises:
            ConfigError: If the data is not there.
        """
        train: Any
        held_out: Any
        if self.dataset in ("cifar10", "cifar100"):
            sets = load_cifar(self.folder, self.classes)
            train, held_out = (ArrayImages(*images, self.image_size, images is sets[0]) for images in sets)
        else:
            train, held_out = image_folders(self.folder, self.image_size, imagenet=self.dataset == "imagenet")
            if len(train.classes) != self.classes:
                raise ConfigError(f"data: {str(train.root)!r} has {len(train.classes)} classes, not {self.classes}")
        return PairsDataModule(train, held_out, batch_size, seed, workers=self.workers)

    def example_input(self, batch: int = 1) -> Tensor:
        """Random pixels, normalised."""
        return torch.randn(batch, 3, self.image_size, self.image_size)


class HFImageTask(ImageTask):
    """An image classifier of Hugging Face.

    ``pretrained`` is a local folder, or the name on the hub, of weights to start from, and ``download`` whether the hub
    may be asked. The other arguments are those of :class:`~gblr_plugin.tasks.images.ImageTask`, and of the network's
    configuration in ``transformers``.
    """

    kind: str
    """Name of the network in ``transformers``, as in ``<kind>ForImageClassification``."""

    def __init__(
        self,
        dataset: str = "imagenet",
        folder: str | None = None,
        image_size: int = 224,
        classes: int | None = None,
        workers: int = 0,
        pretrained: str | None = None,
        download: bool = False,
        **config: Any,
    ) -> None:
        super().__init__(dataset, folder, image_size, classes, workers)
        self._hf = HFNetwork(
            f"{self.kind}ForImageClassification",
            f"{self.kind}Config",
            pretrained,
            download,
            ("classifier.",),
            {**self._defaults(pretrained), **config, **self._fixed()},
        )

    def _defaults(self, pretrained: str | None) -> dict[str, Any]:
        """Arguments of the configuration that a config may change."""
        return {}

    def _fixed(self) -> dict[str, Any]:
        """Arguments of the configuration that follow from the data."""
        return {"num_labels": self.classes}

    def _finished(self, model: Any) -> nn.Module:
        return Logits(model)

    def network(self) -> nn.Module:
        """A new network, or the pretrained one."""
        return self._finished(self._hf())

    def architecture(self) -> nn.Module:
        """The network with random weights."""
        return self._finished(self._hf.architecture())


class ViTTask(HFImageTask):
    """Vision transformer (``transformers.ViTForImageClassification``); the defaults are ViT-Base/16.

    Args are those of :class:`~gblr_plugin.tasks.images.HFImageTask`, with those of ``ViTConfig``.
    """

    kind = "ViT"
    layers = ["network.model.vit.layers.*", "network.model.vit.encoder.*"]

    def _fixed(self) -> dict[str, Any]:
        return {"num_labels": self.classes, "image_size": self.image_size}


class ResNetTask(HFImageTask):
    """Residual network (``transformers.ResNetForImageClassification``); the defaults are ResNet-18.

    Args:
        kernel_positions: Whether the convolutions of the stages are written as one matrix per kernel position, instead
            of one c_out x (c_in * kh * kw) matrix each as published.
        **arguments: As :class:`~gblr_plugin.tasks.images.HFImageTask` takes them, with those of ``ResNetConfig``.
    """

    kind = "ResNet"
    layers = ["network.model.resnet.*"]

    def __init__(self, *, kernel_positions: bool = False, **arguments: Any) -> None:
        check_flag("model: kernel_positions", kernel_positions)
        self.kernel_positions = kernel_positions
        super().__init__(**arguments)

    def _defaults(self, pretrained: str | None) -> dict[str, Any]:
        if pretrained is not None:
            return {}
        return {"layer_type": "basic", "depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512]}  # He et al. 2016

    def _finished(self, model: Any) -> nn.Module:
        if self.kernel_positions:
            split_kernel_positions(model.resnet.encoder)
        return super()._finished(model)


class MixerTask(ImageTask):
    """MLP-Mixer (:class:`~gblr_plugin.tasks.mixer.Mixer`); the defaults are Mixer-S/16.

    Args:
        **arguments: As :class:`~gblr_plugin.tasks.images.ImageTask` takes them, and further ones of
            :class:`~gblr_plugin.tasks.mixer.Mixer`.
    """

    layers = ["network.blocks.*"]

    def __init__(self, **arguments: Any) -> None:
        of_data = ("dataset", "folder", "image_size", "classes", "workers")
        super().__init__(**{name: arguments.pop(name) for name in of_data if name in arguments})
        self._network = arguments

    def network(self) -> nn.Module:
        """A new mixer."""
        return make_network(Mixer, classes=self.classes, image_size=self.image_size, **self._network)

    architecture = network
