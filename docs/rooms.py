"""Draw the rooms of the package, images/rooms.svg: ``python docs/rooms.py``.

``LEVELS`` is the list that the picture shows and that ``tests/test_walls.py`` holds the imports to, so that picture and
code cannot differ.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

__all__ = ["LEVELS", "picture"]

PICTURE = Path(__file__).parent / "images" / "rooms.svg"

# From top to bottom: name of the level, and its rooms, each with the lines that say what it holds. A room may import
# rooms of lower rows alone.
LEVELS: list[tuple[str, dict[str, str]]] = [
    ("command", {"cli": "the command gblr"}),
    ("", {"commands": "one file for each command"}),
    (
        "",
        {"run": "one run, comparisons, searches", "compression": "pretrained networks", "bench": "timings"},
    ),
    ("", {"tasks": "networks and trainings"}),
    ("", {"data": "digits, text, images"}),
    ("", {"loading": "gblr_plugin.load: files, and folders of Hugging Face"}),
    (
        "bridges",
        {
            "nni": "pruner",
            "lightning": "callback",
            "tensorboard": "tab",
            "torchao": "quantize_",
            "huggingface": "folders",
            "plot": "figures",
            "exporting": "ONNX, export",
        },
    ),
    (
        "model",
        {
            "surgery": "select, prepare, convert, report",
            "serialization": "safetensors files",
            "monitoring": "records, statistics, pictures",
        },
    ),
    ("learning", {"learning": "learner, budget, schedule, stages"}),
    ("", {"calibration": "batches, moments, allocation of budgets"}),
    ("", {"families": "one file a family"}),
    ("matrices", {"layers": "trainable layers, their masks and products"}),
    ("", {"decomposition": "closed forms, pursuit, exact recovery", "tensor": "the frozen GBLRTensor"}),
    ("kernels", {"kernels": "layout, kernel plan, dispatch; cpu/ and cuda/"}),
    ("ground", {"matrix": "structure, Gaudi mask, tiles, metric, low-rank and trapezoid forms"}),
    ("", {"utils": "files, progress, validation, tables"}),
    ("", {"errors": "what is raised"}),
]

WIDTH, LEFT, TOP, ROW, GAP, BOX = 920, 120, 20, 56, 8, 48
STYLE = """
    .page { fill: #ffffff; stroke: #dde1e7 }
    .room { fill: #e3edf6; stroke: #1f5f99; stroke-width: 1.2 }
    .rule { stroke: #dde1e7; stroke-width: 1 }
    .down { stroke: #5b6673; stroke-width: 1.6; fill: none }
    .tip { fill: #5b6673 }
    text { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; fill: #5b6673 }
    .name { font-weight: 600; font-size: 13px; fill: #1b222c; text-anchor: middle }
    .what { text-anchor: middle; font-size: 12px }
    .level { font-weight: 600; font-size: 13px; fill: #1f5f99 }
    @media (prefers-color-scheme: dark) {
      .page { fill: #1c2027; stroke: #323943 }
      .room { fill: #22384d; stroke: #7db8ee }
      .rule { stroke: #323943 }
      .down { stroke: #9da7b4 }
      .tip { fill: #9da7b4 }
      text { fill: #b4bdc9 }
      .name { fill: #e7ebf0 }
      .level { fill: #7db8ee }
    }
"""


def picture() -> str:
    """The rooms as an SVG: one row of boxes for each level, the highest first."""
    height = 2 * TOP + ROW * len(LEVELS)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        'role="img" aria-labelledby="t">',
        '  <title id="t">The rooms of gblr_plugin, level by level; imports go downwards only</title>',
        f"  <style>{STYLE}  </style>",
        f'  <rect class="page" x=".5" y=".5" width="{WIDTH - 1}" height="{height - 1}" rx="12"/>',
    ]
    right = WIDTH - TOP
    for row, (level, rooms) in enumerate(LEVELS):
        y = TOP + ROW * row
        if level:
            if row:
                lines.append(f'  <path class="rule" d="M{TOP} {y - GAP / 2:g}H{right}"/>')
            lines.append(f'  <text class="level" x="{TOP + 16}" y="{y + 28}">{escape(level)}</text>')
        width = (right - LEFT - GAP * (len(rooms) - 1)) / len(rooms)
        for place, (room, what) in enumerate(rooms.items()):
            x = LEFT + place * (width + GAP)
            name = room + (".py" if room in ("cli", "errors", "loading") else "/")
            lines += [
                f'  <rect class="room" x="{x:.1f}" y="{y}" width="{width:.1f}" height="{BOX}" rx="6"/>',
                f'  <text class="name" x="{x + width / 2:.1f}" y="{y + 20}">{escape(name)}</text>',
                f'  <text class="what" x="{x + width / 2:.1f}" y="{y + 38}">{escape(what)}</text>',
            ]
    bottom = height - TOP - 14
    lines += [
        f'  <path class="down" d="M{TOP} {TOP + 6}V{bottom}"/>',
        f'  <path class="tip" d="M{TOP - 5} {bottom}h10l-5 10z"/>',
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
