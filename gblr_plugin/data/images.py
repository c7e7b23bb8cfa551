"""Images: folders of JPEG and PNG files read with Pillow, arrays in memory, and what happens to an image before use."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from ..errors import ConfigError
from .places import existing_folder, missing

__all__ = ["ArrayImages", "EvalView", "ImageFolder", "TrainView", "image_files", "image_folders", "read_image"]

_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}
# The mean and standard deviation of ImageNet's pixels, by which every published model of this kind normalises.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_HELD_OUT = ("val", "validation", "valid", "test")

_IMAGENET = (
    "ILSVRC 2012 from https://image-net.org (register there), unpacked into train/<class>/*.JPEG and val/<class>/*.JPEG"
)
_OF_USER = "put your images into train/<class>/ and val/<class>/"

Box = tuple[float, float, float, float]


def _draw(low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(()))


class View(Protocol):
    """Which part of an image becomes the (size, size) input, and whether it is mirrored."""

    @property
    def size(self) -> int:
        """Side of the input, in pixels."""

    def box(self, width: int, height: int) -> Box:
        """Left, upper, right and lower edge in pixels."""

    def mirrored(self) -> bool:
        """Whether left and right change places."""


@dataclass(frozen=True)
class TrainView:
    """A random part of the image, mirrored half of the time.

    Args:
        size: Side of the input, in pixels.
        least: Smallest share of the image's area that is shown.
        most_stretch: Largest change of the aspect ratio, either way.
    """

    size: int
    least: float = 0.08
    most_stretch: float = 4 / 3

    def box(self, width: int, height: int) -> Box:
        """A part of random area and aspect ratio; after ten that do not fit, the largest central one that does."""
        for _ in range(10):
            area = width * height * _draw(self.least, 1.0)
            stretch = math.exp(_draw(-math.log(self.most_stretch), math.log(self.most_stretch)))
            w, h = math.sqrt(area * stretch), math.sqrt(area / stretch)
            if w <= width and h <= height:
                left, upper = _draw(0, width - w), _draw(0, height - h)
                return left, upper, left + w, upper + h
        w, h = min(width, height * self.most_stretch), min(height, width * self.most_stretch)
        left, upper = (width - w) / 2, (height - h) / 2
        return left, upper, left + w, upper + h

    def mirrored(self) -> bool:
        """A fair coin."""
        return bool(torch.rand(()) < 0.5)


@dataclass(frozen=True)
class EvalView:
    """The central square, of a fixed share of the shorter side.

    Args:
        size: Side of the input, in pixels.
        share: Of the shorter side that is shown; 224 / 256 is the usual one of ImageNet.
    """

    size: int
    share: float = 224 / 256

    def box(self, width: int, height: int) -> Box:
        """The central square."""
        side = self.share * min(width, height)
        left, upper = (width - side) / 2, (height - side) / 2
        return left, upper, left + side, upper + side

    def mirrored(self) -> bool:
        """Never."""
        return False


def _normalised(pixels: Tensor) -> Tensor:
    """(3, H, W) uint8 to float32, by the mean and standard deviation of ImageNet."""
    mean, std = torch.tensor(_MEAN)[:, None, None], torch.tensor(_STD)[:, None, None]
    return pixels.float().div_(255).sub_(mean).div_(std)


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise ConfigError("data: reading image files needs Pillow: pip install 'gblr-plugin[images]'") from error
    return Image


def _read(path: Path, view: View) -> Tensor:
    """(3, size, size) float32 of an image file."""
    image_module = _pillow()
    try:
        with image_module.open(path) as image:
            left, upper, right, lower = view.box(*image.size)
            full = image.size
            # A JPEG decodes several times faster at 1/2, 1/4 or 1/8 of its size; what is shown keeps its resolution.
            shrink = max(min(right - left, lower - upper) / view.size, 1.0)
            image.draft("RGB", (int(full[0] / shrink), int(full[1] / shrink)))
            x, y = image.size[0] / full[0], image.size[1] / full[1]
            shown = image.convert("RGB").resize(
                (view.size, view.size),
                image_module.Resampling.BICUBIC,
                box=(left * x, upper * y, min(right * x, image.size[0]), min(lower * y, image.size[1])),
                reducing_gap=2.0,
            )
    except (OSError, SyntaxError, ValueError) as error:
        raise ConfigError(f"data: {str(path)!r} is no image that can be read: {error}") from error
    pixels = torch.frombuffer(bytearray(shown.tobytes()), dtype=torch.uint8).view(view.size, view.size, 3)
    pixels = pixels.permute(2, 0, 1)
    return _normalised(pixels.flip(2) if view.mirrored() else pixels)


def read_image(path: Path) -> Any:
    """An image file as a Pillow image in RGB, in its full size.

    Raises:
        ConfigError: If it cannot be read, or Pillow is missing.
    """
    try:
        with _pillow().open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise ConfigError(f"data: {str(path)!r} is no image that can be read: {error}") from error


class ImageFolder(Dataset[tuple[Tensor, Tensor]]):
    """Image files in one subfolder per class, as ImageNet is laid out.

    Args:
        root: Holds the classes' folders; files may lie deeper in them.
        classes: Names of the folders, in the order of the labels.
        view: What of an image is shown.

    Raises:
        ConfigError: If a class has no image.
    """

    def __init__(self, root: Path, classes: list[str], view: View) -> None:
        _pillow()
        self.root, self.classes, self.view = root, classes, view
        self.files: list[tuple[str, int]] = []
        for label, name in enumerate(classes):
            before = len(self.files)
            self.files.extend((file, label) for file in image_files(root / name))
            if len(self.files) == before:
                raise ConfigError(f"data: no image in {str(root / name)!r}; allowed are {', '.join(sorted(_SUFFIXES))}")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """(3, size, size) float32, normalised, and the label as int64."""
        file, label = self.files[index]
        return _read(Path(file), self.view), torch.tensor(label)


def image_files(folder: Path) -> list[str]:
    """Paths of the image files of a folder and of the folders in it, in the order of their names."""
    found: list[str] = []
    for place, folders, names in os.walk(folder):
        folders.sort()
        found.extend(os.path.join(place, n) for n in sorted(names) if os.path.splitext(n)[1].lower() in _SUFFIXES)
    return found


def _subfolders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def image_folders(folder: object, size: int, *, imagenet: bool) -> tuple[ImageFolder, ImageFolder]:
    """Training and held-out images of a folder with train/ and val/ (or validation/, valid/, test/).

    Args:
        folder: Path of the data set.
        size: Side of the input, in pixels.
        imagenet: Whether it must be ImageNet with its 1000 classes; else classes are the folders that are there.

    Raises:
        ConfigError: If it is not there, or the two parts have different classes.
    """
    what, how = ("ImageNet", _IMAGENET) if imagenet else ("image folder", _OF_USER)
    looked_for = "train/<class>/ and val/<class>/"
    root = existing_folder(folder, what, looked_for, how)
    held_out = next((root / name for name in _HELD_OUT if (root / name).is_dir()), None)
    if held_out is None or not (root / "train").is_dir():
        raise missing(what, looked_for, root, how)
    classes = _subfolders(root / "train")
    if not classes:
        raise missing(what, looked_for, root, how)
    if (others := _subfolders(held_out)) != classes:
        odd = sorted(set(classes) ^ set(others))[0]
        raise ConfigError(f"data: class {odd!r} is in only one of {str(root / 'train')!r} and {str(held_out)!r}")
    if imagenet and len(classes) != 1000:
        raise ConfigError(f"data: ImageNet has 1000 classes, {str(root / 'train')!r} has {len(classes)}; data: folder")
    return ImageFolder(root / "train", classes, TrainView(size)), ImageFolder(held_out, classes, EvalView(size))


class ArrayImages(Dataset[tuple[Tensor, Tensor]]):
    """Images in memory, as of CIFAR, with its usual augmentation: shifted by up to 4 pixels and mirrored.

    Args:
        images: (N, 3, H, W) uint8.
        target: (N,) int64.
        size: Side of the input in pixels; larger ones are interpolated.
        augment: Whether images are shifted and mirrored at random.
    """

    def __init__(self, images: Tensor, target: Tensor, size: int, augment: bool) -> None:
        self.images, self.target, self.size, self.augment = images, target, size, augment

    def __len__(self) -> int:
        return len(self.target)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """(3, size, size) float32, normalised, and the label as int64."""
        pixels = self.images[index]
        if self.augment:
            height, width = pixels.shape[1:]
            top, left = torch.randint(9, (2,)).tolist()
            pixels = F.pad(pixels, (4, 4, 4, 4))[:, top : top + height, left : left + width]
            pixels = pixels.flip(2) if torch.rand(()) < 0.5 else pixels
        x = _normalised(pixels)
        if x.shape[1:] != (self.size, self.size):
            x = F.interpolate(x[None], (self.size, self.size), mode="bilinear", antialias=True, align_corners=False)[0]
        return x, self.target[index]
