"""Logs of a short real training run, a TensorBoard over them, and a headless Chromium.

Chromium is driven through chromedriver's own HTTP protocol (W3C WebDriver): no package is needed for it.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend import application
from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
from tensorboard.compat.proto import summary_pb2
from tensorboard.plugins import base_plugin
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from werkzeug.test import Client

import gblr_plugin as gblr
from gblr_plugin.matrix.structure import StructuredMatrix
from gblr_plugin.surgery.conversion import prepare_layers
from gblr_plugin.surgery.layer_settings import LayerSettings
from gblr_plugin.tensorboard import write_structure
from gblr_plugin.tensorboard.plugin import GBLRPluginLoader

_ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
]


class Browser:
    """One browser session."""

    def __init__(self, driver: str, chromium: str, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._process = subprocess.Popen(
            [driver, f"--port={port}", f"--log-path={folder / 'chromedriver.log'}"], stdout=subprocess.DEVNULL
        )
        self._base = f"http://127.0.0.1:{port}/session"
        options = {"binary": chromium, "args": [*_ARGUMENTS, f"--user-data-dir={folder / 'profile'}"]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        self._id = self._start({"capabilities": {"alwaysMatch": wanted}})["sessionId"]

    def _start(self, body: Any) -> Any:
        for _ in range(100):
            try:
                return self._request("POST", "", body)
            except (urllib.error.URLError, ConnectionError) as error:
                if isinstance(error, urllib.error.HTTPError):
                    raise
                time.sleep(0.1)
        raise RuntimeError("chromedriver did not start")

    def _request(self, method: str, path: str, body: Any = None) -> Any:
        data = None if method == "GET" else json.dumps(body or {}).encode()
        request = urllib.request.Request(self._base + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(json.load(error)["value"]["message"]) from error

    def command(self, path: str, body: Any = None) -> Any:
        return self._request("POST", f"/{self._id}{path}", body)

    def devtools(self, cmd: str, **params: Any) -> Any:
        return self.command("/goog/cdp/execute", {"cmd": cmd, "params": params})

    def resize(self, width: int, height: int) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.devtools("Emulation.setDeviceMetricsOverride", **size)

    def theme(self, name: str) -> None:
        features = [{"name": "prefers-color-scheme", "value": name}]
        self.devtools("Emulation.setEmulatedMedia", features=features)

    def open(self, url: str) -> None:
        self.command("/url", {"url": url})

    def run(self, script: str, *args: Any) -> Any:
        """Value of a script's ``return``; promises are awaited."""
        return self.command("/execute/sync", {"script": script, "args": list(args)})

    def wait(self, script: str, *args: Any, seconds: float = 20.0) -> Any:
        """Repeat a script until it returns something true."""
        end = time.monotonic() + seconds
        while True:
            try:
                value = self.run(script, *args)
            except RuntimeError as error:
                value, problem = None, str(error)
            else:
                problem = f"last value {value!r}"
            if value:
                return value
            if time.monotonic() > end:
                raise AssertionError(f"waited {seconds} s for: {script}\n{problem}\n{self.messages()}")
            time.sleep(0.05)

    def key(self, *keys: str) -> None:
        """Press and release keys, one after the other; names as in the DevTools protocol."""
        for key in keys:
            text = {"text": "\r" if key == "Enter" else key} if len(key) == 1 or key == "Enter" else {}
            self.devtools("Input.dispatchKeyEvent", type="keyDown", key=key, code=key, **_key_code(key), **text)
            self.devtools("Input.dispatchKeyEvent", type="keyUp", key=key, code=key, **_key_code(key))

    def mouse(self, kind: str, x: float, y: float, **more: Any) -> None:
        self.devtools("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)

    def click(self, x: float, y: float) -> None:
        for kind in ("mousePressed", "mouseReleased"):
            self.mouse(kind, x, y, button="left", clickCount=1)

    def frame(self, selector: str) -> None:
        element = self.wait("return document.querySelector(arguments[0])", selector)
        self.command("/frame", {"id": element})

    def top(self) -> None:
        self.command("/frame", {"id": None})

    def screenshot(self, path: Path) -> None:
        data = self.devtools("Page.captureScreenshot", format="png")["data"]
        path.write_bytes(base64.b64decode(data))

    def messages(self) -> list[str]:
        """What the page has logged since the last call: errors, refused resources."""
        log = self.command("/se/log", {"type": "browser"})
        return [entry["message"] for entry in log if entry["level"] == "SEVERE"]

    def close(self) -> None:
        try:
            self._request("DELETE", f"/{self._id}")
        finally:
            self._process.terminate()
            self._process.wait(10)


def _key_code(key: str) -> dict[str, int]:
    codes = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Home": 36, "Tab": 9, "Enter": 13}
    return {"windowsVirtualKeyCode": codes[key]} if key in codes else {}


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Headless Chromium; skips with the reason where it is not installed."""
    driver = os.environ.get("CHROMEDRIVER") or shutil.which("chromedriver")
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if not driver or not chromium:
        missing = "chromium-driver" if chromium else "chromium"
        pytest.skip(f"no browser test: {missing} is not installed (Debian: apt-get install chromium chromium-driver)")
    session = Browser(driver, chromium, tmp_path_factory.mktemp("browser"))
    yield session
    session.close()


@dataclass(frozen=True)
class TrainedLog:
    """A log folder and what was true when it was written."""

    folder: Path
    run: str
    steps: list[int]
    relative_flops: list[float]
    structures: dict[str, list[StructuredMatrix]]

    def shares(self, layer: str) -> list[float]:
        """Relative FLOPs of a layer at each step, counted over its components (while it trains, they may exceed 1)."""
        return [
            int(matrix.component_multiply_adds.sum()) / (matrix.shape[0] * matrix.shape[1])
            for matrix in self.structures[layer]
        ]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TrainedLog:
    """A two-block network trained for 60 steps; a snapshot every tenth."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads cost more than they bring at this size
    try:
        return _train(tmp_path_factory.mktemp("log"))
    finally:
        torch.set_num_threads(threads)


def _train(folder: Path) -> TrainedLog:
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Sequential(nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 24)) for _ in range(2)))
    x = torch.randn(64, 24)
    y = torch.roll(x, 3, dims=1) * 0.5
    names = [name for name, module in net.named_modules() if isinstance(module, nn.Linear)]
    layers = prepare_layers(net, {name: LayerSettings() for name in names})
    goals = {name: gblr.LayerGoal(budget=0.4, group="all") for name in names}
    learner = gblr.StructureLearner(layers, goals, gblr.Schedule(10, 50))
    optimizer = torch.optim.AdamW(gblr.param_groups(net, lr=1e-2))
    learner.attach_all([optimizer])
    log = TrainedLog(folder, "trained", [], [], {name: [] for name in names})
    writer = SummaryWriter(str(folder / log.run))
    for step in range(61):
        loss = nn.functional.mse_loss(net(x), y)
        if step % 10 == 0:
            write_structure(writer, layers, step, budget=0.4, lambdas=learner.lambdas(), loss=loss.item())
            log.steps.append(step)
            log.relative_flops.append(learner.relative_flops)
            for name, layer in layers.items():
                log.structures[name].append(layer.structure())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    writer.close()
    return log


