"""Train low-rank adapters (LoRA) of the LM `tiny` on a folder of recordings, one subfolder per class.

    python examples/train_on_folder.py recordings runs/mine

This is what `python -m spjax.main --config=configs/own.py --folders=recordings --workdir=runs/mine` does. Everything
that was made is kept, and a second call continues. The pack is in runs/mine/packs/seed_0, the scores in summary.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from configs import own
from data_pipelines.sources import source_of
from spjax import config, jobs
from spjax.compilation_cache import keep_programs


def main(arguments: Sequence[str] | None = None) -> None:
    """Make units, train, score on the test split, and write a pack."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recordings", help="folder with one subfolder per class")
    parser.add_argument("workdir")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--cache", default="~/.cache/spjax/xla", help="directory of compiled programs")
    options = parser.parse_args(arguments)

    settings = own.get_config()  # all of them: print(settings)
    settings.lm = "tiny"  # frozen, 3.2 M parameters
    settings.prompt.rank = 4  # of the adapters of all six kernels of a layer
    settings.optim.lr = 2e-3
    settings.train.epochs = options.epochs  # the best on valid is kept
    settings.train.max_rows = 16  # utterances in a batch
    settings.train.seeds = (0,)  # several are trained side by side

    keep_programs(options.cache)
    job = config.parse(settings)
    source = source_of(job, options.workdir, {"folders": options.recordings}, overrides=())
    jobs.run(source.job, options.workdir, source.make, command="examples/train_on_folder.py")
    source.finish()

    results = json.loads((Path(options.workdir) / "results.json").read_text())
    print(f"accuracy on test: {results['headline']['mean']:.3f}")


if __name__ == "__main__":
    main()
