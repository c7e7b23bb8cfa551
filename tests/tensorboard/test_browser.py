"""The GBLR tab in a real browser, inside a real TensorBoard, over the logs of a real (short) training run.

Set ``GBLR_SCREENSHOTS`` to a folder to keep pictures of what the tests see.
"""

from __future__ import annotations

import base64
import csv
import io
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from tensorboard import default, program
from torch.utils.tensorboard import SummaryWriter

from gblr_plugin.matrix.structure import Intervals, StructuredMatrix
from gblr_plugin.tensorboard import write_structure
from gblr_plugin.tensorboard.plugin import GBLRPluginLoader

pytestmark = pytest.mark.browser

HOSTILE_RUN = "<img src=x onerror=window.hacked=1>"
HOSTILE_LAYER = '"><script>window.hacked=1</script>.0.<b>fc</b>\x1b\u202e'  # ends with what XML cannot hold


def serve(folder: Path) -> str:
    """Start TensorBoard over a folder, on this machine only; returns its address."""
    board = program.TensorBoard(plugins=[*default.get_static_plugins(), GBLRPluginLoader])
    arguments = ["--logdir", str(folder), "--host", "127.0.0.1", "--port", "0", "--load_fast", "false"]
    board.configure(argv=["tensorboard", *arguments, "--reload_interval", "0"])
    before = set(threading.enumerate())
    address = board.launch()
    assert all(thread.daemon for thread in set(threading.enumerate()) - before)
    return address


@pytest.fixture(scope="module")
def address(browser: Any, trained: Any) -> str:
    return serve(trained.folder)


@pytest.fixture
def tab(browser: Any, address: str) -> Iterator[Any]:
    """The tab on its own page, as TensorBoard's iframe loads it, in its first state."""
    open_tab(browser, address)
    yield browser
    problems = [message for message in browser.messages() if "favicon" not in message]
    assert problems == []


def open_tab(browser: Any, address: str, width: int = 1280, theme: str = "light") -> None:
    browser.resize(width, 900)
    browser.theme(theme)
    browser.open(f"{address}data/plugin_entry.html?name=gblr")
    browser.run("sessionStorage.clear()")
    browser.open(f"{address}data/plugin_entry.html?name=gblr")
    browser.wait("return document.querySelectorAll('button.layer').length > 0")


def view(browser: Any, name: str) -> None:
    browser.run("document.querySelector(`[data-value=${arguments[0]}]`).click()", name)


def choose(browser: Any, label: str, value: str) -> None:
    """Pick an option of the visible select with this label."""
    browser.run(
        """
        const field = [...document.querySelectorAll('label.field')].find(
          (f) => f.offsetParent && f.firstElementChild.textContent === arguments[0]);
        const input = field.querySelector('select');
        if (![...input.options].some((o) => o.value === arguments[1])) throw new Error('no such option');
        input.value = arguments[1];
        input.dispatchEvent(new Event('change'));
        """,
        label,
        value,
    )


def open_layer(browser: Any, layer: str) -> None:
    view(browser, "structure")
    browser.wait("return document.querySelectorAll('.thumb').length > 0")
    choose(browser, "Layer", layer)
    browser.wait("return document.querySelector('.pane strong')?.textContent.startsWith(arguments[0] + ',')", layer)


def go_to_step(browser: Any, index: int) -> None:
    browser.run(
        """
        const slider = document.querySelector('input[type=range]');
        slider.value = arguments[0];
        slider.dispatchEvent(new Event('input'));
        """,
        index,
    )


def shown_step(browser: Any) -> str:
    return str(browser.run("return document.querySelector('.transport output strong').textContent"))


def map_pixels(browser: Any, places: list[tuple[int, int]], shape: tuple[int, int], pane: int = 0) -> list[str]:
    """Colours in the middle of matrix entries, as drawn on the unzoomed map."""
    return browser.run(  # type: ignore[no-any-return]
        """
        const [places, [m, n], pane] = arguments;
        const canvas = document.querySelectorAll('.pane .base')[pane];
        const w = canvas.clientWidth - 44 - 58, h = canvas.clientHeight - 46 - 34;
        const ctx = canvas.getContext('2d');
        return places.map(([row, col]) =>
          [...ctx.getImageData(44 + (col + 0.5) / n * w, 46 + (row + 0.5) / m * h, 1, 1).data].join());
        """,
        places,
        shape,
        pane,
    )


def overlap(matrix: StructuredMatrix) -> torch.Tensor:
    return matrix.rows.support().long().T @ matrix.cols.support().long()


