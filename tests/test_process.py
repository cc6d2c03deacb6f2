"""Ctrl-C at any time ends a command with status 130 and without a traceback, and its processes too.

The moment is an import, or the start of a process, detected by code in the command's process: no test sleeps.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FSC = f"--config={ROOT}/configs/fsc.py"
SERVING = ("--lm=lm", "--packs=packs", "--encoder=mfcc", "--kmeans=kmeans")

# Python imports this file at startup. AT: a module, "start" of an interpreter that replaces another,
# or "child" of a pool.
HOOK = """
import os, signal, sys
AT, GROUP = os.environ["INTERRUPT_AT"], "INTERRUPT_GROUP" in os.environ
sent = []
def send():
    if not sent:
        sent.append(True)
        os.write(2, b"SENT\\n")
        (os.killpg(0, signal.SIGINT) if GROUP else os.kill(os.getpid(), signal.SIGINT))
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == AT:
            send()
sys.meta_path.insert(0, Finder())
if AT == "start" and "GLIBC_TUNABLES" in os.environ or AT == "child" and "--multiprocessing-fork" in sys.orig_argv:
    send()
"""


def interrupted(
    folder: Path, words: list[str], at: str, *, ignored: bool = False, group: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run `python WORDS` in a folder and send SIGINT at a moment; `group`: to its processes too, as a terminal does."""
    (folder / "hook").mkdir(exist_ok=True)
    (folder / "hook" / "sitecustomize.py").write_text(HOOK)
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    environment |= {"PYTHONPATH": f"{folder / 'hook'}:{ROOT}:{folder}", "INTERRUPT_AT": at, "JAX_PLATFORMS": "cpu"}
    if group:
        environment["INTERRUPT_GROUP"] = "1"
    trap = "trap '' INT; " if ignored else ""
    script = ["bash", "-c", f'{trap}exec "$@"', "bash", sys.executable, *words]
    return subprocess.run(
        script, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False,
        start_new_session=True,
    )  # fmt: skip


def _assert_ended(done: subprocess.CompletedProcess[str]) -> None:
    printed = done.stdout + done.stderr
    assert "SENT" in printed, printed
    assert done.returncode == 130, printed
    for sign in ("Traceback", "KeyboardInterrupt", "Exception ignored"):
        assert sign not in printed


@pytest.mark.parametrize(
    ("command", "at"),
    [
        ("spjax.main", "spjax.malloc"),
        ("spjax.main", "start"),  # the second interpreter, before any of our code runs in it
        ("spjax.main", "ml_collections"),
        (f"spjax.main {FSC}", "configs.defaults"),
        (f"spjax.main {FSC}", "spjax.jobs.pretraining"),
        (f"spjax.predict {' '.join(SERVING)} a.wav", "spjax.serving.predictor"),
        (f"spjax.serve {' '.join(SERVING)}", "start"),
        (f"spjax.serve {' '.join(SERVING)}", "spjax.serving.api"),
        ("spjax.packs show packs", "numpy"),
        ("spjax.fetch km100 --out=out", "spjax.convert"),
        ("spjax.inside --lm=lm --packs=packs --out=out", "jax"),
        ("spjax.convert unit_lm a.pt out", "numpy"),
        ("spjax.evaluation.ngram --data=records", "spjax.data.records"),
        ("data_pipelines.extract --task=fsc --raw=. --out=out --encoder=mfcc --clusters=3", "data_pipelines.builders"),
        ("data_pipelines.fit_kmeans --task=fsc --raw=. --out=out --encoder=mfcc", "numpy"),
        ("data_pipelines.synthesize --out=out", "data_pipelines.espeak"),
        ("data_pipelines.import_units --task=fsc --src=. --out=out", "spjax.data.tfrecords"),
        ("data_pipelines.leaks --task=fsc --raw=.", "data_pipelines.builders.fsc"),
    ],
)
def test_a_command_ends_at_once_during_any_import(tmp_path: Path, command: str, at: str) -> None:
    """With SIGINT ignored, as for `command &` in a script."""
    _assert_ended(interrupted(tmp_path, ["-m", *command.split()], at, ignored=True))


def test_it_ends_with_default_signal_handling(tmp_path: Path) -> None:
    _assert_ended(interrupted(tmp_path, ["-m", "spjax.packs", "show", "packs"], "numpy"))


