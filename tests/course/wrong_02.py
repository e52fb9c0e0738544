LAYER = """
class MyBatchNorm(nn.Module):
    def __init__(self, num_features, eps=1e-5, momentum=0.1):
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def forward(self, x):
        mean, var = self.running_mean, self.running_var
        if self.training:
            n = x.numel() // x.shape[1]
            if n < 2:
                raise ValueError(n)
            var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
            with torch.no_grad():
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(var * n / (n - 1), self.momentum)
        scale = self.weight / (var + self.eps).sqrt()
        shape = (1, -1, 1, 1)
        return (x - mean.view(shape)) * scale.view(shape) + self.bias.view(shape)
"""


def layer(old: str, new: str) -> str:
    assert old in LAYER
    return LAYER.replace(old, new)


WRONG = {
    "batch statistics": [
        (
            "def statistics(x):\n    return x.mean((0, 2, 3)), x.var((0, 2, 3))",
            "divided by n - 1",
        ),
        ("def statistics(x):\n    return x.mean(), x.var()", "Keep dimension 1"),
        (
            "def statistics(x):\n    return x.mean(0), x.var(0, correction=0)",
            "has shape (3, 5, 2), expected (3,)",
        ),
        (
            "def statistics(x):\n    return x.mean((0, 2, 3)), x.var(0, correction=0).mean((1, 2))",
            "An average of variances",
        ),
        (
            "def statistics(x):\n    return x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)",
            "build the list of dimensions from x.dim()",
        ),
        (
            "def statistics(x):\n    return x.mean((0, 2, 3)), x.std((0, 2, 3), correction=0)",
            "The variance is its square",
        ),
        ("def statistics(x):\n    print(x.mean(), x.var())", "Return two tensors"),
    ],
    "variance to store": [
        (
            "def to_store(var, x):\n    n = len(x)\n    return var * n / (n - 1)",
            "counts the samples and forgets the pixels",
        ),
        (
            "def to_store(var, x):\n    n = x.numel()\n    return var * n / (n - 1)",
            "counts all channels together",
        ),
        (
            "def to_store(var, x):\n    n = x.numel() // x.shape[1]\n    return var * (n - 1) / n",
            "the larger of the two",
        ),
        ("def to_store(var, x):\n    return var", "Unchanged"),
        ("def to_store(var, x):\n    return x.var()", "Expected a tensor of shape (3,)"),
    ],
    "normalise": [
        (
            "def normalise(x, mean, var, weight, bias, eps):\n"
            "    return (x - mean) / (var + eps).sqrt() * weight + bias",
            "met the width, not the channels",
        ),
        (
            "def normalise(x, mean, var, weight, bias, eps):\n"
            "    m, v, w, b = (t.view(1, -1, 1, 1) for t in (mean, var, weight, bias))\n"
            "    return (x - m) / (v.sqrt() + eps) * w + b",
            "eps stands outside the root",
        ),
        (
            "def normalise(x, mean, var, weight, bias, eps):\n"
            "    m, v, w, b = (t.view(1, -1, 1, 1) for t in (mean, var, weight, bias))\n"
            "    return (x - m) / (v + eps) * w + b",
            "Divided by the variance",
        ),
        (
            "def normalise(x, mean, var, weight, bias, eps):\n"
            "    m, v, w, b = (t.view(1, -1, 1, 1) for t in (mean, var, weight, bias))\n"
            "    return ((x - m) / (v + eps).sqrt() + b) * w",
            "It is added last",
        ),
        (
            "def normalise(x, mean, var, weight, bias, eps):\n"
            "    return (x - mean.view(3, 1)) / (var + eps).sqrt()",
            "in your line: return (x - mean.view(3, 1))",
        ),
    ],
    "your own layer": [
        (
            layer("            with torch.no_grad():", "            if True:"),
            "keeps the graph of every step",
        ),
        (layer(", correction=0)", ")"), "output: expected"),
        (layer("var * n / (n - 1), self", "var, self"), "the biased variance (divided by n)"),
        (
            layer("x.numel() // x.shape[1]", "len(x)"),
            "n counts the samples and forgets the pixels",
        ),
        (
            layer(
                "            var, mean = torch",
                "            with torch.no_grad(): var, mean = torch",
            ),
            "over-detached",
        ),
        (layer("        if self.training:", "        if True:"), "evaluation: expected"),
        (
            layer("(var + self.eps).sqrt()", "(var.sqrt() + self.eps)"),
            "eps is added outside the root",
        ),
        (
            layer("lerp_(mean, self.momentum)", "lerp_(mean, 1 - self.momentum)"),
            "the weight of the old value",
        ),
        (
            layer("            if n < 2:\n                raise ValueError(n)\n", ""),
            "one value per channel: expected an error",
        ),
        (
            layer(
                'self.register_buffer("running_mean", torch.zeros(num_features))',
                "self.running_mean = torch.zeros(num_features)",
            ),
            "running_mean is no buffer",
        ),
        ("MyBatchNorm = 7", "Expected the class itself"),
    ],
}
