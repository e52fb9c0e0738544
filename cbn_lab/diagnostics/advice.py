"""What to write instead: one sentence or two for each way of keeping history."""


def for_buffer(name: str) -> str:
    """The cure of a buffer that takes history in."""
    attribute = name.rpartition(".")[2]
    return (
        f"update it under torch.no_grad(), or from a detached value: "
        f"`with torch.no_grad(): self.{attribute}.mul_(1 - momentum).add_(momentum * batch_value)`, "
        f"or `self.{attribute} = (1 - momentum) * self.{attribute} + momentum * "
        f"batch_value.detach()`. Do not detach what the output is normalised with: that makes "
        f"the gradient wrong"
    )
