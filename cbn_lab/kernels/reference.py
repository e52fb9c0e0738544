"""The reference engine: whitening in plain torch, and its backward in closed form.

Trabelsi et al., *Deep Complex Networks*, ICLR 2018, section 3.5, for x = (re, im):

    y = A·(x − μ) + β,     A = Γ·R,     R = (V + ε·I)^(−1/2)

Every function here is differentiable. Nothing here looks at dtypes: who wants float64 passes it.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from cbn_lab.running_stats import Running
from cbn_lab.shapes import per_channel, reduced_dims
from cbn_lab.whitening import symmetric, whitening_matrix, whitening_matrix_adjoint

Pair = tuple[Float[Tensor, "N C *spatial"], Float[Tensor, "N C *spatial"]]


def moments(re: Tensor, im: Tensor) -> tuple[Float[Tensor, "C 2"], Float[Tensor, "C 3"]]:
    """Mean (re, im) and biased covariance (rr, ii, ri) of each channel.

    Centred before multiplying: E[x²] − E[x]² would cancel where the mean is large.
    """
    dims = reduced_dims(re)
    mean = torch.stack([re.mean(dims), im.mean(dims)], -1)
    re, im = centred(re, im, mean)
    covar = [(re * re).mean(dims), (im * im).mean(dims), (re * im).mean(dims)]
    return mean, torch.stack(covar, -1)


def whiten(
    re: Tensor,
    im: Tensor,
    mean: Float[Tensor, "C 2"],
    covar: Float[Tensor, "C 3"],
    weight: Float[Tensor, "C 3"] | None,
    bias: Float[Tensor, "C 2"] | None,
    eps: float,
) -> Pair:
    """y = A·(x − μ) + β: one linear map of the plane per channel."""
    a = whitening_matrix(covar, eps)
    if weight is not None:
        a = symmetric(weight) @ a
    re, im = apply(a, *centred(re, im, mean))
    if bias is not None:
        re, im = re + per_channel(bias[..., 0], re), im + per_channel(bias[..., 1], im)
    return re, im


def gram(
    re: Tensor, im: Tensor, grad_re: Tensor, grad_im: Tensor, mean: Float[Tensor, "C 2"]
) -> tuple[Float[Tensor, "C 2"], Float[Tensor, "C 2 2"]]:
    """Σ g and G = Σ g·(x − μ)ᵀ: all that the backward asks of the batch."""
    dims, grads = reduced_dims(re), (grad_re, grad_im)
    total = torch.stack([g.sum(dims) for g in grads], -1)
    products = [(g * x).sum(dims) for g in grads for x in centred(re, im, mean)]
    return total, torch.stack(products, -1).unflatten(-1, (2, 2))


def input_gradient(
    re: Tensor,
    im: Tensor,
    grad_re: Tensor,
    grad_im: Tensor,
    mean: Float[Tensor, "C 2"],
    covar: Float[Tensor, "C 3"],
    weight: Float[Tensor, "C 3"] | None,
    eps: float,
    total: Float[Tensor, "C 2"],
    product: Float[Tensor, "C 2 2"],
    count: int | None,
) -> Pair:
    """x̄ = Aᵀ·(g − Σg/M) + (2/M)·V̄·(x − μ) for M = ``count`` values; None: μ and V are constants."""
    a = whitening_matrix(covar, eps)
    if weight is not None:
        a, product = symmetric(weight) @ a, symmetric(weight) @ product  # Γᵀ = Γ
    if count is None:
        return apply(a.mT, grad_re, grad_im)
    covar_grad = whitening_matrix_adjoint(covar, eps, (product + product.mT) / 2)
    through_grad = apply(a.mT, *centred(grad_re, grad_im, total / count))
    through_covar = apply(2 / count * covar_grad, *centred(re, im, mean))
    return through_grad[0] + through_covar[0], through_grad[1] + through_covar[1]


def parameter_gradients(
    covar: Float[Tensor, "C 3"],
    eps: float,
    total: Float[Tensor, "C 2"],
    product: Float[Tensor, "C 2 2"],
) -> tuple[Float[Tensor, "C 3"], Float[Tensor, "C 2"]]:
    """Γ̄ = G·Rᵀ, of which Γ's one off-diagonal number collects both entries, and β̄ = Σ g."""
    g = product @ whitening_matrix(covar, eps)
    return torch.stack([g[..., 0, 0], g[..., 1, 1], g[..., 0, 1] + g[..., 1, 0]], -1), total


def centred(re: Tensor, im: Tensor, mean: Float[Tensor, "C 2"]) -> Pair:
    # Here and elsewhere [..., k] and not [:, k], for which older torch (2.6) also makes a slice of
    # all channels: one more node for autograd, which the notebooks count.
    return re - per_channel(mean[..., 0], re), im - per_channel(mean[..., 1], im)


def apply(a: Float[Tensor, "C 2 2"], re: Tensor, im: Tensor) -> Pair:
    """A·x for each channel, term by term: ``bmm`` on long rows of 2×2 is seven times as slow."""
    rr, ri, ir, ii = (per_channel(a[..., j, k], re) for j in (0, 1) for k in (0, 1))
    return rr * re + ri * im, ir * re + ii * im


class Sweep:
    """A forward and a backward and their steps, as every engine offers them; all in float64."""

    def __init__(self, parts: tuple[Tensor, ...], eps: float) -> None:
        self.like, self.eps = parts, eps
        self.x = as_pair(parts)

    def forward(self, mean, covar, weight, bias):
        """The output, and the statistics that it was made with: those of the batch for None."""
        if mean is None:
            mean, covar = self.moments()
        return self.apply(mean, covar, weight, bias), mean, covar

    def finish(self, running: Running | None, mean: Tensor, covar: Tensor) -> None:
        """The last step of a forward: move the running statistics towards those of the batch."""
        if running is not None and running.moved():
            running.update_(mean, covar)

    def backward(self, grads, mean, covar, weight, count, need_input):
        """Gradients of input (if needed), weight and bias."""
        self.take_gradient(grads, mean, covar)
        return self.apply_backward(weight, *self.gram(), count, need_input)

    def moments(self) -> tuple[Tensor, Tensor]:
        return moments(*self.x)

    def apply(self, mean, covar, weight, bias) -> tuple[Tensor, ...]:
        state = (None if p is None else p.double() for p in (mean, covar, weight, bias))
        return self.outputs(whiten(*self.x, *state, self.eps))

    def take_gradient(self, grads: tuple[Tensor, ...], mean: Tensor, covar: Tensor) -> None:
        self.g, self.mean, self.covar = as_pair(grads), mean, covar

    def gram(self) -> tuple[Tensor, Tensor]:
        return gram(*self.x, *self.g, self.mean)

    def apply_backward(self, weight, total, product, count, need_input):
        gradients = parameter_gradients(self.covar, self.eps, total, product)
        if not need_input:
            return (), *gradients
        weight = None if weight is None else weight.double()
        state = (self.mean, self.covar, weight, self.eps, total, product, count)
        return self.outputs(input_gradient(*self.x, *self.g, *state)), *gradients

    def outputs(self, pair: Pair) -> tuple[Tensor, ...]:
        """In the form, dtype and memory format of the input."""
        pair = pair if len(self.like) == 2 else (torch.complex(*pair),)
        return tuple(torch.empty_like(x).copy_(y) for x, y in zip(self.like, pair, strict=True))


def as_pair(parts: tuple[Tensor, ...]) -> Pair:
    """Real and imaginary part in float64."""
    if len(parts) == 1:
        parts = parts[0].real, parts[0].imag
    return tuple(part.double() for part in parts)
