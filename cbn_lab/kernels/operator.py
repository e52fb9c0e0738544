"""One operator, ``torch.ops.cbn_lab.complex_batch_norm``, whichever engine does the work.

Forward and backward are functional custom operators: they mutate nothing and return the batch's
statistics, and :func:`whiten` moves the running ones. In eager mode :class:`WhitenAtOnce` runs the
same code without the dispatcher, which would cost more than the arithmetic of a small layer.
"""

import os
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._C import (
    _are_functorch_transforms_active,
    _get_tracing_state,
    _len_torch_dispatch_stack,
)
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from cbn_lab.kernels import recall, reference
from cbn_lab.kernels.recall import Known
from cbn_lab.running_stats import Running
from cbn_lab.shapes import values_per_channel

ENGINES = {
    "reference": "cbn_lab.kernels.reference",
    "numba": "cbn_lab.kernels.cpu.engine",
    "triton": "cbn_lab.kernels.cuda.engine",
}
NATIVE = {"cpu": "numba", "cuda": "triton"}
_loaded: dict[str, ModuleType] = {"reference": reference}

PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None)))
WIDE = frozenset((torch.complex64, torch.float32, torch.complex128, torch.float64))
Parts = tuple[Tensor, ...]  # one complex tensor, or a real and an imaginary one


def whiten(
    parts: Parts,
    mean: Tensor | None,
    covar: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    engine: str,
    running: Running | None,
    known: Known | None,
) -> Parts:
    """Whiten ``parts`` by the given statistics, or by their own where these are None.

    Args:
        parts: one complex tensor (N, C, ...), or two real ones.
        mean, covar: (C, 2) and (C, 3), biased; None in training.
        weight, bias: (C, 3) and (C, 2), or None.
        eps: added to both variances.
        engine: "auto", "reference", "numba" (CPU) or "triton" (CUDA).
        running: moved towards the statistics of the batch, once all has succeeded.
        known: what is known of such calls; None where :func:`is_watched`.

    Returns:
        the output in the form of ``parts``.
    """
    input, imag = parts if len(parts) == 2 else (parts[0], None)
    if known is None:
        return whiten_watched(input, imag, mean, covar, weight, bias, eps, engine, running=running)
    run = known.direct.forward if known.direct else sweep_forward
    if torch.is_grad_enabled():
        found: list = []
        others = run, mean, covar, eps, engine, found  # as one, for torch looks at each argument
        output = WhitenAtOnce.apply(input, imag, weight, bias, others)
        mean, covar, sweep = found
    else:
        output, mean, covar, sweep = run(input, imag, mean, covar, weight, bias, eps, engine)
    sweep.finish(running, mean, covar)  # only now: to save the tensors may fail as well
    return output


def whiten_watched(
    input: Tensor, imag: Tensor | None, *args: Any, running: Running | None
) -> Parts:
    """:func:`whiten` for a compiler, a tracer, a mode or torch.func: one operator they can see."""
    plain = is_plain((input, imag, *args[:4]))
    run = Whiten.apply if plain else torch.ops.cbn_lab.complex_batch_norm
    y, y_imag, mean, covar = run(input, imag, *args)
    if running is not None:
        running.update_(mean, covar)
    return (y,) if imag is None else (y, y_imag)


def is_watched(given: tuple[Any, ...]) -> bool:
    """Whether somebody follows the call, or will want its derivative in another way."""
    return (
        not is_plain(given) or _are_functorch_transforms_active() or forward_ad._current_level >= 0
    )


def is_plain(tensors: tuple[Any, ...]) -> bool:
    """Whether there is no compiler, no tracer, no dispatch mode, no subclass."""
    return not (
        is_compiling()
        or _len_torch_dispatch_stack()
        or _get_tracing_state() is not None
        or not PLAIN.issuperset(map(type, tensors))
    )


def learn_call(given: tuple[Tensor | None, ...], settings: tuple) -> Known:
    """Keep in mind a call whose arguments have passed all checks.

    Args:
        given: input or its parts, running mean and covariance, weight, bias, number of batches.
        settings: whether in training, the engine, and what else makes calls different.
    """
    *parts, mean, covar, weight, bias, batches = given
    training, engine, *_ = settings
    if training:
        found = direct_way(engine, parts, [(weight, bias)], moved=(mean, covar, batches))
    else:
        found = direct_way(engine, parts, [(mean, covar), (weight, bias)])
    return recall.learn(given, settings, found)


# --- engines ---------------------------------------------------------------------------------


