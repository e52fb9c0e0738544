"""What to write instead: one sentence or two for each way of keeping history."""

from typing import Any

BOUNDED = (
    "it holds the graph of the last step or of a few, and no more: memory does not grow. If "
    "nobody calls backward through it, keep `.detach()` of it"
)
UNREACHABLE_TENSORS = (
    "live tensors grow at every step, and no object looked at leads to them: the growth is "
    "known, the holder is not. Look for backward(create_graph=True) with gradients that are "
    "replaced rather than set to None, tensors stored as `ctx.name` in a custom Function "
    "(use ctx.save_for_backward), exceptions kept with their tracebacks, and objects that the "
    "step does not refer to: hand them to diagnose"
)
UNREACHABLE_HEAP = (
    "the host's heap grows at every step while the live tensors do not, and no object looked at "
    "holds more nodes: the growth is known, the holder is not. Look for graphs kept by objects "
    "that the step does not refer to, and hand those to diagnose; and for what is no tensor, "
    "such as bytes, lists or numpy arrays that a list collects"
)


def for_buffer(name: str) -> str:
    """The cure of a buffer that takes history in."""
    attribute = name.rpartition(".")[2]
    return (
        f"update it under torch.no_grad(), or from a detached value: "
        f"`with torch.no_grad(): self.{attribute}.lerp_(batch_value, momentum)`, "
        f"or `self.{attribute} = (1 - momentum) * self.{attribute} + momentum * "
        f"batch_value.detach()`. Do not detach what the output is normalised with: that makes "
        f"the gradient wrong"
    )


def for_held(held: Any, path: str, has_nodes: bool) -> str:
    """The cure of whatever a diagnosis found growing at ``path``."""
    if not has_nodes:
        return (
            "it keeps more tensors at every step, without history: keep `.item()`, the result "
            "you need, or the last few (`collections.deque(maxlen=...)`)"
        )
    if held.owner is not None and held.attribute in held.owner._buffers:
        return for_buffer(path)
    if path.endswith(".grad"):
        return (
            "gradients made with create_graph=True carry graphs of their own: "
            "`optimizer.zero_grad(set_to_none=True)` at every step, or torch.autograd.grad"
        )
    if "hook." in path:
        return "the hook stores what it is shown, graph and all: store `output.detach()` there"
    if ".state[" in path:
        return "update the optimizer's state under torch.no_grad(): decorate `step` with it"
    if path.endswith("[…]"):
        return "store `x.item()` or `x.detach()` there, not the tensor with its graph"
    return (
        "it is computed from its own last value, so every step's graph stays reachable: detach "
        "the last value (`h = h.detach()`), update it under torch.no_grad(), or add up `.item()`"
    )
