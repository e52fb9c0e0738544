"""Whitening as what it does to an ellipse."""

import math

import torch
from jaxtyping import Complex, Float
from matplotlib.axes import Axes
from torch import Tensor
from traitlets import Bytes, Dict, Int, List, validate
from traitlets import Float as FloatTrait

from cbn_lab import plots
from cbn_lab.explorers import base
from cbn_lab.kernels.reference import moments
from cbn_lab.whitening import whitening_matrix

SYNTHETIC = {"rr": 1.6, "ii": 0.6, "correlation": 0.7}
IDENTITY = {"gamma_rr": 1.0, "gamma_ii": 1.0, "gamma_ri": 0.0}
MOST_VALUES = 20_000  # more would take long to send and change no picture
EPS = 1e-5


def make_cloud(size: int = 400, seed: int = 0) -> Complex[Tensor, "400"]:
    """Circular normal values."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, dtype=torch.complex128, generator=generator)


def check_data(data: Complex[Tensor, "*shape"]) -> Complex[Tensor, "n"]:
    """One flat complex128 tensor that can be whitened and coloured again."""
    z = torch.as_tensor(data).detach().cpu().resolve_conj().flatten()
    if not z.is_complex():
        raise TypeError(f"expected complex values, got {z.dtype}")
    if len(z) < 3:
        raise ValueError(f"expected at least 3 values, got {len(z)}")
    if not torch.isfinite(torch.view_as_real(z)).all():
        raise ValueError("expected finite values, got inf or nan")
    z = z[:: math.ceil(len(z) / MOST_VALUES)].to(torch.complex128)
    rr, ii, ri = _moments(z)[1].tolist()
    if rr * ii - ri * ri <= 1e-10 * (rr + ii) ** 2:
        raise ValueError(
            "expected a cloud with some width in every direction, got values on a line "
            f"(variances rr {rr:.3g}, ii {ii:.3g}, covariance ri {ri:.3g})"
        )
    return z


def _moments(z: Complex[Tensor, "n"]) -> tuple[Float[Tensor, "2"], Float[Tensor, "3"]]:
    mean, covar = moments(z.real[:, None], z.imag[:, None])
    return mean[0], covar[0]


def _transform(matrix: Float[Tensor, "2 2"], z: Complex[Tensor, "n"]) -> Complex[Tensor, "n"]:
    return torch.complex(*(matrix @ torch.stack([z.real, z.imag])))


def _round_up(value: float) -> float:
    """The next larger of ..., 0.1, 0.2, 0.5, 1, 2, 5, ..."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= value)


