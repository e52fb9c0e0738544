import pytest
import torch

from cbn_lab import datasets, plots


def test_digits_as_they_ship():
    images, labels = datasets.digits()
    assert images.shape == (1797, 1, 8, 8) and images.dtype == torch.float32
    assert (images.min(), images.max()) == (0, 1)
    assert labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_digits_resized_keep_their_mean_grey():
    small, _ = datasets.digits()
    large, _ = datasets.digits(28)
    assert large.shape == (1797, 1, 28, 28)
    assert float(large.mean()) == pytest.approx(float(small.mean()), rel=0.02)


def test_the_transform_of_the_digits_is_that_of_the_literature():
    spectrum, _ = datasets.digits(fft=True)
    assert spectrum.dtype == torch.complex64
    images, _ = datasets.digits()
    # Parseval: an orthonormal transform keeps the energy.
    torch.testing.assert_close(spectrum.abs().square().sum(), images.square().sum())
    assert plots.axis_ratio(spectrum[:, 0, 1, 1]) == pytest.approx(1.58, abs=0.005)
    assert plots.axis_ratio(spectrum[:, 0, 0, 1]) == pytest.approx(1.54, abs=0.005)


@pytest.mark.parametrize("circularity", [0.2, 0.5, 1.0])
def test_speckle_has_the_circularity_it_was_asked_for(circularity):
    generator = torch.Generator().manual_seed(0)
    field = datasets.speckle((200_000,), circularity, angle=0.3, generator=generator)
    assert field.dtype == torch.complex64
    assert float(field.abs().square().mean()) == pytest.approx(1, rel=0.01)
    assert 1 / plots.axis_ratio(field) == pytest.approx(circularity, rel=0.02)
    pseudo = (field * field).mean()  # E z² points along twice the angle of the long axis
    if circularity < 1:
        assert float(pseudo.angle()) == pytest.approx(0.6, abs=0.05)


def test_a_line_is_the_least_circular():
    field = datasets.speckle((1000,), 0.0, generator=torch.Generator().manual_seed(0))
    assert field.imag.abs().max() == 0


@pytest.mark.parametrize("bad", [-0.1, 1.1])
def test_a_circularity_outside_0_to_1_is_named(bad):
    with pytest.raises(ValueError, match=f"got {bad}"):
        datasets.speckle((4,), bad)


def test_a_size_below_1_is_named():
    with pytest.raises(ValueError, match="got 0"):
        datasets.digits(0)
