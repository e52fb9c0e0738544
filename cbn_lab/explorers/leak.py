"""The leak, one step at a time: which nodes each form of update leaves behind the buffer."""

import contextlib
import functools
from collections.abc import Iterator

import torch
from matplotlib.axes import Axes
from torch import Tensor, nn
from traitlets import Bool, Dict, Int, List, Unicode, validate

from cbn_lab import plots
from cbn_lab.diagnostics import graph
from cbn_lab.explorers import base
from cbn_lab.specimens import CURES, LEAKS, LeakyComplexBatchNorm2d

STEPS = 24
UPDATES = (*LEAKS, *CURES)
BUFFER = "running_mean"

# What each form of cbn_lab.specimens reads like in a layer of one's own.
CODE = {
    "rebind": "self.running_mean = f * mean + (1 - f) * self.running_mean",
    "inplace": "self.running_mean.mul_(1 - f).add_(f * mean)",
    "slice": (
        "self.running_mean[:, 0] = f * mean[:, 0] + (1 - f) * self.running_mean[:, 0]\n"
        "self.running_mean[:, 1] = f * mean[:, 1] + (1 - f) * self.running_mean[:, 1]"
    ),
    "lerp": "self.running_mean.lerp_(mean, f)",
    "copy": "self.running_mean.copy_(f * mean + (1 - f) * self.running_mean)",
    "no_grad": (
        "with torch.no_grad():\n    self.running_mean = f * mean + (1 - f) * self.running_mean"
    ),
    "detach": "self.running_mean = f * mean.detach() + (1 - f) * self.running_mean",
    "data": "self.running_mean = f * mean.data + (1 - f) * self.running_mean",
}


class Network(nn.Module):
    """Something trainable before the layer, without which nothing leaks."""

    def __init__(self, update: str) -> None:
        super().__init__()
        self.real, self.imag = (nn.Conv2d(1, 2, 3, bias=False) for _ in range(2))
        self.bn = LeakyComplexBatchNorm2d(2, update=update)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.bn(self.real(x), self.imag(x))


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Threads only wait for each other on tensors this small, on a busy machine for seconds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def record(update: str, backward: bool) -> dict[str, list]:
    """Train the network and look behind ``running_mean`` after each step.

    Returns:
        nodes, bytes: after each step. new: for each step the nodes that came with it, each as
        [name, the numbers of the nodes it leads to]; they are numbered in this order.
    """
    with one_thread(), torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        net = Network(update)
        walk = graph.Graph([*net.parameters(), *net.buffers()])
        nodes, retained, new = [], [], []
        for _ in range(STEPS):
            re, im = net(torch.randn(8, 1, 8, 8))
            if backward:
                (re.square() + im).sum().backward()
            del re, im
            known = len(walk.numbers)
            extent = walk.measure(net.bn.running_mean)
            nodes.append(extent.nodes)
            retained.append(extent.retained_bytes)
            new.append(walk.links(known))
    del walk, net
    graph.release()
    return {"nodes": nodes, "bytes": retained, "new": new}


@functools.cache
def recordings() -> dict[str, dict[str, list]]:
    """Every form, with and without backward: measured once, when the first explorer is made."""
    return {
        key(update, backward): record(update, backward)
        for update in UPDATES
        for backward in (True, False)
    }


def key(update: str, backward: bool) -> str:
    return f"{update} {'backward' if backward else 'forward'}"


class LeakExplorer(base.Explorer):
    """The autograd graph behind ``running_mean``, growing by a training step at a time.

    Names, numbers and links of the nodes are measured, on two convolutions before a
    :class:`cbn_lab.LeakyComplexBatchNorm2d` that is trained for 24 steps with each form of update.

    Args:
        update: ``"rebind"``, ``"inplace"``, ``"slice"``, ``"lerp"``, ``"copy"``, which leak, or
            ``"no_grad"``, ``"detach"``, ``"data"``, which do not.
        step: training steps done, 0 to 24.
        backward: whether a step calls ``loss.backward()``, which frees the tensors that the nodes
            had saved, and leaves the nodes.

    Raises:
        traitlets.TraitError: an unknown update, or a step outside of its limits.
    """

    _esm = base.source("view.js", "leak.js")
    update = Unicode("rebind").tag(**base.MOVED)
    step = Int(1).tag(**base.MOVED)
    backward = Bool(True).tag(**base.MOVED)
    _steps = Int(STEPS).tag(sync=True)
    _updates = List(list(UPDATES)).tag(sync=True)
    _leaks = List(list(LEAKS)).tag(sync=True)
    _code = Dict(CODE).tag(sync=True)
    _recordings = Dict().tag(sync=True)

    def __init__(self, update: str = "rebind", step: int = 1, backward: bool = True) -> None:
        super().__init__(update=update, step=step, backward=backward, _recordings=recordings())

    @validate("update")
    def _check_update(self, proposal):
        return base.check_one_of("update", proposal["value"], UPDATES)

    @validate("step")
    def _check_step(self, proposal):
        return base.check_between("step", proposal["value"], 0, STEPS)

    @property
    def recording(self) -> dict[str, list]:
        """What was measured for the chosen form; see :func:`record`."""
        return self._recordings[key(self.update, self.backward)]

    @property
    def nodes(self) -> int:
        """Autograd nodes behind the buffer after the steps done."""
        return self.recording["nodes"][self.step - 1] if self.step else 0

    @property
    def new_nodes(self) -> int:
        """How many of them came with the last step."""
        return len(self.recording["new"][self.step - 1]) if self.step else 0

    @property
    def retained_bytes(self) -> int:
        """Bytes of the tensors that those nodes keep, without parameters and buffers."""
        return self.recording["bytes"][self.step - 1] if self.step else 0

    @property
    def summary(self) -> str:
        verdict = "leaks" if self.update in LEAKS else "does not leak"
        behind = (
            f"{self.nodes} nodes behind {BUFFER}, {self.new_nodes} of them new; "
            f"they keep {self.retained_bytes:,} bytes of tensors."
        )
        return (
            f"Update {self.update}, which {verdict}: after {self.step} "
            f"step{'' if self.step == 1 else 's'} "
            f"{behind if self.nodes else f'no node behind {BUFFER}.'}"
        )

    def plot(self, ax: Axes | None = None) -> Axes:
        """The nodes behind the buffer after each step, with the chosen form and no_grad.

        Args:
            ax: where to draw; a new figure where None.
        """
        steps = max(self.step, 1)
        forms = dict.fromkeys([self.update, "no_grad"])
        counts = {
            form: self._recordings[key(form, self.backward)]["nodes"][:steps] for form in forms
        }
        ax = plots.graph_growth(counts, ax, unit=f"graph nodes behind {BUFFER}")
        ax.set_label(f"{self.summary} {ax.get_label()}")
        return ax