@pytest.fixture(scope="session")
def client_of() -> Callable[..., Client]:
    """TensorBoard's own application with only our plugin, over a log folder."""

    def build(folder: Path, samples: int = 0) -> Client:
        multiplexer = plugin_event_multiplexer.EventMultiplexer(tensor_size_guidance={"gblr": samples})
        multiplexer.AddRunsFromDirectory(str(folder))
        multiplexer.Reload()
        provider = data_provider.MultiplexerDataProvider(multiplexer, str(folder))
        plugin = GBLRPluginLoader().load(base_plugin.TBContext(data_provider=provider, logdir=str(folder)))
        return Client(application.TensorBoardWSGI([plugin], "", provider))

    return build


@pytest.fixture(scope="session")
def log_bytes() -> Callable[..., None]:
    """Writes arbitrary bytes as a record of the plugin: what a broken writer or a foreign one would leave."""

    def write(writer: SummaryWriter, tag: str, data: bytes, step: int, blob: bool = False) -> None:
        summary = summary_pb2.Summary()
        value = summary.value.add(tag=tag)
        value.metadata.plugin_data.plugin_name = "gblr"
        kind = summary_pb2.DATA_CLASS_BLOB_SEQUENCE if blob else summary_pb2.DATA_CLASS_TENSOR
        value.metadata.data_class = kind
        value.tensor.dtype = 7  # DT_STRING
        value.tensor.tensor_shape.dim.add(size=1)
        value.tensor.string_val.append(data)
        writer._get_file_writer().add_summary(summary, step)

    return write
