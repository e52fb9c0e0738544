"""Who holds tensors: a walk over modules, containers, closures and objects, with a path to each.

Breadth first, so that the path to a tensor is the shortest one. Nothing is called and no property
is read: only what is stored is followed.
"""

import collections
import dataclasses
import functools
import sys
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cbn_lab.diagnostics import source

MOST_THINGS = 1_000_000
_ATOMS = (
    *(int, float, complex, bool, str, bytes, bytearray, type(None), range, slice),
    *(types.ModuleType, types.BuiltinFunctionType, types.CodeType, types.FrameType),
    *(torch.dtype, torch.device, torch.Size, torch.layout),
)
_HOOKS = {
    "_forward_hooks": "forward_hook",
    "_forward_pre_hooks": "forward_pre_hook",
    "_backward_hooks": "backward_hook",
    "_backward_pre_hooks": "backward_pre_hook",
    "_state_dict_hooks": "state_dict_hook",
}


@dataclasses.dataclass(slots=True)
class Held:
    """A tensor, or an autograd node, and where it hangs.

    Attributes:
        thing: the tensor or node.
        path: the way to it, such as ``1.running_mean`` or ``ema['w']``; elements of a list share
            the path ``losses[…]``.
        shelf: the same with the last dictionary key left out: ``ema[…]``.
        bounded: whether it is in a container that holds a fixed number of things.
        belongs: whether it is part of a module or an optimizer.
        owner: the module that holds it, as a buffer or an attribute, or None.
        attribute: its name there.
    """

    thing: Any
    path: str
    shelf: str
    bounded: bool
    belongs: bool
    owner: nn.Module | None = None
    attribute: str = ""


@dataclasses.dataclass(slots=True)
class Place:
    """Where the walk stands: a thing, and what a :class:`Held` inherits from the way to it."""

    thing: Any
    path: str
    shelf: str = ""
    bounded: bool = False
    belongs: bool = False
    owner: nn.Module | None = None
    attribute: str = ""

    def inside(self, thing: Any, suffix: str, shelf: str | None = None) -> "Place":
        path = (self.path + suffix).lstrip(".")
        folded = path if shelf is None else (self.path + shelf).lstrip(".")
        belongs = self.belongs or isinstance(self.thing, (nn.Module, torch.optim.Optimizer))
        return Place(thing, path, folded, self.bounded, belongs)


class Keyed(NamedTuple):
    """An entry of a dictionary whose key is a tensor."""

    key: Tensor
    value: Any


