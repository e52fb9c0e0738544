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
    assert "a 1.000; b 0.750; true value 1.000" in ax.get_label()


def test_graph_growth_draws_the_counts_and_says_their_slope(ax):
    assert plots.graph_growth({"rebind": [6, 11, 16], "no_grad": [0, 0, 0]}, ax) is ax
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), [6, 11, 16])
    assert "rebind 16 (+5 a step); no_grad 0 (+0 a step)" in ax.get_label()
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


def test_channels_draws_every_value_and_says_mean_and_deviation(ax):
    x = torch.tensor([[1.0, 4.0], [3.0, 4.0]]).view(2, 2, 1)  # channels (1, 3) and (4, 4)
    assert plots.channels(x, ax) is ax
    points = [line for line in ax.lines if len(line.get_ydata()) == 2 and line.get_alpha()]
    assert [sorted(line.get_ydata()) for line in points] == [[1, 3], [4, 4]]
    assert points[0].get_marker() != points[1].get_marker()
    assert "channel 0: 2.00 ± 1.00, 1: 4.00 ± 0.00" in ax.get_label()


def test_deviation_is_logarithmic_and_marks_what_is_not_finite(ax):
    errors = {"a": [1e-6, 1e-4, float("nan")], "b": [0.0, 2e-3, 5e-2]}
    errors = {name: values[::-1] for name, values in errors.items()}  # from large x to small
    made = plots.deviation([100, 10, 1], errors, ax, xlabel="scale", ylabel="error", floor=1e-7)
    assert made is ax
    assert ax.get_xscale() == ax.get_yscale() == "log"
    drawn = {line.get_label(): line for line in ax.lines}
    np.testing.assert_array_equal(drawn["b"].get_ydata(), [np.nan, 2e-3, 5e-2])  # no log of 0
    assert [text.get_text() for text in ax.texts] == ["not finite"]
    (mark,) = [line for line in ax.lines if len(line.get_xdata()) == 1]
    assert mark.get_xdata() == [100]
    assert ax.get_ylim()[1] > mark.get_ydata()[0] > 5e-2  # above all errors, inside the picture
    assert "a 1e-06 to 1e-04, not finite at 100; b 0e+00 to 5e-02." in ax.get_label()


def test_a_form_that_breaks_down_for_good_is_said_to_do_so(ax):
    broken = [1.0] + 5 * [float("inf")]
    plots.deviation([1, 10, 100, 1000, 1e4, 1e5], {"a": broken}, ax, xlabel="scale", ylabel="error")
    assert "not finite at 10 and more" in ax.get_label()


def test_a_computation_draws_each_arrow_and_says_what_flows_back(ax):
    nodes = {"$x$": (0, 0), r"$\hat{x}$": (2, 0)}
    arrow = ("$x$", r"$\hat{x}$")
    assert plots.computation(nodes, [arrow], {arrow[::-1]: "$1/σ$"}, ax) is ax
    arrows = [text for text in ax.texts if getattr(text, "arrow_patch", None)]
    assert [(text.xyann, text.xy) for text in arrows] == [((0, 0), (2, 0)), ((2, 0), (0, 0))]
    styles = [(text.arrow_patch.get_linestyle(), text.arrow_patch.get_ec()) for text in arrows]
    assert styles[0][0] != styles[1][0] and styles[0][1] != styles[1][1]
    assert ax.get_label() == "Forward: x → x̂. Backward: x̂ → x times 1/σ."


def test_a_computation_names_an_arrow_to_nowhere(ax):
    with pytest.raises(ValueError, match="between nodes, got 'z'"):
        plots.computation({"x": (0, 0)}, [("x", "z")], {}, ax)


@pytest.mark.parametrize(
    "name",
    ["whitening", "running_statistics", "graph_growth", "memory", "channels", "deviation", "costs"],
)
def test_without_an_axes_a_new_figure_is_made(name, z):
    rows = [SimpleNamespace(tensor_bytes=1, heap_bytes=2)]
    data = {
        "whitening": z,
        "running_statistics": [1.0, 2.0],
        "graph_growth": {"a": [1, 2]},
        "memory": rows,
        "channels": torch.randn(4, 2),
        "deviation": [1.0, 2.0],
        "costs": {"a": 1.0},
    }
    more = {
        "deviation": dict(errors={"a": [1.0, 2.0]}, xlabel="x", ylabel="y"),
        "costs": dict(xlabel="x"),
    }
    before = plt.get_fignums()
    ax = getattr(plots, name)(data[name], **more.get(name, {}))
    assert ax.figure.number not in before
    plt.close(ax.figure)


def test_intervals_draws_each_mean_with_its_interval_and_says_it(ax):
    series = {"a": [(0.0, 90.0, 1.0), (1.0, 92.0, 0.5)], "b": [(0.0, 91.0, 2.0), (1.0, 93.0, 1.0)]}
    assert plots.intervals(series, ax, xlabel="x", ylabel="accuracy (%)", zero=True) is ax
    ends = [c.lines[2][0].get_segments() for c in ax.containers]
    np.testing.assert_allclose([segment[:, 1] for segment in ends[0]], [[89, 91], [91.5, 92.5]])
    assert ends[0][0][0, 0] < 0 < ends[1][0][0, 0]  # side by side, around their place
    assert "b 91.00 ± 2.00 at 0, 93.00 ± 1.00 at 1" in ax.get_label()


def test_costs_draws_a_bar_each_and_the_bound(ax):
    assert (
        plots.costs({"stock": 2.0, "ours": 0.5}, ax, xlabel="ratio", bounds={"bound": 0.25}) is ax
    )
    assert [bar.get_width() for bar in ax.patches] == [2.0, 0.5]
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["stock", "ours"]
    np.testing.assert_array_equal(ax.lines[0].get_xdata(), [0.25, 0.25])
    assert "stock 2.00; ours 0.50; bound 0.25" in ax.get_label()


def test_a_short_description_stays_on_its_line(ax):
    ax.set_label("cost: a 1; b 2.")
    assert plots.described(ax) == "cost: a 1; b 2."
    assert plots.described(ax, "left") == "left: cost: a 1; b 2."


def test_a_long_description_becomes_a_list_whose_lines_fit_the_page(ax):
    points = ", ".join(f"{k}.00 ± 0.50 at {k}" for k in range(12))
    ax.set_label(
        f"accuracy (%), mean and interval: naive {points}; none {points}. Higher is better."
    )
    lines = plots.described(ax, "right").splitlines()
    assert lines[:2] == ["right:", "  accuracy (%), mean and interval:"]
    assert lines[2].startswith("    naive 0.00 ± 0.50 at 0, 1.00")
    assert lines[-1] == "  Higher is better."
    assert max(map(len, lines)) <= plots.LINE
    assert all(line.endswith((",", ":", " at 11", "11.", "better.")) for line in lines)
    assert "".join(lines).replace(" ", "").count("±") == 24
