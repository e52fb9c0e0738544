"""Batch normalisation in PyTorch, taken apart.

The public names stand in ``__init__.pyi``; each is imported when it is first touched, so that
``import cbn_lab`` costs nothing and a command or a pytest plugin need not wait for torch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
