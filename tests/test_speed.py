"""The steps of notebook 8: they agree with each other, and what is counted is what moves."""

import pytest
import torch

from cbn_lab import speed

SHAPE = (3, 5, 6, 7)
CANDIDATES = {
    "folded": speed.folded,
    "save_input": speed.save_input,
    "reference": speed.engine("reference"),
    "numba": speed.engine("numba"),
}


@pytest.fixture
def batch():
    return speed.batch(SHAPE)


@pytest.mark.parametrize("name", [*CANDIDATES, "traced"])
def test_each_step_gives_what_the_formula_gives(name, batch):
    z, weight, bias, _ = batch
    candidate = CANDIDATES.get(name) or speed.traced(z, weight, bias)
    expected = speed.step(speed.formula, *batch)()
    for got, want in zip(speed.step(candidate, *batch)(), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(candidate(z, weight, bias), speed.formula(z, weight, bias))


def test_traffic_counts_reads_and_writes_and_no_views():
    x, y = torch.zeros(1000), torch.zeros(1000)
    size = x.nbytes
    for run, read, written, operations in (
        (lambda: x + y, 2, 1, 1),
        (lambda: x + x, 1, 1, 1),  # the second look is free
        (lambda: x.add_(y), 2, 1, 1),
        (lambda: x.view(10, 100).T, 0, 0, 0),
        (lambda: x[:500] * 2, 0.5, 0.5, 1),
        (lambda: torch.zeros(1).expand(1000) + y, 1, 1, 2),
    ):
        counted = speed.traffic(run)
        assert counted.operations == operations
        assert counted.read == pytest.approx(read * size, abs=8)
        assert counted.written == pytest.approx(written * size, abs=8)


def test_traffic_falls_step_by_step_to_the_eight_sweeps(batch):
    z = batch[0]
    order = [speed.formula, speed.folded, speed.save_input, speed.engine("numba")]
    sweeps = [speed.traffic(speed.step(c, *speed.batch((8, 4, 16, 16)))).bytes for c in order]
    assert sweeps == sorted(sweeps, reverse=True)
    assert sweeps[-1] / speed.batch((8, 4, 16, 16))[0].nbytes == pytest.approx(8, rel=0.1)
    assert speed.saved_bytes(speed.step(speed.formula, *batch)) > 2.9 * z.nbytes


def test_an_own_backward_keeps_the_input_alone():
    batch = speed.batch((8, 4, 16, 16))
    for candidate in (speed.save_input, speed.engine("numba")):
        kept = speed.saved_bytes(speed.step(candidate, *batch)) / batch[0].nbytes
        assert 1 <= kept < 1.05


def test_profile_names_the_operations_and_prints_nothing(capfd):
    x = torch.zeros(1000)
    rows, total = speed.profile(lambda: [x * 2 for _ in range(3)])
    assert ("aten::mul", 3) in [row[:2] for row in rows]
    assert [row[2] for row in rows] == sorted((row[2] for row in rows), reverse=True)
    assert total == pytest.approx(sum(row[2] for row in rows))
    assert capfd.readouterr() == ("", "")


def test_the_yardstick_is_two_stock_layers(batch):
    z, _, _, grad = batch
    re, im, *_ = speed.stock_step(z, grad)()
    stock = torch.nn.BatchNorm2d(SHAPE[1])
    part = z.imag.contiguous().requires_grad_()
    (want,) = torch.autograd.grad(stock(part), part, grad.imag.contiguous())
    torch.testing.assert_close(im, want)
    assert re.shape == z.shape


def test_times_runs_all_in_turn_and_keeps_the_least():
    calls = []
    found = speed.times({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3)
    assert calls == ["a", "b"] * 4  # one round more, for what happens once
    assert all(0 < ms < 1000 for ms in found.values())


def test_the_command_writes_what_load_reads(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(speed, "has_compiler", lambda: False)
    before = torch.get_num_threads()
    path = tmp_path / "mine.csv"
    try:
        assert speed.main(["--out", str(path), "--rounds", "1", "--shape", "2", "3", "4", "5"]) == 0
    finally:
        torch.set_num_threads(before)
    head, rows = speed.load(path)
    assert head["shape"] == [2, 3, 4, 5]
    names = [row["candidate"] for row in rows]
    assert names[0] == "two stock BatchNorm2d" and "torch.compile" not in names
    assert rows[0]["ratio"] == 1


def test_the_stored_figures_are_of_the_default_batch():
    head, rows = speed.load()
    assert head["shape"] == list(speed.SHAPE)
    assert {"numba", "formula", "torch.compile", "eight sweeps"} <= {r["candidate"] for r in rows}
