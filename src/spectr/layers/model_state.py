"""The state of a model's modules, before and after other code uses them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

# What torch keeps in containers, which hooks' handles refer to: submodules, tensors and hooks.
_CONTAINERS = tuple(name for name, value in vars(nn.Module()).items() if isinstance(value, (dict, set)))


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Afterwards each module has its submodules, tensors, hooks, attributes and mode again.

    Parameters need gradients as before. The values of tensors are not restored.
    """
    attributes = {module: dict(vars(module)) for module in model.modules()}
    held = {module: [vars(module)[name].copy() for name in _CONTAINERS] for module in attributes}
    with_gradient = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        yield
    finally:
        for module, own in attributes.items():
            vars(module).clear()
            vars(module).update(own)
            for name, content in zip(_CONTAINERS, held[module], strict=True):
                own[name].clear()
                own[name].update(content)
        for parameter, needs in with_gradient.items():
            if parameter.requires_grad != needs:
                parameter.requires_grad_(needs)
