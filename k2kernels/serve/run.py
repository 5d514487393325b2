"""The process of a server: its socket, its signals, its end."""

from __future__ import annotations

import socket
import sys
from typing import Any

import uvicorn

from k2kernels.serve.app import Server


class _Uvicorn(uvicorn.Server):
    """Ends by SIGTERM or SIGINT once the requests in flight have their answers; by a second one at once."""

    def __init__(self, config: uvicorn.Config, server: Server, greeting: str):
        super().__init__(config)
        self.server, self.greeting = server, greeting

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets=sockets)
        print(self.greeting, file=sys.stderr, flush=True)

    def handle_exit(self, sig: int, frame: Any) -> None:
        self.should_exit = self.force_exit = self.server.closing
        self.server.closing = True

    async def on_tick(self, counter: int) -> bool:
        if self.server.closing and not self.server.open:
            self.should_exit = True
        return await super().on_tick(counter)


def bind(host: str, port: int) -> socket.socket:
    """A socket that does not listen yet. OSError: the address is in use, or not one of this machine."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    bound = socket.socket(family, kind, protocol)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise OSError(f"--host {host} --port {port}: {error.strerror or error}") from None
    return bound


def run(server: Server, bound: socket.socket) -> int:
    """Serves until a signal. Returns the exit code: 0, or 1 after a second signal."""
    host, port = bound.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    greeting = f"serving {server.name!r} at http://{host}:{port}/v1 (Ctrl-C ends)"
    config = uvicorn.Config(server.app, lifespan="off", log_level="warning", access_log=False)
    http = _Uvicorn(config, server, greeting)
    http.run(sockets=[bound])
    return int(http.force_exit)
