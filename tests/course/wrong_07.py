LOOP = """
def make_step(net, losses, average):
    def step():
        loss = train_step(net)
        losses.append({loss})
        {mode}
            for name, p in net.named_parameters():
                average[name] = {average}
    return step
def train_step(net):
    loss = net(torch.randn(8, 1, 6, 6)).square().mean()
    net.zero_grad()
    loss.backward()
    return loss
"""


def loop(loss="loss.item()", mode="with torch.no_grad():", average="0.9 * average[name] + 0.1 * p"):
    return LOOP.format(loss=loss, mode=mode, average=average)


def verdict(**changed):
    right = dict(total="growing", item="clean", hook="growing", output="bounded")
    return f"verdicts = {right | changed}"


WRONG = {
    "verdicts": [
        (verdict(total="bounded"), "every earlier loss in its history"),
        (verdict(item="growing"), "a plain number"),
        (verdict(hook="bounded"), "added to the list"),
        (verdict(output="growing"), "replaces the old one"),
        (verdict(item="leak"), "got 'leak'"),
        ("verdicts = ['growing']", "Expected a dict"),
    ],
    "healthy loop": [
        (loop(loss="loss"), "What grows: losses"),
        (loop(mode="if True:"), "What grows: average"),
        (loop(average="0.1 * average[name] + 0.9 * p"), "0.9 of the old"),
        (
            "def make_step(net, losses, average):\n    def step():\n        pass\n    return step",
            "should hold one loss",
        ),
        ("def make_step(net, losses, average):\n    losses.append(1)", "returns the step"),
    ],
}