class Survey:
    """Everything that can be reached from some named roots.

    Attributes:
        held: the tensors and nodes.
        mutable: every list, dict, set, deque, instance dictionary and closure cell.
        generators: random number generators.
        complete: False if there were too many things to look at.
    """

    def __init__(self, roots: list[tuple[str, Any]]) -> None:
        self.held: list[Held] = []
        self.mutable: list[Any] = []
        self.generators: list[Any] = []
        self.globals: list[tuple[dict, str]] = []
        self.complete = True
        self._parameter_paths: dict[int, str] = {}
        self._later: list[Place] = []  # what is keyed by parameters, whose names come first
        self._seen: dict[int, Any] = {}  # the things as well: an id must not be used again
        with torch._C.DisableTorchFunctionSubclass():
            self._walk([Place(thing, name, name) for name, thing in roots])
            self._walk(self._later)

    def _walk(self, queue: list[Place]) -> None:
        for place in queue:  # grows while it is gone through
            thing = place.thing
            if isinstance(thing, _ATOMS) or id(thing) in self._seen:
                continue
            if len(self._seen) >= MOST_THINGS:
                self.complete = False
                return
            self._seen[id(thing)] = thing
            queue.extend(self._inside(place))

    def _inside(self, place: Place) -> Iterator[Place]:
        thing = place.thing
        if isinstance(thing, Keyed):
            name = self._parameter_paths.get(id(thing.key), "…")
            return iter([place.inside(thing.value, f"[{name}]", "[…]")])
        if isinstance(thing, Tensor) or _is_node(thing):
            return self._note(place)
        if isinstance(thing, nn.Module):
            return self._in_module(place)
        if isinstance(thing, torch.Generator):
            self.generators.append(thing)
            return iter(())
        if isinstance(thing, dict):
            return self._in_dict(place)
        if isinstance(thing, (list, tuple, set, frozenset, collections.deque)):
            return self._in_sequence(place)
        if isinstance(thing, types.FunctionType):
            return self._in_function(place)
        if isinstance(thing, type):
            return self._in_class(place)
        if isinstance(thing, types.MethodType):
            return iter([place.inside(thing.__func__, ""), place.inside(thing.__self__, "")])
        if isinstance(thing, functools.partial):
            parts = (thing.func, thing.args, thing.keywords)
            return (place.inside(part, "") for part in parts)
        if isinstance(thing, BaseException):
            return self._in_exception(place)
        if isinstance(thing, types.GeneratorType):
            return self._in_frame(place, thing.gi_frame)
        return self._in_instance(place)

    def _note(self, place: Place) -> Iterator[Place]:
        thing = place.thing
        fields = {f.name: getattr(place, f.name) for f in dataclasses.fields(place)}
        self.held.append(Held(**fields))
        if isinstance(thing, Tensor):
            if isinstance(thing, nn.Parameter):
                self._parameter_paths[id(thing)] = place.path
            if thing.is_leaf and thing.grad is not None:
                yield place.inside(thing.grad, ".grad")
            for hook in (thing._backward_hooks or {}).values():
                yield place.inside(hook, ".hook")
            yield from self._in_instance(place)

    def _in_module(self, place: Place) -> Iterator[Place]:
        module = place.thing
        own = ("_parameters", "_buffers", "_modules")
        for kind in own:
            if isinstance(getattr(module, kind), dict):  # a scripted module's are not
                self.mutable.append(getattr(module, kind))
            for name, thing in getattr(module, kind).items():
                child = place.inside(thing, "" if name == "_orig_mod" else f".{name}")
                child.owner, child.attribute = module, name
                yield child
        self.mutable.append(vars(module))
        yield place.inside(type(module), "")
        for name, thing in vars(module).items():
            if name in _HOOKS:
                for hook in (thing or {}).values():
                    yield place.inside(hook, f".{_HOOKS[name]}")
            elif name not in own:
                child = place.inside(thing, f".{name}")
                child.owner, child.attribute = module, name
                yield child

    def _in_dict(self, place: Place) -> Iterator[Place]:
        self.mutable.append(place.thing)
        for key, thing in list(place.thing.items()):
            if isinstance(key, str):
                yield place.inside(thing, f"[{key!r}]", "[…]")
            elif isinstance(key, Tensor):  # an optimizer's state, say
                self._later.append(place.inside(key, "[…]"))
                self._later.append(place.inside(Keyed(key, thing), "", "[…]"))
            else:
                yield place.inside(thing, "[…]")

    def _in_sequence(self, place: Place) -> Iterator[Place]:
        things = place.thing
        if isinstance(things, (list, set, collections.deque)):
            self.mutable.append(things)
        bounded = getattr(things, "maxlen", None) is not None
        for thing in things:
            child = place.inside(thing, "[…]")
            child.bounded = place.bounded or bounded
            yield child

    def _in_function(self, place: Place) -> Iterator[Place]:
        function = place.thing
        for name, cell in zip(
            function.__code__.co_freevars, function.__closure__ or (), strict=True
        ):
            self.mutable.append(cell)
            try:
                yield place.inside(cell.cell_contents, f".{name}")
            except ValueError:  # not bound yet
                pass
        for default in (function.__defaults__, function.__kwdefaults__, vars(function)):
            yield place.inside(default, "")
        if not source.is_library(function.__code__.co_filename):
            for name in sorted(_global_names(function.__code__) & function.__globals__.keys()):
                self.globals.append((function.__globals__, name))
                yield Place(function.__globals__[name], name, name)

    def _in_class(self, place: Place) -> Iterator[Place]:
        """What hangs on a class of the user's own, shared by all its instances."""
        for kind in place.thing.__mro__:
            file = getattr(sys.modules.get(kind.__module__), "__file__", None)
            if kind.__module__ != "builtins" and not source.is_library(file or ""):
                for name, thing in list(vars(kind).items()):
                    if isinstance(thing, (Tensor, nn.Module, list, dict, set, collections.deque)):
                        yield place.inside(thing, f".{name}")

    def _in_exception(self, place: Place) -> Iterator[Place]:
        error = place.thing
        for linked in (error.__cause__, error.__context__, error.args, vars(error)):
            yield place.inside(linked, "")
        trace = error.__traceback__
        while trace is not None:
            yield from self._in_frame(place.inside(None, ".__traceback__"), trace.tb_frame)
            trace = trace.tb_next

    def _in_frame(self, place: Place, frame: types.FrameType | None) -> Iterator[Place]:
        if frame is not None:
            for name, thing in list(frame.f_locals.items()):
                yield place.inside(thing, f".{name}")

    def _in_instance(self, place: Place) -> Iterator[Place]:
        thing = place.thing
        yield place.inside(type(thing), "")
        attributes = getattr(thing, "__dict__", None)
        if isinstance(attributes, dict) and attributes:
            self.mutable.append(attributes)
            for name, part in list(attributes.items()):
                yield place.inside(part, f".{name}")
        for kind in type(thing).__mro__:
            slots = vars(kind).get("__slots__", ())
            for name in (slots,) if isinstance(slots, str) else slots:
                member = vars(kind).get(name)
                if isinstance(member, types.MemberDescriptorType) and not isinstance(thing, Tensor):
                    try:
                        yield place.inside(member.__get__(thing), f".{name}")
                    except AttributeError:  # never assigned
                        pass


