"""Workers for runners that start none themselves: `python -m data_pipelines.worker_pool --port=50000`.

A runner with the options `--environment_type=EXTERNAL --environment_config=HOST:50000` requests workers from the pool
there: Beam's local job service does so, and Flink and Spark with a pool on every machine. Each worker is a process of
one thread, as those that `data_pipelines.extract` starts. Workers end with their job, and all of them with the pool
(Ctrl-C or SIGTERM). A killed worker is reported here, and the launcher of its job resubmits the missing parts.

Anyone who can reach the port can run code. It listens on localhost by default; use `--host=0.0.0.0` only if the runner
is on another machine or in a container, and only in a private network.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the slow imports
    from spjax import process

    process.run("data_pipelines.worker_pool")

import argparse
import contextlib
import json
import logging
import os
import queue
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

from spjax.command_line import Parser

LOOK_SECONDS = 0.5  # between checks for ended workers
END_SECONDS = 5.0  # time for workers to end after SIGTERM


class WorkerRequest(NamedTuple):
    """A runner's request to start or end a worker.

    Attributes:
      worker: the runner's name of the worker.
      job: address, HOST:PORT, from which a new worker gets its work; "" to end the worker.
      log: address to which it sends its log.
      done: set when the worker was started or ended; holds the exception if that failed.
    """

    worker: str
    job: str
    log: str
    done: Future[None]


def listen(host: str, port: int, requests: queue.Queue[WorkerRequest]) -> tuple[str, Any]:
    """Starts a server that queues the requests of runners, by Beam's protocol.

    Beam's pool would listen on every address of the machine.

    Args:
      host: name or address of this machine to listen on; 0.0.0.0 for all addresses.
      port: to listen on; 0 for any free port.
      requests: queue for the requests.

    Returns:
      The address, and the server, which listens as long as it is referenced.

    Raises:
      OSError: the address cannot be listened on.
    """
    from apache_beam.portability.api import beam_fn_api_pb2 as messages
    from apache_beam.portability.api import beam_fn_api_pb2_grpc as services
    from apache_beam.runners.worker.worker_pool_main import grpc  # Beam's dependency, not ours
    from apache_beam.utils.thread_pool_executor import shared_unbounded_instance

    class Servicer(services.BeamFnExternalWorkerPoolServicer):
        def StartWorker(self, request: Any, _: Any) -> Any:  # noqa: N802 - Beam's name
            wanted = WorkerRequest(
                request.worker_id, request.control_endpoint.url, request.logging_endpoint.url, Future()
            )
            requests.put(wanted)
            return messages.StartWorkerResponse(error=str(wanted.done.exception() or ""))

        def StopWorker(self, request: Any, _: Any) -> Any:  # noqa: N802
            wanted = WorkerRequest(request.worker_id, "", "", Future())
            requests.put(wanted)
            return messages.StopWorkerResponse(error=str(wanted.done.exception() or ""))

    # Daemon threads: at the end there may be unanswered requests.
    server = grpc.server(shared_unbounded_instance(), options=[("grpc.so_reuseport", 0)])
    services.add_BeamFnExternalWorkerPoolServicer_to_server(Servicer(), server)
    try:
        port = server.add_insecure_port(f"{host}:{port}")
    except RuntimeError as error:  # gRPC's error
        raise OSError(f"cannot listen on {host}:{port}: --host must be an address of this machine") from error
    server.start()
    return f"{host}:{port}", server


def check_port(port: int) -> None:
    """Exits if the port is in use: gRPC would share it, and each process would get some of the requests."""
    with contextlib.suppress(OSError):
        socket.create_connection(("localhost", port), timeout=5).close()
        sys.exit(f"error: port {port} is in use: is it running already? Or choose another --port")


def serve(requests: queue.Queue[WorkerRequest]) -> None:
    """Starts and ends workers as requested; an exception (SystemExit, KeyboardInterrupt) ends all of them.

    One thread starts all workers, since Linux kills them when that thread ends (`beam_worker.die_with`).
    """
    workers: dict[subprocess.Popen[bytes], WorkerRequest] = {}
    broken: set[str] = set()  # jobs with a dead worker

    def end(chosen: Sequence[subprocess.Popen[bytes]]) -> None:
        """Sends SIGTERM, then SIGKILL to those that do not end; these are not reported as dead."""
        for process in chosen:
            process.terminate()
        for process in chosen:
            try:
                process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            del workers[process]

    try:
        while True:
            try:
                request = requests.get(timeout=LOOK_SECONDS)
            except queue.Empty:
                request = None
            for process in [process for process in workers if process.poll() is not None]:
                gone = workers.pop(process)
                if process.returncode:
                    broken.add(gone.job)
                    print(f"{gone.worker}, process {process.pid}, {_how(process.returncode)}", file=sys.stderr)
            if request is None:
                continue
            try:
                if request.job:
                    # Beam's local job service waits forever for a killed worker, and its other workers keep their
                    # memory. When the next job starts, that one has been aborted.
                    end([process for process, its in workers.items() if its.job in broken - {request.job}])
                    process = _start(request)
                    workers[process] = request
                    print(f"{request.worker}, process {process.pid}, works for {request.job}", file=sys.stderr)
                else:
                    end([process for process, its in workers.items() if its.worker == request.worker])
            except OSError as error:
                request.done.set_exception(error)
            else:
                request.done.set_result(None)
    finally:
        end(list(workers))


def _start(request: WorkerRequest) -> subprocess.Popen[bytes]:
    root = str(Path(__file__).resolve().parents[1])
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
        "CONTROL_API_SERVICE_DESCRIPTOR": f"url: {json.dumps(request.job)}",
        "LOGGING_API_SERVICE_DESCRIPTOR": f"url: {json.dumps(request.log)}",
        "WORKER_ID": request.worker,
    }
    command = [sys.executable, "-m", "data_pipelines.beam_worker", str(os.getpid())]
    return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL)


def _how(status: int) -> str:
    return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"failed with status {status}"


def main(argv: Sequence[str] | None = None) -> None:
    """The command line (`--help`)."""
    parser = Parser(
        prog="python -m data_pipelines.worker_pool",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--host", default="localhost", help="address to listen on, 0.0.0.0 for all addresses (%(default)s)"
    )
    parser.add_argument("--port", type=int, default=50000, help="to listen on, 0 for any free port (%(default)s)")
    args = parser.parse_args(argv)
    logging.getLogger().addHandler(logging.NullHandler())  # else Beam's first warning opens a handler to the terminal
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    requests: queue.Queue[WorkerRequest] = queue.Queue()
    check_port(args.port)
    try:
        address, server = listen(args.host, args.port, requests)
    except OSError as error:
        sys.exit(f"error: {error}")
    print(f"worker pool: {address}", flush=True)
    try:
        serve(requests)
    finally:
        server.stop(0)
