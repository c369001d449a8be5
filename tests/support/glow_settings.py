"""Small Glows of every kind, away from their start, for the tests of the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import pyglow_fast as pgf
from support.gradients import perturbed
from support.plain_glow import plain_encode

CONFIGS: dict[str, dict[str, Any]] = {
    "default": {"image_shape": (3, 4, 8)},
    "one level": {"image_shape": (1, 4, 2), "n_levels": 1},
    "three levels": {"image_shape": (1, 8, 8), "n_levels": 3, "n_steps": 1},
    "one dimension": {"image_shape": (2, 8)},
    "three dimensions": {"image_shape": (1, 4, 4, 8), "n_steps": 1},
    "additive": {"image_shape": (1, 4, 4), "coupling": "additive"},
    "plain matrix": {"image_shape": (1, 4, 4), "permutation": "invconv_plain"},
    "shuffle": {"image_shape": (1, 4, 4), "permutation": "shuffle"},
    "reverse": {"image_shape": (1, 4, 4), "permutation": "reverse"},
    "net actnorm": {"image_shape": (1, 4, 4), "net_actnorm": True},
    "fixed priors": {"image_shape": (1, 4, 4), "learn_prior": False},
    "classes": {"image_shape": (1, 4, 4), "n_classes": 3},
    "classes, fixed priors": {"image_shape": (1, 4, 4), "n_classes": 3, "learn_prior": False},
    "vector": {"image_shape": (1, 4, 4), "cond_channels": 2},
    "map": {"image_shape": (1, 4, 8), "cond_channels": 2, "cond_map": True},
    "everything": {"image_shape": (1, 4, 8), "cond_channels": 1, "cond_map": True, "n_classes": 2, "net_actnorm": True},
    "exp": {"image_shape": (1, 4, 4), "scale_map": "exp"},
    "tanh": {"image_shape": (1, 4, 4), "scale_map": "tanh", "scale_clamp": 0.8},
    "atan": {"image_shape": (1, 4, 4), "scale_map": "atan"},
    "factor": {"image_shape": (1, 4, 4), "scale_bias": 0.0, "scale_factor": 2.0},
    "eps": {"image_shape": (1, 4, 4), "scale_bias": 0.5, "scale_eps": 0.2},
    "checkerboard": {"image_shape": (2, 4, 8), "n_levels": 1, "n_steps": 4, "n_checkerboard": 3},
    "checkerboard, one dimension": {"image_shape": (1, 8), "n_checkerboard": 1, "cond_channels": 1, "cond_map": True},
    "last checkerboard": {"image_shape": (1, 4, 4), "n_last_checkerboard": 2, "n_steps": 1, "n_classes": 3},
    "realnvp": {
        "image_shape": (1, 8, 8),
        "n_checkerboard": 1,
        "n_last_checkerboard": 2,
        "permutation": "reverse",
        "scale_map": "tanh",
        "net_actnorm": True,
        "learn_prior": False,
    },
}
# A bound of the condition number of the models below in their data: what a rounding error can grow by.
CONDITION = 1000.0
# How far the parameters of a model to sample from are moved: further, samples of the tails run away in the inverse.
CALM = 0.03


class Setting:
    """A small Glow in float64, away from its start, with a batch and what it is conditioned on."""

    def __init__(
        self, name: str, device: torch.device | str = "cpu", n: int = 4, spread: float = 0.1, **changed: Any
    ) -> None:
        fields = CONFIGS[name] | changed
        self.cond_map = fields.pop("cond_map", False)
        self.config = pgf.GlowConfig(**{"n_levels": 2, "n_steps": 2, "hidden": 5, **fields})
        self.device = torch.device(device)
        self.model = pgf.Glow(self.config).to(self.device, torch.float64)
        # Many samples: the scales that four of them would set can be extreme for the next four.
        x, _, cond = self.batch(64)
        self.model.initialize(x, cond)
        perturbed(self.model, spread)
        self.x, self.y, self.cond = self.batch(n)

    def batch(self, n: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        config, options = self.config, {"dtype": torch.float64, "device": self.device}
        y = None if config.n_classes is None else torch.arange(n, device=self.device) % config.n_classes
        sizes = config.image_shape[1:] if self.cond_map else ()
        cond = torch.randn(n, config.cond_channels, *sizes, **options) if config.cond_channels else None
        return torch.rand(n, *config.image_shape, **options) - 0.5, y, cond

    @property
    def state(self) -> dict[str, Tensor]:
        return dict(self.model.state_dict())

    def standardised(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """(z - mean) / sd of every latent of x, (N, D): standard normal for samples of the model."""
        latents, _ = plain_encode(self.state, self.config, x, self.y if y is None else y, self.cond)
        return torch.cat([((z - mean) / log_sd.exp()).flatten(1) for z, mean, log_sd in latents], dim=1)


class Loss(nn.Module):
    """The mean negative log-likelihood of a small Glow, as a module that DistributedDataParallel can wrap."""

    def __init__(self, memory: str, **fields: Any) -> None:
        super().__init__()
        torch.manual_seed(1)
        given = {"image_shape": (1, 8, 8), "n_levels": 2, "n_steps": 3, "hidden": 4, "net_actnorm": True, **fields}
        self.model = pgf.Glow(**given, memory=memory, anchor_every=2).double()

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Compute the loss of x and y, a tensor ()."""
        return -self.model.log_prob(x, y).mean()
