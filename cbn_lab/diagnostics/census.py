"""A census of live tensors: every storage made while it is on, and those there before.

It sees what no walk from a module can: tensors saved inside C++, kept in closures, lists or
reference cycles. It counts storages, so a view costs nothing and two views of one storage count
once. It is blind to autograd nodes as such; those are walked from the tensors it knows.
"""

import collections
import gc
import weakref
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cbn_lab.diagnostics import graph, storages


class _StorageRef(weakref.ref):
    """A weak reference that remembers what it stood for: its key is gone when it is called."""

    __slots__ = ("key", "nbytes", "device")


class Census(TorchDispatchMode):
    """Counts bytes of live storages; a context manager.

    Args:
        device: the type of device to count on; None for all.
    """

    def __init__(self, device: str | None = "cpu") -> None:
        super().__init__()
        self.device = device
        self._bytes: dict[str, int] = collections.Counter()
        self._storages: dict[int, _StorageRef] = {}
        self._tensors: dict[int, weakref.ref] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # torch's own switch: wrapping the dispatch for the compiler would import all of
        # torch._dynamo, several seconds of it, and the census is never compiled.
        return False

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all live storages, each once."""
        return sum(self._bytes.values())

    def bytes_on(self, device: str) -> int:
        """Those on one type of device."""
        return self._bytes[device]

    def __enter__(self) -> "Census":
        for thing in gc.get_objects():
            # Not isinstance: it would call __class__ of proxies, and import what they stand for.
            if issubclass(type(thing), Tensor):
                self._note(thing)
                self._note_history(thing)
                if thing.is_leaf and thing.grad is not None:
                    self._note(thing.grad)  # held in C++, out of the collector's sight
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if isinstance(output, Tensor):
            self._note(output)
            if torch.is_grad_enabled():
                self._note_history(output)
        elif isinstance(output, (tuple, list)):
            for part in output:
                if isinstance(part, Tensor):
                    self._note(part)
                    if torch.is_grad_enabled():
                        self._note_history(part)
        return output

    def with_history(self) -> Iterator[Tensor]:
        """The live tensors that hold an autograd graph."""
        for reference in list(self._tensors.values()):
            tensor = reference()
            if tensor is not None and graph.has_history(tensor):
                yield tensor

    def _note(self, tensor: Tensor) -> None:
        if tensor.layout is not torch.strided:
            return
        if self.device is not None and tensor.device.type != self.device:
            return
        storage = storages.storage_of(tensor)
        if storage is None:
            return
        key, nbytes = storage._cdata, storage.nbytes()
        known = self._storages.get(key)
        if known is None:
            reference = _StorageRef(storage, self._forget)
            reference.key, reference.nbytes, reference.device = key, nbytes, tensor.device.type
            self._storages[key] = reference
            self._bytes[reference.device] += nbytes
        elif known.nbytes != nbytes:  # resized
            self._bytes[known.device] += nbytes - known.nbytes
            known.nbytes = nbytes

    def _forget(self, reference: _StorageRef) -> None:
        if self._storages.get(reference.key) is reference:
            del self._storages[reference.key]
            self._bytes[reference.device] -= reference.nbytes

    def _note_history(self, tensor: Tensor) -> None:
        key = id(tensor)
        if key not in self._tensors:
            tensors = self._tensors
            self._tensors[key] = weakref.ref(tensor, lambda _: tensors.pop(key, None))