def saved(browser: Any, kind: str) -> str:
    """What a download button saves: text, or base64 for PNG."""
    browser.run(
        """
        window.saved = null;
        const create = (window.createUrl ??= URL.createObjectURL);
        URL.createObjectURL = (blob) => {
          if (blob.type.includes(arguments[0])) {
            const reader = new FileReader();
            reader.onload = () => (window.saved = reader.result);
            reader.readAsDataURL(blob);
          }
          return create(blob);
        };
        HTMLAnchorElement.prototype.click = () => {};
        [...document.querySelectorAll(`[data-save=${arguments[1]}]`)].find((b) => b.offsetParent).click();
        """,
        {"png": "image/png", "svg": "image/svg", "csv": "text/csv"}[kind],
        kind,
    )
    data = base64.b64decode(browser.wait("return window.saved").split(",", 1)[1])
    return data.decode("latin-1" if kind == "png" else "utf-8")


def keep(browser: Any, name: str) -> None:
    if "GBLR_SCREENSHOTS" in os.environ:
        browser.screenshot(Path(os.environ["GBLR_SCREENSHOTS"]) / f"{name}.png")


def test_tab_inside_tensorboard_follows_its_theme_and_reload(browser: Any, address: str, trained: Any) -> None:
    browser.resize(1280, 900)
    for theme in ("light", "dark"):
        browser.theme(theme)
        browser.open("about:blank")
        browser.open(f"{address}?darkMode={str(theme == 'dark').lower()}#gblr")
        browser.frame("iframe[src*='name=gblr']")
        browser.wait("return document.querySelectorAll('button.layer').length === 4")
        browser.wait("return document.documentElement.dataset.theme === arguments[0]", theme)
        total = browser.run("return document.querySelector('[data-total=flops]').textContent")
        assert total == f"{100 * trained.relative_flops[-1]:.1f}%"
        own = browser.run(
            "return performance.getEntriesByType('resource').every((e) => new URL(e.name).origin === location.origin)"
        )
        assert own
        asked = "return performance.getEntriesByType('resource').filter((e) => e.name.endsWith('/gblr/runs')).length"
        before = browser.run(asked)
        browser.top()
        keep(browser, f"inside-{theme}")
        browser.run("document.querySelector('app-header-reload button').click()")
        browser.frame("iframe[src*='name=gblr']")
        browser.wait(f"{asked} > arguments[0]", before)
        browser.top()


def test_overview_sorts_groups_and_follows_the_slider(tab: Any, trained: Any) -> None:
    names = "return [...document.querySelectorAll('button.layer')].map((b) => b.dataset.layer)"
    assert tab.run(names) == ["0.0", "0.2", "1.0", "1.2"]
    blocks = tab.run("return [...document.querySelectorAll('.block bdi')].map((b) => b.textContent)")
    assert blocks == ["0", "1"]
    choose(tab, "Sort by", "flops")
    view(tab, "none")
    final = {name: trained.shares(name)[-1] for name in trained.structures}
    expected = sorted(final, key=lambda name: -final[name])
    tab.wait("return document.querySelectorAll('.block').length === 0")
    assert [final[name] for name in tab.run(names)] == [final[name] for name in expected]
    go_to_step(tab, 0)
    tab.wait("return document.querySelector('.transport output strong').textContent === 'step 0'")
    # The slider moves at once, what it shows follows when it has come.
    first = 100 * trained.relative_flops[0]
    total = (
        "return Math.abs(parseFloat(document.querySelector('[data-total=flops]').textContent) - arguments[0]) < 0.51"
    )
    tab.wait(total, first)
    widths = tab.run("return [...document.querySelectorAll('.bar .fill')].map((b) => b.getBoundingClientRect().width)")
    dense = tab.run("return document.querySelector('.bar .dense').getBoundingClientRect().width")
    starts = [trained.shares(name)[0] for name in tab.run(names)]
    assert [width / dense for width in widths] == pytest.approx(starts, abs=0.01)


def test_map_draws_the_blocks_that_were_learned(tab: Any, trained: Any) -> None:
    open_layer(tab, "0.0")
    everywhere = [(row, col) for row in range(0, 48, 3) for col in range(24)]
    colours: dict[int, set[str]] = {}
    for index in (6, 4, 0):
        go_to_step(tab, index)
        tab.wait(
            "return document.querySelector('.pane strong').textContent.endsWith(`step ${arguments[0]}`)",
            trained.steps[index],
        )
        counts = overlap(trained.structures["0.0"][index])
        pixels = map_pixels(tab, everywhere, (48, 24))
        by_count: dict[int, set[str]] = {}
        for (row, col), colour in zip(everywhere, pixels, strict=True):
            by_count.setdefault(int(counts[row, col]), set()).add(colour)
        assert all(len(found) == 1 for found in by_count.values()), "one colour for one count"
        assert len({colour for found in by_count.values() for colour in found}) == len(by_count)
        colours[index] = by_count.get(0, set())
    assert 0 not in [int(count) for count in overlap(trained.structures["0.0"][0]).unique()]
    assert colours[6], "after training there are places without blocks"


