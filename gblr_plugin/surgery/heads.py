"""Find the output heads of a model: its last projections, to which its accuracy is most sensitive."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from ..layers.dense import KINDS, structurable

__all__ = ["output_heads"]

_ASK = ("get_output_embeddings", "get_classifier")
"""Methods by which models of transformers and of timm say what their head is."""

_NAMES = frozenset(
    {
        "aux_classifier",
        "bbox_embed",
        "bbox_predictor",
        "class_embed",
        "class_labels_classifier",
        "class_predictor",
        "classification_head",
        "classifier",
        "cls",
        "ctc_head",
        "decode_head",
        "embed_out",
        "fc",
        "head",
        "head_dist",
        "heads",
        "last_linear",
        "lm_head",
        "lm_heads",
        "lm_loss",
        "logits",
        "logits_proj",
        "output",
        "output_layer",
        "output_projection",
        "proj_out",
        "qa_outputs",
        "score",
    }
)
"""What models of torchvision, timm, transformers and torchtune call them."""


def output_heads(model: nn.Module) -> set[int]:
    """Find the layers that are output heads.

    A model says so itself (``get_output_embeddings`` of transformers, ``get_classifier`` of timm, of any module
    inside the model too), or the head has one of the names that are usual for it (``lm_head``, ``head``, ``heads``,
    ``classifier``, ``fc``, ``score``, ...). Such a name counts outside of numbered blocks only. Of a head of several
    layers the last one counts, of a list or table of heads the last layer of each.

    Args:
        model: Only looked at.

    Returns:
        ``id`` of each such module.
    """
    found: list[nn.Module] = []
    for name, module in model.named_modules():
        found += _said_by(module)
        *outer, last = name.split(".")
        if last in _NAMES and not any(level.isdigit() for level in outer):
            found.append(module)
    return {id(layer) for head in found for layer in _last_layers(head)}


def _said_by(module: nn.Module) -> list[nn.Module]:
    said: list[nn.Module] = []
    for method in _ASK:
        ask: Any = getattr(module, method, None)
        if not callable(ask):
            continue
        try:
            answer = ask()
        except (AttributeError, NotImplementedError, TypeError):  # the method of another library, or of no use here
            continue
        answers = answer if isinstance(answer, (tuple, list)) else [answer]
        said += [module for module in answers if isinstance(module, nn.Module)]
    return said


def _last_layers(head: nn.Module) -> list[nn.Module]:
    several: Iterable[nn.Module] | None = None
    if isinstance(head, nn.ModuleList):
        several = head
    elif isinstance(head, nn.ModuleDict):
        several = head.values()
    if several is not None:
        return [layer for head in several for layer in _last_layers(head)]
    return [module for module in head.modules() if isinstance(module, KINDS) or structurable(module)][-1:]
