"""`python -m spjax.serve` as a process: output, shutdown, and a small load with bad requests in it."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import load, memory
from spjax import serve
from spjax.extras import MissingExtraError

httpx = pytest.importorskip("httpx", reason="httpx is a test dependency")
pytest.importorskip("uvicorn", reason="uvicorn is in the extra serve")
TOY = [
    "--dim=64", "--layers=1", "--prompt=3", "--separators=2", "--tasks=2", "--recordings=6", "--longest=0.6",
    "--asked=1,2", "--clients=20", "--warm=0.5", "--seconds=3",
]  # fmt: skip


def options(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    load.add_flags(parser)
    return parser.parse_args([*TOY, *flags])


@pytest.fixture(scope="module", autouse=True)
def quickly() -> Iterator[None]:
    """Servers compile with little optimisation, since tiny programs are fast anyway."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
        patch.setenv("JAX_PLATFORMS", "cpu")
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("load")
    load.make_place(folder, options())
    return folder


FEW = ("--no-page", "--max-units=64", "--max-seconds=3")  # few programs to compile


@pytest.mark.slow
def test_a_load_with_bad_requests_in_it(place: Path):
    """Every good request gets the predictor's answer, every bad one an error, and nothing is left behind."""
    result = load.race(place, "batched", options(), flags=FEW)
    assert result["faults"] == []
    assert result["good"] > 20
    assert result["rubbish"] > 5
    assert result["rows_a_batch"] > 2  # requests are batched
    assert result["outcomes"]['spjax_requests_total{outcome="failed"}'] == 0
    text = "\n".join(load.tables({"batched": result, "alone": {**result, "good": 1}}, options()))
    assert f"{result['good']:.2f} times the good answers" in text


@pytest.mark.slow
def test_memory_is_flat_over_thousands_of_requests():
    """Good requests of many formats and lengths, bad ones, and calls of the page."""
    parser = argparse.ArgumentParser()
    memory.add_flags(parser)
    result = memory.run(parser.parse_args([]))
    assert result["faults"] == []
    assert sum(result["sent"].values()) == 11_000
    assert result["growth"] <= memory.FLAT, result["memory"]


def test_a_wrong_answer_is_detected():
    expected = {"word": {"labels": {"word": "a"}, "probabilities": {"word": {"a": 0.6, "b": 0.4}}}}
    found = {"units": [1], "durations": [2], "answers": expected}
    assert load.wrong(found, expected, ["word"]) == ""
    other = {"word": {"labels": {"word": "a"}, "probabilities": {"word": {"a": 0.5999, "b": 0.4001}}}}
    assert "differ (1.0e-04)" in load.wrong({**found, "answers": other}, expected, ["word"])
    assert "no answer to" in load.wrong({"error": "busy"}, expected, ["word"])


