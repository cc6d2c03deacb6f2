"""Runs Beam jobs locally behind the protocol of cluster runners: `python -m data_pipelines.job_service --port=8099`.

It is Beam's local job service (`apache_beam.runners.portability.local_job_service`) with two changes: it uses
--direct_num_workers workers instead of one, and a job fails at once when a worker dies, where Beam's waits forever. The
workers are those of a pool, `data_pipelines.worker_pool`.

Its port listens on localhost only. However, Beam opens further ports for the workers of a job, which listen on all
addresses without encryption: use it only on a machine that others cannot reach.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the slow imports
    from spjax import process

    process.run("data_pipelines.job_service")

import argparse
import logging
import os
import signal
import threading
from collections.abc import Sequence
from typing import Any

from data_pipelines.worker_pool import check_port
from spjax.command_line import Parser

DEAD_WORKER = "a worker died, possibly killed for lack of memory"

log = logging.getLogger(__name__)


def fail_on_dead_workers() -> None:
    """Patches Beam's runner in this process to fail the requests of a worker whose connection breaks.

    Beam (2.77) reads a worker's responses in a thread that ends with the connection, and then waits for them forever.
    """
    from apache_beam.portability.api import beam_fn_api_pb2 as messages
    from apache_beam.runners.portability.fn_api_runner import worker_handlers as beam

    class Connection(beam.ControlConnection):
        broken = False

        def _read(self) -> None:
            try:
                super()._read()
            except Exception as error:  # gRPC's error for a broken connection
                log.debug("a connection broke: %r", error)
            finally:
                self.broken = True
                for future in list(self._futures_by_id.values()):  # empty after an orderly end
                    self._fail(future)

        def push(self, req: Any) -> Any:
            future = super().push(req)
            if self.broken and future is not None:
                self._fail(future)
            return future

        def _fail(self, future: Any) -> None:
            future.set(messages.InstructionResponse(instruction_id=future.instruction_id, error=DEAD_WORKER))

    beam.ControlConnection = Connection  # type: ignore[misc]


def start_job_service(port: int) -> tuple[int, Any]:
    """Starts the job service.

    Args:
      port: to listen on; 0 for any free port.

    Returns:
      The port, and the service, which has a method `stop()`.
    """
    from apache_beam.options.pipeline_options import DirectOptions
    from apache_beam.portability.api import beam_job_api_pb2 as jobs
    from apache_beam.runners.portability import local_job_service
    from apache_beam.runners.portability.fn_api_runner import FnApiRunner

    class Job(local_job_service.BeamJob):
        def _invoke_runner(self) -> Any:
            self.set_state(jobs.JobState.RUNNING)
            options = self.pipeline_options()
            runner = FnApiRunner(provision_info=self._provision_info)
            # Options arrive as text, and FnApiRunner reads this one only if it was chosen by --runner.
            runner._num_workers = int(options.view_as(DirectOptions).direct_num_workers) or os.cpu_count() or 1
            return runner.run_via_runner_api(self._pipeline_proto, options)

    fail_on_dead_workers()
    service = local_job_service.LocalJobServicer(beam_job_type=Job)
    return service.start_grpc_server(port), service


def main(argv: Sequence[str] | None = None) -> None:
    """The command line (`--help`)."""
    parser = Parser(
        prog="python -m data_pipelines.job_service",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--port", type=int, default=8099, help="to listen on, 0 for any free port (%(default)s)")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.ERROR)
    over = threading.Event()
    for ends in (signal.SIGTERM, signal.SIGINT):
        signal.signal(ends, lambda *_: over.set())
    check_port(args.port)
    port, service = start_job_service(args.port)
    print(f"job service: localhost:{port}", flush=True)
    over.wait()
    service.stop()
    os._exit(0)  # unfinished jobs would keep the process alive
