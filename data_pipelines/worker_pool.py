"""Workers for a runner that starts none itself: `python -m data_pipelines.worker_pool --port=50000`.

A runner that is told `--environment_type=EXTERNAL --environment_config=HOST:50000` asks the pool there for as many
workers as it wants: Beam's local job service does, and Flink and Spark with a pool on every machine of theirs. Each is
a process of one thread, the same as those that `data_pipelines.extract` starts by itself. Workers end with their job,
and all of them with the pool (Ctrl-C or SIGTERM). One that is killed is told of here; the launcher of its job hands in
again what is missing.

Whoever reaches the port has code run here. It is this machine's alone, unless `--host` says otherwise: 0.0.0.0 where
the runner asks from another machine or container, and then only in a network of your own.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take their time
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

LOOK_SECONDS = 0.5  # between two looks at who has ended
END_SECONDS = 5.0  # that workers have to end by themselves


class Order(NamedTuple):
    """What a runner asks of a pool.

    Attributes:
      worker: name that the runner has for it.
      job: address, HOST:PORT, where a new worker finds its work; "" to end the worker.
      log: address where it sends its log.
      done: set once it is started, or ended, or holds what prevented that.
    """

    worker: str
    job: str
    log: str
    done: Future[None]


def listen(host: str, port: int, orders: queue.Queue[Order]) -> tuple[str, Any]:
    """Takes what runners ask for, by Beam's protocol.

    Beam's own pool listens on every address of its machine.

    Args:
      host: name or address of this machine to listen on; 0.0.0.0 for all that it has.
      port: to listen on; 0 for any that is free.
      orders: where to put it.

    Returns:
      The address, and the server, which listens as long as it is held.

    Raises:
      OSError: nobody can listen there.
    """
    from apache_beam.portability.api import beam_fn_api_pb2 as messages
    from apache_beam.portability.api import beam_fn_api_pb2_grpc as services
    from apache_beam.runners.worker.worker_pool_main import grpc  # of Beam's, and no requirement of ours
    from apache_beam.utils.thread_pool_executor import shared_unbounded_instance

    class Servicer(services.BeamFnExternalWorkerPoolServicer):
        def StartWorker(self, request: Any, _: Any) -> Any:  # noqa: N802  # Beam's name
            order = Order(request.worker_id, request.control_endpoint.url, request.logging_endpoint.url, Future())
            orders.put(order)
            return messages.StartWorkerResponse(error=str(order.done.exception() or ""))

        def StopWorker(self, request: Any, _: Any) -> Any:  # noqa: N802
            order = Order(request.worker_id, "", "", Future())
            orders.put(order)
            return messages.StopWorkerResponse(error=str(order.done.exception() or ""))

    # Threads that keep nobody from ending: at the end there may be orders yet that were never answered.
    server = grpc.server(shared_unbounded_instance(), options=[("grpc.so_reuseport", 0)])
    services.add_BeamFnExternalWorkerPoolServicer_to_server(Servicer(), server)
    try:
        port = server.add_insecure_port(f"{host}:{port}")
    except RuntimeError as error:  # gRPC's own
        raise OSError(f"nobody can listen on {host}:{port}: --host must be an address of this machine") from error
    server.start()
    return f"{host}:{port}", server


def check_port(port: int) -> None:
    """Ends this process if somebody listens there: gRPC would share the port with them, and each get some requests."""
    with contextlib.suppress(OSError):
        socket.create_connection(("localhost", port), timeout=5).close()
        sys.exit(f"error: port {port} is taken: is it running already? Or choose another --port")


def serve(orders: queue.Queue[Order]) -> None:
    """Starts and ends workers as ordered, until an exception (SystemExit, KeyboardInterrupt) ends it with all of them.

    It is one thread that starts them all, since Linux ends them with that thread (`beam_worker.die_with`).
    """
    workers: dict[subprocess.Popen[bytes], Order] = {}
    broken: set[str] = set()  # jobs that have lost a worker

    def end(chosen: Sequence[subprocess.Popen[bytes]]) -> None:
        """SIGTERM, and SIGKILL to whom that does not end; nothing is said of them, since it is no loss."""
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
                order = orders.get(timeout=LOOK_SECONDS)
            except queue.Empty:
                order = None
            for process in [process for process in workers if process.poll() is not None]:
                gone = workers.pop(process)
                if process.returncode:
                    broken.add(gone.job)
                    print(f"{gone.worker}, process {process.pid}, {_how(process.returncode)}", file=sys.stderr)
            if order is None:
                continue
            try:
                if order.job:
                    # Beam's local job service waits for ever for a worker that was killed, and the others idle in
                    # their memory with it. By the next job, that one has been given up.
                    end([process for process, its in workers.items() if its.job in broken - {order.job}])
                    process = _start(order)
                    workers[process] = order
                    print(f"{order.worker}, process {process.pid}, works for {order.job}", file=sys.stderr)
                else:
                    end([process for process, its in workers.items() if its.worker == order.worker])
            except OSError as error:
                order.done.set_exception(error)
            else:
                order.done.set_result(None)
    finally:
        end(list(workers))


def _start(order: Order) -> subprocess.Popen[bytes]:
    root = str(Path(__file__).resolve().parents[1])
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
        "CONTROL_API_SERVICE_DESCRIPTOR": f"url: {json.dumps(order.job)}",
        "LOGGING_API_SERVICE_DESCRIPTOR": f"url: {json.dumps(order.log)}",
        "WORKER_ID": order.worker,
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
        "--host", default="localhost", help="address to listen on, 0.0.0.0 for all of this machine's (%(default)s)"
    )
    parser.add_argument("--port", type=int, default=50000, help="to listen on, 0 for any that is free (%(default)s)")
    args = parser.parse_args(argv)
    logging.getLogger().addHandler(logging.NullHandler())  # Beam's warnings would open a log to the terminal
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    orders: queue.Queue[Order] = queue.Queue()
    check_port(args.port)
    try:
        address, server = listen(args.host, args.port, orders)
    except OSError as error:
        sys.exit(f"error: {error}")
    print(f"worker pool: {address}", flush=True)
    try:
        serve(orders)
    finally:
        server.stop(0)
