"""guard_buffers: every way in is closed, on its line; everything healthy is left as it is."""

import copy
import io
import pickle
import statistics
import time

import gallery
import pytest
import torch
from torch import nn

import cbn_lab
from cbn_lab.diagnostics import guard as guard_module

BUFFER_LEAKS = [name for name in gallery.LEAKS if name.startswith(("buffer", "thread"))]
CURES = ["torch_batch_norm", "cured_by_no_grad", "cured_by_detach_in_place", "cured_by_data"]


def built(name, where):
    made = where[name][0]()
    return made[0], made[1]


@pytest.mark.parametrize("name", BUFFER_LEAKS)
def test_raises_on_the_line_with_buffer_and_cure(name):
    step, net = built(name, gallery.LEAKS)
    with cbn_lab.guard_buffers(net), pytest.raises(cbn_lab.BufferGraphError) as caught:
        step()
    error = caught.value
    assert error.buffer in gallery.LEAKS[name][1]
    # The line is that of the deepest frame outside torch and the guard itself.
    frames = [f for f in caught.traceback if str(f.path).endswith(("gallery.py", "specimens.py"))]
    assert error.origin == f"{frames[-1].path}:{frames[-1].lineno + 1}"
    assert error.origin in str(error) and f"'{error.buffer}'" in str(error)
    assert "torch.no_grad()" in str(error)
    assert cbn_lab.inspect_buffers(net).ok  # it was stopped before it happened


@pytest.mark.parametrize("name", BUFFER_LEAKS)
def test_detach_stores_the_same_values_without_history(name):
    step, net = built(name, gallery.LEAKS)
    torch.manual_seed(0)
    start = copy.deepcopy(net.state_dict())
    step()
    wanted = {key: value.detach().clone() for key, value in net.state_dict().items()}
    step, net = built(name, gallery.LEAKS)
    net.load_state_dict(start)
    torch.manual_seed(0)
    with cbn_lab.guard_buffers(net, action="detach"):
        step()
    assert cbn_lab.inspect_buffers(net).ok
    for key, value in net.state_dict().items():
        torch.testing.assert_close(value, wanted[key])


@pytest.mark.parametrize("name", BUFFER_LEAKS)
def test_warn_points_to_the_line_and_lets_it_happen(name):
    step, net = built(name, gallery.LEAKS)
    with cbn_lab.guard_buffers(net, action="warn"), pytest.warns(RuntimeWarning) as caught:
        step()
    assert caught[0].filename.endswith(("gallery.py", "specimens.py"))
    assert not cbn_lab.inspect_buffers(net).ok


@pytest.mark.parametrize("name", CURES)
def test_healthy_layers_train_as_without_a_guard(name):
    results = []
    for guarded in (False, True):
        torch.manual_seed(0)
        step, net = built(name, gallery.INNOCENT)
        identities = {key: id(value) for key, value in net.named_parameters()}
        if guarded:
            with cbn_lab.guard_buffers(net):
                for _ in range(guard_module.TRUSTED_AFTER + 3):
                    step()
                copy.deepcopy(net).double()
                pickle.loads(pickle.dumps(net[0]))
                net.load_state_dict(net.state_dict())
        else:
            for _ in range(guard_module.TRUSTED_AFTER + 3):
                step()
        assert identities == {key: id(value) for key, value in net.named_parameters()}
        results.append(net.state_dict())
    for key, value in results[0].items():
        assert torch.equal(value, results[1][key])


def test_nothing_is_left_on_the_module_or_in_torch():
    module_hooks = torch.nn.modules.module
    step, net = built("buffer_rebound", gallery.LEAKS)
    before = [dict(vars(module)) for module in net.modules()]
    types = [type(module._buffers) for module in net.modules()]
    hooks = len(module_hooks._global_forward_hooks), len(module_hooks._global_forward_pre_hooks)
    guard = cbn_lab.guard_buffers(net)
    with pytest.raises(cbn_lab.BufferGraphError):
        step()
    guard.remove()
    guard.remove()
    assert [dict(vars(module)) for module in net.modules()] == before
    assert [type(module._buffers) for module in net.modules()] == types
    assert not module_hooks._global_buffer_registration_hooks
    assert hooks == (
        len(module_hooks._global_forward_hooks),
        len(module_hooks._global_forward_pre_hooks),
    )
    step()  # leaks again, unguarded
    assert not cbn_lab.inspect_buffers(net).ok


def test_other_modules_are_not_guarded():
    step, net = built("buffer_in_place", gallery.LEAKS)
    with cbn_lab.guard_buffers(nn.BatchNorm1d(3)):
        step()
    assert not cbn_lab.inspect_buffers(net).ok


