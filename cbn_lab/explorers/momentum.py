"""Momentum as the memory of a running mean."""

import torch
import traitlets
from jaxtyping import Float
from matplotlib.axes import Axes
from torch import Tensor
from traitlets import Bytes, Int
from traitlets import Float as FloatTrait

from cbn_lab import plots
from cbn_lab.explorers import base
from cbn_lab.running_stats import average_factor, update_

STEPS = 150
START = 1.0  # the true mean at step 0; the running mean starts at 0, as every batch norm does
LIMITS = {"momentum": (0.01, 1.0), "batch_size": (1, 64), "drift": (-4.0, 4.0)}


def make_noise(seed: int = 1) -> Float[Tensor, "150 64"]:
    """Standard normal values: a row for each step, of which a batch of n takes the first n."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(STEPS, LIMITS["batch_size"][1], generator=generator, dtype=torch.float64)


class MomentumExplorer(base.Explorer):
    """How a running mean follows the data, with its effective memory 1/momentum drawn in.

    150 batches of values with standard deviation 1, whose true mean starts at 1 and drifts.

    Args:
        momentum: weight of the new batch, 0.01 to 1; None for the cumulative average of all.
        batch_size: values in a batch, 1 to 64.
        drift: change of the true mean over 100 steps, −4 to 4.

    Raises:
        traitlets.TraitError: a value outside of its limits.
    """

    _esm = base.source("arithmetic.js", "view.js", "momentum.js")
    momentum = FloatTrait(0.1, allow_none=True).tag(**base.MOVED)
    batch_size = Int(16).tag(**base.MOVED)
    drift = FloatTrait(0.0).tag(**base.MOVED)
    _limits = traitlets.Dict(LIMITS).tag(sync=True)
    _start = FloatTrait(START).tag(sync=True)
    _noise = Bytes().tag(sync=True)

    def __init__(
        self, momentum: float | None = 0.1, batch_size: int = 16, drift: float = 0.0
    ) -> None:
        self._values = make_noise()
        super().__init__(
            momentum=momentum,
            batch_size=batch_size,
            drift=drift,
            _noise=self._values.numpy().astype("<f8").tobytes(),
        )

    @traitlets.validate("momentum", "batch_size", "drift")
    def _check(self, proposal):
        name, value = proposal["trait"].name, proposal["value"]
        return value if value is None else base.check_between(name, value, *LIMITS[name])

    @property
    def true_means(self) -> Float[Tensor, "150"]:
        """The mean that each batch is drawn from."""
        return START + self.drift * torch.arange(1, STEPS + 1, dtype=torch.float64) / 100

    @property
    def batch_means(self) -> Float[Tensor, "150"]:
        """The mean of each batch."""
        return self.true_means + self._values[:, : self.batch_size].mean(1)

    @property
    def running_means(self) -> Float[Tensor, "150"]:
        """The running mean after each batch, by the rule that every layer here uses."""
        running, history = torch.zeros((), dtype=torch.float64), []
        for step, batch in enumerate(self.batch_means, start=1):
            update_(running, batch, average_factor(self.momentum, step))
            history.append(running.clone())
        return torch.stack(history)

    @property
    def weights(self) -> Float[Tensor, "150"]:
        """What each batch counts for in the last running mean: m·(1 − m)^age.

        Whatever is missing to 1 is the weight of the initial 0.
        """
        if self.momentum is None:
            return torch.full((STEPS,), 1 / STEPS, dtype=torch.float64)
        age = torch.arange(STEPS - 1, -1, -1, dtype=torch.float64)
        return self.momentum * (1 - self.momentum) ** age

    @property
    def memory(self) -> float:
        """Batches that count, 1/momentum; all of them in a cumulative average."""
        return STEPS if self.momentum is None else 1 / self.momentum

    @property
    def lag(self) -> float:
        """Expected difference from the true mean at the last step."""
        return float(self.weights @ self.true_means - self.true_means[-1])

    @property
    def noise(self) -> float:
        """Standard deviation of the running mean at the last step."""
        return float(self.weights.norm() / self.batch_size**0.5)

    @property
    def summary(self) -> str:
        name = "None (cumulative average)" if self.momentum is None else f"{self.momentum:.2f}"
        start = 1 - float(self.weights.sum())
        left = "" if start < 0.005 else f" The initial 0 still counts for {100 * start:.0f} %."
        return (
            f"Momentum {name}: memory of about {self.memory:.0f} batches. After {STEPS} batches "
            f"of {self.batch_size} the running mean is {self.running_means[-1]:.2f}, the true "
            f"mean {self.true_means[-1]:.2f}. Expected: lag {base.signed(self.lag)}, "
            f"noise ±{self.noise:.2f}.{left}"
        )

    def plot(self, ax: Axes | None = None) -> Axes:
        """The running mean over its batches, with the effective memory shaded.

        Args:
            ax: where to draw; a new figure where None.
        """
        ax = plots.running_statistics(
            self.running_means.numpy(),
            self.batch_means.numpy(),
            self.true_means.numpy(),
            ax,
            memory=self.memory,
        )
        ax.set_label(self.summary)
        return ax
