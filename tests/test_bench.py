"""The benchmark runs, counts right and says what it ran; no timing is judged."""

from __future__ import annotations

import pytest
import torch

from gblr_plugin.bench import main, random_structure, speed
from gblr_plugin.errors import ConfigError


@pytest.mark.parametrize("align", [1, 16])
def test_random_structures_hold_the_aim(align: int) -> None:
    matrix = random_structure(256, 384, 0.3, align)
    assert matrix.relative_flops == pytest.approx(0.3, rel=0.2)
    for part in (matrix.rows, matrix.cols):
        assert not bool((part.width % align).any())
        assert not bool((part.start % align).any())


def test_random_structures_refuse_what_cannot_be() -> None:
    with pytest.raises(ConfigError, match="align must lie"):
        random_structure(16, 16, 0.3, 16)


def test_speed_returns_both_times() -> None:
    dense, ours, weight = speed(random_structure(64, 96, 0.3), 5, seconds=0.0)
    assert dense > 0
    assert ours > 0
    assert weight.shape == (64, 96)


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    before = torch.get_num_threads()
    try:
        code = main(
            ["--shapes", "64x96", "--tokens", "1", "5", "--align", "16", "1", "--seconds", "0", "--threads", "1"]
        )
    finally:
        torch.set_num_threads(before)
    assert code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:3] == ["shape", "align", "tokens"]
    assert [line.split()[:3] for line in lines[2:]] == [["64x96", a, t] for a in ("16", "1") for t in ("1", "5")]


def test_bad_shapes_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--shapes", "64by96"])
    assert "must look like" in capsys.readouterr().err
