"""Backbones, prompts, pooling, checkpoints: everything between an input and its vector."""

import logging

# On import, torchao warns about GPU kernels that it lacks, and torch about types that torchao registers.
for _name in ("torchao", "torch.utils._pytree"):
    if logging.getLogger(_name).level == logging.NOTSET:
        logging.getLogger(_name).setLevel(logging.ERROR)
