"""The package can be imported where the system lacks what Linux has."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import gblr_plugin

ROOT = Path(gblr_plugin.__file__).parents[1]
PROGRAM = """
import importlib, importlib.util, os, pkgutil, signal, sys, torch

hosts = ["nni", "pytorch_lightning", "lightning", "tensorboard", "torchao", "numba", "transformers", "matplotlib"]
hosts += ["onnx", "triton", "sklearn", "psutil", "yaml", "safetensors"]
missing = {name for name in hosts if importlib.util.find_spec(name) is None}
for name in ("torchao.quantization", "torch.utils.tensorboard", "nni.compression.pytorch", "lightning.pytorch", *hosts):
    if name.partition(".")[0] not in missing:
        try:  # themselves whole, whatever the system
            importlib.import_module(name)
        except ImportError:
            pass
# What Python has on Linux alone, or not on Windows; see the availability notes of its documentation.
gone = ["fork", "register_at_fork", "sched_getaffinity", "sched_setaffinity", "getuid", "geteuid", "getgid", "uname"]
gone += ["getegid", "setsid", "killpg", "getpgid", "statvfs", "sysconf", "sync", "O_DIRECTORY", "O_NOFOLLOW", "wait4"]
gone += ["unshare", "setns", "mkfifo", "wait3", "nice", "getloadavg", "posix_fallocate", "sendfile", "memfd_create"]
for name in gone:
    if hasattr(os, name):
        delattr(os, name)
for name in ("SIGKILL", "SIGALRM", "SIGCHLD", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU", "setitimer", "alarm"):
    if hasattr(signal, name):
        delattr(signal, name)
for name in ("fcntl", "resource", "termios", "pwd", "grp", "pty", "syslog"):
    sys.modules[name] = None
sys.platform = sys.argv[1]

import gblr_plugin
for module in pkgutil.walk_packages(gblr_plugin.__path__, "gblr_plugin."):
    if module.name.endswith("__main__"):
        continue
    try:
        importlib.import_module(module.name)
    except ImportError as error:
        if not any(name in str(error) for name in missing):
            raise
    print(module.name)
"""


@pytest.mark.parametrize("system", ["win32", "darwin"])
def test_every_module_is_imported_on_other_systems(system: str) -> None:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, system],
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert {"gblr_plugin.kernels.cpu.threads", "gblr_plugin.run.private_network"} <= set(done.stdout.split())
