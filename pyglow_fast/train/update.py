"""One update of the weights, from pixels to the average: all on the device, in a CUDA graph where that can hold it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pyglow_fast.likelihood import bits_per_dim
from pyglow_fast.models import Glow
from pyglow_fast.models.class_head import class_bits
from pyglow_fast.models.replays import Replays
from pyglow_fast.train.config import TrainConfig
from pyglow_fast.train.evaluation import device_of, labels_for
from pyglow_fast.train.optim import FUSED, Average
from pyglow_fast.train.ranks import Ranks
from pyglow_fast.train.seeds import noisy

# Of one backward: pixels uint8 (n, C, H, W), keys of their noise int64 (n,), labels int64 (n,).
Part = tuple[Tensor, Tensor, Tensor | None]


class Losses(nn.Module):
    """The losses that a step minimises, means over the batch: bits/dim, -log p(x) / (D ln 2) + log2(n_bins).

    A model with a classifier has a second, from the same pass: what the labels cost, -log2 p(label | top latent).
    """

    def __init__(self, model: Glow, n_bins: int) -> None:
        super().__init__()
        self.model, self.n_bins = model, n_bins

    def forward(self, x: Tensor, labels: Tensor | None) -> Tensor:
        """x (N, C, H, W), labels (N,) or None -> (1,), or (2,) with a classifier."""
        y, costs = labels_for(self.model, labels), []
        if self.model.head is None or labels is None:
            log_prob = self.model.log_prob(x, y)
        else:
            log_prob, logits = self.model.log_prob_and_logits(x, y)
            costs.append(class_bits(logits, labels).mean())
        return torch.stack([bits_per_dim(log_prob, self.model.config.n_values, self.n_bins).mean(), *costs])


class Update:
    """Noise, losses, backward of all parts, their sum over the ranks, clipping, optimizer and average.

    Whether a loss or the gradient is not finite, so that the update is left out, is decided on the device, and the host
    reads nothing before all of this is under way: but Adamax asks it, and eager reversible steps judge their drift.
    ``replays.how`` says whether it was a CUDA graph, or why not.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: Glow,
        optimizer: torch.optim.Optimizer,
        average: Average | None,
        n_bins: int,
        ranks: Ranks,
    ) -> None:
        self.model, self.optimizer, self.average, self.n_bins, self.ranks = model, optimizer, average, n_bins, ranks
        self._clip_norm, self._class_weight = config.clip_norm or math.inf, config.class_weight
        self._fused = config.optimizer in FUSED
        self._losses = Losses(model, n_bins)
        if config.compile:
            self._losses.compile()
        against = {"graph is off": config.graph == "off", "torch.compile": config.compile}
        against[f"{config.optimizer} decides nothing on the device"] = not self._fused
        first = next((why for why, is_so in against.items() if is_so), "")

        def whole(*inputs: Tensor | None) -> Tensor:
            return self._apply(self._backward(*inputs))

        functions = [whole] if ranks.world == 1 else [self._backward, ranks.add, self._apply]
        self.replays = Replays(model, first, *functions)

    def __call__(
        self, parts: Sequence[Part], lr: float, meanwhile: Callable[[], object]
    ) -> tuple[list[float], float, bool]:
        """Update the weights; returns the losses, the norm of the gradients before clipping, and whether it did so.

        What the host does ``meanwhile``, a GPU that has all of the update does not wait for.

        An update that a graph has left out, since states drifted, is made by the model itself, which redoes them.
        """
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        device = device_of(self.model)
        inputs = [None if value is None else value.to(device, non_blocking=True) for part in parts for value in part]
        row = self.replays(*inputs)
        meanwhile()
        found: list[float] = row.tolist()  # one read: on a GPU it waits
        if found[-3] > 0:
            self.model.memory_report()  # takes the verdicts in: anchors move closer together
            self.replays.forget()
            found = self.replays(*inputs).tolist()
        *losses, _, norm, taken = found
        return losses, norm, bool(taken)

    def _backward(self, *inputs: Tensor | None) -> Tensor:
        """Leave gradients in ``.grad``; return losses and whether states drifted, of ranks behind all gradients."""
        self.optimizer.zero_grad(set_to_none=True)
        before, count, losses = self.replays.zeroed(), len(inputs) // 3, list[Tensor]()
        for pixels, keys, labels in zip(inputs[::3], inputs[1::3], inputs[2::3], strict=True):
            assert pixels is not None
            assert keys is not None
            values: Tensor = self._losses(noisy(pixels, keys, self.n_bins), labels) / count
            with self.replays.leaving_out():  # as _apply does
                (values[0] + self._class_weight * values[1:].sum()).backward()
            losses.append(values.detach())
        row = torch.stack(losses).sum(0)
        lost = (self.replays.zeroed() > before).to(row.dtype).reshape(1)
        summed = self._trained() if self.ranks.world > 1 else []
        return torch.cat([*(parameter.grad.flatten() for parameter in summed if parameter.grad is not None), row, lost])

    @torch.no_grad()
    def _apply(self, found: Tensor) -> Tensor:
        """Update by what _backward has returned, of all ranks the sum; return losses, drifted, norm, updated."""
        trained = self._trained()
        if self.ranks.world > 1:
            found.div_(self.ranks.world)
            sizes = [parameter.numel() for parameter in trained]
            *gradients, found = found.split([*sizes, len(found) - sum(sizes)])
            for parameter, gradient in zip(trained, gradients, strict=True):
                parameter.grad = gradient.view_as(parameter)
        norm = nn.utils.clip_grad_norm_(trained, self._clip_norm)
        loss, lost = found[0] + self._class_weight * found[1:-1].sum(), found[-1] > 0
        taken = loss.isfinite() & norm.isfinite() & ~lost
        if self._fused:
            self.optimizer.found_inf = (~taken).float()  # type: ignore[attr-defined]  # as GradScaler sets it
            self.optimizer.step()
        elif taken:
            self.optimizer.step()
        if self.average is not None:
            self.average.update(self.model, taken)
        return torch.cat([found, torch.stack([norm, taken.to(norm.dtype)])])

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.grad is not None]
