"""The state of a model's modules, before and after other code uses them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

_CONTAINERS = (dict, OrderedDict, set)  # in which torch keeps submodules, tensors and hooks


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Afterwards each module has its submodules, tensors, hooks, attributes and mode again.

    Parameters need gradients as before. The values of tensors are not restored.
    """
    attributes = {module: dict(vars(module)) for module in model.modules()}
    values = (value for own in attributes.values() for value in own.values())
    contents = [(value, value.copy()) for value in values if type(value) in _CONTAINERS]
    with_gradient = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        yield
    finally:
        for module, own in attributes.items():
            vars(module).clear()
            vars(module).update(own)
        for container, content in contents:  # the same ones, as handles of hooks refer to them
            container.clear()
            container.update(content)
        for parameter, needs in with_gradient.items():
            if parameter.requires_grad != needs:
                parameter.requires_grad_(needs)