def test_a_write_outside_any_forward_is_found_at_the_end():
    _, net = built("torch_batch_norm", gallery.INNOCENT)
    with pytest.raises(cbn_lab.BufferGraphError, match="'1.running_mean'"):
        with cbn_lab.guard_buffers(net):
            net[1].running_mean.mul_(net[1].weight)


def test_a_late_in_place_leak_is_still_found_in_its_forward():
    class Late(gallery.Running):
        steps = 0

        def update(self, mean):
            self.steps += 1
            if self.steps > guard_module.TRUSTED_AFTER + 5:
                self.mean.mul_(mean)

    net = nn.Sequential(nn.Linear(6, 5), Late())
    with cbn_lab.guard_buffers(net), pytest.raises(cbn_lab.BufferGraphError) as caught:
        for _ in range(40):
            net(gallery.data())
    assert caught.value.buffer == "1.mean" and net[1].steps == guard_module.TRUSTED_AFTER + 6
    assert caught.value.origin.startswith(__file__)  # read from the layer's source


@pytest.mark.parametrize("update, leaks", [("inplace", True), ("rebind", True), ("no_grad", False)])
@pytest.mark.filterwarnings("ignore")
def test_compiled_models_work_and_leaks_are_found(update, leaks):
    torch._dynamo.reset()
    net = nn.Sequential(nn.Conv2d(1, 2, 3), cbn_lab.LeakyBatchNorm2d(2, update=update))
    compiled = torch.compile(net, backend="eager")
    x = torch.randn(2, 1, 5, 5)
    with cbn_lab.guard_buffers(compiled) as guard:
        if leaks:
            with pytest.raises(cbn_lab.BufferGraphError, match="'1.running_mean'"):
                compiled(x)
            guard.remove()
            for module in net.modules():  # so that the guard's last look is satisfied
                if isinstance(module, cbn_lab.LeakyBatchNorm2d):
                    module.running_mean = module.running_mean.detach()
                    module.running_var = module.running_var.detach()
        else:
            compiled(x).sum().backward()


def test_scripted_modules_are_left_alone():
    net = torch.jit.script(nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)))
    with cbn_lab.guard_buffers(net):
        net(gallery.data()).sum().backward()


def test_a_step_that_fails_leaves_the_guard_in_order():
    class Failing(gallery.Running):
        def update(self, mean):
            raise ArithmeticError("diverged")

    net = nn.Sequential(nn.Linear(6, 5), Failing())
    with cbn_lab.guard_buffers(net):
        with pytest.raises(ArithmeticError, match="diverged"):
            net(gallery.data())
        assert type(net[1]._buffers) is dict
    assert not torch.overrides._get_current_function_mode_stack()


def test_errors_say_what_was_expected():
    with pytest.raises(TypeError, match="expected a torch.nn.Module, got Tensor"):
        cbn_lab.guard_buffers(torch.zeros(1))
    with pytest.raises(ValueError, match="'raise', 'warn' or 'detach', got 'stop'"):
        cbn_lab.guard_buffers(nn.Linear(1, 1), "stop")
    step, net = built("buffer_rebound", gallery.LEAKS)
    step()
    with pytest.raises(cbn_lab.BufferGraphError, match="'1.mean'"):
        cbn_lab.guard_buffers(net)


def test_the_error_survives_pickling():
    error = cbn_lab.BufferGraphError("text", "1.mean", "a.py:3")
    copied = pickle.load(io.BytesIO(pickle.dumps(error)))
    assert (str(copied), copied.buffer, copied.origin) == ("text", "1.mean", "a.py:3")


@pytest.mark.parametrize("layer", [nn.BatchNorm2d, cbn_lab.BatchNorm2d])
def test_a_step_of_a_small_net_costs_at_most_three_percent_more(layer):
    """The guard's own time does not depend on the size of the batch: one value tells it best."""
    net = nn.Sequential(
        *(nn.Conv2d(1, 20, 5), layer(20), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5)),
        *(layer(50), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.LazyLinear(10)),
    )
    net(torch.randn(32, 1, 28, 28))
    tiny = nn.Sequential(*net[:7])  # every module that the guard looks after, and a few more

    def seconds(step, times):
        taken = []
        for _ in range(times):
            start = time.process_time()
            step()
            taken.append(time.process_time() - start)
        return statistics.median(taken)

    def tiny_step():
        tiny(torch.zeros(2, 1, 14, 14))

    extra = []
    for _ in range(3):
        plain = seconds(tiny_step, 30)
        with cbn_lab.guard_buffers(tiny):
            seconds(tiny_step, guard_module.TRUSTED_AFTER)
            extra.append(seconds(tiny_step, 30) - plain)
    x = torch.randn(32, 1, 28, 28)
    step = seconds(lambda: net(x).square().mean().backward(), 7)
    assert statistics.median(extra) <= 0.03 * step
