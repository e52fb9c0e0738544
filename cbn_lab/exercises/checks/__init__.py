"""The checks, one module a notebook. Each tells a right answer from the usual wrong ones."""
