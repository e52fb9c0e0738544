"""The experiment of notebook 9: the data are what they claim to be, and a run can be repeated."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from cbn_lab import experiments, plots
from cbn_lab.experiments import METHODS, Affine, Results, Run, Settings
from cbn_lab.explorers.results import ResultsExplorer

TINY = Settings(train=100, validation=100, detectors=8, hidden=4, epochs=2)


@pytest.fixture(scope="module")
def stored():
    return experiments.load()


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("circularity", [0.0, 0.3, 1.0])
def test_the_medium_has_the_circularity_that_was_asked_for(circularity):
    pixels = torch.randn(4000, 400, generator=torch.Generator().manual_seed(0))
    fields = experiments.medium(pixels, circularity, 0.0, 32, seed=0)
    short_over_long = np.median([1 / max(plots.axis_ratio(z), 1) for z in fields.T])
    assert short_over_long == pytest.approx(circularity, abs=0.1)
    squared = (fields - fields.mean(0)).square().mean(0)
    assert squared.angle().std() > 1  # the reference phase differs between detectors


def test_the_noise_is_as_strong_as_it_is_said_to_be():
    pixels = torch.rand(4000, 64, generator=torch.Generator().manual_seed(0))
    clean, noisy = (experiments.medium(pixels, 0.5, noise, 32, seed=0) for noise in (0.0, 0.5))
    spread = (clean - clean.mean(0)).abs().square().mean().sqrt()
    assert (noisy - clean).abs().square().mean().sqrt() / spread == pytest.approx(0.5, rel=0.02)


def test_the_networks_differ_in_the_normalisation_alone():
    shapes = {m: [p.shape for p in experiments.network(m, TINY).parameters()] for m in METHODS}
    assert shapes["none"] == shapes["naive"] == shapes["whitening"]


def test_affine_is_the_symmetric_map_of_the_plane():
    affine = Affine(1, 1.0)
    with torch.no_grad():
        affine.weight[0] = torch.tensor([2.0, 3.0, 0.5])
        affine.bias[0] = torch.tensor([10.0, 20.0])
    expected = torch.tensor([[2.0, 0.5], [0.5, 3.0]]) @ torch.tensor([1.0, -1.0])
    out = torch.view_as_real(affine(torch.tensor([[1 - 1j]])))[0, 0]
    torch.testing.assert_close(out, expected + torch.tensor([10.0, 20.0]))


@pytest.mark.parametrize("method", METHODS)
def test_a_run_is_determined_by_its_key(method, one_thread):
    run = Run("medium", 0.2, method, 0.1, 3)
    torch.manual_seed(1)
    first = experiments.perform(run, TINY)
    torch.rand(5)  # the caller's generator plays no part
    assert experiments.perform(run, TINY) == first
    assert 0 <= first.test <= 1
    assert experiments.perform(dataclasses.replace(run, seed=4), TINY) != first


def test_a_run_leaves_the_callers_generator_alone():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    experiments.perform(
        Run("fft", math.nan, "none", 0.1, 0), dataclasses.replace(TINY, detectors=64)
    )
    torch.testing.assert_close(torch.rand(3), expected)


def test_interval_is_students():
    # Tables: t(0.975) with 4 degrees of freedom is 2.776.
    mean, half = experiments.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == pytest.approx(3)
    assert half == pytest.approx(2.7764 * np.sqrt(2.5 / 5), rel=1e-4)
    with pytest.raises(ValueError, match="at least 2 values"):
        experiments.interval([1.0])


def test_a_series_broken_off_goes_on_and_makes_the_same_file(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "CIRCULARITIES", (0.5,))
    monkeypatch.setattr(experiments, "RATES", (0.03, 0.1))
    monkeypatch.setattr(experiments, "TUNING_SEEDS", (1000,))
    monkeypatch.setattr(experiments, "perform_all", in_this_process)
    tiny = [f"--{name}={getattr(TINY, name)}" for name in ("train", "validation", "epochs")]
    common = [*tiny, "--seeds", "2"]
    assert experiments.main([*common, "--out", str(tmp_path / "whole.csv")]) == 0
    for limit in (7, 9, 100):
        part = [*common, "--out", str(tmp_path / "parts.csv"), "--limit", str(limit)]
        assert experiments.main(part) == 0
    assert (tmp_path / "parts.csv").read_text() == (tmp_path / "whole.csv").read_text()
    found = experiments.load(tmp_path / "whole.csv")
    assert len(found.runs) == 2 * 3 * (2 + 2)
    assert len(found.accuracy("medium", 0.5, "naive")) == 2
    with pytest.raises(SystemExit):  # a file of other settings is not mixed up with these
        experiments.main([*common[:-1], "3", "--epochs", "1", "--out", str(tmp_path / "whole.csv")])


def in_this_process(todo, results, path, workers):
    results.runs += [experiments.perform(run, results.settings) for run in todo]
    experiments.save(results, path)


def test_the_stored_series_is_complete(stored):
    assert stored.settings == Settings()
    assert stored.versions["torch"]
    for point in experiments.points():
        for method in METHODS:
            assert len(stored.accuracy(*point, method)) == 12


@pytest.mark.parametrize("method", METHODS)
def test_a_stored_point_is_reproduced(stored, method, one_thread):
    # Another machine rounds otherwise, and training amplifies it: 3 points of accuracy are allowed.
    rate = stored.rate("medium", 0.2, method)
    there = stored.accuracy("medium", 0.2, method)[0]
    now = experiments.perform(Run("medium", 0.2, method, rate, 0), stored.settings)
    assert 100 * now.test == pytest.approx(there, abs=3)
    assert there > 60  # chance is 10


def test_what_is_no_series_is_named(tmp_path):
    (tmp_path / "a.csv").write_text("x,y\n1,2\n")
    with pytest.raises(ValueError, match="settings and versions first"):
        experiments.load(tmp_path / "a.csv")
    with pytest.raises(LookupError, match="no complete search"):
        Results(TINY, {}).rate("medium", 0.5, "naive")


def test_the_explorer_follows_its_slider(stored):
    explorer = ResultsExplorer(stored)
    seen = set()
    for circularity in experiments.CIRCULARITIES:
        explorer.control.value = circularity
        mean, half = experiments.interval(stored.accuracy("medium", circularity, "whitening"))
        assert f"whitening {mean:.1f} ± {half:.1f} %" in explorer.summary
        assert explorer.summary in explorer.picture.value
        seen.add(explorer.picture.value)
    assert len(seen) == len(experiments.CIRCULARITIES)
