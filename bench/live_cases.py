"""The flows of projects that people run, as the benchmark of live models calls them: models, features, sources.

Each is built by its project's own code (`make test-live` installs it into build/live), or is written by the project's
interface. Features are random.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.live.light_import import light_import

Latents = tuple[list[Tensor], Tensor]  # z of each scale, log_det (N,)


@dataclasses.dataclass(frozen=True)
class LiveCase:
    """A flow and its features; ``call(model, *features)`` gives its latents and log-determinants.

    The last ``masks`` of the features are no data: nothing has gradients with respect to them. ``also``: other settings
    of theirs that are measured besides, by name; each is made of a copy of the model.
    """

    model: nn.Module
    features: tuple[Tensor, ...]
    call: Callable[..., Latents]
    source: str
    masks: int = 0
    also: Mapping[str, Callable[[nn.Module], None]] = dataclasses.field(default_factory=dict)

    @property
    def n_data(self) -> int:
        """The number of features that are data."""
        return len(self.features) - self.masks


def version(package: str) -> str:
    """A package and its version, as rows name their source."""
    return f"{package} {importlib.metadata.version(package)}"


def _features(batch: int, *shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.randn(batch, *shape) for shape in shapes)


class Stacks(nn.Module):
    """Flows side by side, each with features of its own."""

    def __init__(self, stacks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.stacks = nn.ModuleList(stacks)

    def forward(self, *features: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Gives (z, log_det) of each stack."""
        return [stack(x) for stack, x in zip(self.stacks, features, strict=True)]


def _side_by_side(model: nn.Module, *features: Tensor) -> Latents:
    latents, log_dets = zip(*model(*features), strict=True)
    return list(latents), torch.stack(log_dets).sum(0)


def _graph(model: nn.Module, *features: Tensor) -> Latents:
    latents, log_det = model(list(features))
    return list(latents), log_det


def _alone(model: nn.Module, *features: Any) -> Latents:
    z, log_det = model(*features)
    return [z], log_det.flatten()


def fastflow(batch: int, ratio: float, steps: int, *dims: tuple[int, int, int]) -> LiveCase:
    """FastFlow (arXiv 2111.07677): a stack of steps for each scale of a feature extractor."""
    block = light_import("anomalib.models.image.fastflow.torch_model").create_fast_flow_block
    model = Stacks([block(list(size), conv3x3_only=False, hidden_ratio=ratio, flow_steps=steps) for size in dims])
    return LiveCase(model, _features(batch, *dims), _side_by_side, version("anomalib"))


def uflow(batch: int) -> LiveCase:
    """U-Flow (arXiv 2211.12353) on a ResNet18 at 256 pixels: scales that meet in a graph."""
    own = light_import("anomalib.models.image.uflow.torch_model").UflowModel
    shell = own.__new__(own)
    nn.Module.__init__(shell)
    shell.input_size, shell.affine_clamp, shell.affine_subnet_channels_ratio = (256, 256), 2.0, 1.0
    shell.permute_soft = False
    shell.feature_extractor = types.SimpleNamespace(channels=[64, 128, 256], scale_factors=[4, 8, 16])
    shapes = ((64, 64, 64), (128, 32, 32), (256, 16, 16))
    return LiveCase(shell.build_flow(4), _features(batch, *shapes), _graph, version("anomalib"))


class _NormalisedNet(nn.Module):
    """conv, LayerNorm over channels, relu, conv: msflow's net by its interface."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1, self.ln = nn.Conv2d(inputs, inputs, 3, padding=1), nn.LayerNorm(inputs)
        self.relu, self.conv2 = nn.ReLU(inplace=True), nn.Conv2d(inputs, outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) -> (N, outputs, H, W)."""
        hidden = self.ln(self.conv1(x).movedim(1, -1)).movedim(-1, 1)
        out: Tensor = self.conv2(self.relu(hidden))
        return out


