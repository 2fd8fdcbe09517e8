"""Imports of the fork server from which ranks start, which saves each test seconds.

Importing this module starts no thread and opens no file, which a fork would not survive.
"""

from __future__ import annotations

import torch
import torch.distributed.checkpoint
import torch.distributed.tensor.parallel
import torch.nn.parallel
import torch.utils.data

import plugframe.lite.lite  # noqa: F401 - for its imports

# Creating the first optimizer imports torch's compiler.
torch.optim.SGD([torch.zeros(1)], lr=0.1)
