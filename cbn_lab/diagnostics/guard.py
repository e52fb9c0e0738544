"""A guard that lets nothing with history into a module's buffers.

Nothing is patched and nothing is left on the guarded modules, so ``deepcopy``, ``state_dict``,
pickling and ``torch.compile`` see what they always see. Three means work together:

* torch's own hook on buffer registration sees ``self.buffer = ...`` and ``register_buffer``;
* while the forward of a module that can write buffers runs, a ``TorchFunctionMode`` sees every
  in-place operation, and ``_buffers`` is a dict that sees direct writes. That makes a layer of
  many small operations twice as slow, so it ends once the layer has behaved for a while;
* after every forward, and when the guard ends, the buffers are looked at once more. That catches
  what ran compiled or scripted, outside any forward, or in a layer that changed its ways: late,
  but by name.
"""

import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from cbn_lab.diagnostics import advice, source
from cbn_lab.diagnostics.graph import has_history

TRUSTED_AFTER = 20  # training forwards in which a layer wrote nothing with history

Action = Literal["raise", "warn", "detach"]


class BufferGraphError(RuntimeError):
    """A tensor with autograd history was about to enter a buffer, or was found in one.

    Attributes:
        buffer: dotted name in the guarded module.
        origin: ``file:line`` of the write, or None where it is not known.
    """

    def __init__(self, message: str, buffer: str, origin: str | None) -> None:
        super().__init__(message)
        self.buffer = buffer
        self.origin = origin

    def __reduce__(self) -> tuple:
        return type(self), (self.args[0], self.buffer, self.origin)


