"""The explorers without a browser: their arithmetic against torch, their data, their bad input."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import playwright
import pytest
import torch
from torch import nn
from traitlets import TraitError

from cbn_lab import LeakExplorer, MomentumExplorer, WhiteningExplorer, datasets, inspect_buffers
from cbn_lab.explorers import base, leak
from cbn_lab.kernels.reference import moments
from cbn_lab.specimens import CURES, LEAKS, UPDATES
from cbn_lab.whitening import whitening_matrix

EXPLORERS = [MomentumExplorer, WhiteningExplorer, LeakExplorer]
COVARIANCES = [
    [1.6, 0.6, 0.686],
    [1.0, 1.0, 0.0],
    [2.0, 1e-3, 0.04],
    [1.0, 1.0, 1 - 1e-9],
    [0.3, 5, -1],
]


def node_executable() -> str:
    """The JavaScript engine that playwright brings, or one that is installed."""
    name = "node.exe" if sys.platform == "win32" else "node"
    bundled = Path(playwright.__file__).parent / "driver" / name
    found = os.environ.get("PLAYWRIGHT_NODEJS_PATH") or shutil.which("node")
    return str(bundled) if bundled.exists() else found


@pytest.fixture(scope="module")
def javascript(tmp_path_factory):
    """Evaluates an expression in which the functions of all files stand."""
    folder = tmp_path_factory.mktemp("javascript")
    code = base.source("arithmetic.js", "view.js", "handles.js", "leak.js")
    (folder / "explorers.mjs").write_text(code, encoding="utf-8")

    def evaluate(expression: str, **values):
        lines = ['import * as all from "./explorers.mjs";', "Object.assign(globalThis, all);"]
        lines += [f"const {name} = {json.dumps(value)};" for name, value in values.items()]
        lines += [f"process.stdout.write(JSON.stringify({expression}));"]
        (folder / "run.mjs").write_text("\n".join(lines), encoding="utf-8")
        done = subprocess.run(
            [node_executable(), "run.mjs"], cwd=folder, capture_output=True, encoding="utf-8"
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return evaluate


@pytest.fixture
def ax():
    figure, ax = plt.subplots()
    yield ax
    plt.close(figure)


def close(actual, expected, tolerance=1e-12):
    np.testing.assert_allclose(
        np.asarray(actual), np.asarray(expected), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("momentum", [0.01, 0.1, 0.5, 1.0, None])
@pytest.mark.parametrize(("size", "drift"), [(1, 0.0), (16, 1.5), (64, -4.0)])
def test_the_running_mean_in_the_browser_is_that_of_torch(javascript, momentum, size, drift):
    explorer = MomentumExplorer(momentum, size, drift)
    noise = np.frombuffer(explorer._noise, "<f8").tolist()
    result = javascript(
        """(() => {
            const truth = trueMeans(1, drift, 150), batches = batchMeans(noise, truth, size);
            const running = runningMeans(batches, momentum);
            return { truth, batches, running, weights: batchWeights(momentum, 150) };
        })()""",
        noise=noise,
        momentum=momentum,
        size=size,
        drift=drift,
    )
    close(result["truth"], explorer.true_means)
    close(result["batches"], explorer.batch_means)
    close(result["running"], explorer.running_means)
    close(result["weights"], explorer.weights)


@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
def test_the_weights_reproduce_the_running_mean_of_a_stock_layer(momentum):
    explorer = MomentumExplorer(momentum, 8, 1.0)
    layer = nn.BatchNorm1d(1, momentum=momentum, dtype=torch.float64)
    for mean, row in zip(explorer.true_means, explorer._values, strict=True):
        layer((mean + row[:8])[:, None])
    close(explorer.running_means[-1], layer.running_mean[0])
    close(explorer.weights @ explorer.batch_means, layer.running_mean[0])


@pytest.mark.parametrize("eps", [0.0, 1e-5])
def test_the_whitening_matrix_in_the_browser_is_that_of_torch(javascript, eps):
    result = javascript("covars.map((v) => whiteningMatrix(v, eps))", covars=COVARIANCES, eps=eps)
    expected = whitening_matrix(torch.tensor(COVARIANCES, dtype=torch.float64), eps)
    close(result, expected.flatten(1))


def test_roots_axes_and_moments_in_the_browser_are_those_of_torch(javascript):
    z = WhiteningExplorer().input
    result = javascript(
        """{
            roots: covars.map(rootMatrix),
            axes: covars.map(principalAxes),
            moments: moments(re, im),
            again: covars.map((v) => {
                const { variances, angle } = principalAxes(v);
                return covarianceOf(angle, variances.map(Math.sqrt));
            }),
        }""",
        covars=COVARIANCES,
        re=z.real.tolist(),
        im=z.imag.tolist(),
    )
    for (rr, ii, ri), root, axes in zip(COVARIANCES, result["roots"], result["axes"], strict=True):
        covar = np.array([[rr, ri], [ri, ii]])
        root = np.array(root).reshape(2, 2)
        close(root @ root, covar)
        close(sorted(axes["variances"]), np.linalg.eigvalsh(covar))
    close(result["again"], COVARIANCES)
    mean, covar = moments(z.real[:, None], z.imag[:, None])
    close(result["moments"]["mean"], mean[0])
    close(result["moments"]["covar"], covar[0])


def test_a_handle_stays_on_its_axis_where_that_becomes_the_shorter_one(javascript):
    """The axis at 20° shrinks from 2 to 0.5 past the other one, which has length 1."""
    lengths = np.linspace(2, 0.5, 16).tolist()
    followed = javascript(
        """(() => {
            let angle = 0.349;
            return lengths.map((length) => {
                const axes = namedAxes(covarianceOf(0.349, [length, 1]), angle);
                angle = axes.angle;
                return [axes.angle, ...axes.lengths];
            });
        })()""",
        lengths=lengths,
    )
    close(followed, [[0.349, length, 1] for length in lengths], 1e-9)


def test_each_key_turns_or_stretches_and_others_are_left_alone(javascript):
    keys = ["ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown", "Home", "End", "a"]
    moved = javascript("keys.map((key) => keyMove(key, 1, 2, [0.5, 4]))", keys=keys)
    turned = np.pi / 90
    assert moved[-1] is None
    close(moved[:2], [[1 + turned, 2], [1 - turned, 2]])
    assert moved[2][1] > 2 > moved[3][1]
    assert moved[4:6] == [[1, 0.5], [1, 4]]


def test_the_input_has_the_covariance_that_is_set():
    explorer = WhiteningExplorer()
    explorer.rr, explorer.ii, explorer.correlation = 2.5, 0.3, -0.9
    mean, covar = moments(explorer.input.real[:, None], explorer.input.imag[:, None])
    close(covar[0], explorer.covar)
    close(explorer.covar, [2.5, 0.3, -0.9 * 0.75**0.5])
    ratios = explorer.axis_ratios
    assert ratios["whitened"] == pytest.approx(1, abs=1e-4)
    assert ratios["input"] > ratios["naive"] > 4


def test_gamma_is_applied_to_what_is_whitened():
    explorer = WhiteningExplorer()
    explorer.gamma_rr, explorer.gamma_ii, explorer.gamma_ri = 1.5, 0.5, 0.25
    gamma = torch.tensor([[1.5, 0.25], [0.25, 0.5]], dtype=torch.float64)
    z = explorer.whitened
    _, covar = moments(z.real[:, None], z.imag[:, None])
    expected = gamma @ gamma
    close(covar[0], [expected[0, 0], expected[1, 1], expected[0, 1]], 1e-4)  # eps


def test_data_is_shown_as_it_came():
    spectrum, _ = datasets.digits(fft=True)
    z = spectrum[:, 0, 1, 1]
    explorer = WhiteningExplorer(z)
    torch.testing.assert_close(explorer.input, z.to(torch.complex128), rtol=1e-9, atol=1e-9)
    from_numpy = WhiteningExplorer(z.numpy().reshape(-1, 1))
    assert from_numpy.summary == explorer.summary


@pytest.mark.parametrize(
    ("data", "error", "text"),
    [
        (torch.ones(5), TypeError, "expected complex values, got torch.float32"),
        (torch.ones(2) + 0j, ValueError, "at least 3 values, got 2"),
        (torch.tensor([1j, 2, float("nan")]), ValueError, "finite"),
        (torch.randn(9) * (1 + 2j), ValueError, "values on a line"),
        (torch.ones(9) + 1j, ValueError, "values on a line"),
    ],
)
def test_data_that_cannot_be_whitened_is_refused(data, error, text):
    with pytest.raises(error, match=text):
        WhiteningExplorer(data)


@pytest.mark.parametrize(
    ("explorer", "name", "value", "text"),
    [
        (MomentumExplorer, "momentum", 2, "expected momentum from 0.01 to 1, got 2.0"),
        (MomentumExplorer, "momentum", 0, "got 0.0"),
        (MomentumExplorer, "momentum", float("nan"), "got nan"),
        (MomentumExplorer, "momentum", "fast", "'fast'"),
        (MomentumExplorer, "batch_size", 65, "expected batch_size from 1 to 64, got 65"),
        (MomentumExplorer, "drift", -5, "expected drift from -4 to 4, got -5.0"),
        (WhiteningExplorer, "rr", -1, "expected rr from 0.05 to 3, got -1.0"),
        (WhiteningExplorer, "correlation", 1, "expected correlation from -0.99 to 0.99, got 1.0"),
        (WhiteningExplorer, "gamma_ri", 3, "expected gamma_ri from -1 to 1, got 3.0"),
        (LeakExplorer, "update", "rebound", "one of rebind, inplace, .* got 'rebound'"),
        (LeakExplorer, "step", 25, "expected step from 0 to 24, got 25"),
        (LeakExplorer, "step", 1.5, "1.5"),
    ],
)
def test_a_bad_value_is_refused_and_the_old_one_stays(explorer, name, value, text):
    made = explorer()
    before = getattr(made, name)
    with pytest.raises(TraitError, match=text):
        setattr(made, name, value)
    assert getattr(made, name) == before


def test_a_bad_argument_is_refused():
    with pytest.raises(TraitError, match="expected momentum from 0.01 to 1, got 2"):
        MomentumExplorer(momentum=2)
    with pytest.raises(TraitError, match="got 'leak'"):
        LeakExplorer("leak")


@pytest.mark.parametrize("backward", [True, False])
@pytest.mark.parametrize("update", leak.UPDATES)
def test_the_nodes_are_those_that_inspect_buffers_finds(update, backward):
    torch.manual_seed(0)
    net = leak.Network(update)
    explorer = LeakExplorer(update, backward=backward)
    for step in range(1, 6):
        re, im = net(torch.randn(8, 1, 8, 8))
        if backward:
            (re.square() + im).sum().backward()
        explorer.step = step
        row = next(row for row in inspect_buffers(net).rows if row.name == "bn.running_mean")
        assert (explorer.nodes, explorer.retained_bytes) == (row.nodes, row.retained_bytes)
    assert (explorer.nodes > 0) == (update in LEAKS)


def test_every_leak_and_every_cure_is_shown():
    assert set(leak.UPDATES) == set(LEAKS) | set(CURES) == set(leak.CODE)


@pytest.mark.parametrize("update", leak.UPDATES)
def test_every_node_is_drawn_once_and_leads_to_nodes_that_are_there(javascript, update):
    recording = leak.recordings()[leak.key(update, True)]
    nodes = javascript("graphNodes(recording)", recording=recording)
    assert [sum(node["step"] <= k for node in nodes) for k in (1, 12, 24)] == [
        recording["nodes"][k - 1] for k in (1, 12, 24)
    ]
    for node in nodes:
        for number in node["links"]:
            other = nodes[number]
            assert other["step"] <= node["step"]
            if other["step"] == node["step"] and not other["sink"]:
                assert other["level"] > node["level"]  # lines lead downwards
    roots = [
        [n for n in nodes if n["step"] == k and n["level"] == 0 and not n["sink"]] for k in (2, 24)
    ]
    assert all(len(root) == (update in LEAKS) for root in roots)


@pytest.mark.parametrize("update", LEAKS)
def test_what_does_not_fit_is_folded(javascript, update):
    layouts = javascript(
        "widths.map((width) => leakLayout(graphNodes(recording), 24, width))",
        recording=leak.recordings()[leak.key(update, True)],
        widths=list(range(300, 901, 10)),
    )
    for layout in layouts:
        assert layout["columns"][0]["step"] == 24
        assert layout["folded"] == 24 - len(layout["columns"]) > 0
        assert min(column["left"] for column in layout["columns"]) >= 84  # right of the fold
    assert len(layouts[0]["columns"]) == 1 < len(layouts[-1]["columns"])


@pytest.mark.parametrize("update", leak.UPDATES)
def test_the_line_of_code_does_what_the_specimen_does(update):
    """Same numbers, and history exactly where the specimen has it."""
    buffers = []
    for form in ("code", "specimen"):
        module = nn.Module()
        module.register_buffer("running_mean", torch.full((3, 2), 2.0))
        weight = torch.ones(3, 2, requires_grad=True)
        mean = weight * torch.arange(6.0).reshape(3, 2)
        if form == "code":
            exec(leak.CODE[update], {"self": module, "mean": mean, "f": 0.1, "torch": torch})
        else:
            UPDATES[update](module, "running_mean", mean, 0.1)
        buffers.append(module.running_mean)
    torch.testing.assert_close(*buffers)
    assert [buffer.requires_grad for buffer in buffers] == [update in LEAKS] * 2


def test_recording_leaves_the_random_numbers_of_the_notebook_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    leak.record("rebind", backward=True)
    assert torch.equal(torch.rand(3), expected)


def test_momentum_plots_the_same_curves(ax):
    explorer = MomentumExplorer(0.05, 4, 2.0)
    assert explorer.plot(ax) is ax
    drawn = {line.get_label(): line.get_ydata() for line in ax.lines}
    close(drawn["running_mean"], explorer.running_means)
    close(drawn["batch"], explorer.batch_means)
    close(drawn["true value"], explorer.true_means)
    assert "memory, 20 batches" in [text.get_text() for text in ax.get_legend().get_texts()]
    assert ax.get_label() == explorer.summary


def test_whitening_plots_the_ellipses_of_all_stages(ax):
    explorer = WhiteningExplorer()
    explorer.gamma_rr = 0.5
    assert explorer.plot(ax) is ax
    drawn = {line.get_label(): line for line in ax.lines}
    assert {"input", "naive", "whitened"} <= set(drawn)
    assert drawn["whitened"].get_xdata().max() == pytest.approx(0.5, abs=1e-3)
    assert drawn["whitened"].get_ydata().max() == pytest.approx(1.0, abs=1e-3)
    assert explorer.summary in ax.get_label()


def test_leak_plots_the_counts_up_to_the_step(ax):
    explorer = LeakExplorer("slice", 5)
    assert explorer.plot(ax) is ax
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), explorer.recording["nodes"][:5])
    np.testing.assert_array_equal(ax.lines[1].get_ydata(), [0] * 5)


@pytest.mark.parametrize("explorer", EXPLORERS)
def test_it_prints_as_what_it_shows(explorer):
    made = explorer()
    assert repr(made) == f"{explorer.__name__}: {made.summary}"
    figure = made.plot().figure
    plt.close(figure)


@pytest.mark.parametrize("explorer", EXPLORERS)
def test_nothing_is_fetched_and_nothing_has_a_global_name(explorer):
    code = explorer._esm + explorer._css
    assert re.findall(r"https?://[^\"' ]+", code) == ["http://www.w3.org/2000/svg"]
    assert not re.search(r"\bimport\b|@import|getElementById|\bid:|\burl\(", code)
