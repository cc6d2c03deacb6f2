"""Benchmarks of extraction and of the record reader at toy size: all sides run and are reported."""

from __future__ import annotations

import argparse
import json

import pytest

from benchmarks import extraction, reader


@pytest.mark.distributed
@pytest.mark.slow
def test_extraction_is_measured(tmp_path, capsys):
    flags = ["--clips=70", "--seconds=0.3", "--clusters=8", "--rounds=1", "--workers", "1"]
    extraction.main([*flags, f"--out={tmp_path / 'out.json'}"])
    output = capsys.readouterr().out
    assert "| workers | s | s to start" in output
    assert "processor: " in output
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert {name: runs[0]["utterances"] for name, runs in results.items()} == {"1 workers": 70, "1 workers, start": 64}
    with pytest.raises(SystemExit):
        extraction.main(["--clips=64"])


def test_rates_beyond_the_start():
    results = {
        "1 workers": [{"seconds": 12.0, "cpu": 13.0, "utterances": 1064}],
        "1 workers, start": [{"seconds": 2.0, "cpu": 2.5, "utterances": 64}],
        "2 workers": [{"seconds": 8.0, "cpu": 14.0, "utterances": 1128}],
        "2 workers, start": [{"seconds": 3.0, "cpu": 4.0, "utterances": 128}],
    }
    times, ratios = extraction.tables(results, 1.5, [1, 2])
    assert "| 1 | 12.0 | 2.0 | 13.0 | 2.5 | 100 | 150 |" in times
    assert "| 2 | 8.0 | 3.0 | 14.0 | 4.0 | 200 | 300 |" in times
    assert "| 2 | 1.50 (1.50–1.50) |" in ratios


def test_reader_sides(tmp_path):
    args = argparse.Namespace(utterances=70, units=10, records=str(tmp_path / "records"))
    reader.write_records(tmp_path / "records", args)
    for side in ("records", "batches"):
        run = reader.runner(side, args)
        assert run()["utterances"] == 70
    results = {
        "records": [{"seconds": 1.0, "utterances": 100}],
        "batches": [{"seconds": 1.0, "utterances": 100}],
        "training": [{"seconds": 1.0, "utterances": 4}],
    }
    (table,) = reader.tables(results)
    assert "| records | 100 | 25.00 (25.00–25.00) | met |" in table
    assert "| records, then batches | 50 | 12.50 (12.50–12.50) | missed |" in table
