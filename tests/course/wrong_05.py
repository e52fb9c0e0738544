RECURSIVE = """
def count_nodes(tensor):
    seen = set()
    def visit(node):
        if node is not None and node not in seen:
            seen.add(node)
            for following, _ in node.next_functions:
                visit(following)
    visit(tensor.grad_fn)
    return len(seen)
"""
TWICE = """
def count_nodes(tensor):
    waiting, count = [tensor.grad_fn], 0
    while waiting:
        node = waiting.pop()
        if node is not None:
            count += 1
            waiting.extend(following for following, _ in node.next_functions)
    return count
"""
WITHOUT_FIRST = """
def count_nodes(tensor):
    waiting, seen = [tensor.grad_fn], set()
    while waiting:
        for following, _ in waiting.pop().next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)
    return len(seen)
"""
WRONG = {
    "history": [
        ("def has_history(tensor):\n    return tensor.requires_grad", "it begins a graph"),
        ("def has_history(tensor):\n    return tensor.grad is not None", "holds on to a graph"),
        ("def has_history(tensor):\n    return tensor.grad_fn", "Expected True or False"),
        ("def has_history(tensor):\n    return True", "begins a graph and holds none"),
        ("def has_history(tensor):\n    return not tensor.leaf", "has no attribute 'leaf'"),
    ],
    "count nodes": [
        (RECURSIVE, "RecursionError"),
        (TWICE, "is reached twice and counts once"),
        (WITHOUT_FIRST, "Behind weight * 2 + 1 stand 3 nodes"),
    ],
    "reproduce": [
        ("def model_around(layer):\n    return layer", "is missing, or is frozen"),
        (
            "def model_around(layer):\n    return nn.Sequential(layer, nn.Conv2d(4, 4, 1))",
            "stands only behind it",
        ),
        (
            "def model_around(layer):\n"
            "    return nn.Sequential(nn.Conv2d(4, 4, 1).requires_grad_(False), layer)",
            "is missing, or is frozen",
        ),
        ("def model_around(layer):\n    return nn.Conv2d(4, 4, 1)", "is not in your model"),
        ("def model_around(layer):\n    return [nn.Conv2d(4, 4, 1), layer]", "Got list"),
        (
            "def model_around(layer):\n    return nn.Sequential(nn.Conv2d(3, 4, 1), layer)",
            "expected input[8, 4, 6, 6] to have 3 channels",
        ),
    ],
}
