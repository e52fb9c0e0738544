"""Training loops that leak, and loops that only look as if they did.

Each entry is a function that returns a step, ready to run, and the objects a user would pass to
``diagnose`` with it. ``LEAKS`` gives the paths that must be named as growing (and no others may
be); ``INNOCENT`` gives the verdict, "clean" or "bounded".
"""

import collections
import copy
import functools

import torch
import torch.utils.checkpoint
from torch import nn

import cbn_lab

UNREACHABLE = "(not reachable)"
LEAKS, INNOCENT = {}, {}


def leak(*paths):
    return lambda build: LEAKS.setdefault(build.__name__, (build, set(paths)))


def innocent(verdict):
    return lambda build: INNOCENT.setdefault(build.__name__, (build, verdict))


def data():
    return torch.randn(4, 6)


def net_of(*layers):
    return nn.Sequential(nn.Linear(6, 5), *layers)


def trainer(net):
    return torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)


def plain_step(net, opt):
    opt.zero_grad()
    loss = net(data()).square().mean()
    loss.backward()
    opt.step()
    return loss


class Running(nn.Module):
    """A layer with a running mean; subclasses say how it is updated."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(5))

    def forward(self, x):
        self.update(x.mean(0))
        return x


def with_layer(layer):
    net = net_of(layer)
    opt = trainer(net)
    return lambda: plain_step(net, opt), net, opt


# --- buffers ---------------------------------------------------------------------------------


@leak("1.mean")
def buffer_rebound():
    class Layer(Running):
        def update(self, mean):
            self.mean = 0.9 * self.mean + 0.1 * mean

    return with_layer(Layer())


@leak("1.mean")
def buffer_in_place():
    class Layer(Running):
        def update(self, mean):
            self.mean.mul_(0.9).add_(0.1 * mean)

    return with_layer(Layer())


@leak("1.mean")
def buffer_by_slices():
    class Layer(Running):
        def update(self, mean):
            for k in range(2):
                self.mean[k] = 0.9 * self.mean[k] + 0.1 * mean[k]

    return with_layer(Layer())


@leak("1.mean")
def buffer_by_copy():
    class Layer(Running):
        def update(self, mean):
            self.mean.copy_(0.9 * self.mean + 0.1 * mean)

    return with_layer(Layer())


@leak("1.mean")
def buffer_by_lerp():
    class Layer(Running):
        def update(self, mean):
            self.mean.lerp_(mean, 0.1)

    return with_layer(Layer())


@leak("1.mean")
def buffer_registered_again():
    class Layer(Running):
        def update(self, mean):
            self.register_buffer("mean", 0.9 * self.mean + 0.1 * mean)

    return with_layer(Layer())


@leak("1.mean")
def buffer_written_directly():
    class Layer(Running):
        def update(self, mean):
            self._buffers["mean"] = 0.9 * self._buffers["mean"] + 0.1 * mean

    return with_layer(Layer())


@leak("1.running_mean", "1.running_covar")
def thread_form():
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3, dtype=torch.complex64),
        cbn_lab.LeakyComplexBatchNorm2d(3, update="slice"),
    )

    def step():
        net(torch.randn(2, 1, 6, 6, dtype=torch.complex64)).abs().mean().backward()

    return step, net


# --- other things of a module ----------------------------------------------------------------


@leak("1.mean")
def plain_attribute():
    class Layer(nn.Module):
        mean = 0.0

        def forward(self, x):
            self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
            return x

    return with_layer(Layer())


@leak("1.stats['mean']")
def attribute_in_a_dict():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.stats = {"mean": torch.zeros(5)}

        def forward(self, x):
            self.stats["mean"] = 0.9 * self.stats["mean"] + 0.1 * x.mean(0)
            return x

    return with_layer(Layer())


@leak("1.seen[…]")
def attribute_list():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.seen = []

        def forward(self, x):
            self.seen.append(x.mean())
            return x

    return with_layer(Layer())


@leak("0.forward_hook.acts[…]")
def hook_appends_activations():
    net = net_of()
    acts = []
    net[0].register_forward_hook(lambda module, args, output: acts.append(output))
    opt = trainer(net)
    return lambda: plain_step(net, opt), net


@leak("0.forward_hook.acts[…]")
def hook_appends_detached_activations():
    net = nn.Sequential(nn.Linear(6, 256))
    acts = []
    net[0].register_forward_hook(lambda module, args, output: acts.append(output.detach()))
    opt = trainer(net)
    return lambda: plain_step(net, opt), net


@leak("0.weight.grad", "0.bias.grad")
def gradients_with_a_graph():
    net = net_of()

    def step():
        net(data()).square().mean().backward(create_graph=True)

    return step, net


# --- the loop --------------------------------------------------------------------------------


@leak("losses[…]")
def list_of_losses():
    net = net_of()
    opt, losses = trainer(net), []
    return lambda: losses.append(plain_step(net, opt)), net, losses


@leak("total")
def sum_of_losses():
    net, total = net_of(), torch.zeros(())
    opt = trainer(net)

    def step():
        nonlocal total
        total = total + plain_step(net, opt)

    return step, net


@leak("log[…]")
def dict_by_step_name():
    net, log = net_of(), {}
    opt = trainer(net)

    def step():
        log[f"step {len(log)}"] = plain_step(net, opt)

    return step, net, log


@leak("ema['w']")
def ema_of_parameters():
    net = net_of()
    opt, ema = trainer(net), {"w": torch.zeros(5, 6)}

    def step():
        plain_step(net, opt)
        ema["w"] = 0.9 * ema["w"] + 0.1 * net[0].weight

    return step, net, ema


@leak("ema_net.weight")
def ema_of_a_module():
    net, ema_net = net_of(), nn.Linear(6, 5)
    opt = trainer(net)
    for name, p in list(ema_net.named_parameters()):
        delattr(ema_net, name)
        ema_net.register_buffer(name, p.detach().clone())

    def step():
        plain_step(net, opt)
        ema_net.weight = 0.9 * ema_net.weight + 0.1 * net[0].weight

    return step, net, ema_net


@leak("History.losses[…]")
def list_on_a_class():
    class History:
        losses = []

    net = net_of()
    opt = trainer(net)
    return lambda: History.losses.append(plain_step(net, opt)), net


@leak("h")
def hidden_state_carried():
    gru = nn.GRUCell(6, 5)
    h = torch.zeros(4, 5)

    def step():
        nonlocal h
        h = gru(data(), h)
        h.square().mean().backward(retain_graph=True)

    return step, gru


@leak("bank")
def memory_bank():
    net, bank = net_of(), torch.zeros(8, 5)
    opt, where = trainer(net), iter(range(10**6))

    def step():
        plain_step(net, opt)
        bank[next(where) % 8] = net(data())[0]

    return step, net, bank


@leak("meter.total")
def metric_object():
    class Meter:
        __slots__ = ("total",)

        def __init__(self):
            self.total = 0.0

        def update(self, loss):
            self.total = self.total + loss

    net, meter = net_of(), Meter()
    opt = trainer(net)
    return lambda: meter.update(plain_step(net, opt)), net, meter


@leak("opt.state[0.weight]['trace']", "opt.state[0.bias]['trace']")
def optimizer_state():
    class Optimizer(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})

        def step(self):  # no_grad was forgotten
            for p in self.param_groups[0]["params"]:
                trace = self.state[p].get("trace", 0.0)
                self.state[p]["trace"] = 0.9 * trace + p * p.grad

    net = net_of()
    opt = Optimizer(net.parameters())
    return lambda: plain_step(net, opt), net, opt


@leak("errors[…].__traceback__.hidden")
def exceptions_kept():
    net, errors = net_of(), []

    def fails():
        hidden = net(data())
        raise ArithmeticError(f"diverged at {tuple(hidden.shape)}")

    def step():
        try:
            fails()
        except ArithmeticError as error:
            errors.append(error)

    return step, net, errors


@leak("nodes[…]")
def nodes_kept():
    net, nodes = net_of(), []
    return lambda: nodes.append(net(data()).grad_fn), net, nodes


@leak("generator.kept")
def generator_frame():
    net = net_of()

    def train():
        kept = torch.zeros(())
        while True:
            kept = kept + net(data()).mean()
            yield

    generator = train()
    return lambda: next(generator), net, generator


@leak(UNREACHABLE)
def create_graph_cycle():
    def step():  # a fresh leaf whose gradient's graph leads back to it, in C++ only
        w = torch.randn(16, 16, requires_grad=True)
        (w @ w).square().sum().backward(create_graph=True)

    return step, nn.Linear(1, 1)


class Keeping(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        out = x * 2
        ctx.out = out.view(-1)  # a cycle: the tensor holds its node, and the node the tensor
        return out

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


@leak(UNREACHABLE)
def context_attribute():
    net = nn.Sequential(nn.Linear(6, 64))

    def step():
        Keeping.apply(net(data())).mean().backward()

    return step, net


@leak(UNREACHABLE)
def model_in_a_cache():
    @functools.lru_cache
    def model():  # what a cached function has returned is in no attribute
        return nn.Sequential(nn.Linear(6, 5), LEAKS["buffer_rebound"][0]()[1][1])

    return lambda: model()(data()).square().mean().backward(), nn.Linear(1, 1)


# --- what only looks like a leak --------------------------------------------------------------


@innocent("clean")
def torch_batch_norm():
    return with_layer(nn.BatchNorm1d(5))


@innocent("clean")
def cured_by_no_grad():
    class Layer(Running):
        @torch.no_grad()
        def update(self, mean):
            self.mean = 0.9 * self.mean + 0.1 * mean

    return with_layer(Layer())


@innocent("clean")
def cured_by_detach_in_place():
    class Layer(Running):
        def update(self, mean):
            self.mean.mul_(0.9).add_(0.1 * mean.detach())

    return with_layer(Layer())


@innocent("clean")
def cured_by_data():
    class Layer(Running):
        def update(self, mean):
            self.mean.data = 0.9 * self.mean + 0.1 * mean.data

    return with_layer(Layer())


@innocent("clean")
def optimizer_warms_up():
    net = net_of()
    opt = torch.optim.AdamW(net.parameters())
    return lambda: plain_step(net, opt), net, opt


@innocent("clean")
def lazy_cache():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.cache = {}

        def forward(self, x):
            width = 4 + len(self.cache) if len(self.cache) < 3 else 4
            self.cache.setdefault(f"mask {width}", torch.ones(width, 5000))
            return x

    return with_layer(Layer())


@innocent("clean")
def losses_as_numbers():
    net = net_of()
    opt, losses = trainer(net), []
    return lambda: losses.append(plain_step(net, opt).item()), net, losses


@innocent("clean")
def losses_detached():
    net = net_of()
    opt, losses = trainer(net), []
    return lambda: losses.append(plain_step(net, opt).detach()), net, losses


@innocent("bounded")
def last_output_overwritten():
    class Layer(nn.Module):
        def forward(self, x):
            self.last = x
            return x

    return with_layer(Layer())


@innocent("bounded")
def window_of_losses():
    net = net_of()
    opt, window = trainer(net), collections.deque(maxlen=100)
    return lambda: window.append(plain_step(net, opt)), net, window


@innocent("bounded")
def losses_summed_over_four_batches():
    net, total = net_of(), torch.zeros(())
    opt, count = trainer(net), iter(range(1, 10**6))

    def step():
        nonlocal total
        total = total + net(data()).mean()
        if next(count) % 4 == 0:
            opt.zero_grad()
            total.backward()
            opt.step()
            total = torch.zeros(())

    # Ends on a sum of four, three of which are not emptied yet, or on none.
    for _ in range(3):
        step()
    return step, net


@innocent("bounded")
def hidden_state_detached_late():
    gru = nn.GRUCell(6, 5)
    h = torch.zeros(4, 5)

    def step():
        nonlocal h
        h = gru(data(), h.detach())
        h.square().mean().backward()

    return step, gru


@innocent("clean")
def ema_under_no_grad():
    net = net_of()
    opt, ema = trainer(net), copy.deepcopy(net)

    def step():
        plain_step(net, opt)
        with torch.no_grad():
            for mine, theirs in zip(ema.parameters(), net.parameters(), strict=True):
                mine.lerp_(theirs, 0.1)

    return step, net, ema


@innocent("clean")
def python_cycles_that_are_collected():
    net = net_of()
    opt = trainer(net)

    class Batch:
        pass

    def step():
        batch = Batch()
        batch.itself, batch.x = batch, torch.randn(100, 100)
        batch.loss = plain_step(net, opt)

    return step, net


@innocent("clean")
def memory_grows_and_is_given_back():
    net, queue = net_of(), []
    opt = trainer(net)

    def step():
        queue.append(torch.randn(1000))
        plain_step(net, opt)
        if len(queue) == 5:
            queue.clear()

    return step, net, queue


@innocent("clean")
def recomputed_checkpoint():
    net = net_of(nn.Linear(5, 5))

    def step():
        net.zero_grad()
        out = torch.utils.checkpoint.checkpoint(net, data(), use_reentrant=False)
        out.square().mean().backward()

    return step, net
