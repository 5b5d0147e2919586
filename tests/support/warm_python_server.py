"""The process whose forks run scripts; see warm_python.py, which starts it."""

import gc
import json
import os
import runpy
import select
import signal
import socket
import sys
from typing import Any

import torch
import torch._dynamo  # noqa: F401 - torch itself does so at the first step of an optimizer

import offloop.callbacks
import offloop.engine
import offloop.engine.session.session  # noqa: F401 - for the scripts


def receive(requests: socket.socket) -> tuple[Any, list[int]]:
    """Return the next request and the descriptors for a child's stdin, stdout, stderr and exit code."""
    said, descriptors, _, _ = socket.recv_fds(requests, 65536, 4)
    while said and not said.endswith(b"\n"):
        said += requests.recv(65536)
    return json.loads(said or b"null"), descriptors


def reap(running: dict[int, int]) -> None:
    """Report the children that have ended."""
    for child, status in list(running.items()):
        ended, code = os.waitpid(child, os.WNOHANG)
        if ended:
            del running[child]
            os.write(status, f"{os.waitstatus_to_exitcode(code)}\n".encode())
            os.close(status)


def serve(requests: socket.socket) -> Any:
    """Fork a child for each request; return, in the child only, the request."""
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # a Ctrl-C at the terminal is for the tests, which end this process
    # From here on the garbage collector leaves alone what there is. It writes to each object, and at the end of a
    # child, where it looks at all of them, the system would have to copy all that memory: most of a second.
    gc.collect()
    gc.freeze()
    running: dict[int, int] = {}  # the children, and where the exit code of each is written
    while True:
        ready, _, _ = select.select([requests.fileno(), woken], [], [])
        if woken in ready:
            os.read(woken, 4096)
            reap(running)
        if requests.fileno() in ready:
            request, descriptors = receive(requests)
            if request is None:
                for child in running:
                    os.kill(child, signal.SIGKILL)
                os._exit(0)  # to take so many modules down would take seconds
            child = os.fork()
            if child == 0:
                break
            *streams, running[child] = descriptors
            for stream in streams:
                os.close(stream)
            requests.sendall(f"{child}\n".encode())
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, stream in enumerate(descriptors[:3]):
        os.dup2(stream, number)
    for descriptor in (*descriptors, *running.values(), woken, wake):
        os.close(descriptor)
    requests.close()
    return request


if __name__ == "__main__":
    request = serve(socket.socket(fileno=int(sys.argv[1])))
    if request["new_session"]:
        os.setsid()
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    script = request["script"]
    sys.argv = [script, *request["arguments"]]
    sys.path[0] = os.path.dirname(script)
    runpy.run_path(script, run_name="__main__")
