"""What other code does to a model is undone, whatever its modules are."""

import pytest
import torch
from torch import nn

from spectr.layers.model_state import restored


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_modules_and_hooks_are_restored_next_to_a_scripted_module():
    model = nn.Sequential(nn.Linear(2, 2), torch.jit.script(nn.Sequential(nn.Linear(2, 2)))).train()
    x, seen, first = torch.ones(1, 2), [], model[0]
    want, handle = model(x), first.register_forward_hook(lambda *_: seen.append(1))
    with restored(model):
        model.eval()
        model[0] = nn.Linear(2, 2)
        first.requires_grad_(False)
        first.register_forward_hook(lambda *_: seen.append(2))
    assert torch.equal(model(x), want)
    assert (seen, model[0] is first, model.training, first.training) == ([1], True, True, True)
    assert first.weight.requires_grad
    handle.remove()
    model(x)
    assert seen == [1]
