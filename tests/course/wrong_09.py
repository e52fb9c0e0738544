Q = "def quotient(z):\n    "
P = "def paired(a, b):\n    d = a - b\n    t = 2.5706\n    "

WRONG = {
    "circularity quotient": [
        (
            Q + "z = z - z.mean()\n    return z.abs().square().mean() / z.abs().square().mean()",
            "It is 1 for every z",
        ),
        (
            Q + "z = z - z.mean()\n    return z.square().mean().abs()",
            "must not depend on the unit",
        ),
        (
            Q + "return z.square().mean().abs() / z.abs().square().mean()",
            "Subtract the mean first",
        ),
        (
            Q + "z = z - z.mean()\n    return z.square().mean() / z.abs().square().mean()",
            "should be one real number",
        ),
        (
            Q + "z = z - z.mean()\n    return z.real.std() / z.imag.std()",
            "For a field of circularity 0.5",
        ),
        (
            Q + "z = z - z.mean()\n    return z.square().mean().abs() / z.abs().mean()",
            "Five times the same field",
        ),
    ],
    "paired interval": [
        (
            "def paired(a, b):\n    t = 2.5706\n"
            "    return (a - b).mean(), t * ((a.var() + b.var()) / len(a)) ** 0.5",
            "which both share",
        ),
        (P + "return d.mean(), t * d.std()", "the spread of one difference"),
        (P + "return d.mean(), 1.96 * d.std() / len(d) ** 0.5", "Student's t"),
        (P + "return d.mean(), t * d.std(correction=0) / len(d) ** 0.5", "Divide by n - 1"),
        (P + "return d.mean(), d.std() / len(d) ** 0.5", "one standard error"),
        (P + "return -d.mean(), t * d.std() / len(d) ** 0.5", "The sign"),
        (P + "return d.mean()", "Expected two numbers"),
    ],
    "verdict": [
        (
            "def verdict(mean, half):\n    return 'helps' if mean > 0 else 'hurts'",
            "holds 0",
        ),
        (
            "def verdict(mean, half):\n    return 'helps' if mean > half else 'cannot tell'",
            "That is a result as well",
        ),
        (
            "def verdict(mean, half):\n    return 'cannot tell'",
            "lies above 0 altogether",
        ),
        ("def verdict(mean, half):\n    return mean > half", "Expected 'helps'"),
    ],
}
