"""The CPU engine: loops that numba compiles once and llvmlite loads."""
