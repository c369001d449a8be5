"""Small models of normflows, nflows and FrEIA that ``accelerate`` takes over, and what two of them must agree in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import FrEIA.framework as Ff
import FrEIA.modules as Fm
import nflows.distributions
import nflows.flows
import nflows.transforms
import normflows
import torch
from torch import Tensor, nn

from support.helpers import tensors

MEMORIES = (None, "store", "checkpoint", "reversible")
HIDDEN = 8


def subnet(c_in: int, c_out: int, first: nn.Module | None = None, second: nn.Module | None = None) -> nn.Module:
    """Make a subnet with ReLUs, or with the activations given."""
    return nn.Sequential(
        nn.Conv2d(c_in, HIDDEN, 3, padding=1),
        first or nn.ReLU(),
        nn.Conv2d(HIDDEN, HIDDEN, 1),
        second or nn.ReLU(),
        nn.Conv2d(HIDDEN, c_out, 3, padding=1),
    )


def leaky_subnet(c_in: int, c_out: int) -> nn.Module:
    return subnet(c_in, c_out, nn.LeakyReLU(0.2), nn.LeakyReLU(0.2, inplace=True))


class ContextNet(nn.Module):
    """A net that takes a context, as nflows calls it."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(part for part in subnet(c_in, c_out) if isinstance(part, nn.Conv2d))

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        first, second, third = self.convs
        return third(torch.relu(second(torch.relu(first(inputs)))))


class WithContext(nn.Module):
    """A net of images that takes a context and does not read it."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        return self.body(inputs)


def leaky_context_net(c_in: int, c_out: int) -> nn.Module:
    return WithContext(leaky_subnet(c_in, c_out))


def from_normflows(levels: int = 2, steps: int = 3, **options: Any) -> nn.Module:
    """The Glow of its documentation, small."""
    flows, merges, bases = [], [], []
    shape = (3, 8, 8)
    for i in range(levels):
        channels = shape[0] * 2 ** (levels + 1 - i)
        blocks = [normflows.flows.GlowBlock(channels, HIDDEN, **options) for _ in range(steps)]
        flows.append([*blocks, normflows.flows.Squeeze()])
        if i > 0:
            merges.append(normflows.flows.Merge())
            side = (shape[0] * 2 ** (levels - i), shape[1] // 2 ** (levels - i), shape[2] // 2 ** (levels - i))
        else:
            side = (shape[0] * 2 ** (levels + 1), shape[1] // 2**levels, shape[2] // 2**levels)
        bases.append(normflows.distributions.DiagGaussian(side))
    return normflows.MultiscaleFlow(bases, flows, merges, class_cond=False)


def mask(channels: int, cut: str) -> Tensor:
    half = torch.arange(channels) >= channels // 2
    return (half if cut == "halves" else torch.arange(channels) % 2 == 1).float()


def nflows_steps(
    cut: Any, net: Callable[..., nn.Module], steps: int = 2, mix: Any = nflows.transforms.OneByOneConvolution
) -> list[nn.Module]:
    """Steps of an actnorm, a mix of the channels and a coupling with this mask."""
    t, c = nflows.transforms, len(cut)
    return [layer for _ in range(steps) for layer in (t.ActNorm(c), mix(c), t.AffineCouplingTransform(cut, net))]


def from_nflows(cut: str = "halves", steps: int = 3, net: Callable[..., nn.Module] = ContextNet) -> nn.Module:
    parts = [nflows.transforms.SqueezeTransform(), *nflows_steps(mask(12, cut), net, steps)]
    base = nflows.distributions.StandardNormal([12, 4, 4])
    return nflows.flows.Flow(nflows.transforms.CompositeTransform(parts), base)


def sequence(shape: tuple[int, ...], blocks: Sequence[tuple[Any, dict[str, Any]]]) -> nn.Module:
    """Make a SequenceINN of modules with their options."""
    model = Ff.SequenceINN(*shape)
    for module, options in blocks:
        model.append(module, **options)
    return model


def from_freia(steps: int = 3, net: Callable[..., nn.Module] = subnet, **options: Any) -> nn.Module:
    block = (Fm.AllInOneBlock, {"subnet_constructor": net, **options})
    return sequence((3, 8, 8), [(Fm.IRevNetDownsampling, {}), *[block] * steps])


@torch.no_grad()
def orthogonalise(layer: Any) -> None:
    """Make a rotation of FrEIA's, drawn in float32, one in float64 too: only then is log|det| 0."""
    if getattr(layer, "w_0", None) is not None:
        layer.w_0.copy_(torch.linalg.qr(layer.w_0).Q)
    elif isinstance(layer.w_perm, Tensor) and layer.w_perm.is_floating_point() and layer.w_perm.frac().any():
        rotation = torch.linalg.qr(layer.w_perm.flatten(1)).Q
        layer.w_perm.copy_(rotation.view_as(layer.w_perm))
        layer.w_perm_inv.copy_(rotation.T.reshape(layer.w_perm.shape))