def test_shutdown_waits_only_for_queued_requests(place: Path):
    """After Ctrl-C (the load test ends its server by SIGTERM) new requests are refused and queued ones answered.

    A connection that sent half a request, and will never send the rest, does not delay it. The server is started with
    SIGINT ignored, as a script's `COMMAND &` does.
    """
    wave = (place / "waves" / "0.wav").read_bytes()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited; `signals_as_before` restores it
    with load.server(place, *FEW) as (process, address), contextlib.ExitStack() as stack:
        host, port = address.removeprefix("http://").split(":")
        half = stack.enter_context(socket.create_connection((host, int(port))))
        half.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nhalf")
        assert httpx.get(f"{address}/health").json()["ready"]

        async def talk() -> list[int]:
            async with httpx.AsyncClient(base_url=address, timeout=60) as client:
                asks = [asyncio.create_task(client.post("/predict", content=wave)) for _ in range(40)]
                while not (await client.get("/health")).json()["working"]:
                    await asyncio.sleep(0.001)
                process.send_signal(signal.SIGINT)
                return [reply.status_code for reply in await asyncio.gather(*asks)]

        codes = asyncio.run(talk())
        assert set(codes) <= {200, 503}  # 503: sent after the server began to stop
        assert codes.count(200) > 0
        assert process.wait(30) == 130
        assert "stopping" in process.stdout.read()  # type: ignore[union-attr]
        half.settimeout(10)
        with contextlib.suppress(ConnectionResetError):
            assert half.recv(100) == b"", "it is closed"
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{address}/health")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--queue=0"], "queue is 0: give a whole number"),
        (["--kmeans=nowhere"], "nowhere"),
        (["--encoder=mfc"], "encoder 'mfc' is neither"),
        (["--most-rows=0"], "most_rows is 0"),
        (["--port=99999"], "--port is 99999: give 1 to 65535, or 0"),
        (["--port=-1"], "--port is -1: give"),
        (["--max-mb=inf"], "--max-mb is inf: give a number of megabytes"),
        (["--max-mb=nan"], "--max-mb is nan: give"),
        (["--host=192.0.2.1"], "--host=192.0.2.1 is not an address of this machine: give 127.0.0.1"),
        (["--host=" + "x" * 70], "is not an address of this machine"),
    ],
)
def test_errors_are_one_line(place: Path, flags: list[str], message: str):
    common = [f"--lm={place / 'lm'}", "--encoder=log_mel", f"--kmeans={place / 'km'}", f"--packs={place / 'packs'}"]
    with pytest.raises(SystemExit) as left:
        serve.main([*common, "--compilation-cache=", "--port=0", "--no-page", *flags])
    assert str(left.value.code).startswith("error: ")
    assert message in str(left.value.code)


def test_a_port_in_use_is_reported_before_compilation(place: Path):
    common = [f"--lm={place / 'lm'}", "--encoder=log_mel", f"--kmeans={place / 'km'}", f"--packs={place / 'packs'}"]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit) as left:
            serve.main([*common, "--compilation-cache=", "--no-page", f"--port={port}"])
    advice = "stop the other program, or give another --port (0: any free port)"
    assert left.value.code == f"error: port {port} of 127.0.0.1 is in use: {advice}"


def test_urls():
    options = argparse.Namespace(host="127.0.0.1", port=0)
    with serve._bind(options) as place:
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+", serve._url(place))
    try:
        place = serve._bind(argparse.Namespace(host="::1", port=0))
    except ValueError:
        pytest.skip("this machine has no IPv6")
    with place:
        assert re.fullmatch(r"http://\[::1\]:\d+", serve._url(place))


@pytest.mark.parametrize("inherited", ["ignored", "blocked", "default"])
def test_sigterm_during_compilation_ends_it_whatever_the_parent_did(
    inherited: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """SIGTERM; for SIGINT, which all commands handle alike, see test_process.py."""
    number = signal.SIGTERM

    def compiling(options: argparse.Namespace) -> None:
        os.kill(os.getpid(), number)
        time.sleep(30)  # until a signal ends it
        pytest.fail("the signal did nothing")

    monkeypatch.setattr(serve, "_serve", compiling)
    hangup = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        if inherited == "blocked":
            signal.pthread_sigmask(signal.SIG_BLOCK, [number])
        else:
            signal.signal(number, signal.SIG_IGN if inherited == "ignored" else signal.SIG_DFL)
        with pytest.raises(SystemExit) as left:
            serve.main(["--lm=x", "--encoder=log_mel", "--kmeans=x", "--packs=x"])
        assert left.value.code == 0
        assert capsys.readouterr().out.startswith("stopping")
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, hangup)


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(MissingExtraError, match=r"extra serve .*uvicorn.*pip install 'spjax\[serve\]'"):
        serve.main(["--lm=x", "--encoder=log_mel", "--kmeans=x", "--packs=x"])


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as left:
        serve.main(["--help"])
    assert left.value.code == 0
    printed = capsys.readouterr().out
    assert "  python -m spjax.serve --lm=" in printed
    assert re.search(r"--max-mb=N\s+most megabytes of an upload \(10\)", printed)


@pytest.fixture(autouse=True)
def signals_as_before() -> Iterator[None]:
    """`serve.main` installs signal handlers."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    yield
    assert threading.current_thread() is threading.main_thread()
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    for number, handler in before.items():
        signal.signal(number, handler)
