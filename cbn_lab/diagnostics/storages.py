"""Bytes of memory behind a tensor, and behind what an autograd node keeps for backward."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from cbn_lab.diagnostics import saved

Block = tuple[int, int]  # a storage's identity and its size in bytes
_PLAIN = (Tensor, torch.nn.Parameter)


def of_tensor(tensor: Tensor) -> list[Block]:
    """The storages behind a tensor: one, or those of the parts of a sparse or wrapping tensor.

    A view counts with its whole storage, which is what it keeps alive. Meta tensors have none.
    """
    if type(tensor) in _PLAIN:
        return _of_dense(tensor) if tensor.layout is torch.strided else _of_sparse(tensor)
    if is_traceable_wrapper_subclass(tensor):
        parts = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
        return [block for part in parts for block in of_tensor(part)]
    return _of_dense(tensor) if tensor.layout is torch.strided else _of_sparse(tensor)


def storage_of(tensor: Tensor) -> torch.UntypedStorage | None:
    """The memory of a strided tensor; None where it has none to show.

    A compiler's fake tensor says it is on a device, but its storage is on "meta", and has a
    symbolic size that must not be asked for once the compiler is done.
    """
    try:
        storage = tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):  # opaque: functorch's wrappers, say
        return None
    return None if storage.device.type == "meta" else storage


def _of_dense(tensor: Tensor) -> list[Block]:
    storage = storage_of(tensor)
    return [] if storage is None else [(storage._cdata, storage.nbytes())]


def _of_sparse(tensor: Tensor) -> list[Block]:
    if tensor.layout is torch.sparse_coo:
        parts = [tensor._indices(), tensor._values()]
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        parts = [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        parts = [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    else:  # MKL-DNN and jagged layouts do not show their memory
        parts = []
    return [block for part in parts for block in of_tensor(part)]


class _Holdings(NamedTuple):
    """What a kind of node keeps, looked up once per kind: a walk may meet a million of them."""

    saved: tuple[str, ...]  # the attributes with what it saved for backward
    variable: bool  # AccumulateGrad: the leaf itself
    context: bool  # a custom Function: whatever was left on ctx


_holdings: dict[type, _Holdings] = {}


def of_node(node: Any) -> list[Block] | tuple[()]:
    """The storages that one autograd node keeps alive.

    Those of the tensors it saved for backward, as long as backward has not freed them. Besides:
    the leaf that an ``AccumulateGrad`` holds, and tensors left as attributes on the context of a
    custom ``Function``.
    """
    holdings = _holdings.get(type(node)) or _look_up(type(node))
    if not any(holdings):
        return ()
    kept = saved.data(node, holdings.saved)
    if holdings.variable:
        kept.append(node.variable)
    if holdings.context:
        kept += vars(node).values()
    blocks = []
    for tensor in kept:  # None where freed; anything at all where a saved-tensor hook packed it
        if isinstance(tensor, Tensor) and not _is_wrapped_number(tensor):
            blocks += of_tensor(tensor)
    return blocks


def _look_up(kind: type) -> _Holdings:
    context = issubclass(kind, torch.autograd.function.FunctionCtx)
    holdings = _Holdings(saved.names(kind), hasattr(kind, "variable"), context)
    _holdings[kind] = holdings
    return holdings


_PROBES = {
    dtype: torch.empty((), dtype=narrower, device="meta")
    for dtype, narrower in (
        (torch.float64, torch.float32),
        (torch.int64, torch.int32),
        (torch.complex128, torch.complex64),
    )
}


def _is_wrapped_number(tensor: Tensor) -> bool:
    """Whether this is the 0.9 of ``0.9 * x``: 8 bytes that C++ made of a Python number.

    It shows in type promotion: a number leaves a 0-dimensional float32 tensor as it is, where a
    0-dimensional float64 tensor would not.
    """
    if tensor.dim():
        return False
    probe = _PROBES.get(tensor.dtype)
    return probe is not None and torch.result_type(tensor, probe) == probe.dtype
