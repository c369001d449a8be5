"""What is changed on a layer after ``accelerate`` counts in every memory mode, as it does in the original."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.accelerate_cases import at_work, results
from support.gradients import CONDITION
from support.helpers import assert_close, tensors
from support.structures import BY_NAME
from torch import Tensor, nn

from pyglow_fast.interop import accelerate


def set_to(attribute: str, value: Any) -> Callable[[Any], None]:
    return lambda layer: setattr(layer, attribute, value)


def swap_features(layer: Any) -> None:
    """Transform the half that was kept, and keep the other."""
    kept = layer.identity_features.clone()
    layer.identity_features.copy_(layer.transform_features)
    layer.transform_features.copy_(kept)


def learn_clamp(block: Any) -> None:
    """Make it a parameter, of each channel, that gets a gradient."""
    block.clamp = nn.Parameter(torch.linspace(1.7, 2.3, 6, dtype=torch.float64).view(1, 6, 1, 1))


def hook_block(block: nn.Module) -> None:
    block.register_forward_hook(lambda module, given, out: ((1.1 * out[0][0],), out[1]))


def hook_convolution(conv: nn.Module) -> None:
    conv.register_forward_hook(lambda module, given, out: 1.1 * out)


def old_spectral_norm(conv: nn.Module) -> None:
    """A hook, which changes a buffer in each forward: such a net cannot be run again."""
    torch.manual_seed(5)
    nn.utils.spectral_norm(conv)


def new_spectral_norm(conv: nn.Module) -> None:
    torch.manual_seed(5)
    nn.utils.parametrizations.spectral_norm(conv)


class Scaled(nn.Module):
    """Another net, whatever it is given."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, *given: Any, **named: Any) -> Tensor:
        return 0.9 * self.net(*given, **named)


def exchange_net(attribute: str) -> Callable[[Any], None]:
    return lambda layer: setattr(layer, attribute, Scaled(copy.deepcopy(getattr(layer, attribute))))


def exchange_wavenet(coupling: Any) -> None:
    torch.manual_seed(7)
    coupling.wn = at_work(copy.deepcopy(coupling.wn), 0.3)


def exchange_convolution(net: Any) -> None:
    torch.manual_seed(7)
    net.convs[1] = nn.Conv2d(8, 8, 3, padding=1).double()


LIBRARIES = ("normflows-lu-sigmoid", "nflows-halves", "freia")
CHANGES: dict[str, tuple[str, str, Callable[[Any], None]]] = {  # the structure, an attribute of its layers, the change
    "clamp of FrEIA": ("freia", "clamp", set_to("clamp", 0.5)),
    "clamp of a copy of FrEIA's": ("msflow", "clamp", set_to("clamp", 0.5)),
    "clamp of GIN": ("freia-leaky-gin", "clamp", set_to("clamp", 0.5)),
    "scale_map of normflows": ("normflows-lu-sigmoid", "scale_map", set_to("scale_map", "exp")),
    "features of nflows, written": ("nflows-halves", "identity_features", swap_features),
    "slope in normflows": ("normflows-leaky-net-actnorm", "negative_slope", set_to("negative_slope", 0.7)),
    "slope in nflows": ("nflows-alternating-leaky", "negative_slope", set_to("negative_slope", 0.7)),
    "slope in FrEIA": ("freia-leaky-gin", "negative_slope", set_to("negative_slope", 0.7)),
    "clamp of FrEIA, learned": ("freia", "clamp", learn_clamp),
    "hook on a block of FrEIA": ("freia", "w_perm", hook_block),
    "net of normflows": ("normflows-lu-sigmoid", "param_map", exchange_net("param_map")),
    "net of nflows": ("nflows-halves", "transform_net", exchange_net("transform_net")),
    "net of FrEIA": ("freia", "subnet", exchange_net("subnet")),
    "net of a graph": ("freia-graph", "subnet", exchange_net("subnet")),
    "net of Glow-TTS": ("glow-tts-no-norm", "wn", exchange_wavenet),
    "net of chaiyujin": ("chaiyujin-affine", "f", exchange_net("f")),
    "convolution of nflows": ("nflows-halves", "convs", exchange_convolution),
} | {
    f"{change.__name__} in {name}": (name, "kernel_size", change)
    for change, names in {
        hook_convolution: (*LIBRARIES, "freia-graph", "glow-tts-weight-norm", "chaiyujin-affine"),
        old_spectral_norm: ("normflows-lu-sigmoid", "freia"),
        new_spectral_norm: ("normflows-lu-sigmoid", "freia"),
    }.items()
    for name in names
}


def held(model: nn.Module, attribute: str) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, attribute)]


def outputs(name: str, model: nn.Module) -> list[Tensor]:
    """Outputs and log-det, and the gradients of data and parameters."""
    data, conditions = BY_NAME[name].batch()
    found = results(model, lambda model, *data: BY_NAME[name].forward(model, list(data), conditions), *data)
    return list(found.values())


@pytest.mark.parametrize("memory", [None, pytest.param("store", marks=pytest.mark.full), "reversible"], ids=str)
@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_attribute_is_followed(name: str, memory: str | None) -> None:
    """Whoever changes a clamp between two phases of training trains with the new one."""
    structure, attribute, change = CHANGES[name]
    theirs, ours = BY_NAME[structure].model(), BY_NAME[structure].model()
    layers = [held(model, attribute) for model in (ours, theirs)]
    accelerate(ours, memory)
    before = outputs(structure, ours)
    for layer in (*layers[0], *layers[1]):
        change(layer)
    expected = outputs(structure, theirs)
    assert float((expected[0] - before[0]).abs().max()) > 1e-3
    assert_close(outputs(structure, ours), expected, CONDITION)
    found, wanted = ([value.double() for value in model.buffers()] for model in (ours, theirs))
    assert_close(found, wanted, CONDITION)


def test_the_inverse_of_a_soft_permutation_is_one_in_every_mode() -> None:
    """FrEIA keeps the inverse in float32, so it is one to 1e-7 only: here it is further off, to be seen."""
    case = BY_NAME["freia-soft"]
    z, back = case.batch()[0], []
    for memory in (None, "store", "reversible"):
        model = case.model()
        with torch.no_grad():
            for block in held(model, "w_perm_inv"):
                block.w_perm_inv.mul_(1.001)
        accelerate(model, memory)
        back.append(next(tensors(case.inverse(model, z, []))))
    assert_close(back[1:], [back[0]] * 2, CONDITION)
