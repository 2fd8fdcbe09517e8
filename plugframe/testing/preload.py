"""What the process from which ranks are forked imports once, so that no rank has to: seconds for each test.

It starts no thread and opens nothing, which a fork would not survive.
"""

from __future__ import annotations

import torch
import torch.distributed.checkpoint
import torch.distributed.tensor.parallel
import torch.nn.parallel
import torch.utils.data

import plugframe.lite.lite  # noqa: F401 - for what it imports

# The first optimizer has torch import its compiler.
torch.optim.SGD([torch.zeros(1)], lr=0.1)
