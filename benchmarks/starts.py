"""How much of a result is the start of the prompt: the same job for each start, by many seeds.

    python -m benchmarks.starts --workdir=runs/starts -- --config=configs/fsc.py --config.few_shot=10 ...

What stands behind `--` is passed on to spjax.main, which runs once for each start in WORKDIR/START; what
is done is kept, so the same command goes on. The table is printed and written to WORKDIR/starts.md: mean, standard
deviation, lowest and highest score of the seeds, on valid and on test. Nothing is chosen by it.
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

SPLITS = {"valid": "valid", "headline": "test"}  # by their names in results.json


def run(start: str, workdir: Path, flags: Sequence[str]) -> list[dict[str, Any]]:
    """Train with a start, unless that is done; the results of every task.

    Raises:
      subprocess.CalledProcessError: training failed; it said why.
    """
    command = [sys.executable, "-m", "spjax.main", *flags, f"--config.prompt.init={start}", f"--workdir={workdir}"]
    subprocess.run(command, check=True)
    return [json.loads(path.read_text()) for path in sorted(workdir.glob("**/results.json"))]


def rows_of(found: dict[str, list[dict[str, Any]]]) -> list[list[str]]:
    """Rows of the table, task after task, from every start's results."""
    rows = []
    for start, results in found.items():
        for one in results:
            row = [one["task"], start, str(len(one["members"]))]
            for name in SPLITS:
                scores = one[name]["values"]
                spread = statistics.stdev(scores) if len(scores) > 1 else None
                row += map(percent, (statistics.fmean(scores), spread, min(scores), max(scores)))
            rows.append(row)
    return sorted(rows, key=lambda row: row[0])  # starts stay in their order


def main() -> None:
    """Run every start and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("runs/starts"))
    parser.add_argument("--starts", default=",".join(STARTS), help="those to try, with commas between")
    parser.add_argument("flags", nargs="+", help="of spjax.main, behind --")
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
