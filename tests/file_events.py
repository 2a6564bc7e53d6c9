"""Act at a chosen file operation of this process, so that a test does not depend on how fast the machine is."""

import os
import signal
import sys
from collections.abc import Callable

_CHANGES = {"os.rename", "os.mkdir", "os.link", "os.remove"}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_hooks: list[Callable[[str], None]] = []
_listening = False


def at_operation(number: int, act: Callable[[], object]) -> None:
    """Call ``act`` before the operation of that number, from 1 on, that writes, renames or deletes a file.

    Processes that this one forks do not count and do not act.
    """
    count, owner = 0, os.getpid()

    def hook(path: str) -> None:
        nonlocal count
        count += os.getpid() == owner
        if count == number and os.getpid() == owner:
            act()

    _install(hook)


def at_path(end: str, act: Callable[[], object]) -> None:
    """Call ``act`` once, before the first operation that writes a path with this end."""
    owner = os.getpid()

    def hook(path: str) -> None:
        if path.endswith(end) and os.getpid() == owner and hook in _hooks:
            _hooks.remove(hook)
            act()

    _install(hook)


def kill_group() -> None:
    """Kill this process and those that it started, at once."""
    os.killpg(os.getpgrp(), signal.SIGKILL)


def interrupt() -> None:
    """Send Ctrl-C to this process."""
    os.kill(os.getpid(), signal.SIGINT)


def _install(hook: Callable[[str], None]) -> None:
    global _listening
    if not _listening:
        sys.addaudithook(_dispatch)  # it cannot be taken away again
        _listening = True
    _hooks.append(hook)


def _dispatch(event: str, arguments: tuple) -> None:
    if event in _CHANGES:
        path = arguments[1] if event in ("os.rename", "os.link") else arguments[0]
    elif event == "open" and arguments[2] & _WRITING:
        path = arguments[0]
    else:
        return
    if isinstance(path, str | bytes | os.PathLike):
        for hook in list(_hooks):
            hook(os.fsdecode(path))
