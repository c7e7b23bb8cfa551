"""Mutation testing: change the source in one place at a time, and see whether a test of that module notices.

Run ``python integration/mutation.py [MODULE ...] [--record mutants.jsonl] [--survivors]``; it needs ``cosmic-ray``,
whose operators make the mutants. Its own runner starts a process per mutant, of which each would import torch for
seconds; here one process has imported the hosts and forks a child per mutant, to which the changed source is given at
the import. Annotations are left alone: they are not evaluated. The record gets a line as soon as a mutant was tried; a
run that is started again with it goes on after the last one.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import hashlib
import importlib.abc
import importlib.util
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import cosmic_ray.plugins
import hypothesis
import numba
import pytest
import torch
import torch._dynamo
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code

ROOT = Path(__file__).parents[1]
SCOPE = {
    "matrix/gaudi_mask": "tests/layers/test_masks.py",
    "matrix/structure": "tests/matrix/test_structure.py",
    "learning/proximal": "tests/learning/test_proximal.py",
    "learning/schedule": "tests/learning/test_schedule.py",
    "learning/budget": "tests/learning/test_budget.py",
}
PATIENCE = 5.0  # times what the tests take without a change; beyond, a mutant counts as noticed
SURVIVED = "survived"
PRELOADED = (hypothesis, numba, torch._dynamo)


class Mutated(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from a text."""

    def __init__(self, name: str, path: Path, text: str) -> None:
        self.name, self.path, self.text = name, path, text

    def find_spec(self, name: str, path: object, target: object = None) -> object:
        """Of this module alone."""
        if name != self.name:
            return None
        return importlib.util.spec_from_file_location(name, self.path, loader=self)

    def exec_module(self, module: object) -> None:
        """Run the text in its place."""
        exec(compile(self.text, str(self.path), "exec"), vars(module))


def annotated(text: str) -> set[tuple[int, int]]:
    """Places (line, column) within annotations."""
    places = set()
    for node in ast.walk(ast.parse(text)):
        for part in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            if part is not None:
                places |= {(inner.lineno, inner.col_offset) for inner in ast.walk(part) if hasattr(inner, "lineno")}
                places |= {(part.lineno, column) for column in range(part.col_offset, part.end_col_offset)}
    return places


def mutants(text: str) -> Iterator[tuple[str, int, str]]:
    """(operator, line, changed source) of all mutants of a source."""
    tree, skipped = get_ast(text), annotated(text)
    for name in sorted(cosmic_ray.plugins.operator_names()):
        kind = cosmic_ray.plugins.get_operator(name)
        if kind.arguments():
            continue
        operator = kind()
        positions = [place for node in ast_nodes(tree) for place in operator.mutation_positions(node)]
        for occurrence, (start, _) in enumerate(positions):
            if tuple(start) not in skipped:
                yield name.removeprefix("core/"), start[0], mutate_code(text, operator, occurrence)


def noticed(module: str, text: str | None, seconds: float = 600.0) -> tuple[bool, str]:
    """Whether the module's tests fail in a child with the changed source, and how it ended."""
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        if text is not None:
            path = ROOT / "gblr_plugin" / f"{module}.py"
            sys.meta_path.insert(0, Mutated(f"gblr_plugin.{module.replace('/', '.')}", path, text))
        try:
            code = int(
                pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", str(ROOT / SCOPE[module])])
            )
        except BaseException:
            code = 1
        os._exit(code)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status != 0, "failed" if os.WIFEXITED(status) else "crashed"
        time.sleep(0.01)
    os.killpg(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if os.WIFEXITED(status):  # while this process was paused
        return status != 0, "failed"
    return True, "too slow"


def change(before: str, after: str) -> str:
    """The changed lines."""
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), n=0, lineterm="")
    return "\n".join(line for line in lines if line[:1] in "+-" and line[:3] not in ("+++", "---"))


class Record:
    """What became of each mutant of a source, in a file of one line each; the last line of a mutant counts."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path and path.exists() else []
        self.ends = {self.key(one): one for one in map(json.loads, lines)}

    @staticmethod
    def key(one: dict[str, object]) -> tuple[object, ...]:
        """By which a mutant is known again."""
        return one["source"], one["line"], one["by"], one["change"]

    def add(self, one: dict[str, object]) -> None:
        """Write what became of one."""
        self.ends[self.key(one)] = one
        if self.path:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(one) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("modules", nargs="*", default=list(SCOPE), metavar="MODULE", help=", ".join(SCOPE))
    parser.add_argument("--record", type=Path, help="file of lines of JSON; mutants in it are not tried again")
    parser.add_argument("--survivors", action="store_true", help="but for those in it that survived")
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    record = Record(options.record)
    for module in options.modules:
        text = (ROOT / "gblr_plugin" / f"{module}.py").read_text(encoding="utf-8")
        source = f"{module} {hashlib.sha256(text.encode()).hexdigest()[:16]}"
        begun = time.monotonic()
        if noticed(module, None)[0]:
            raise SystemExit(f"{SCOPE[module]} fails without any change")
        seconds = 5.0 + PATIENCE * (time.monotonic() - begun)
        for operator, line, changed in mutants(text):
            one = {"source": source, "line": line, "by": operator, "change": change(text, changed)}
            earlier = record.ends.get(record.key(one))
            if earlier and not (options.survivors and earlier["end"] == SURVIVED):
                continue
            caught, how = noticed(module, changed, seconds)
            record.add({**one, "end": how if caught else SURVIVED})
            if not caught:
                print(f"{module}.py:{line} {operator}\n{one['change']}", flush=True)
        ends = Counter(str(one["end"]) for one in record.ends.values() if one["source"] == source)
        counts = ", ".join(f"{count} {how}" for how, count in sorted(ends.items()))
        print(f"== {module}: {sum(ends.values())} mutants: {counts}; {time.monotonic() - begun:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
