"""``cbn-lab bench``: what it times, what it writes, and that it refuses to time what is wrong."""

import argparse
import csv
from pathlib import Path

import pytest
import torch

from cbn_lab import bench, cli

SHAPE = "3x4x6x5"
ROOT = Path(__file__).parent.parent


@pytest.fixture
def rows(tmp_path, capsys):
    command = ["bench", "--shape", SHAPE, "--shape", "40x4", "--threads", "1", "--rounds", "3"]
    before = torch.get_num_threads()
    assert cli.main([*command, "--ours-only", "--output", str(tmp_path)]) == 0
    assert torch.get_num_threads() == before
    for name in ("bench.csv", "bench.md", "bench.png"):
        assert (tmp_path / name).stat().st_size > 100
    assert (tmp_path / "bench.md").read_text(encoding="utf-8") in capsys.readouterr().out
    with (tmp_path / "bench.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_each_shape_has_its_candidates_in_ratio_to_stock(rows):
    assert [row["shape"] for row in rows] == ["3×4×6×5"] * 5 + ["40×4"] * 5
    for group in (rows[:5], rows[5:]):
        ratio = {row["candidate"]: float(row["A_min"]) for row in group}
        assert list(ratio) == [
            bench.STOCK, "ours", "ours, pair", "ours, reference engine", "memory-traffic bound",
        ]  # fmt: skip
        milliseconds = {row["candidate"]: float(row["step_ms_min"]) for row in group}
        assert ratio[bench.STOCK] == 1
        for name, value in ratio.items():
            assert value == pytest.approx(milliseconds[name] / milliseconds[bench.STOCK])
        saved = {row["candidate"]: float(row["saved_to_input"]) for row in group}
        assert 1 <= saved["ours"] < 1.5
        assert float(group[1]["eval_A_min"]) > 0


@pytest.mark.parametrize("shape", ["3x", "axb", "3x4x5", "0x4", "-1x4"])
def test_what_is_no_shape_is_named(shape, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["bench", f"--shape={shape}"])
    assert f"expected a shape such as 32x64x32x32, got '{shape}'" in capsys.readouterr().err


def test_what_computes_something_else_is_not_timed(monkeypatch):
    args = argparse.Namespace(
        device="cpu", channels_last=False, ours_only=False, rounds=1, quick=True
    )
    monkeypatch.setattr(bench, "PEERS", {})
    monkeypatch.setattr(bench.Inputs, "thread", lambda self, **_: self.pair("wrong", wrong))
    with pytest.raises(RuntimeError, match="wrong differs by"):
        bench.run_shape((3, 4, 6, 5), 1, args)


def wrong(re, im):
    return re, im + 0.1 * re


def test_all_sweeps_are_counted_in_the_bound():
    stock = bench.Candidate("stock", None, (), (), False, [1.0], [1.0], [1.0])
    small = bench.bound("", 1, stock, 1 << 20, "cpu")
    large = bench.bound("", 1, stock, 1 << 25, "cpu")
    assert large["step_ms_min"] > 8 * small["step_ms_min"]
    assert large["step_ms_min"] / 1e3 == pytest.approx(4 * large["eval_A_min"])


@pytest.mark.parametrize("name", ["bench.csv", "bench_cuda.csv"])
def test_the_readme_shows_the_stored_measurement(name):
    with (ROOT / "cbn_lab" / "results" / name).open(newline="", encoding="utf-8") as file:
        assert bench.ratios(list(csv.DictReader(file))) in (ROOT / "README.md").read_text(
            encoding="utf-8"
        )


def test_ratios_put_threads_side_by_side():
    base = {"shape": "2×3", "candidate": "ours", "eval_A_min": ""}
    rows = [base | {"threads": 1, "A_min": "0.5"}, base | {"threads": 2, "A_min": "0.625"}]
    rows.append(base | {"candidate": "other", "A_min": "7", "eval_A_min": "1.5"})
    assert bench.ratios(rows).splitlines()[2:] == [
        "| ours | 0.50 / 0.62 |", "| other | 7.00 |", "| other: evaluation | 1.50 |",
    ]  # fmt: skip
