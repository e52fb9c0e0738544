"""Data that ships with a dependency or is made here: nothing is fetched from a network."""

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor


def digits(
    size: int | None = None, fft: bool = False
) -> tuple[Float[Tensor, "1797 1 H W"] | Complex[Tensor, "1797 1 H W"], Int[Tensor, "1797"]]:
    """Handwritten digits: 1797 grey images of 8×8 pixels and the figure that each shows.

    From scikit-learn, which ships them: Alpaydin and Kaynak, *Optical Recognition of Handwritten
    Digits*, UCI Machine Learning Repository, 1998.

    Args:
        size: side length to resize to (bilinear); None keeps 8.
        fft: return the orthonormal 2D Fourier transform, complex64, instead of the pixels.

    Returns:
        Images (1797, 1, size, size), grey values from 0 to 1, and labels (1797,), 0 to 9.
    """
    if size is not None and size < 1:
        raise ValueError(f"expected a positive size, got {size}")
    from sklearn.datasets import load_digits  # takes seconds, which other data need not wait for

    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 16
    if size is not None and size != 8:
        images = torch.nn.functional.interpolate(
            images, (size, size), mode="bilinear", align_corners=False
        )
    if fft:
        images = torch.fft.fft2(images, norm="ortho")
    return images, torch.from_numpy(data.target).long()


def speckle(
    shape: tuple[int, ...],
    circularity: float = 1.0,
    *,
    angle: float = 0.0,
    generator: torch.Generator | None = None,
) -> Complex[Tensor, "*shape"]:
    """The complex field behind a scattering medium, with a set circularity.

    Many scattered waves of random phase add up to a complex Gaussian (Goodman, *Speckle Phenomena
    in Optics*, 2007, section 2.2). It is circular, the same in every direction of the plane, where
    the phases are spread over the whole circle; where they are not, the cloud is an ellipse.

    Args:
        shape: of the result; the values are independent.
        circularity: short axis over long axis of the ellipse, from 0 (a line) to 1 (a circle).
        angle: of the long axis against the real axis, in radians.
        generator: source of randomness.

    Returns:
        complex64 of total variance 1, E|z|² = 1.
    """
    if not 0 <= circularity <= 1:
        raise ValueError(f"expected circularity from 0 to 1, got {circularity}")
    re, im = torch.randn(2, *shape, generator=generator)
    field = torch.complex(re, circularity * im) / (1 + circularity**2) ** 0.5
    return field * torch.exp(torch.tensor(1j * angle))
