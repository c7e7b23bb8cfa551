"""Who trains need not know who shows: snapshots go to every registered sink, and each takes what is its host's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from gblr_plugin.monitoring import sinks
from gblr_plugin.monitoring.sinks import register_sink, send_snapshot


def test_every_sink_gets_the_snapshot(monkeypatch):
    monkeypatch.setattr(sinks, "_sinks", {})
    got = []
    for name in ("a", "b", "a"):
        register_sink(name, lambda *args, **about: got.append((args, about)))
    send_snapshot("logger", {"fc": "layer"}, 3, budget=0.5)
    assert got == [(("logger", {"fc": "layer"}, 3), {"budget": 0.5})] * 2


def test_loggers_of_other_kinds_are_left_alone(tmp_path: Path):
    writer = SummaryWriter(str(tmp_path))
    send_snapshot(object(), {"fc": "no layer"}, 0)
    writer.close()


def test_torchs_writer_makes_the_tab_a_sink():
    code = (
        "import gblr_plugin; from gblr_plugin.monitoring import sinks; assert not sinks._sinks\n"
        "import torch.utils.tensorboard; assert list(sinks._sinks) == ['tensorboard']\n"
        "import sys; assert 'gblr_plugin.tensorboard.summary' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
