"""Effect of the prompt's initialisation on results: the same job with each initialisation, over many seeds.

    python -m benchmarks.starts --workdir=runs/starts -- --config=configs/fsc.py --config.few_shot=10 ...

Flags after `--` are passed to spjax.main, which runs once for each initialisation in WORKDIR/START; finished runs are
kept, so the same command continues. The table is printed and written to WORKDIR/starts.md: mean, standard deviation,
minimum and maximum over the seeds, on valid and on test. It is not used to choose anything.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spjax.evaluation.markdown import percent, table
from spjax.models.prompts import STARTS

SPLITS = {"valid": "valid", "headline": "test"}  # key in results.json → split


def run(start: str, workdir: Path, flags: Sequence[str]) -> list[dict[str, Any]]:
    """Trains with an initialisation, unless that is done; returns the results of every task.

    Raises:
      subprocess.CalledProcessError: training failed; its output has the reason.
    """
    command = [sys.executable, "-m", "spjax.main", *flags, f"--config.prompt.init={start}", f"--workdir={workdir}"]
    subprocess.run(command, check=True)
    return [json.loads(path.read_text()) for path in sorted(workdir.glob("**/results.json"))]


def rows_of(found: dict[str, list[dict[str, Any]]]) -> list[list[str]]:
    """Makes the rows of the table, sorted by task, from the results of every initialisation."""
    rows = []
    for start, results in found.items():
        for one in results:
            row = [one["task"], start, str(len(one["members"]))]
            for name in SPLITS:
                scores = one[name]["values"]
                spread = statistics.stdev(scores) if len(scores) > 1 else None
                row += map(percent, (statistics.fmean(scores), spread, min(scores), max(scores)))
            rows.append(row)
    return sorted(rows, key=lambda row: row[0])  # stable, so initialisations stay in order


def main() -> None:
    """Runs every initialisation and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("runs/starts"))
    parser.add_argument("--starts", default=",".join(STARTS), help="initialisations to compare, comma-separated")
    parser.add_argument("flags", nargs="+", help="of spjax.main, after --")
    args = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {}
    for start in args.starts.split(","):
        found[start] = run(start, args.workdir / start, args.flags)
        header = ["task", "start", "seeds"]
        header += [f"{split} {what}" for split in SPLITS.values() for what in ("mean", "sd", "lowest", "highest")]
        text = "\n".join(table(header, rows_of(found)))
        (args.workdir / "starts.md").write_text(f"{text}\n")
    print(text)


if __name__ == "__main__":
    main()