def test_pointing_lists_the_blocks_of_a_place(tab: Any, trained: Any) -> None:
    open_layer(tab, "0.0")
    counts = overlap(trained.structures["0.0"][-1])
    row, col = divmod(int(counts.argmax()), 24)
    box = tab.run(
        "const b = document.querySelector('.overlay').getBoundingClientRect(); return [b.x, b.y, b.width, b.height]"
    )
    x = box[0] + 44 + (col + 0.5) / 24 * (box[2] - 44 - 58)
    y = box[1] + 46 + (row + 0.5) / 48 * (box[3] - 46 - 34)
    tab.mouse("mouseMoved", x, y)
    most = int(counts.max())
    blocks = "1 block" if most == 1 else f"{most} blocks"
    tab.wait(
        "return document.querySelector('.place')?.textContent === arguments[0]", f"Row {row}, column {col}: {blocks}"
    )
    assert tab.run("return document.querySelectorAll('.pointed tbody tr').length") == min(most, 5)
    keep(tab, "structure-light")


def test_keyboard_alone_drives_map_and_slider(tab: Any, trained: Any) -> None:
    open_layer(tab, "0.2")
    tab.run("document.querySelector('.overlay').focus()")
    tab.key("ArrowDown", "ArrowRight")
    tab.wait("return /^Row 13, column 25:/.test(document.querySelector('.place')?.textContent)")
    before = map_pixels(tab, [(r, c) for r in range(24) for c in range(48)], (24, 48))
    tab.key("+")
    assert map_pixels(tab, [(r, c) for r in range(24) for c in range(48)], (24, 48)) != before
    tab.key("0")
    assert map_pixels(tab, [(r, c) for r in range(24) for c in range(48)], (24, 48)) == before
    tab.key("Escape")
    assert tab.run("return document.querySelector('.place')") is None
    tab.run("document.querySelector('.intervals canvas').focus()")
    tab.key("ArrowDown")
    first = int(trained.structures["0.2"][-1].rows.start.argmin())
    tab.wait("return document.querySelector('.place')?.textContent.startsWith('Component')")
    assert tab.run("return document.querySelectorAll('.pointed tbody tr').length") == 1
    start = int(trained.structures["0.2"][-1].rows.start[first])
    assert tab.run("return parseInt(document.querySelectorAll('.pointed td')[1].textContent)") == start
    tab.run("document.querySelector('input[type=range]').focus()")
    tab.key("Home")
    tab.wait("return document.querySelector('.transport output strong').textContent === 'step 0'")
    tab.key("ArrowRight")
    tab.wait("return document.querySelector('.transport output strong').textContent === 'step 10'")
    for _ in range(30):
        tab.key("Tab")
        if tab.run("return document.activeElement.dataset.save") == "csv":
            break
    else:
        raise AssertionError("Tab does not reach the downloads")


def test_opening_a_layer_keeps_the_keyboard_in_place(tab: Any) -> None:
    chosen = "return document.activeElement.closest('.field')?.firstElementChild.textContent === 'Layer'"
    tab.run("document.querySelectorAll('button.layer')[1].focus()")
    tab.key("Enter")
    tab.wait("return document.querySelector('.pane strong')?.textContent.startsWith('0.2,')")
    tab.wait(chosen)
    choose(tab, "Layer", "")
    tab.wait("return document.querySelectorAll('.thumb').length === 4")
    tab.run("document.querySelectorAll('.thumb')[2].focus()")
    tab.key("Enter")
    tab.wait("return document.querySelector('.pane strong')?.textContent.startsWith('1.0,')")
    tab.wait(chosen)


def test_playing_runs_through_learning(tab: Any) -> None:
    open_layer(tab, "1.0")
    tab.run(
        """
        window.seen = [];
        new MutationObserver(() => window.seen.push(document.querySelector('.pane strong').textContent))
          .observe(document.querySelector('.pane figcaption'), { childList: true });
        document.querySelector('[data-control=play]').click();
        """
    )
    tab.wait("return document.querySelector('[data-control=play]').textContent === 'Play' && window.seen.length > 6")
    seen = list(dict.fromkeys(tab.run("return window.seen")))
    assert seen == [f"1.0, step {step}" for step in range(0, 61, 10)]


