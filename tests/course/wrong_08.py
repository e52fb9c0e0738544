BOUND = "def traffic_bound(values, gigabytes):\n    return "
FOLD = "def fold(gamma, r, mean, bias):\n    "
COV = "def covariance(re, im):\n    "

WRONG = {
    "traffic bound": [
        (BOUND + "8 * 8 * values / (gigabytes * 1e9)", "in seconds"),
        (BOUND + "1000 * 8 * values / (gigabytes * 1e9)", "are missing"),
        (BOUND + "1000 * 5 * 8 * values / (gigabytes * 1e9)", "Five sweeps are the least"),
        (BOUND + "1000 * 8 * 4 * values / (gigabytes * 1e9)", "two float32 numbers"),
        (BOUND + "1000 * 8 * 8 * values / (gigabytes * 2**30)", "not 2³⁰"),
        (BOUND + "gigabytes * values", "expected 12.8 ms"),
        (BOUND + "12.8", "With twice the bandwidth"),
    ],
    "fold": [
        (
            FOLD + "a = r @ gamma\n    return a, bias - (a @ mean[..., None])[..., 0]",
            "R acts on x first",
        ),
        (FOLD + "return gamma * r, bias", "entry by entry"),
        (FOLD + "return gamma @ r, bias - mean", "passes through a as well"),
        (
            FOLD + "a = gamma @ r\n    return a, bias + (a @ mean[..., None])[..., 0]",
            "Mind the sign",
        ),
        (
            FOLD + "return gamma @ r, bias - (r @ mean[..., None])[..., 0]",
            "through R and then through Γ",
        ),
        (
            FOLD + "a = gamma @ r\n    return a, bias[..., None] - a @ mean[..., None]",
            "Expected b of shape (3, 2), got (3, 2, 1)",
        ),
        (FOLD + "return gamma @ r", "Expected two tensors"),
    ],
    "one sweep": [
        (
            COV + "m, k = re.mean(), im.mean()\n    return (re * re).mean() - m**2, "
            "(im * im).mean() - k**2, (re * im).mean() - m * k",
            "two large numbers cancel",
        ),
        (
            COV + "return (re * re).mean(), (im * im).mean(), (re * im).mean()",
            "the squared mean is missing",
        ),
        (
            COV + "c = torch.cov(torch.stack([re, im]))\n    return c[0, 0], c[1, 1], c[0, 1]",
            "the unbiased form",
        ),
        (COV + "return re.var(correction=0), im.var(correction=0), 0.0", "the third, ri"),
        (COV + "return re.var()", "Expected three numbers"),
        (COV + "return re.std(), im.std(), 0.0", "Variances near"),
    ],
}
