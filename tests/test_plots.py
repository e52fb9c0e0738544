"""The pictures: each returns the Axes it was given, draws what it says, and shows nothing."""

from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from cbn_lab import datasets, plots


@pytest.fixture
def ax(monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("a plot called show")

    monkeypatch.setattr(plt, "show", forbidden)
    fig, ax = plt.subplots()
    yield ax
    fig.canvas.draw()  # whatever was drawn can be drawn
    plt.close(fig)


@pytest.fixture
def z():
    generator = torch.Generator().manual_seed(0)
    return datasets.speckle((4000,), circularity=0.5, angle=0.7, generator=generator) + (1 - 2j)


def test_the_ellipse_is_the_level_line_of_the_gaussian(z):
    # Points on it have Mahalanobis distance sigma from the mean.
    points = torch.from_numpy(plots.ellipse(z, sigma=2.0)).T
    data = torch.view_as_real(z.to(torch.complex128))
    centred = points - data.mean(0)
    distance = (centred @ torch.linalg.inv(torch.cov(data.T, correction=0)) * centred).sum(1)
    torch.testing.assert_close(distance, torch.full_like(distance, 4.0))


def test_the_stages_do_what_their_names_say(z):
    assert plots.axis_ratio(plots.normalised(z, "input")) == pytest.approx(2.0, rel=0.05)
    naive = torch.view_as_real(plots.normalised(z, "naive"))
    torch.testing.assert_close(naive.var(0), torch.ones(2), rtol=1e-3, atol=0)
    assert plots.axis_ratio(torch.view_as_complex(naive)) > 1.5
    assert plots.axis_ratio(plots.normalised(z, "whitened")) == pytest.approx(1.0, abs=1e-3)


def test_whitening_draws_two_ellipses_a_stage_and_says_their_shape(ax, z):
    assert plots.whitening(z, ax) is ax
    curves = [line for line in ax.lines if len(line.get_xdata()) == 181]
    assert len(curves) == 6
    assert "whitened 1.00" in ax.get_label()
    styles = {(line.get_linestyle(), line.get_color()) for line in curves}
    assert len({style for style, _ in styles}) == 3  # told apart by more than colour


def test_whitening_takes_any_shape_and_a_graph(ax):
    z = torch.randn(5, 4, 3, dtype=torch.cfloat, requires_grad=True)
    assert plots.whitening(z, ax, stages=["whitened"], points="whitened") is ax


@pytest.mark.parametrize(
    "data, error, text",
    [
        (torch.randn(8), TypeError, "complex values, got torch.float32"),
        (torch.randn(1, dtype=torch.cfloat), ValueError, "at least 2 values, got 1"),
    ],
)
def test_whitening_names_bad_data(ax, data, error, text):
    with pytest.raises(error, match=text):
        plots.whitening(data, ax)


def test_whitening_names_an_unknown_stage(ax, z):
    with pytest.raises(ValueError, match="got 'white'"):
        plots.whitening(z, ax, stages=["white"])


def test_running_statistics_draws_each_series_from_step_1(ax):
    series = {"a": [3.0, 2.0, 1.0], "b": [0.0, 0.5, 0.75]}
    assert plots.running_statistics(series, [1.0, 1.0, 1.0], 1.0, ax) is ax
    drawn = {line.get_label(): line for line in ax.lines}
    assert set(drawn) == {"a", "b", "batch", "true value"}
    np.testing.assert_array_equal(drawn["b"].get_xydata(), [[1, 0.0], [2, 0.5], [3, 0.75]])
    assert "a 1.000, b 0.750; true value 1.000" in ax.get_label()


def test_graph_growth_draws_the_counts_and_says_their_slope(ax):
    assert plots.graph_growth({"rebind": [6, 11, 16], "no_grad": [0, 0, 0]}, ax) is ax
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), [6, 11, 16])
    assert "rebind 16 (+5 a step), no_grad 0 (+0 a step)" in ax.get_label()
    assert ax.lines[0].get_marker() != ax.lines[1].get_marker()


def test_memory_draws_growth_since_the_first_step(ax):
    rows = [SimpleNamespace(tensor_bytes=2**20 * (5 + k), heap_bytes=None) for k in range(4)]
    assert plots.memory(rows, ax) is ax
    (line,) = ax.lines
    np.testing.assert_allclose(line.get_ydata(), [0, 1, 2, 3])
    assert "live tensors +3.00 MiB (+1024.0 KiB a step)" in ax.get_label()


def test_memory_of_an_empty_trace_is_refused(ax):
    with pytest.raises(ValueError, match="at least one step"):
        plots.memory([], ax)


@pytest.mark.parametrize("name", ["whitening", "running_statistics", "graph_growth", "memory"])
def test_without_an_axes_a_new_figure_is_made(name, z):
    rows = [SimpleNamespace(tensor_bytes=1, heap_bytes=2)]
    data = {
        "whitening": z,
        "running_statistics": [1.0, 2.0],
        "graph_growth": {"a": [1, 2]},
        "memory": rows,
    }
    before = plt.get_fignums()
    ax = getattr(plots, name)(data[name])
    assert ax.figure.number not in before
    plt.close(ax.figure)


def test_intervals_draws_each_mean_with_its_interval_and_says_it(ax):
    series = {"a": [(0.0, 90.0, 1.0), (1.0, 92.0, 0.5)], "b": [(0.0, 91.0, 2.0), (1.0, 93.0, 1.0)]}
    assert plots.intervals(series, ax, xlabel="x", ylabel="accuracy (%)", zero=True) is ax
    ends = [c.lines[2][0].get_segments() for c in ax.containers]
    np.testing.assert_allclose([segment[:, 1] for segment in ends[0]], [[89, 91], [91.5, 92.5]])
    assert ends[0][0][0, 0] < 0 < ends[1][0][0, 0]  # side by side, around their place
    assert "b: 91.00 ± 2.00 at 0, 93.00 ± 1.00 at 1" in ax.get_label()


def test_costs_draws_a_bar_each_and_the_bound(ax):
    assert (
        plots.costs({"stock": 2.0, "ours": 0.5}, ax, xlabel="ratio", bounds={"bound": 0.25}) is ax
    )
    assert [bar.get_width() for bar in ax.patches] == [2.0, 0.5]
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["stock", "ours"]
    np.testing.assert_array_equal(ax.lines[0].get_xdata(), [0.25, 0.25])
    assert "stock 2.00, ours 0.50; bound 0.25" in ax.get_label()