class WhiteningExplorer(base.Explorer):
    """A complex cloud before and after normalisation: as it comes, naive, whitened and times Γ.

    The ellipse of the input is dragged by its axes, or set by its covariance: the data is brought
    to any covariance by a linear map, so that its own shape is kept.

    Args:
        data: complex values of one channel, in any shape; None for normal ones.

    Attributes:
        rr, ii: variances of real and imaginary part.
        correlation: of both parts, ri/√(rr·ii).
        gamma_rr, gamma_ii, gamma_ri: the symmetric matrix Γ after the whitening.

    Raises:
        TypeError: data that is not complex.
        ValueError: fewer than 3 values, values not finite, or all of them on a line.
        traitlets.TraitError: a value outside of its limits.
    """

    _esm = base.source("arithmetic.js", "view.js", "handles.js", "whitening.js")
    rr = FloatTrait().tag(**base.MOVED)
    ii = FloatTrait().tag(**base.MOVED)
    correlation = FloatTrait().tag(**base.MOVED)
    gamma_rr = FloatTrait(1.0).tag(**base.MOVED)
    gamma_ii = FloatTrait(1.0).tag(**base.MOVED)
    gamma_ri = FloatTrait(0.0).tag(**base.MOVED)
    _limits = Dict().tag(sync=True)
    _digits = Int(2).tag(sync=True)  # of a variance
    _home = Dict().tag(sync=True)  # what the reset button goes back to
    _mean = List().tag(sync=True)
    _white = Bytes().tag(sync=True)  # the data with mean 0 and covariance 1: all re, then all im
    _eps = FloatTrait(EPS).tag(sync=True)

    def __init__(self, data: Complex[Tensor, "*shape"] | None = None) -> None:
        z = make_cloud() if data is None else check_data(data)
        mean, covar = _moments(z)
        centred = z - torch.complex(*mean)
        self._cloud = _transform(whitening_matrix(covar, 0.0), centred)
        home = dict(SYNTHETIC)
        if data is None:
            mean = torch.zeros_like(mean)
        else:
            rr, ii, ri = covar.tolist()
            home = {"rr": rr, "ii": ii, "correlation": ri / math.sqrt(rr * ii)}
        self._centre = torch.complex(*mean)
        parts = torch.stack([self._cloud.real, self._cloud.imag])
        limits = self._limits_around(**home)
        super().__init__(
            **home,
            _limits=limits,
            _digits=max(2, 2 - math.floor(math.log10(limits["rr"][1]))),
            _home=home | IDENTITY,
            _mean=mean.tolist(),
            _white=parts.numpy().astype("<f8").tobytes(),
        )

    @staticmethod
    def _limits_around(rr: float, ii: float, correlation: float) -> dict[str, tuple[float, float]]:
        unit = _round_up(max(rr, ii) / 2)
        variance = (min(0.05 * unit, rr, ii), 3 * unit)
        edge = max(0.99, abs(correlation))
        return {
            "rr": variance,
            "ii": variance,
            "correlation": (-edge, edge),
            "gamma_rr": (0.0, 2.0),
            "gamma_ii": (0.0, 2.0),
            "gamma_ri": (-1.0, 1.0),
        }

    @validate("rr", "ii", "correlation", "gamma_rr", "gamma_ii", "gamma_ri")
    def _check(self, proposal):
        name = proposal["trait"].name
        return base.check_between(name, proposal["value"], *self._limits[name])

    @property
    def covar(self) -> Float[Tensor, "3"]:
        """The covariance that the input has been given: rr, ii, ri."""
        ri = self.correlation * math.sqrt(self.rr * self.ii)
        return torch.tensor([self.rr, self.ii, ri], dtype=torch.float64)

    @property
    def gamma(self) -> Float[Tensor, "3"]:
        """Γ as a layer's ``weight`` has it: rr, ii, ri."""
        values = [self.gamma_rr, self.gamma_ii, self.gamma_ri]
        return torch.tensor(values, dtype=torch.float64)

    @property
    def input(self) -> Complex[Tensor, "n"]:
        """The data, brought to the covariance that is set."""
        root = torch.linalg.inv(whitening_matrix(self.covar, 0.0))
        return _transform(root, self._cloud) + self._centre

    @property
    def naive(self) -> Complex[Tensor, "n"]:
        """The input, real and imaginary part normalised apart."""
        return plots.normalised(self.input, "naive")

    @property
    def whitened(self) -> Complex[Tensor, "n"]:
        """The input, whitened and multiplied by Γ."""
        return plots.normalised(self.input, "whitened", self.gamma)

    @property
    def axis_ratios(self) -> dict[str, float]:
        """Long axis over short axis of each cloud; inf where Γ has flattened it to a line."""
        return {stage: _axis_ratio(getattr(self, stage)) for stage in plots.STAGES}

    @property
    def summary(self) -> str:
        ratios = ", ".join(f"{stage} {ratio:.2f}" for stage, ratio in self.axis_ratios.items())
        return (
            f"Covariance rr {self.rr:.{self._digits}f}, ii {self.ii:.{self._digits}f}, "
            f"correlation {self.correlation:.2f}; "
            f"Γ rr {self.gamma_rr:.2f}, ii {self.gamma_ii:.2f}, ri {self.gamma_ri:.2f}. "
            f"Long axis over short axis: {ratios}."
        )

    def plot(self, ax: Axes | None = None) -> Axes:
        """The input's cloud and the ellipses of all three stages in one plane.

        Args:
            ax: where to draw; a new figure where None.
        """
        ax = plots.whitening(self.input, ax, weight=self.gamma)
        ax.set_label(f"{self.summary} Thick lines 1σ, thin lines 2σ.")
        return ax


def _axis_ratio(z: Complex[Tensor, "n"]) -> float:
    """As the browser computes it, which has no eigenvalue solver."""
    rr, ii, ri = _moments(z)[1].tolist()
    half, radius = (rr + ii) / 2, math.hypot((rr - ii) / 2, ri)
    short = max(half - radius, 0.0)
    return math.sqrt((half + radius) / short) if short else math.inf