def test_it_ends_while_a_program_is_compiled(tmp_path: Path) -> None:
    """JAX reports a compilation in the middle of the call that needs it."""
    (tmp_path / "compiles.py").write_text(
        "import os, signal, jax\n"
        "def main():\n"
        "    def listen(event, *_, **__):\n"
        "        if 'compile' in event:\n"
        "            os.write(2, b'SENT\\n')\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "    jax.monitoring.register_event_duration_secs_listener(listen)\n"
        "    print(jax.jit(lambda x: x + 1)(1))\n"
    )
    done = interrupted(tmp_path, ["-c", "from spjax import process; process.run('compiles')"], "nothing")
    _assert_ended(done)
    assert done.stdout == ""


def test_it_ends_where_exceptions_are_ignored(tmp_path: Path) -> None:
    """JAX runs a callback at every garbage collection, in which an exception is printed and lost."""
    (tmp_path / "ignores.py").write_text(
        "import gc, os, signal, time\n"
        "def main():\n"
        "    def collecting(phase, info):\n"
        "        gc.callbacks.remove(collecting)\n"
        "        os.write(2, b'SENT\\n')\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    gc.callbacks.append(collecting)\n"
        "    gc.collect()\n"
        "    time.sleep(20)\n"
        "    print('went on')\n"
    )
    done = interrupted(tmp_path, ["-c", "from spjax import process; process.run('ignores')"], "nothing")
    _assert_ended(done)
    assert done.stdout == ""


def test_it_ends_where_a_library_turns_exceptions_into_others(tmp_path: Path) -> None:
    """As numpy does while its extensions are imported; cleanup still runs."""
    (tmp_path / "fragile.py").write_text(
        "import os, signal\n"
        "try:\n"
        "    os.write(2, b'SENT\\n')\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "except BaseException:\n"
        "    raise ImportError('an extension cannot be initialised') from None\n"
    )
    (tmp_path / "imports.py").write_text(
        "import time\ndef main():\n    try:\n        import fragile\n        time.sleep(20)\n"
        "    finally:\n        print('tidy')\n"
    )
    done = interrupted(tmp_path, ["-c", "from spjax import process; process.run('imports')"], "nothing")
    _assert_ended(done)
    assert done.stdout == "tidy\n"


POOL = """
import os, signal, time
from spjax import process

def work(folder):
    open(os.path.join(folder, str(os.getpid())), "w").close()
    os.write(2, b"SENT\\n")
    os.killpg(0, signal.SIGINT)
    time.sleep(600)

def main():
    with process.worker_pool(2) as pool:
        pool.submit(work, os.path.abspath("pids")).result()
"""


@pytest.mark.parametrize("at", ["nothing", "child"], ids=["in work", "at the start of a worker"])
def test_the_processes_of_a_pool_end_silently(tmp_path: Path, at: str) -> None:
    """A terminal sends SIGINT to them too; waiting in the pool would take ten minutes."""
    (tmp_path / "pids").mkdir()
    (tmp_path / "pooled.py").write_text(POOL)
    script = "from spjax import process\nif __name__ == '__main__': process.run('pooled')\n"
    (tmp_path / "start.py").write_text(script)
    _assert_ended(interrupted(tmp_path, ["start.py"], at, group=True))
    for path in (tmp_path / "pids").iterdir():
        state = Path(f"/proc/{path.name}/stat")
        assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] in "ZX"


def test_results_of_a_pool_come_back(tmp_path: Path) -> None:
    from spjax import process

    with process.worker_pool(1) as pool:
        assert pool.submit(abs, -3).result() == 3


BREAKS = """
import time
from spjax import process

def main():
    with process.worker_pool(2, max_tasks_per_child=1) as pool:
        waiting = [pool.submit(time.sleep, 0.001) for _ in range(8)]
        waiting[1].result()
        raise SystemExit("error: a sentence")

if __name__ == "__main__":
    process.run("breaks")
"""


def test_an_error_in_a_pool_block_is_printed_alone(tmp_path: Path) -> None:
    """The pool's thread, about to start the next process, would find the pool closed."""
    (tmp_path / "breaks.py").write_text(BREAKS)
    done = interrupted(tmp_path, ["breaks.py"], "nothing")
    assert (done.returncode, done.stderr) == (1, "error: a sentence\n")