def test_compare_steps_and_layers(tab: Any, trained: Any) -> None:
    open_layer(tab, "0.0")
    choose(tab, "Compare with", "step")
    tab.wait("return document.querySelectorAll('.pane').length === 3")
    titles = tab.run("return [...document.querySelectorAll('.pane strong')].map((t) => t.textContent)")
    assert titles == ["0.0, step 60", "0.0, step 0", "difference: first minus second"]
    choose(tab, "Step", "60")
    tab.wait("return document.querySelectorAll('.pane strong')[1].textContent === '0.0, step 60'")
    same = set(map_pixels(tab, [(r, c) for r in range(0, 48, 5) for c in range(0, 24, 3)], (48, 24), pane=2))
    assert len(same) <= 2, "no change anywhere: one colour for blocks, one for none"
    choose(tab, "Compare with", "layer")
    tab.wait("return document.querySelectorAll('.pane').length === 2")
    keep(tab, "compare")


def test_several_runs_side_by_side(browser: Any, tmp_path: Path) -> None:
    full = StructuredMatrix.from_factors(torch.ones(1, 8), torch.ones(1, 8))
    rows = Intervals(torch.tensor([4]), torch.tensor([2]), 8)
    block = StructuredMatrix.from_factors(torch.ones(1, 8), torch.ones(1, 8), rows, rows)
    for run, matrix in (("all", full), ("block", block)):
        with SummaryWriter(str(tmp_path / run)) as writer:
            write_structure(writer, {"a.0.fc": matrix}, 5, budget=0.5)
    open_tab(browser, serve(tmp_path))
    totals = "return [...document.querySelectorAll('[data-total=flops]')].map((t) => t.textContent)"
    assert browser.run(totals) == ["25.0%", "12.5%"]
    widths = "return [...document.querySelectorAll('.layer .fill')].map((b) => b.style.width)"
    assert browser.run(widths) == ["25%", "12.5%"]
    view(browser, "structure")
    open_layer(browser, "a.0.fc")
    choose(browser, "Compare with", "run")
    browser.wait("return document.querySelectorAll('.pane').length === 3")
    titles = browser.run("return [...document.querySelectorAll('.pane strong')].map((t) => t.textContent)")
    assert titles[:2] == ["a.0.fc, all, step 5", "a.0.fc, block, step 5"]
    everywhere = [(row, col) for row in range(8) for col in range(8)]
    changed = map_pixels(browser, everywhere, (8, 8), pane=2)
    inside = {pixel for place, pixel in zip(everywhere, changed, strict=True) if all(2 <= at < 6 for at in place)}
    outside = {pixel for place, pixel in zip(everywhere, changed, strict=True) if not all(2 <= at < 6 for at in place)}
    assert (len(inside), len(outside), len(inside | outside)) == (1, 1, 2)
    view(browser, "overview")
    browser.run("document.querySelector('.chip input[data-run=all]').click()")
    browser.wait(f"return JSON.stringify((() => {{ {totals} }})()) === '[\"12.5%\"]'")


def test_clicking_a_curve_moves_the_slider(tab: Any, trained: Any) -> None:
    view(tab, "time")
    tab.wait("return document.querySelector('.curves svg')")
    titles = tab.run(
        "return [...document.querySelectorAll('.curves [font-weight]')].flatMap(bold)".replace(
            "bold", "(t) => (t.getAttribute('font-weight') === '600' ? [t.textContent] : [])"
        )
    )
    assert titles == ["Relative FLOPs", "Live components", "Smoothness σ", "Shrinkage λ", "Loss"]
    box = tab.run("const b = document.querySelector('.curves svg').getBoundingClientRect(); return [b.x, b.y, b.width]")
    tab.click(box[0] + 56 + (box[2] - 70) * 20 / 60, box[1] + 60)
    tab.wait("return document.querySelector('.transport output strong').textContent === 'step 20'")
    readout = tab.run("return document.querySelector('.readout').textContent")
    assert f"{100 * trained.relative_flops[2]:.1f}%" in readout
    tab.run("document.querySelector('.curves').focus()")
    tab.key("ArrowLeft")
    tab.wait("return document.querySelector('.transport output strong').textContent === 'step 10'")
    keep(tab, "time-light")


