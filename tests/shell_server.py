"""Runs a page's commands in a real shell, each in a process forked off one warm Python.

A Python that trains takes three seconds to import what it needs, and the pages start it forty
times. So one process imports everything once, and every program that a page names is a
small client that hands arguments, folder, environment and open files to it. It forks: what the fork
does, prints and leaves as exit code is the program's own.
"""

import contextlib
import json
import os
import pathlib
import select
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator

# Installed under each program's name. Without site-packages it starts in 20 ms.
CLIENT = """#!{python} -SE
import json, os, socket, sys

with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
    connection.connect({address!r})
    request = {{"words": sys.argv, "folder": os.getcwd(), "environment": dict(os.environ)}}
    socket.send_fds(connection, [json.dumps(request).encode()], [0, 1, 2])
    sys.exit(int(connection.recv(16)))
"""
# Not run here: CI does, by .ci/run, and the tests within the tests would never end.
RUN_BY_CI = (["make", "test"], ["make", "lint"])
_MAX_REQUEST = 1 << 20


@contextlib.contextmanager
def running(folder: pathlib.Path, **environment: str) -> Iterator[pathlib.Path]:
    """Starts the server; gives the program that is its client, to be linked under any name."""
    address, client = folder / "socket", folder / "client"
    client.write_text(CLIENT.format(python=sys.executable, address=str(address)))
    client.chmod(0o755)
    with subprocess.Popen(
        [sys.executable, __file__, address],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
        cwd=folder,
    ) as server:
        assert server.stdout.readline() == "ready\n"
        yield client
        # The server ends when its input does, also where this process is killed.
        server.stdin.close()


def serve(address: str) -> None:
    import shell_programs
    import shell_standins

    # In this process alone, and in those that it forks.
    shell_standins.install()
    # Children are waited for by nobody.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
        listening.bind(address)
        listening.listen(16)
        print("ready", flush=True)
        while True:
            readable, _, _ = select.select([listening, sys.stdin], [], [])
            if sys.stdin in readable:
                return
            connection, _ = listening.accept()
            if os.fork() == 0:
                listening.close()
                _answer(connection, shell_programs.run)
            connection.close()


def _answer(connection, run):
    """Runs the program in a process of its own; notes it, with its exit code, and gives that."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    message, files, _, _ = socket.recv_fds(connection, _MAX_REQUEST, 3)
    request = json.loads(message)
    environment = request["environment"]
    depth = int(environment.get("STAND_IN_DEPTH", 0))
    path, *arguments = request["words"]
    program = os.fork()
    if program == 0:
        connection.close()
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)
        os.chdir(request["folder"])
        os.environ.clear()
        os.environ.update(environment, STAND_IN_DEPTH=str(depth + 1))
        is_run_by_ci = [pathlib.Path(path).name, *arguments] in RUN_BY_CI
        os._exit(0) if is_run_by_ci else _run(run, pathlib.Path(path), arguments)
    _, status = os.waitpid(program, 0)
    code = os.waitstatus_to_exitcode(status)
    note = {"words": [pathlib.Path(path).name, *arguments], "depth": depth, "code": code}
    with open(environment["STAND_IN_LOG"], "a") as log:
        log.write(json.dumps(note) + "\n")
    # As a shell gives it, where a signal ended the program.
    connection.send(str(code if code >= 0 else 128 - code).encode())
    os._exit(0)


def _run(run, path, arguments):
    code = 1
    try:
        code = run(path, arguments)
    except SystemExit as exit:
        if isinstance(exit.code, str):
            print(exit.code, file=sys.stderr)
        code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        # Threads that a program leaves behind do not keep its end.
        os._exit(code)


if __name__ == "__main__":
    serve(sys.argv[1])
