"""A model moved to a device and a smaller type, without what `Module.to` does to its buffers.

`model.to(dtype)` casts buffers as well, and the rotary frequencies are one: rounded to bfloat16,
positions far into a prompt turn by the wrong angle. transformers keeps them in float32 when it
loads a model in bfloat16, and so does this.
"""

from typing import TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


def placed(model: M, device: torch.device, dtype: torch.dtype) -> M:
    """`model` itself: its weights on `device` in `dtype`, its buffers there as they are."""
    kept = {
        (module, name): buffer
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    }
    model.to(device=device, dtype=dtype)
    for (module, name), buffer in kept.items():
        module._buffers[name] = buffer.to(device)
    return model
