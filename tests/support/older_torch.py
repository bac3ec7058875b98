"""torch as it is in the oldest version that we allow, 2.11: without the names that came later."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any
from unittest import mock

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from stackwise_core.training import distributed

LATER = {
    "linear_cross_entropy": F,
    "LinearCrossEntropyOptions": nn,
    "LinearCrossEntropyLoss": nn,
    "set_reduce_scatter_unused_params": FSDPModule,
    "set_reduce_scatter_max_input_buffers": FSDPModule,
    "set_separate_reduce_scatter_group": FSDPModule,
    "set_symm_mem_for_comm": FSDPModule,
}
"""Names of 2.12 and 2.13, and where they are."""
MORE = "forward_sync_buffers acc_policy batch_chunk_size batched_grad_copy isolate_recompiles "
MORE += "cublas_workspace_size cublaslt_workspace_size blas_workspace_size DataParallelMeshDims all_gather_single "
MORE += "shapes_spec reduce_scatter_single thread_safe_generator reset_iter_state swap_in_optimizer_params_and_state "
MORE += "region_activation_memory_budget caching_allocator_disabled is_ck_sdpa_available override_cudagraphs"
"""Others: what `dir` and `inspect.signature` find in torch 2.13.0 and not in 2.11.0, but for names that are words."""


class _OlderDdp(DistributedDataParallel):
    """Takes the keys of 2.11 that we use, and no other."""

    def __init__(
        self, module: nn.Module, *, find_unused_parameters: bool, broadcast_buffers: bool, gradient_as_bucket_view: bool
    ) -> None:
        super().__init__(
            module,
            find_unused_parameters=find_unused_parameters,
            gradient_as_bucket_view=gradient_as_bucket_view,
            **{"forward_sync_buffers" if _newer() else "broadcast_buffers": broadcast_buffers},
        )


def _newer() -> bool:
    """Return whether this torch has the names at all."""
    return hasattr(F, "linear_cross_entropy")


@contextlib.contextmanager
def older_torch() -> Generator[None]:
    """Take the later names away for a block."""
    with contextlib.ExitStack() as stack:
        for name, owner in LATER.items():
            if hasattr(owner, name):
                had: Any = getattr(owner, name)
                delattr(owner, name)
                stack.callback(setattr, owner, name, had)
        stack.enter_context(mock.patch.object(distributed, "DistributedDataParallel", _OlderDdp))
        yield