def _is_node(thing: Any) -> bool:
    return hasattr(type(thing), "next_functions")


def _global_names(code: types.CodeType) -> set[str]:
    """The names that a function, or one within it, may look up in its module."""
    names, codes = set(), [code]
    for one in codes:  # grows while it is gone through
        names.update(one.co_names)
        codes += [c for c in one.co_consts if isinstance(c, types.CodeType)]
    return names


def roots_of(step: Any, objects: tuple, caller: types.FrameType) -> list[tuple[str, Any]]:
    """The named things to start from: the objects given, by their variables' names, then step.

    The paths of the only module among them start at the module itself, as in ``state_dict``.
    """
    around = {**caller.f_globals, **caller.f_locals, **_variables(step)}
    names = {id(thing): name for name, thing in around.items() if not name.startswith("__")}
    named = [(names.get(id(thing), type(thing).__name__.lower()), thing) for thing in objects]
    modules = [thing for _, thing in named if isinstance(thing, nn.Module)]
    if not modules:
        found = [(n, t) for n, t in _variables(step).items() if isinstance(t, nn.Module)]
        if len({id(thing) for _, thing in found}) == 1:
            named, modules = [*named, found[0]], [found[0][1]]
    single = modules[0] if len({id(thing) for thing in modules}) == 1 else None
    named = [("" if thing is single else name, thing) for name, thing in named]
    if isinstance(step, types.MethodType):
        owner = step.__self__
        already = owner is single
        named.append(("" if already else names.get(id(owner), "self"), owner))
        step = step.__func__
    return [*named, ("", step)]


def _variables(step: Any) -> dict[str, Any]:
    """What a function's free and global names stand for, and its defaults."""
    while isinstance(step, functools.partial):
        step = step.func
    function = getattr(step, "__func__", step)
    if not isinstance(function, types.FunctionType):
        return {}
    found = {
        n: function.__globals__[n]
        for n in _global_names(function.__code__)
        if n in function.__globals__
    }
    cells = function.__closure__ or ()
    for name, cell in zip(function.__code__.co_freevars, cells, strict=True):
        try:
            found[name] = cell.cell_contents
        except ValueError:  # not bound yet
            pass
    return found
