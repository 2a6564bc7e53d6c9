"""The Milvus server of the package ``milvus``, on this machine, for the tests that need a real one."""

import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

from helpers import free_port

SERVER = Path(
    os.environ.get("ST_KDMCSE_MILVUS_SERVER")
    or Path(__file__).resolve().parents[1] / ".venv-milvus" / "bin" / "milvus-server"
)
"""The program; ``make milvus`` installs it in an environment of its own."""


class MilvusServer:
    """A server that keeps its data in a folder, and is ready when this is made; it takes up to 2 GiB.

    Args:
        folder: of its data.
    """

    def __init__(self, folder):
        self._folder = folder
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self):
        """Start it, with the data that is there, and wait until it is ready."""
        command = [str(SERVER), "--data", str(self._folder), "--proxy-port", str(self.port)]
        command += ["--extra-config", "proxy.timeTickInterval=20"]  # what was added is found after ms, not 200
        command = ["sh", "-c", '"$@" & cat; kill -9 0', "sh", *command]  # all end when the process of the tests does
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
        try:
            lines = []
            while not any("Ctrl+C to exit" in line for line in lines):
                lines.append(self._process.stdout.readline())
                assert lines[-1], f"the server ended: {''.join(lines)}; see {self._folder / 'logs'}"
        except BaseException:
            self.kill()
            raise

    def kill(self):
        """End it at once, as a power failure of its machine does."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()
