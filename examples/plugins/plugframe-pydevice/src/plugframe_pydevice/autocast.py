"""``torch.autocast``: operators that run in the lower precision, in float32, or in the widest input dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from plugframe_pydevice.backend import NAME

# Matrix products, as on other accelerators.
_LOWER = """
    matmul linear mm bmm mv addmm addmv addbmm baddbmm chain_matmul linalg_multi_dot linalg_vecdot
    conv1d conv2d conv3d conv_transpose1d conv_transpose2d.input conv_transpose3d.input convolution conv_tbc
    prelu scaled_dot_product_attention gru_cell lstm_cell rnn_relu_cell rnn_tanh_cell
"""
# Where 8 bits of mantissa are too few: powers, long sums, losses.
_FLOAT32 = """
    acos asin cosh erfinv exp expm1 log log10 log1p log2 reciprocal rsqrt sinh tan
    pow.Tensor_Scalar pow.Tensor_Tensor pow.Scalar softplus layer_norm native_layer_norm rms_norm group_norm
    cosine_similarity poisson_nll_loss cosine_embedding_loss nll_loss nll_loss2d hinge_embedding_loss kl_div l1_loss
    smooth_l1_loss huber_loss mse_loss margin_ranking_loss multilabel_margin_loss soft_margin_loss
    triplet_margin_loss multi_margin_loss binary_cross_entropy_with_logits cross_entropy_loss dist pdist cdist renorm
    logsumexp softmax.int log_softmax.int cumprod cumsum prod prod.dim_int sum sum.dim_IntList
    norm.Scalar norm.ScalarOpt_dim linalg_vector_norm linalg_matrix_norm
"""
_WIDEST = """
    addcdiv addcmul atan2 bilinear cross dot vdot grid_sampler index_put tensordot scatter_add cat stack
"""


def _kernel(op: Any, choose: Callable[[Sequence[Tensor]], torch.dtype]) -> Callable[..., Any]:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(NAME, enabled=False):
            leaves, structure = pytree.tree_flatten((args, kwargs))
            dtype = choose([leaf for leaf in leaves if _is_castable(leaf)])
            leaves = [leaf.to(dtype) if _is_castable(leaf) else leaf for leaf in leaves]
            cast_args, cast_kwargs = pytree.tree_unflatten(leaves, structure)
            return op(*cast_args, **cast_kwargs)

    return kernel


def _is_castable(leaf: Any) -> bool:
    if not isinstance(leaf, Tensor):
        return False
    # float64 is chosen explicitly and not changed.
    return leaf.device.type == NAME and leaf.is_floating_point() and leaf.dtype is not torch.float64


def _lower(tensors: Sequence[Tensor]) -> torch.dtype:
    return torch.get_autocast_dtype(NAME)


def _float32(tensors: Sequence[Tensor]) -> torch.dtype:
    return torch.float32


def _widest(tensors: Sequence[Tensor]) -> torch.dtype:
    wide = any(tensor.dtype is torch.float32 for tensor in tensors)
    return torch.float32 if wide else torch.get_autocast_dtype(NAME)


def register() -> list[Any]:
    """Register all kernels; they stay registered while the returned libraries are referenced."""
    library: Any = torch.library.Library
    everything = library("_", "IMPL")
    everything.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    own = library("aten", "IMPL", "AutocastPrivateUse1")
    for names, choose in ((_LOWER, _lower), (_FLOAT32, _float32), (_WIDEST, _widest)):
        for name in names.split():
            packet, _, overload = name.partition(".")
            op = getattr(getattr(torch.ops.aten, packet, None), overload or "default", None)
            if op is not None:  # missing in some versions of torch
                own.impl(name, _kernel(op, choose))
    return [everything, own]
