WRONG = {
    "update rule": [
        (
            "def update(running, batch, momentum):\n"
            "    return momentum * running + (1 - momentum) * batch",
            "weighs the old value",
        ),
        (
            "def update(running, batch, momentum):\n    return running + momentum * batch",
            "must add up to 1",
        ),
        (
            "def update(running, batch, momentum):\n    running.mul_(1 - momentum)",
            "Expected a tensor of shape (2,)",
        ),
        (
            "def update(running, batch, momentum):\n    return running.lerp(batch, momentum, 3)",
            "in your line: return running.lerp(batch, momentum, 3)",
        ),
        (
            "def update(running, batch, momentum):\n    return 0.95 * running + 0.05 * batch",
            "For running = [2, -1]",
        ),
    ],
    "cumulative average": [
        ("def factor(momentum, count):\n    return momentum", "expected a number, got None"),
        (
            "def factor(momentum, count):\n"
            "    return 1 / (count + 1) if momentum is None else momentum",
            "The first batch is the whole average",
        ),
        ("def factor(momentum, count):\n    return 1 / count", "a given momentum is the factor"),
        (
            "def factor(momentum, count):\n"
            "    return 1 / count**2 if momentum is None else momentum",
            "with your factors it comes to",
        ),
        ("def factor(momentum, count):\n    while True:\n        pass", "Does its loop end?"),
    ],
    "half-life": [
        ("def half_life(momentum):\n    return 1 / momentum", "is the memory"),
        ("def half_life(momentum):\n    return math.log(2) / math.log(1 - momentum)", "positive"),
        ("def half_life(momentum):\n    return 0.5 / momentum", "is about"),
        ("def half_life(momentum):\n    print(momentum)", "expected a number, got None"),
    ],
}