def test_downloads(tab: Any, trained: Any) -> None:
    rows = list(csv.DictReader(io.StringIO(saved(tab, "csv"))))
    assert [row["layer"] for row in rows] == list(trained.structures)
    assert [float(row["relative_flops"]) for row in rows] == [
        pytest.approx(matrices[-1].relative_flops) for matrices in trained.structures.values()
    ]
    for name in ("overview", "structure", "time"):
        view(tab, name)
        if name == "structure":
            tab.wait("return document.querySelectorAll('.thumb .share:not(:empty)').length === 4")
            ElementTree.fromstring(saved(tab, "svg"))
            open_layer(tab, "0.0")
        if name == "time":
            tab.wait("return document.querySelector('.curves svg')")
        root = ElementTree.fromstring(saved(tab, "svg"))
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert len(list(root.iter())) > 20
        assert saved(tab, "png").startswith("\x89PNG")
        assert len(list(csv.reader(io.StringIO(saved(tab, "csv"))))) > 3


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_every_view_fits(browser: Any, address: str, width: int, theme: str) -> None:
    open_tab(browser, address, width, theme)
    assert browser.run("return document.documentElement.dataset.theme") == theme
    for name in ("overview", "structure", "time"):
        view(browser, name)
        if name == "structure":
            browser.wait("return document.querySelectorAll('.thumb .share:not(:empty)').length > 0")
            assert browser.run("return document.documentElement.scrollWidth") <= width
            open_layer(browser, "0.2")
        if name == "time":
            browser.wait("return document.querySelector('.curves svg')")
        assert browser.run("return document.documentElement.scrollWidth") <= width, name
        keep(browser, f"{name}-{width}-{theme}")


def test_hostile_names_and_broken_records(browser: Any, tmp_path: Path, log_bytes: Callable[..., None]) -> None:
    rows = Intervals(torch.tensor([4, 2]), torch.tensor([0, 7]), 8)
    cols = Intervals(torch.tensor([3, 5]), torch.tensor([2, 0]), 8)
    matrix = StructuredMatrix.from_factors(torch.ones(2, 8), torch.ones(2, 8), rows, cols)
    writer = SummaryWriter(str(tmp_path / HOSTILE_RUN))
    for step in (0, 1):
        write_structure(writer, {HOSTILE_LAYER: matrix, "=1+1": matrix}, step, loss=0.5, lambdas={"=1+1": 1.0})
    log_bytes(writer, "gblr/summary", b"<script>window.hacked=1</script>", 2)
    log_bytes(writer, f"gblr/structure/{HOSTILE_LAYER}", b"GBLR\x01\x02broken", 3, blob=True)
    write_structure(writer, {HOSTILE_LAYER: matrix, "=1+1": matrix}, 3)
    log_bytes(writer, "<script>window.hacked=1</script>", b"x", 2)
    writer.close()
    open_tab(browser, serve(tmp_path))
    text = "return document.body.textContent"
    assert "2 records were skipped" in browser.run(text)
    assert HOSTILE_RUN in browser.run(text)
    for name in ("overview", "structure", "time"):
        view(browser, name)
        if name == "structure":
            open_layer(browser, HOSTILE_LAYER)
            browser.wait("return document.querySelector('.view .note').textContent.includes('step 3')")
            pixels = map_pixels(browser, [(row, col) for row in range(8) for col in range(8)], (8, 8))
            counts = overlap(matrix).flatten().tolist()
            assert len(set(zip(counts, pixels, strict=True))) == len(set(counts)) == 3
        if name == "time":
            browser.wait("return document.querySelector('.curves svg')")
        saved(browser, "png")
        ElementTree.fromstring(saved(browser, "svg"))
        table = saved(browser, "csv")
        assert ",=1+1" not in table
        assert browser.run("return document.querySelectorAll('.app script, .app img, .app b').length") == 0
    browser.run("return new Promise((resolve) => setTimeout(resolve, 50))")
    assert browser.run("return window.hacked") is None


def test_a_download_that_fails_says_so(tab: Any) -> None:
    tab.run(
        "URL.createObjectURL = () => { throw new Error('<b>disk full</b>'); };"
        "document.querySelector('[data-save=csv]').click()"
    )
    tab.wait("return document.querySelector('.banner').textContent.includes('not saved: <b>disk full</b>')")
    tab.run("document.querySelector('[data-value=time]').click()")
    tab.wait("return document.querySelector('.banner').textContent === ''")


def test_nothing_readable_is_explained(browser: Any, tmp_path: Path, log_bytes: Callable[..., None]) -> None:
    writer = SummaryWriter(str(tmp_path / "run"))
    log_bytes(writer, "gblr/summary", b"foreign", 2)
    writer.close()
    browser.open(f"{serve(tmp_path)}data/plugin_entry.html?name=gblr")
    browser.wait("return document.querySelector('.nothing')")
    text = browser.run("return document.body.textContent")
    assert "No readable GBLR records" in text
    assert "1 record was skipped" in text