def msflow(batch: int) -> LiveCase:
    """MSFlow's parallel flows (arXiv 2308.15300), conditioned on 64 channels; its features pooled to these sizes."""
    from FrEIA import framework, modules  # type: ignore[import-not-found]

    scales, conditional = ((256, 64, 64), (512, 32, 32), (1024, 16, 16)), 64
    stacks = []
    for (channels, *_), blocks in zip(scales, (2, 5, 8), strict=True):
        stack = framework.SequenceINN(channels, 1, 1)
        for _ in range(blocks):
            stack.append(
                modules.AllInOneBlock,
                cond=0,
                cond_shape=(conditional, 1, 1),
                subnet_constructor=_NormalisedNet,
                affine_clamping=1.9,
                global_affine_type="SOFTPLUS",
            )
        stacks.append(stack)

    def call(model: nn.Module, *features: Tensor) -> Latents:
        pairs = zip(model.stacks, features[::2], features[1::2], strict=True)  # type: ignore[call-overload]
        latents, log_dets = zip(*[stack(x, [cond]) for stack, x, cond in pairs], strict=True)
        return list(latents), torch.stack(log_dets).sum(0)

    shapes = [shape for scale in scales for shape in (scale, (conditional, *scale[1:]))]
    return LiveCase(Stacks(stacks), _features(batch, *shapes), call, f"{version('FrEIA')}, msflow's interface")


