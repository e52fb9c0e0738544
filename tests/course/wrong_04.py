COVARIANCE = "def covariance(z):\n    c = z - z.mean()\n    re, im = c.real, c.imag\n    "
ROOT = (
    "def inverse_root(covar):\n"
    "    rr, ii, ri = covar\n"
    "    s = (rr * ii - ri * ri).sqrt()\n"
    "    t = (rr + ii + 2 * s).sqrt()\n"
    "    return torch.stack([ii + s, -ri, -ri, rr + s]).view(2, 2) / (s * t)"
)
UNDO = ROOT.replace("inverse_root", "undo")
WHITEN = """
def whiten(z, eps=1e-5):
    dtype, z = z.dtype, z.to(torch.complex128)
    z = z - z.mean(0)
    re, im = z.real, z.imag
    rr, ii, ri = (re * re).mean(0) + eps, (im * im).mean(0) + eps, (re * im).mean(0)
    s = (rr * ii - ri * ri).sqrt()
    t = (rr + ii + 2 * s).sqrt()
    out = torch.complex((ii + s) * re - ri * im, (rr + s) * im - ri * re) / (s * t)
    return out.to(dtype)
"""


def changed(code: str, old: str, new: str) -> str:
    assert old in code
    return code.replace(old, new)


def undo(result: str) -> str:
    return changed(UNDO, "torch.stack([ii + s, -ri, -ri, rr + s]).view(2, 2) / (s * t)", result)


SINGLE = changed(WHITEN, "z.to(torch.complex128)", "z")

WRONG = {
    "covariance": [
        (
            COVARIANCE + "re, im = z.real, z.imag\n"
            "    return torch.stack([(re * re).mean(), (im * im).mean(), (re * im).mean()])",
            "The mean has not been subtracted",
        ),
        (
            COVARIANCE + "return torch.stack([re.var(), im.var(), (re * im).sum() / (len(z) - 1)])",
            "Divided by n - 1",
        ),
        (
            COVARIANCE
            + "return torch.stack([(re * re).mean(), (re * im).mean(), (im * im).mean()])",
            "in another order",
        ),
        (COVARIANCE + "return torch.var(z)", "Expected a real tensor of shape (3,)"),
        (
            COVARIANCE + "return (re * re).mean(), (im * im).mean(), (re * im).mean()",
            "put torch.stack around them",
        ),
        (COVARIANCE + "return torch.stack([re, im]).cov().flatten()[:3]", "expected [3.8009"),
    ],
    "inverse root": [
        (
            changed(
                ROOT,
                "[ii + s, -ri, -ri, rr + s]).view(2, 2) / (s * t)",
                "[rr + s, ri, ri, ii + s]).view(2, 2) / t",
            ),
            "This is the root itself",
        ),
        (
            changed(ROOT, "[ii + s, -ri, -ri, rr + s]", "[rr + s, -ri, -ri, ii + s]"),
            "must be swapped",
        ),
        (changed(ROOT, "-ri, -ri", "ri, ri"), "The sign of the off-diagonal"),
        (changed(ROOT, " / (s * t)", " / s"), "Not divided by t"),
        (
            changed(ROOT, "(rr * ii - ri * ri).sqrt()", "rr * ii - ri * ri"),
            "the determinant itself",
        ),
        (
            "def inverse_root(covar):\n"
            "    rr, ii, ri = covar\n"
            "    V = torch.stack([rr, ri, ri, ii]).view(2, 2)\n"
            "    return torch.linalg.inv(torch.linalg.cholesky(V))",
            "It whitens, but it is not symmetric",
        ),
        (
            "def inverse_root(covar):\n"
            "    rr, ii, ri = covar\n"
            "    return torch.linalg.inv(torch.stack([rr, ri, ri, ii]).view(2, 2))",
            "it divides by the variance",
        ),
        (
            "def inverse_root(covar):\n"
            "    rr, ii, ri = covar\n"
            "    return torch.diag(torch.stack([rr, ii]) ** -0.5)",
            "is not the identity",
        ),
    ],
    "undo the whitening": [
        ("def undo(covar):\n    return covar.clone()", "the covariance itself"),
        (undo("torch.stack([ii + s, rr + s, -ri]) / (s * t)"), "it whitens again"),
        (undo("torch.stack([rr.sqrt(), ii.sqrt(), 0 * ri])"), "without the tilt"),
        (undo("torch.stack([ii + s, rr + s, ri]) / t"), "The diagonal is swapped"),
        (
            undo("torch.stack([rr + s, ri, ri, ii + s]).view(2, 2) / t"),
            "Expected a tensor of shape (3,)",
        ),
        (undo("torch.stack([rr + s, ii + s, ri])"), "must be the identity, and is"),
    ],
    "stay finite": [
        (SINGLE, "channels are not finite"),
        (
            changed(SINGLE, "(rr * ii - ri * ri)", "(rr * ii - ri * ri).clamp(min=eps)"),
            "Finite at scale",
        ),
        (changed(SINGLE, "out.to(dtype)", "torch.nan_to_num(out)"), "Finite at scale"),
        (changed(WHITEN, "out.to(dtype)", "out"), "complex64 came in and torch.complex128"),
        (changed(WHITEN, "torch.complex((", "torch.stack(("), "in your line: out ="),
        (
            changed(WHITEN, "out.to(dtype)", "out.abs().to(torch.float32)"),
            "Expected a complex tensor",
        ),
    ],
}
