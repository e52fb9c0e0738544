"""Compiled loops without a compiler at hand: built by numba once, kept on disk, run by threads.

A loop is a C function ``void loop(int64 *args)`` that takes its tasks from a shared counter until
none is left, so any number of threads may run it at the same time.

numba needs 0.7 s to import and seconds to compile. Its object code is therefore kept on disk under
a key of everything it depends on, and loaded by llvmlite alone, within a tenth of a second.

The threads are those of torch's own OpenMP runtime where it can be called (Linux). A second pool
would fight with torch's workers, which keep spinning for a while after each operation. Elsewhere a
small pool of Python threads runs the loops, which hold no interpreter lock.
"""

import ctypes
import functools
import hashlib
import os
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import llvmlite.binding as llvm
import torch

_lock = threading.RLock()
_keep_alive: list[object] = []
HUGE = 4 << 20  # bytes; a result of that size is often fresh from the system
Loop = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def load(names: list[str], build: Callable[[], dict[str, tuple[str, bytes]]], source: str):
    """The loops called ``names``, from the disk if they are there, else from ``build``.

    Args:
        names: of the loops; the first one also names the file.
        build: compiles; gives for each name its symbol and its object code.
        source: the text whose change makes a kept file stale.

    Returns:
        a dictionary from name to a callable that takes the address of the arguments.
    """
    with _lock:
        path = cache_folder() / f"{names[0]}-{_key(source)}.bin"
        try:
            return _loops(_unpack(path.read_bytes(), names))
        except (OSError, ValueError):
            say(f"cbn_lab: compiling {names[0].split('.')[0]}, once on this machine …")
            compiled = build()
            _store(path, compiled)
        return _loops(compiled)


def say(text: str) -> None:
    """To who sits at a terminal and waits; logs and notebooks are left as they are."""
    if sys.stderr is not None and sys.stderr.isatty():
        print(text, file=sys.stderr, flush=True)


def _loops(compiled: dict[str, tuple[str, bytes]]) -> dict[str, Loop]:
    """Callables for the object code, which has an engine to itself.

    numba numbers its symbols anew in each process, so two files may use the same ones.
    """
    engine = _engine()
    return {name: Loop(_address(engine, *code)) for name, code in compiled.items()}


def cache_folder() -> Path:
    """Beside this file, as Python's own cache, or in the user's cache folder if that is closed.

    ``NUMBA_CACHE_DIR`` goes before both.
    """
    if given := os.environ.get("NUMBA_CACHE_DIR"):
        return Path(given)
    beside = Path(__file__).parent / "__pycache__"
    if os.access(beside if beside.exists() else beside.parent, os.W_OK):
        return beside
    home = os.environ.get("LOCALAPPDATA") or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "cbn_lab"


def _key(source: str) -> str:
    features = llvm.get_host_cpu_features().flatten()
    parts = [source, version("numba"), version("llvmlite"), llvm.get_process_triple()]
    return hashlib.sha256(
        "\0".join([*parts, llvm.get_host_cpu_name(), features]).encode()
    ).hexdigest()[:24]


def _store(path: Path, compiled: dict[str, tuple[str, bytes]]) -> None:
    """One line of names, symbols and lengths, a checksum, and the object files end to end."""
    blob = b"".join(code for _, code in compiled.values())
    rows = [f"{name} {symbol} {len(code)}" for name, (symbol, code) in compiled.items()]
    head = ";".join([*rows, _checksum(rows, blob)])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(head.encode() + b"\n" + blob)
        os.replace(temporary, path)  # so that nobody ever reads half a file
    except OSError:
        pass  # nowhere to write: compiled again next time


def _checksum(rows: list[str], blob: bytes) -> str:
    return hashlib.sha256(";".join(rows).encode() + blob).hexdigest()


def _unpack(data: bytes, names: list[str]) -> dict[str, tuple[str, bytes]]:
    head, _, blob = data.partition(b"\n")
    *rows, checksum = head.decode().split(";")
    if _checksum(rows, blob) != checksum:
        raise ValueError("damaged file")
    compiled, start = {}, 0
    for row in rows:
        name, symbol, length = row.split(" ")
        compiled[name] = symbol, blob[start : start + int(length)]
        start += int(length)
    if set(compiled) != set(names):
        raise ValueError("another set of loops")
    return compiled


@functools.cache
def _initialise() -> None:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    # What numba's error handling would call. Our loops raise nothing, so it is never reached, but
    # the loader wants an address; should it be reached after all, the process ends.
    abort = ctypes.cast(ctypes.pythonapi.Py_FatalError, ctypes.c_void_p).value
    for symbol in ("numba_gil_ensure", "numba_gil_release", "NRT_MemInfo_call_dtor"):
        llvm.add_symbol(symbol, abort)


def _engine() -> llvm.ExecutionEngine:
    _initialise()
    machine = llvm.Target.from_default_triple().create_target_machine(jit=True)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    _keep_alive.append(engine)
    return engine


def _address(engine: llvm.ExecutionEngine, symbol: str, code: bytes) -> int:
    file = llvm.ObjectFileRef.from_data(code)
    _keep_alive.append(file)
    engine.add_object_file(file)
    engine.finalize_object()
    address = engine.get_function_address(symbol)
    if not address:
        raise OSError(f"{symbol} is not in its object file")
    return address


def address(function: Callable | None) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def parallel(loop: Callable[[int], None], args: int, threads: int, owner: object) -> None:
    """Run ``loop`` on ``threads`` threads, the calling one included, and wait for all.

    Where Python's threads run it, they hold on to ``owner``, which has the memory that the loop
    works on: Ctrl-C ends the waiting, but not what is under way.
    """
    if threads <= 1:
        loop(args)
    elif (run := openmp()) is not None:
        run(loop, args, threads, 0)
    else:
        pool = _pool(os.getpid(), threads)
        others = [pool.submit(_run, loop, args, owner) for _ in range(threads - 1)]
        loop(args)
        for other in others:
            other.result()


def _run(loop: Callable[[int], None], args: int, owner: object) -> None:
    loop(args)


@functools.cache
def openmp() -> Callable | None:
    """GOMP_parallel of the OpenMP runtime that torch itself is linked with."""
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        function = library.GOMP_parallel
    except (OSError, AttributeError):
        return None
    function.argtypes = [Loop, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    function.restype = None
    return function


@functools.cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads - 1, thread_name_prefix="cbn_lab")


@functools.cache
def cache_bytes() -> int:
    """The last cache before memory, as Linux has it; 32 MiB, a usual size, elsewhere."""
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text(encoding="ascii")
        return int(text.strip().removesuffix("K")) << 10 or 32 << 20  # some virtual ones say 0K
    except (OSError, ValueError):
        return 32 << 20


@functools.cache
def _madvise() -> Callable | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        return ctypes.CDLL(None).madvise
    except (OSError, AttributeError, TypeError):
        return None


def ask_for_huge_pages(tensor: torch.Tensor) -> None:
    """Tell Linux to back a large fresh tensor by pages of 2 MiB.

    Otherwise its first use stops at every 4 KiB for the kernel to supply a page, which takes
    several times as long as the arithmetic. Smaller tensors come from memory in use already.
    """
    madvise, page = _madvise(), 4096
    if madvise is not None:
        start = -(-tensor.data_ptr() // page) * page
        length = (tensor.data_ptr() + tensor.nbytes) // page * page - start
        huge_pages = 14  # MADV_HUGEPAGE; a kernel without them answers with an error, no harm done
        madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), huge_pages)