def glow_tts(batch: int) -> LiveCase:
    """The decoder of Glow-TTS (arXiv 2005.11129): 12 blocks over 80 mel bands, of samples with lengths of their own."""
    own = light_import("TTS.tts.layers.glow_tts.decoder").Decoder
    model = own(80, 192, kernel_size=5, dilation_rate=1, num_flow_blocks=12, num_coupling_layers=4)
    frames = 400
    lengths = torch.randint(frames // 4, frames // 2 + 1, (batch,)) * 2
    mask = (torch.arange(frames) < lengths[:, None])[:, None].float()
    return LiveCase(model, (torch.randn(batch, 80, frames) * mask, mask), _alone, version("coqui-tts"), masks=1)


def jet(batch: int) -> LiveCase:
    """Jet (arXiv 2412.15129), small: 10 couplings of 2 transformer layers of width 256 over 32x32 images."""
    own = light_import("jet_pytorch.jet").Jet
    model = own(4, 48, n_patches=64, img_dims=(32, 32), coupling_layers=10, block_depth=2, block_width=256)
    return LiveCase(model, _features(batch, (32, 32, 3)), _alone, version("jet-pytorch"))


class _InTurn(nn.Module):
    def __init__(self, steps: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(steps)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """z -> z, log_det."""
        log_det = z.new_zeros(z.shape[0])
        for layer in self.layers:
            z, log_det = layer(z, log_det)
        return z, log_det


def chaiyujin(batch: int) -> LiveCase:
    """16 of chaiyujin's FlowSteps, hidden 512, at the first level of 64x64 images."""
    from tests.support.srflow import FlowStep

    model = _InTurn([FlowStep(12, 512, flow_coupling="affine") for _ in range(16)])
    return LiveCase(model, _features(batch, (12, 32, 32)), _alone, "chaiyujin's interface")


def csflow(batch: int) -> LiveCase:
    """CS-Flow (arXiv 2110.02855): couplings over three scales, of images of 384 pixels."""
    own = light_import("anomalib.models.image.csflow.torch_model").CrossScaleFlow
    shapes = [(304, side, side) for side in (12, 6, 3)]
    return LiveCase(own((3, 384, 384), 4, 3, 1024), _features(batch, *shapes), _graph, version("anomalib"))


def cflow(batch: int) -> LiveCase:
    """CFLOW (arXiv 2107.12571): one decoder of 256 features, conditioned on 128; a batch of fibres."""
    head = light_import("anomalib.models.image.cflow.utils").cflow_head
    features = _features(batch, (256,), (128,))
    return LiveCase(head(128, 8, 1.9, 256), features, lambda own, x, cond: _alone(own, x, [cond]), version("anomalib"))


def _checkpointed(model: nn.Module) -> None:
    model._grad_checkpoint_override = True  # type: ignore[assignment]


def antsx(batch: int, side: int) -> LiveCase:
    """Glow of ANTsTorch on volumes: three levels of 8 steps, hidden 96, nets without actnorms as in its trainer."""
    from tests.live.antstorch import glow

    model = glow((1, side, side, side), 3, 8, 96, grad_checkpoint=False, net_actnorm=False)
    features, own = _features(batch, (1, side, side, side)), {"theirs, grad_checkpoint": _checkpointed}
    return LiveCase(model, features, lambda g, x: g.inverse_and_log_det(x), version("antsnormflows"), also=own)


class _Checkpointed(nn.Module):
    """An operation of which torch.utils.checkpoint keeps the input alone."""

    def __init__(self, operation: nn.Module) -> None:
        super().__init__()
        self.operation = operation

    def forward(self, x: Tensor, rev: bool = False) -> Tensor:
        """Run the operation, and once more in the backward."""
        found: Tensor = checkpoint(self.operation, x, rev, use_reentrant=False)
        return found


def hiding(batch: int, back: bool) -> LiveCase:
    """8 blocks as HiNet (Jing et al. 2021) has them, dense nets of growth 32, in a list: there, and with noise back."""
    from tests.support.hiding_blocks import GrownNet, Hides, InList

    model = InList([Hides(12, 12, lambda c_in, c_out: GrownNet(c_in, c_out, 32)) for _ in range(8)])

    def checkpointed(twin: nn.Module) -> None:
        own: list[nn.Module] = list(twin.operations)  # type: ignore[arg-type]
        twin.operations = nn.ModuleList(map(_Checkpointed, own))

    def call(model: nn.Module, x: Tensor, noise: Tensor) -> Latents:
        z = model(x)
        found = [z, model(torch.cat([z[:, :12], noise], dim=1), True)] if back else [z]
        return found, z.new_zeros(len(z))

    features = _features(batch, (24, 64, 64), (12, 64, 64))
    return LiveCase(model, features, call, "HiNet's interface", also={"theirs, checkpoint": checkpointed})


# How each case is built, and its batch. FastFlow's are those of a ResNet18 and a Wide ResNet50-2 at 256 pixels,
# and, as gathierry's configuration has them, of CaiT-M48 at 448 and DeiT-B at 384 pixels.
MODELS: dict[str, tuple[Callable[[int], LiveCase], int]] = {
    "fastflow-resnet18": (lambda n: fastflow(n, 1.0, 8, (64, 64, 64), (128, 32, 32), (256, 16, 16)), 16),
    "fastflow-wide": (lambda n: fastflow(n, 1.0, 8, (256, 64, 64), (512, 32, 32), (1024, 16, 16)), 1),
    "fastflow-cait": (lambda n: fastflow(n, 0.16, 20, (768, 28, 28)), 2),
    "fastflow-deit": (lambda n: fastflow(n, 0.16, 20, (768, 24, 24)), 2),
    "uflow": (uflow, 8),
    "msflow": (msflow, 1),
    "glow-tts": (glow_tts, 16),
    "jet": (jet, 8),
    "chaiyujin": (chaiyujin, 4),
    "csflow": (csflow, 2),
    "cflow": (cflow, 64),
    "hiding": (lambda n: hiding(n, back=True), 2),
    "hiding-there": (lambda n: hiding(n, back=False), 2),
    "antsx-32": (lambda n: antsx(n, 32), 1),
    "antsx-64": (lambda n: antsx(n, 64), 1),
}


def build(name: str, batch: int | None = None) -> LiveCase:
    """The case with its own batch or this one, initialised on its features; every parameter is away from zero.

    Raises:
        ImportError: its project is not installed.
    """
    make, own_batch = MODELS[name]
    torch.manual_seed(0)
    case = make(batch or own_batch)
    case.model.train()
    with torch.no_grad():
        case.call(case.model, *case.features)  # actnorms see data
        for parameter in case.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn_like(parameter))
    return case
