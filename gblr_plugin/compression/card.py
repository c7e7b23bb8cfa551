"""The model card of a compressed folder: how to load it, how good and how fast it is, and how it was made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["model_card"]


def model_card(values: Mapping[str, Any], class_name: str, source: Path) -> str:
    """A model card in Markdown, as the Hugging Face hub shows it.

    Args:
        values: The contents of ``compress.json``.
        class_name: The class of transformers that loads the folder.
        source: Folder of the dense model; licence, language and kind of task are taken over from its card.
    """
    quality, speedup = values.get("quality"), values.get("speedup")
    name = values["command"]["model"]
    shown = values["command"]
    lines = [
        "---",
        "library_name: transformers",
        "tags: [gblr, compressed]",
        *_kept_fields(source / "README.md"),
        "---",
        "",
        f"# {Path(name).name}, compressed",
        "",
        f"`{name}` with weight matrices of generalized block low-rank structure, made by `gblr compress`.",
        "",
        "```python",
        "import gblr_plugin",
        f"from transformers import {class_name}",
        f'model = {class_name}.from_pretrained("this-folder")',
        "```",
        "",
    ]
    if quality:
        lines += ["## Quality", "", *_table(["measure", "dense", "compressed"], _quality_rows(quality)), ""]
        lines += [f"Over {quality['samples']} samples of `{shown['eval']}`.", ""]
    if speedup:
        items = values["speed"]["items"]
        rows = [
            [f"{count} {items if int(count) > 1 else items[:-1]}", f"{factor:.2f}x"]
            for count, factor in speedup.items()
        ]
        lines += ["## Speed", "", *_table(["at once", "faster than dense"], rows), ""]
        lines += [f"Medians of turns with the dense model, threads: {shown['threads']}.", ""]
    lines += ["## Settings", "", *_table(["setting", "value"], _settings_rows(values)), ""]
    skipped = values.get("skipped") or []
    if skipped:
        lines += ["## Left dense", "", *_table(["layer", "reason"], [[s["name"], s["reason"]] for s in skipped]), ""]
    return "\n".join(lines)


def _kept_fields(card: Path) -> list[str]:
    """Lines of the dense model's own front matter that hold for the compressed one too."""
    try:
        text = card.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return []
    if not text.startswith("---\n"):
        return []
    front = text[4:].partition("\n---")[0]
    kept = ("license:", "license_name:", "license_link:", "language:", "pipeline_tag:")
    return [line for line in front.splitlines() if line.startswith(kept) and line.partition(":")[2].strip()]


def _table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> list[str]:
    head = [str(cell) for cell in header]
    return [
        "| " + " | ".join(cells) + " |"
        for cells in (head, ["---"] * len(head), *(list(map(_cell, row)) for row in rows))
    ]


def _cell(text: object) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")


def _quality_rows(quality: Mapping[str, Any]) -> list[list[str]]:
    named = {quality["metric"]: quality, **quality.get("others", {})}
    return [[name, f"{pair['before']:.4g}", f"{pair['after']:.4g}"] for name, pair in named.items()]


def _settings_rows(values: Mapping[str, Any]) -> list[list[object]]:
    return [
        [f"`{name}`", value]
        for name, value in {**values["settings"], **values["command"]}.items()
        if value not in (None, [], ())
    ]