def check_engine(engine: str, device: str) -> None:
    if engine not in (*ENGINES, "auto"):
        raise ValueError(f"expected engine to be one of auto, {', '.join(ENGINES)}, got {engine!r}")
    if engine == "auto" and device in NATIVE:
        return
    needed = {name: device for device, name in NATIVE.items()}.get(engine, device)
    if device == "mps":
        raise NotImplementedError(
            "expected input on a device with float64, got mps, which has no float64: "
            "the 2×2 algebra needs it. Move the layer's input to the CPU"
        )
    interpreted = engine == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if needed != device and not interpreted:
        raise ValueError(f"expected input on {needed} for engine={engine!r}, got {device}")


def load_engine(name: str) -> ModuleType:
    """The engine called ``name``; the reference, with one warning, where it cannot be loaded."""
    if name not in _loaded:
        try:
            module = import_module(ENGINES[name])
            module.check_available()
            _loaded[name] = module
        except Exception as error:  # a missing wheel, a read-only disk, an unknown processor
            give_up(name, error)
    return _loaded[name]


def give_up(name: str, error: Exception) -> None:
    warnings.warn(
        f"cbn_lab: the {name} engine cannot be loaded ({type(error).__name__}: {error}); "
        "the reference engine is used instead, which is slower",
        stacklevel=3,
    )
    _loaded[name] = reference


def forget() -> None:
    """Let go of what the engines keep between calls."""
    recall.forget()
    for module in _loaded.values():
        getattr(module, "forget", lambda: None)()


def chosen(engine: str, part: Tensor) -> tuple[str, ModuleType]:
    """The engine that suits such a part."""
    if engine == "auto":
        engine = NATIVE.get(part.device.type, "reference")
    if part.numel() == 0:
        engine = "reference"
    return engine, _loaded.get(engine) or load_engine(engine)


def direct_way(
    engine: str, parts: Sequence[Tensor], small: list, moved: tuple | None = None
) -> Any:
    """The engine's way for tensors that it takes as they are; None if it would copy some.

    Args:
        parts: of the input, and of the gradient in a backward.
        small: groups of statistics or parameters which are read together.
        moved: running mean, running covariance and number of batches, if they are to be moved.
    """
    _, module = chosen(engine, parts[0])
    if not hasattr(module, "direct") or any(wide(part) is not part for part in parts):
        return None
    try:
        return module.direct(parts, small, moved)
    except ImportError:  # start will say so
        return None


def start(parts: Parts, eps: float, engine: str) -> Any:
    """The sweep over ``parts`` of the engine that suits them."""
    engine, module = chosen(engine, parts[0])
    try:
        return module.Sweep(parts, eps)
    except ImportError as error:  # loops of one kind are on disk, those of another must be compiled
        give_up(engine, error)
        return reference.Sweep(parts, eps)


# --- forward and backward ------------------------------------------------------------------


def sweep_forward(
    input: Tensor,
    imag: Tensor | None,
    mean: Tensor | None,
    covar: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    engine: str,
) -> tuple[Parts, Tensor, Tensor, Any]:
    """The output, the statistics that it was made with, and the sweep."""
    sweep = start(widened(input, imag), eps, engine)
    y, mean, covar = sweep.forward(mean, covar, weight, bias)
    return as_dtype(y, input.dtype), mean, covar, sweep