@torch.no_grad()
def at_work(model: nn.Module, spread: float = 0.05) -> nn.Module:
    """Move every parameter off its start, and let no layer wait for data. Float64."""
    model = model.double()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(spread * torch.randn_like(parameter))
    wait_for_data(model, False)
    for module in model.modules():
        if hasattr(module, "w_perm_inv") and not getattr(module, "householder", 0):
            orthogonalise(module)
    return model


def wait_for_data(model: nn.Module, waits: bool = True) -> int:
    """Let the actnorms start from the next batch, or not, and count them."""
    count = 0
    for module in model.modules():
        if hasattr(module, "set_ddi"):  # of Glow-TTS
            module.set_ddi(waits)
        elif hasattr(module, "init_on_next_batch"):  # of FrEIA
            module.init_on_next_batch = waits
        elif isinstance(getattr(module, "inited", None), bool):  # of chaiyujin and SRFlow
            module.inited = not waits
        else:
            flag = getattr(module, "data_dep_init_done", getattr(module, "initialized", None))  # of normflows, nflows
            if not isinstance(flag, Tensor):
                continue
            flag.fill_(not waits)
        count += 1
    return count


def results(model: nn.Module, call: Callable[..., Any], *inputs: Tensor, gradients: bool = True) -> dict[str, Tensor]:
    """What ``call(model, *inputs)`` gives, and the gradients of inputs and parameters, zeros where there is none."""
    leaves = {f"input {i}": value.detach().clone().requires_grad_() for i, value in enumerate(inputs)}
    values = list(tensors(call(model, *leaves.values())))
    found = {f"output {i}": value.detach() for i, value in enumerate(values)}
    if not gradients:
        return found
    wanted = leaves | {name: value for name, value in model.named_parameters() if value.requires_grad}
    grads = torch.autograd.grad(weighted(values), list(wanted.values()), allow_unused=True)
    for (name, value), grad in zip(wanted.items(), grads, strict=True):
        found[f"gradient of {name}"] = torch.zeros_like(value) if grad is None else grad
    return found


def weighted(values: Sequence[Tensor]) -> Tensor:
    """Compute a scalar that every value enters with a weight of its own."""
    generator = torch.Generator().manual_seed(3)
    weights = (torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value) for value in values)
    return sum(((weight * value).sum() for weight, value in zip(weights, values, strict=True)), torch.zeros(()))


def assert_same(ours: nn.Module, theirs: nn.Module, call: Callable[..., Any], *inputs: Tensor) -> None:
    """Check that both give the same results to 1e-9, the largest values of these small flows being about 1."""
    found, expected = (results(model, call, *inputs) for model in (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def slope(run: Callable[[], Tensor], bias: nn.Parameter) -> float:
    """The derivative of a scalar along all numbers of bias, by a difference."""
    values = []
    for step in (1e-5, -1e-5):
        bias.data += step
        values.append(float(run()))
        bias.data -= step
    return (values[0] - values[1]) / 2e-5


def saved_bytes(model: nn.Module, run: Callable[[], object]) -> int:
    """How much autograd keeps of a run for its backward, parameters left out."""
    own = {value.untyped_storage().data_ptr() for value in model.parameters()}
    seen: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        run()
    return sum(seen.values())