def guard_buffers(module: nn.Module, action: Action = "raise") -> "BufferGuard":
    """Let nothing with history into any buffer of ``module``, from now on::

        with guard_buffers(net):            # or: guard = guard_buffers(net); ...; guard.remove()
            train(net)

    Args:
        module: it and all its submodules, as they are now.
        action: ``"raise"`` a :class:`BufferGraphError` at the line that writes, before it does;
            ``"warn"`` there and let it happen; ``"detach"``: store the value without its history.

    Returns:
        The guard: on already, a context manager, and a handle with ``remove()``.

    Raises:
        TypeError: ``module`` is no ``torch.nn.Module``.
        ValueError: an unknown action.
        BufferGraphError: a buffer has history when the guard starts (with ``"raise"``).

    An in-place write that runs compiled, scripted or outside every forward cannot be stopped on
    its line: it is found at the end of the next forward of ``module``, or of the guard. So is one
    that a layer makes for the first time after 20 training forwards without any.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(module).__name__}")
    if action not in ("raise", "warn", "detach"):
        raise ValueError(f"expected action to be 'raise', 'warn' or 'detach', got {action!r}")
    return BufferGuard(module, action)


class BufferGuard:
    """What :func:`guard_buffers` returns."""

    def __init__(self, module: nn.Module, action: Action) -> None:
        self._module = module
        self._action = action
        self._paths = {m: _without_wrapper(path) for path, m in module.named_modules()}
        self._writers = {m for m in self._paths if _may_write(m)}
        self._active: list[tuple[nn.Module, _InPlaceWatch | None, _WatchedBuffers | None]] = []
        self._hooks: list[Any] = []
        self._told: set[str] = set()
        self._watch = _InPlaceWatch(self)
        self._good = dict.fromkeys(self._writers, 0)  # training forwards without a finding
        self.check()  # a guard that finds history at its start could not tell who is to blame
        self._hooks = [
            register_module_buffer_registration_hook(self._on_registration),
            register_module_forward_pre_hook(self._before_forward),
            register_module_forward_hook(self._after_forward, always_call=True),
        ]

    def __enter__(self) -> "BufferGuard":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        self.remove()
        if kind is None and not self._told:  # who has caught an error need not be told again
            self.check()

    def remove(self) -> None:
        """Stop guarding. Nothing remains; a second call does nothing."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def check(self) -> None:
        """Look at every buffer now, and act on those that have history."""
        for owner in self._paths:
            self._check_own(owner)

    def _check_own(self, owner: nn.Module) -> None:
        for name, buffer in list(owner._buffers.items()):
            if buffer is not None and has_history(buffer):
                dotted = self._dotted(owner, name)
                if self._action != "warn" or dotted not in self._told:
                    self._act(dotted, source.of_writes(owner, name))
                if self._action == "detach":
                    _cut(owner, name, buffer)

    def _dotted(self, owner: nn.Module, name: str) -> str:
        path = self._paths[owner]
        return f"{path}.{name}" if path else name

    def _act(self, buffer: str, origin: str | None) -> None:
        """Raise, warn, or (with "detach") leave it to the caller to cut."""
        self._good = dict.fromkeys(self._writers, 0)
        if self._action == "detach":
            return
        message = (
            f"buffer '{buffer}' of {type(self._module).__name__} takes autograd history in"
            f"{f' at {origin}' if origin else ''}: every step's graph would be kept alive. "
            f"Instead, {advice.for_buffer(buffer)}."
        )
        self._told.add(buffer)
        if self._action == "raise":
            raise BufferGraphError(message, buffer, origin)
        file, _, line = (origin or "").rpartition(":")
        warnings.warn_explicit(message, RuntimeWarning, file or "unknown", int(line or 0))

    def _on_registration(self, module: nn.Module, name: str, buffer: Tensor | None) -> Any:
        if torch.compiler.is_compiling():  # must stand first: what follows cannot be compiled
            return None
        if buffer is None or not has_history(buffer) or module not in self._paths:
            return None
        self._act(self._dotted(module, name), source.of_frame(sys._getframe(1)))
        return buffer.detach() if self._action == "detach" else None

    def _before_forward(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling() or self._good.get(module, TRUSTED_AFTER) >= TRUSTED_AFTER:
            return
        buffers = None
        if isinstance(module._buffers, dict):
            buffers = _WatchedBuffers(self, module)
            module.__dict__["_buffers"] = buffers
        watch = None if self._active else self._watch  # the outermost watches for all
        if watch is not None:
            watch.__enter__()
        self._active.append((module, watch, buffers))

    def _after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        if self._active and self._active[-1][0] is module:
            _, watch, buffers = self._active.pop()
            if watch is not None:
                watch.__exit__(None, None, None)
            if buffers is not None:
                buffers.give_back()
            if module.training and torch.is_grad_enabled():
                self._good[module] += 1
        if module is self._module:
            self.check()
        elif module in self._writers:
            self._check_own(module)

    def _guarded(self, target: Tensor) -> str | None:
        """The name of the buffer whose memory ``target`` is a part of."""
        storage = target.untyped_storage()._cdata
        for owner in self._paths:
            for name, buffer in owner._buffers.items():
                if buffer is not None and buffer.untyped_storage()._cdata == storage:
                    return self._dotted(owner, name)
        return None


def _without_wrapper(path: str) -> str:
    """A dotted path without the name that torch.compile puts in front."""
    return path.removeprefix("_orig_mod").lstrip(".")


def _cut(owner: nn.Module, name: str, buffer: Tensor) -> None:
    """Take a buffer's history away; in place where torch allows it, to keep its identity."""
    try:
        buffer.detach_()
    except RuntimeError:  # a view cannot be detached in place
        owner._buffers[name] = buffer.detach()


def _may_write(module: nn.Module) -> bool:
    """Whether the module's own code could write a buffer, its own or that of a submodule.

    Torch's own layers are known not to; containers never name a buffer.
    """
    kind = type(module)
    if kind.__module__.startswith("torch.nn.") or isinstance(module, torch.jit.ScriptModule):
        return False
    if module._buffers:
        return True
    names = {name.rpartition(".")[2] for name, _ in module.named_buffers()}
    return bool(names & _names_in(kind))


def _names_in(kind: type) -> set[str]:
    """Every name and string in the methods of a class, down to ``nn.Module``."""
    found: set[str] = set()
    for base in kind.__mro__:
        if base is nn.Module:
            break
        codes = [getattr(thing, "__code__", None) for thing in vars(base).values()]
        for code in codes:  # grows: functions within functions
            if code is not None:
                found.update(code.co_names)
                found.update(c for c in code.co_consts if isinstance(c, str))
                codes += [c for c in code.co_consts if hasattr(c, "co_code")]
    return found


_writes_in_place: dict[Callable, bool] = {}


def _is_in_place(function: Callable) -> bool:
    """Torch's naming rule: a trailing underscore; besides ``a[i] = b`` and ``a += b``."""
    known = _writes_in_place.get(function)
    if known is None:
        name = getattr(function, "__name__", "")
        dunder = name.startswith("__") and name.endswith("__")
        known = name == "__setitem__" or (
            name.startswith("__i") and name not in ("__invert__", "__index__", "__int__")
            if dunder
            else name.endswith("_")
        )
        _writes_in_place[function] = known
    return known


class _InPlaceWatch(TorchFunctionMode):
    """Sees every in-place operation that would give a guarded buffer a history."""

    def __init__(self, guard: BufferGuard) -> None:
        super().__init__()
        self._guard = guard

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if _writes_in_place.get(func) is False:  # nearly every call, so it comes first
            return func(*args, **kwargs) if kwargs else func(*args)
        kwargs = kwargs or {}
        if _is_in_place(func) and torch.is_grad_enabled() and args:
            targets = args[0] if isinstance(args[0], (tuple, list)) else args[:1]
            sources = tree_leaves((args[1:], kwargs))
            if any(isinstance(s, Tensor) and s.requires_grad for s in sources):
                for name in filter(None, map(self._guard._guarded, _tensors(targets))):
                    self._guard._act(name, source.of_frame(sys._getframe(1)))
                    if self._guard._action == "detach":
                        args, kwargs = (args[0], *_detached(args[1:])), _detached(kwargs)
        return func(*args, **kwargs)


def _tensors(things: Any) -> Iterator[Tensor]:
    return (thing for thing in things if isinstance(thing, Tensor))


def _detached(tree: Any) -> Any:
    return tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, tree)


class _WatchedBuffers(dict):
    """``module._buffers`` while its forward runs; copies and pickles as a plain dict."""

    def __init__(self, guard: BufferGuard, module: nn.Module) -> None:
        self._plain = module._buffers
        super().__init__(self._plain)
        self._guard, self._module = guard, module

    def __setitem__(self, name: str, buffer: Any) -> None:
        if isinstance(buffer, Tensor) and has_history(buffer):
            where = source.of_frame(sys._getframe(1))
            # What torch's hook on registration has let through comes by here once more.
            if not source.is_foreign(sys._getframe(1).f_code.co_filename):
                self._guard._act(self._guard._dotted(self._module, name), where)
                buffer = buffer.detach() if self._guard._action == "detach" else buffer
        super().__setitem__(name, buffer)

    def update(self, *args: Any, **kwargs: Any) -> None:
        for name, buffer in dict(*args, **kwargs).items():
            self[name] = buffer

    def __reduce__(self) -> tuple:
        return dict, (dict(self),)

    def give_back(self) -> None:
        """Put the module's own dict back, with what has been written since."""
        self._plain.clear()
        self._plain.update(self)
        self._module.__dict__["_buffers"] = self._plain
