"""The benchmark runs, counts right and says what it ran; no timing is judged."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gblr_plugin.bench import command, products
from gblr_plugin.bench.networks import GPT, ViT, replace_weights
from gblr_plugin.bench.products import Row, random_structure, speed
from gblr_plugin.errors import ConfigError


@pytest.mark.parametrize("align", [1, 16])
def test_random_structures_hold_the_aim(align: int) -> None:
    matrix = random_structure(256, 384, 0.3, align)
    assert matrix.relative_flops == pytest.approx(0.3, rel=0.2)
    for part in (matrix.rows, matrix.cols):
        assert not bool((part.width % align).any())
        assert not bool((part.start % align).any())


def main(arguments: list[str]) -> int:
    return command.bench(command.make_parser().parse_args(arguments))


def test_random_structures_refuse_what_cannot_be() -> None:
    with pytest.raises(ConfigError, match="align must lie"):
        random_structure(16, 16, 0.3, 16)


def test_speed_returns_both_times() -> None:
    dense, ours, weight = speed(random_structure(64, 96, 0.3), 5, seconds=0.0)
    assert dense > 0
    assert ours > 0
    assert weight.shape == (64, 96)


def test_split_structures_hold_the_aim() -> None:
    matrix = random_structure(384, 256, 0.3, 16, row_splits=3)
    assert matrix.shape == (384, 256)
    assert matrix.row_splits == 3
    assert matrix.relative_flops == pytest.approx(0.3, rel=0.2)


def test_table_and_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    before = torch.get_num_threads()
    file = tmp_path / "rows.json"
    arguments = "products --shapes 64x96 --tokens 1 5 --align 16 1 --seconds 0 --threads 1 --wait 0 --output"
    assert main([*arguments.split(), str(file)]) == 0
    assert torch.get_num_threads() == before
    out = capsys.readouterr().out
    assert [line.split()[:4] for line in out.splitlines() if "64x96" in line and "padding" in line] == [
        ["64x96,", t, "tokens", a] for a in ("16", "1") for t in ("1", "5")
    ]
    found = json.loads(file.read_text())
    assert list(found["loads"]) == ["products"]
    for row in found["rows"]:
        assert row["figure"] == pytest.approx(row["dense"] / row["ours"] * row["relative_flops"])
    assert [row["goal"] for row in found["rows"]] == [1.0, None, 0.9, None]


def test_summary_names_the_worst_case() -> None:
    rows = [
        Row("products", name, 32, 0.25, 1.0, 1.0, figure, goal, "group")
        for name, figure, goal in (("fast", 1.2, 0.85), ("slow", 0.5, 0.85), ("even", 0.9, 0.85), ("other", 0.1, None))
    ]
    _, _, line = command._summary(rows)
    assert line.split() == ["group", "0.85", "0.90", "0.50", "slow", "below", "the", "goal"]
    assert command._summary(rows[3:]) == []
    controls = [replace(row, control=control) for row, control in zip(rows[:2], (0.98, 1.04), strict=True)]
    assert command._summary(controls)[2].endswith("slow  below the goal; dense against dense 0.98 to 1.04")


def test_every_section_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--quick", "--cpu-time", "--seconds", "0", "--align", "32", "--threads", "1", "--wait", "0"]) == 0
    out = capsys.readouterr().out
    for name in (
        "256x384, 16 tokens",
        "512x512, 197 tokens",
        "64x64, 16 tokens",
        "ViT-B/16 shape, batch 1",
        "GPT-2 shape, a token, blocks",
    ):
        assert name in out


def test_structured_networks_equal_their_dense_matrices() -> None:
    for network, call in ((ViT(48, 2, 3, 5), None), (GPT(48, 2, 3, 11, 16), 4)):
        products._structured(network, ("qkv", "fc1", "fc2"), 0.4, 1, "fixed")
        plain = copy.deepcopy(network)
        replace_weights(plain, ("qkv", "fc1", "fc2"), lambda name, layer, number: layer.weight.to_dense())
        with torch.no_grad():
            if call is None:
                images = torch.randn(2, 3, 224, 224)
                torch.testing.assert_close(network(images), plain(images), rtol=1e-3, atol=1e-3)
            else:
                assert network.decode(0, call, 3) == plain.decode(0, call, 3)


def test_relative_flops_of_a_network_count_its_dense_layers() -> None:
    network = GPT(48, 1, 3, 11, 16)
    flops = products._structured(network, ("qkv", "fc1", "fc2"), 0.4, 1, "fixed")
    block = network.blocks[0]
    stored = sum(getattr(block, name).weight.stored for name in ("qkv", "fc1", "fc2")) + 48 * 48
    assert flops == pytest.approx(stored / (12 * 48 * 48))


def test_decoding_sees_the_tokens_before() -> None:
    torch.manual_seed(0)
    network = GPT(48, 2, 3, 11, 16)
    block, x = network.blocks[0], torch.randn(1, 5, 48)
    with torch.no_grad():
        for at in range(5):
            last = block(x[:, at : at + 1], network.caches[0], at)
        torch.testing.assert_close(last, block(x)[:, 4:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "64by96"], "must look like"),
        (["--shapes", "0x96"], "must look like"),
        (["nothing"], "must be one of products"),
        (["--threads", "0"], "'0' must be a whole number from 1 to 1024"),
        (["--tokens", "16", "0"], "'0' must be a whole number from 1 to 1000000"),
        (["--relative-flops", "2"], "'2' must be a number from 0.001 to 1"),
        (["--device", "nope"], "'nope' is no device that torch can use here"),
    ],
)
def test_bad_arguments_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    arguments = [
        "products",
        "--shapes",
        "32x32",
        "--tokens",
        "1",
        "--align",
        "1",
        "--seconds",
        "0",
        "--wait",
        "0",
        "--output",
    ]
    with pytest.raises(ConfigError, match="cannot write"):
        main([*arguments, str(tmp_path / "file" / "rows.json")])
