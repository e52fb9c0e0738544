STEP = """
def batch_norm(x, running_mean, running_var, momentum, eps):
    {first}
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction={correction})
    n = x.numel() // x.shape[1]
    with torch.{mode}():
        running_mean.mul_(1 - momentum).add_(mean, alpha=momentum)
        running_var.mul_(1 - momentum).add_(var * {bessel}, alpha=momentum)
    return (x - {mean}[:, None, None]) / {root}[:, None, None]
"""


def step(
    first="if True:",
    correction=0,
    mode="no_grad",
    bessel="n / (n - 1)",
    mean="mean",
    root="(var + eps).sqrt()",
):
    return STEP.format(
        first=first, correction=correction, mode=mode, bessel=bessel, mean=mean, root=root
    )


REBIND = "    setattr(module, name, {})"
HEAD = "def cured_update(module, name, batch, f):\n"
WRONG = {
    "cure": [
        (
            HEAD + REBIND.format("f * batch + (1 - f) * getattr(module, name)"),
            "It still leaks",
        ),
        (
            HEAD + REBIND.format("f * batch + (1 - f) * getattr(module, name).detach()"),
            "keeps the graph of the last step",
        ),
        (
            HEAD + "    value = (1 - f) * getattr(module, name) + f * batch.detach()",
            "has not changed at all",
        ),
        (
            HEAD + "    getattr(module, name).mul_(f).add_(batch.detach(), alpha=1 - f)",
            "the numbers are wrong",
        ),
        (
            HEAD + "    delattr(module, name)\n" + REBIND.format("batch.detach()"),
            "is no buffer any more",
        ),
        (
            HEAD + REBIND.format("(f * batch + (1 - f) * getattr(module, name)).detach()"),
            "in another tensor",
        ),
        (
            HEAD
            + "    old = getattr(module, name)\n"
            + "    old.data = ((1 - f) * old + f * batch).detach()",
            "in another tensor",
        ),
    ],
    "neither": [
        (step(first="with torch.no_grad():"), "cut off from the graph"),
        (step(mean="mean.detach()"), "cut off from the graph"),
        (step(mode="enable_grad"), "It leaks"),
        (step(bessel="1"), "running_var is wrong"),
        (step(correction=1, bessel="1"), "The output is wrong"),
        (step(root="(var.sqrt() + eps)"), "eps inside the root"),
        (
            "def batch_norm(x, running_mean, running_var, momentum, eps):\n    x.mean()",
            "Expected an output of shape",
        ),
    ],
    "which buffer": [
        ("leaking_buffer = '5.running_var'", "leaks as well"),
        ("leaking_buffer = '1.running_mean'", "keeps no history"),
        ("leaking_buffer = 5", "a string. Got 5"),
    ],
}