def forward(
    input: Tensor,
    imag: Tensor | None,
    mean: Tensor | None,
    covar: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    engine: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    args = input, imag, *kept(mean, covar), weight, bias, eps, engine
    y, mean, covar, sweep = sweep_forward(*args)
    sweep.finish(None, mean, covar)
    return y[0], y[1] if imag is not None else input.new_empty(0), mean, covar


def kept(mean: Tensor | None, covar: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Copies in float64: a later update must not change what the backward sees."""
    if mean is None:
        return None, None
    return mean.to(torch.float64, copy=True), covar.to(torch.float64, copy=True)


def sweep_backward(
    input: Tensor,
    imag: Tensor | None,
    grad: Tensor,
    grad_imag: Tensor | None,
    mean: Tensor,
    covar: Tensor,
    weight: Tensor | None,
    eps: float,
    training: bool,
    need_input: bool,
    engine: str,
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
    """Gradients of input, imag, weight and bias; None for what is not needed or not there."""
    tensors = input, imag, grad, grad_imag, mean, covar, weight
    way = direct_backward(tensors, engine)
    if way is not None:
        x, weight_grad, bias_grad = way.backward(*tensors, eps, training, need_input)
        return *(*x, None, None)[:2], weight_grad, bias_grad
    sweep, grads = start(widened(input, imag), eps, engine), widened(grad, grad_imag)
    count = values_per_channel(input) if training else None
    x, weight_grad, bias_grad = sweep.backward(grads, mean, covar, weight, count, need_input)
    x, x_imag = (*as_dtype(x, input.dtype), None, None)[:2]
    dtypes = gradient_dtypes(weight)
    return x, x_imag, narrowed(weight_grad, dtypes[0]), narrowed(bias_grad, dtypes[1])


def direct_backward(tensors: tuple[Tensor | None, ...], engine: str) -> Any:
    """The engine's way for a backward of which it takes all tensors as they are, or None."""
    if not PLAIN.issuperset(map(type, tensors)):
        return None
    known = recall.recall_call(tensors, ("backward", engine))
    if known is None:
        *parts, mean, covar, weight = tensors
        parts = [part for part in parts if part is not None]
        found = None
        if mean.dtype is covar.dtype is torch.float64:  # as a forward gives them
            found = direct_way(engine, parts, [(mean, covar), (weight,)])
        known = recall.learn(tensors, ("backward", engine), found)
    return known.direct


def gradient_dtypes(weight: Tensor | None) -> tuple[torch.dtype, torch.dtype]:
    """Of weight and bias; not that of a half weight for the bias, whose dtype is not known here."""
    if weight is None:
        return torch.float64, torch.float64
    return weight.dtype, torch.float32 if weight.dtype is torch.float32 else torch.float64


def backward(input: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`sweep_backward` for callers that must be given tensors."""
    found = sweep_backward(input, *args)
    return tuple(input.new_empty(0) if part is None else part for part in found)


def widened(input: Tensor, imag: Tensor | None) -> Parts:
    """Half precision as float32: sums of squares would overflow, and no engine has it."""
    return (wide(input),) if imag is None else (wide(input), wide(imag))


def wide(tensor: Tensor) -> Tensor:
    if tensor.is_conj() or tensor.is_neg():
        tensor = tensor.resolve_conj().resolve_neg()
    if tensor.dtype in WIDE:
        return tensor
    return tensor.to(torch.complex64 if tensor.is_complex() else torch.float32)


def as_dtype(parts: Parts, dtype: torch.dtype) -> Parts:
    if not parts or parts[0].dtype is dtype:
        return parts
    return tuple([part.to(dtype) for part in parts])


def narrowed(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def second_order(
    tensors: tuple[Tensor | None, ...],
    outer: tuple[Tensor | None, ...],
    eps: float,
    training: bool,
) -> list[Tensor | None]:
    """The derivative of the backward: autograd on the reference's closed form.

    Args:
        tensors: input, imag, grad, grad_imag, mean, covar, weight.
        outer: gradients of the backward's four results.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        input, imag, grad, grad_imag, mean, covar, weight = (
            None if t is None else t if create_graph and t.requires_grad
            else t.detach().requires_grad_() for t in tensors
        )  # fmt: skip
        x = reference.as_pair((input,) if imag is None else (input, imag))
        g = reference.as_pair((grad,) if grad_imag is None else (grad, grad_imag))
        m, v = reference.moments(*x) if training else (mean, covar)
        w = None if weight is None else weight.double()
        total, product = reference.gram(*x, *g, m)
        count = values_per_channel(input) if training else None
        out = reference.input_gradient(*x, *g, m, v, w, eps, total, product, count)
        if imag is None:
            out = torch.complex(*out), None
        out = *out, *reference.parameter_gradients(v, eps, total, product)
        used = [(o, d) for o, d in zip(out, outer, strict=True) if None not in (o, d)]
        wanted = [t for t in (input, imag, grad, grad_imag, weight) if t is not None]
        found = iter(
            torch.autograd.grad(
                [o for o, _ in used],
                wanted,
                [d.to(o.dtype) for o, d in used],
                create_graph=create_graph,
                allow_unused=True,
            )
        )
        found = [None if t is None else next(found) for t in (input, imag, grad, grad_imag, weight)]
        return [*found[:4], None, None, found[4]]


# --- eager mode ------------------------------------------------------------------------------


class Whiten(torch.autograd.Function):
    """:func:`forward` with :func:`backward`; of the batch only the input is saved."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return forward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        remember(ctx, inputs, *output[2:])
        ctx.mark_non_differentiable(*(output[2:] if inputs[1] is not None else output[1:]))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return backpropagate(ctx, eager_backward(), *grads)


class WhitenAtOnce(torch.autograd.Function):
    """The same without what ``torch.func`` needs; the sweep is left to its caller.

    Where there is a ``setup_context``, torch binds the arguments to their names at every call,
    which takes as long as the arithmetic of a small layer.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        imag: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        others: tuple,
    ) -> Parts:
        run, mean, covar, eps, engine, found = others
        args = input, imag, *kept(mean, covar), weight, bias, eps, engine
        y, *results = run(*args)
        found.extend(results)
        remember(ctx, args, *found[:2])
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return *gradients(ctx, eager_backward(), ctx.needs_input_grad, *grads), None


class WhitenBackward(torch.autograd.Function):
    """:func:`backward`, differentiable again."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return backward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        remember_backward(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor | None) -> tuple[Tensor | None, ...]:
        return backpropagate_again(ctx, *outer)


def remember(ctx: Any, inputs: tuple, mean: Tensor, covar: Tensor) -> None:
    input, imag, given, _, weight, bias, eps, engine = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(input, imag, weight, mean, covar)
    ctx.settings = eps, engine, given is None, None if bias is None else bias.dtype


def eager_backward() -> Callable:
    return WhitenBackward.apply if torch.is_grad_enabled() else sweep_backward


def backpropagate(ctx: Any, run: Callable, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """A gradient for each argument of :func:`forward`."""
    need = ctx.needs_input_grad
    x, x_imag, weight, bias = gradients(ctx, run, (*need[:2], *need[4:6]), *grads)
    return x, x_imag, None, None, weight, bias, None, None


def gradients(
    ctx: Any, run: Callable, need: tuple[bool, ...], grad: Tensor | None, *more: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Those of input, imag, weight and bias that are needed."""
    input, imag, weight, mean, covar = ctx.saved_tensors
    eps, engine, training, bias_dtype = ctx.settings
    grad = torch.zeros_like(input) if grad is None else grad
    grad_imag = None if imag is None else more[0]
    if imag is not None and grad_imag is None:
        grad_imag = torch.zeros_like(imag)
    x, x_imag, weight_grad, bias_grad = run(
        input, imag, grad, grad_imag, mean, covar, weight,
        eps, training, need[0] or need[1], engine,
    )  # fmt: skip
    return (
        x if need[0] else None,
        x_imag if need[1] else None,
        weight_grad if need[2] else None,
        narrowed(bias_grad, bias_dtype) if need[3] else None,
    )


def remember_backward(ctx: Any, inputs: tuple, output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:7])
    ctx.eps, ctx.training = inputs[7:9]


