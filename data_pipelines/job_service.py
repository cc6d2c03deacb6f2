"""A runner on this machine behind the protocol of the large ones: `python -m data_pipelines.job_service --port=8099`.

It is Beam's own local job service (`apache_beam.runners.portability.local_job_service`) with two differences: it uses
as many workers as --direct_num_workers says, where Beam's uses one, and a job that loses a worker fails at once, where
Beam's waits for ever. The workers are those of a pool, `data_pipelines.worker_pool`.

Its port is this machine's alone. But those that Beam's runner opens behind it for the workers of a job, any that are
free, listen on all addresses, unencrypted: keep it to a machine that others do not reach.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take their time
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

LOST = "a worker was lost, killed maybe for want of memory"

log = logging.getLogger(__name__)


def fail_with_lost_workers() -> None:
    """From now on Beam's runner of this process fails what a worker was asked for when the connection to it breaks.

    Beam (2.77) reads a worker's answers in a thread that dies with the connection, and goes on waiting for them.
    """
    from apache_beam.portability.api import beam_fn_api_pb2 as messages
    from apache_beam.runners.portability.fn_api_runner import worker_handlers as beam

    class Connection(beam.ControlConnection):
        lost = False

        def _read(self) -> None:
            try:
                super()._read()
            except Exception as error:  # gRPC's own, of a connection that broke
                log.debug("a connection broke: %r", error)
            finally:
                self.lost = True
                for future in list(self._futures_by_id.values()):  # none where the worker ends in order
                    self._fail(future)

        def push(self, req: Any) -> Any:
            future = super().push(req)
            if self.lost and future is not None:
                self._fail(future)
            return future

        def _fail(self, future: Any) -> None:
            future.set(messages.InstructionResponse(instruction_id=future.instruction_id, error=LOST))

    beam.ControlConnection = Connection  # type: ignore[misc]


def start_job_service(port: int) -> tuple[int, Any]:
    """Serves jobs on this machine.

    Args:
      port: to listen on; 0 for any that is free.

    Returns:
      The port, and the service, which `.stop()` ends.
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
            # Numbers come as text, and a runner heeds this one only where a pipeline names it as its own runner.
            runner._num_workers = int(options.view_as(DirectOptions).direct_num_workers) or os.cpu_count() or 1
            return runner.run_via_runner_api(self._pipeline_proto, options)

    fail_with_lost_workers()
    service = local_job_service.LocalJobServicer(beam_job_type=Job)
    return service.start_grpc_server(port), service


def main(argv: Sequence[str] | None = None) -> None:
    """The command line (`--help`)."""
    parser = Parser(
        prog="python -m data_pipelines.job_service",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--port", type=int, default=8099, help="to listen on, 0 for any that is free (%(default)s)")
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
    os._exit(0)  # jobs that are not done would keep it
