"""A network of its own for a process and its children: a Linux namespace with nothing but the loopback interface."""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import sys
from pathlib import Path

__all__ = ["enter_private_network"]

_NEW_USER, _NEW_NETWORK = 0x10000000, 0x40000000  # sched.h
_SET_FLAGS, _UP = 0x8914, 1  # SIOCSIFFLAGS, IFF_UP


def enter_private_network() -> None:
    """Move this process, which must have one thread, into a new network namespace.

    Needs either the right to make one (root) or unprivileged user namespaces.

    Raises:
        OSError: If the system does not allow it.
    """
    if sys.platform != "linux":
        raise OSError("only Linux has network namespaces")
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(_NEW_NETWORK) != 0:
        if libc.unshare(_NEW_USER | _NEW_NETWORK) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        # The files that it writes stay the user's.
        Path("/proc/self/setgroups").write_text("deny", encoding="ascii")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1", encoding="ascii")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1", encoding="ascii")
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, _SET_FLAGS, struct.pack("16sh14x", b"lo", _UP))