def backpropagate_again(ctx: Any, *outer: Tensor | None) -> tuple[Tensor | None, ...]:
    outer = [None if o is None or o.numel() == 0 else o for o in outer]
    found = second_order(ctx.saved_tensors, outer, ctx.eps, ctx.training)
    found = [f if need else None for f, need in zip(found, ctx.needs_input_grad, strict=False)]
    return *found, None, None, None, None


# --- torch.library -----------------------------------------------------------------------------

library = torch.library.Library("cbn_lab", "DEF")
library.define(
    "complex_batch_norm(Tensor input, Tensor? imag, Tensor? mean, Tensor? covar, Tensor? weight, "
    "Tensor? bias, float eps, str engine) -> (Tensor, Tensor, Tensor, Tensor)"
)
library.define(
    "complex_batch_norm_backward(Tensor input, Tensor? imag, Tensor grad, Tensor? grad_imag, "
    "Tensor mean, Tensor covar, Tensor? weight, float eps, bool training, bool need_input, "
    "str engine) -> (Tensor, Tensor, Tensor, Tensor)"
)
library.impl("complex_batch_norm", forward, "CompositeExplicitAutograd")
library.impl("complex_batch_norm_backward", backward, "CompositeExplicitAutograd")


@torch.library.register_fake("cbn_lab::complex_batch_norm", lib=library)
def _(input, imag, mean, covar, weight, bias, eps, engine):
    second = input.new_empty(0) if imag is None else torch.empty_like(input)
    c = input.shape[1]
    small = dict(dtype=torch.float64, device=input.device)
    return torch.empty_like(input), second, torch.empty(c, 2, **small), torch.empty(c, 3, **small)


@torch.library.register_fake("cbn_lab::complex_batch_norm_backward", lib=library)
def _(
    input, imag, grad, grad_imag, mean, covar, weight, eps, training, need_input, engine
):  # fmt: skip
    x = torch.empty_like(input) if need_input else input.new_empty(0)
    both = need_input and imag is not None
    second = torch.empty_like(input) if both else input.new_empty(0)
    made = [
        torch.empty(input.shape[1], columns, dtype=dtype, device=input.device)
        for columns, dtype in zip((3, 2), gradient_dtypes(weight), strict=True)
    ]
    return x, second, *made


def _compiled_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    return backpropagate(ctx, torch.ops.cbn_lab.complex_batch_norm_backward, *grads)


torch.library.register_autograd(
    "cbn_lab::complex_batch_norm",
    _compiled_backward,
    setup_context=lambda ctx, inputs, output: remember(ctx, inputs, *output[2:]),
    lib=library,
)
torch.library.register_autograd(
    "cbn_lab::complex_batch_norm_backward",
    backpropagate_again,
    setup_context=lambda ctx, inputs, output: remember_backward(ctx, inputs, output),
    lib=library,
)
