FUNCTION = """
class MyFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
        inv_std = torch.rsqrt(var + eps)
        ctx.save_for_backward(x, weight, mean, inv_std)
        return (x - mean) * inv_std * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)

    @staticmethod
    def backward(ctx, g):
        x, weight, mean, inv_std = ctx.saved_tensors
        dims = (0, 2, 3)
        x_hat = (x - mean) * inv_std
        grad_weight, grad_bias = (g * x_hat).sum(dims), g.sum(dims)
        g = g * weight.view(1, -1, 1, 1)
        along = (g * x_hat).mean(dims, keepdim=True)
        grad_x = (g - g.mean(dims, keepdim=True) - x_hat * along) * inv_std
        return grad_x, grad_weight, grad_bias, None
"""


def function(*changes: tuple[str, str]) -> str:
    code = FUNCTION
    for old, new in changes:
        assert old in code
        code = code.replace(old, new)
    return code


def gradient(body: str) -> str:
    return (
        "def input_gradient(g, x_hat, inv_std, weight):\n"
        "    dims, wg = (0, 2, 3), weight * g\n"
        "    def m(values):\n"
        "        return values.mean(dims, keepdim=True)\n"
        f"    return {body}"
    )


PARAMETERS = "def parameter_gradients(g, x_hat):\n    "

WRONG = {
    "gradients of weight and bias": [
        (PARAMETERS + "return (g * x_hat).mean((0, 2, 3)), g.mean((0, 2, 3))", "a sum is due"),
        (PARAMETERS + "return g.sum((0, 2, 3)), g.sum((0, 2, 3))", "which is missing"),
        (PARAMETERS + "return (g * x_hat).sum(0), g.sum(0)", "has shape (3, 5, 2)"),
        (PARAMETERS + "return g.sum((0, 2, 3)), (g * x_hat).sum((0, 2, 3))", "the wrong order"),
        (PARAMETERS + "return g.sum((0, 2, 3))", "Return two tensors"),
        (
            PARAMETERS + "return (2 * g * x_hat).sum((0, 2, 3)), g.sum((0, 2, 3))",
            "of the weight is",
        ),
    ],
    "gradient of the input": [
        (gradient("wg * inv_std"), "Only the straight path"),
        (gradient("(wg - m(wg)) * inv_std"), "The path through σ is missing"),
        (gradient("(wg - x_hat * m(wg * x_hat)) * inv_std"), "The path through μ is missing"),
        (gradient("(g - m(g) - x_hat * m(g * x_hat)) * inv_std"), "γ is missing"),
        (gradient("wg - m(wg) - x_hat * m(wg * x_hat)"), "Not divided by σ"),
        (gradient("(wg - m(wg) - x_hat * m(wg * x_hat)) / inv_std"), "is 1/σ already"),
        (
            gradient("(wg - wg.sum(dims, True) - x_hat * (wg * x_hat).sum(dims, True)) * inv_std"),
            "Sums where means are due",
        ),
        (gradient("(wg - m(wg) - x_hat * m(wg * x_hat)).sum(dims)"), "has the input's shape"),
        (gradient("(wg - m(wg) - x_hat * m(wg)) * inv_std"), "is off by"),
        (
            gradient("(wg - wg.mean(0) - x_hat * (wg * x_hat).mean(0)) * inv_std"),
            "The pixels belong to the channel too",
        ),
    ],
    "a Function of your own": [
        (function(("grad_bias, None", "grad_bias")), "four, the last of them None"),
        (function((" - x_hat * along", "")), "The path through σ is missing"),
        (
            function(
                ("(x, weight, mean, inv_std)\n", "(x, weight, (x - mean) * inv_std, inv_std)\n"),
                ("x, weight, mean, inv_std = ctx", "x, weight, x_hat, inv_std = ctx"),
                ("        x_hat = (x - mean) * inv_std\n", ""),
            ),
            "it keeps 2.0 times the input's size",
        ),
        (
            function(
                (
                    "ctx.save_for_backward(x, weight",
                    "ctx.x = x\n        ctx.save_for_backward(weight",
                ),
                (
                    "x, weight, mean, inv_std = ctx",
                    "x = ctx.x\n        weight, mean, inv_std = ctx",
                ),
            ),
            "ctx.x holds a tensor",
        ),
        (function((", correction=0", "")), "The forward is not batch norm yet"),
        (
            function(("grad_weight, grad_bias, None", "None, grad_bias, None")),
            "would take it for 0",
        ),
        (
            function(("        x_hat = (x - mean)", "        x_hat = (x - mu)")),
            "in your line: x_hat = (x - mu) * inv_std",
        ),
        ("def MyFunction(x, weight, bias, eps):\n    return x", "Expected the class"),
    ],
}
