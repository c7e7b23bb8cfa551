"""Every message that docs/troubleshooting.md explains is one that the code can raise."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
VARIES = "…"
HEADINGS = re.findall(r"^### (.+)$", (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE)


def template(node: ast.expr) -> str:
    """A string expression with an ellipsis for each part that is only known when it runs."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return template(node.left) + template(node.right)
    return VARIES


def raised() -> list[re.Pattern[str]]:
    found = []
    for file in sorted((ROOT / "gblr_plugin").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            called = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
            if called.endswith("Error") and node.args:
                found.append(template(node.args[0]))
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "error":
                found += [template(argument) for argument in node.args]  # located errors of the YAML reader
            elif isinstance(node, ast.FunctionDef) and node.name == "obstacle":  # ends of a message about a layer
                returned = [part.value for part in ast.walk(node) if isinstance(part, ast.Return) and part.value]
                found += [f"layer {VARIES}: {template(value)}" for value in returned]
    parts = [[re.escape(part) for part in text.split(VARIES)] for text in found if text.strip(VARIES)]
    return [re.compile(".*".join(part)) for part in parts]


RAISED = raised()


@pytest.mark.parametrize("heading", HEADINGS)
def test_the_code_raises_it(heading: str) -> None:
    assert len(re.sub(r"\W", "", heading)) > 10
    matching = [pattern.pattern for pattern in RAISED if pattern.fullmatch(heading)]
    assert any(len(re.sub(r"\W", "", pattern)) > 10 for pattern in matching), f"no error of the code reads {heading!r}"


def test_most_errors_were_found() -> None:
    assert len(RAISED) > 200
