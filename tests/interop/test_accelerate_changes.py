"""An accelerated model whose user goes on with it: hooks, other nets, modes, inputs, a second call, copies."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import nflows.transforms
import normflows
import pytest
import torch
from support.accelerate_cases import (
    HIDDEN,
    ContextNet,
    freia_loss,
    from_freia,
    from_nflows,
    from_normflows,
    images,
    mask,
    nflows_loss,
    noisy,
    normflows_loss,
    prepared,
    subnet,
)
from support.covering import pairs
from torch import Tensor, nn

from pyglow_fast.interop import accelerate

NAMES = ("normflows", "nflows", "FrEIA")
Loss = Callable[[Any, Tensor], Tensor]


def assert_same_gradients(model: nn.Module, theirs: nn.Module, loss_of: Loss, x: Tensor) -> None:
    for item in (model, theirs):
        item.zero_grad()
        loss_of(item, x).backward()
    for (key, own), (_, wanted) in zip(model.named_parameters(), theirs.named_parameters(), strict=True):
        assert (own.grad is None) == (wanted.grad is None), key
        if own.grad is not None:
            torch.testing.assert_close(
                own.grad, wanted.grad, rtol=1e-8, atol=1e-9, msg=lambda text, key=key: f"{key}: {text}"
            )


def joined_lists(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if type(module).__name__ == "JoinedList"]


class TestWhatChangesLater:
    @pytest.mark.parametrize("name", NAMES)
    def test_hooks_are_called(self, name: str) -> None:
        """On layers and on convolutions within their nets."""
        model, loss_of, _ = prepared(name)
        theirs = copy.deepcopy(model)
        accelerate(model, "reversible")
        counts = []
        for item in (model, theirs):
            calls: list[str] = []
            for key, module in item.named_modules():
                module.register_forward_hook(lambda *args, key=key, calls=calls: calls.append(key))
            loss_of(item, images())
            counts.append([key for key in calls if not key.endswith("normal")])
        convolutions = [[key for key in found if "conv" in key or "net" in key] for found in counts]
        assert convolutions[0] == convolutions[1] != []

    @pytest.mark.parametrize("name", NAMES)
    def test_hooks_on_all_modules_are_called(self, name: str) -> None:
        """As layer by layer: they see nflows' transforms and FrEIA's blocks, and all convolutions."""
        model, loss_of, _ = prepared(name)
        alone = copy.deepcopy(model)
        accelerate(model, "reversible")
        accelerate(alone)
        counts = []
        for item in (model, alone):
            calls: list[str] = []
            handle = nn.modules.module.register_module_forward_hook(
                lambda module, *args, calls=calls: calls.append(type(module).__name__)
            )
            try:
                loss_of(item, images())
            finally:
                handle.remove()
            counts.append(Counter(calls))
        assert counts[0] == counts[1]
        assert counts[0]["Conv2d"] == 3 * {"normflows": 6}.get(name, 3)

    @pytest.mark.parametrize("memory", [None, "store"])
    @pytest.mark.parametrize("name", NAMES)
    def test_a_forward_put_on_a_convolution(self, name: str, memory: str | None) -> None:
        model, loss_of, _ = prepared(name)
        theirs = copy.deepcopy(model)
        accelerate(model, memory)
        for item in (model, theirs):
            for module in item.modules():
                if type(module) is nn.Conv2d:
                    module.forward = lambda x, own=module: 1.5 * nn.Conv2d.forward(own, x)  # type: ignore[method-assign]
        torch.testing.assert_close(loss_of(model, images()), loss_of(theirs, images()), rtol=1e-12, atol=0)

    @pytest.mark.parametrize("memory", ["store", "reversible"])
    @pytest.mark.parametrize("name", NAMES)
    def test_another_net(self, name: str, memory: str) -> None:
        model, loss_of, _ = prepared(name)
        theirs = copy.deepcopy(model)
        accelerate(model, memory)
        attribute, net = {
            "normflows": ("param_map", lambda: subnet(12, 24)),
            "nflows": ("transform_net", lambda: ContextNet(6, 12)),
            "FrEIA": ("subnet", lambda: subnet(6, 12)),
        }[name]
        for item in (model, theirs):
            owner = [module for module in item.modules() if hasattr(module, attribute)][1]
            torch.manual_seed(7)
            setattr(owner, attribute, net().double())
        assert_same_gradients(model, theirs, loss_of, images())

    def test_a_net_that_does_more_in_training(self) -> None:
        """Joined in evaluation, where it is three convolutions and no more."""

        class InTraining(ContextNet):
            def forward(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
                first, second, third = self.convs
                hidden = torch.relu(first(inputs))
                return third(torch.relu(second(2.0 * hidden if self.training else hidden)))

        torch.manual_seed(0)
        t = nflows.transforms
        steps = [(t.OneByOneConvolution(4), t.AffineCouplingTransform(mask(4, "halves"), InTraining)) for _ in range(3)]
        model = noisy(t.CompositeTransform([layer for step in steps for layer in step])).eval()
        theirs, x = copy.deepcopy(model), torch.randn(2, 4, 6, 6, dtype=torch.float64)
        assert accelerate(model, "reversible").joined
        for mode in (False, True):
            model.train(mode)
            theirs.train(mode)
            torch.testing.assert_close(model(x), theirs(x), rtol=1e-12, atol=1e-12)

    def test_a_convolution_of_a_user_s_net_is_replaced(self) -> None:
        model, loss_of, _ = prepared("nflows")
        theirs = copy.deepcopy(model)
        accelerate(model, "reversible")
        for item in (model, theirs):
            torch.manual_seed(1)
            for module in item.modules():
                if isinstance(module, ContextNet):
                    module.convs[1] = nn.Conv2d(HIDDEN, HIDDEN, 1).double()
        assert_same_gradients(model, theirs, loss_of, images())

    @pytest.mark.parametrize("name", NAMES)
    def test_lists_are_not_changed(self, name: str) -> None:
        """Their length is that of what they show: an append would overwrite a step."""
        model, _, _ = prepared(name)
        shown = repr(model)
        done = accelerate(model, "store")
        keys = list(model.state_dict())
        for change in (
            lambda steps: steps.append(nn.Identity()),
            lambda steps: steps.insert(0, nn.Identity()),
            lambda steps: steps.extend([nn.Identity()]),
            lambda steps: steps.pop(0),
            lambda steps: steps.__setitem__(0, nn.Identity()),
            lambda steps: steps.__delitem__(0),
        ):
            with pytest.raises(RuntimeError, match="undo the acceleration before"):
                change(joined_lists(model)[0])
        assert list(model.state_dict()) == keys
        assert repr(model).replace("JoinedList", "ModuleList") == shown
        changed = joined_lists(model)[0]
        done.undo()
        changed.append(nn.Identity())
        assert list(changed._modules)[-1] == str(len(changed) - 1)


@pairs(
    pytest.mark.parametrize("layer", ["BatchNorm", "spectral norm", "old spectral norm", "InstanceNorm"]),
    pytest.mark.parametrize("memory", ["checkpoint", "reversible"]),
    pytest.mark.parametrize("name", NAMES),
)
def test_nets_that_change_when_they_run_are_left(name: str, memory: str, layer: str) -> None:
    def net(c_in: int, c_out: int) -> nn.Module:
        first = nn.Conv2d(c_in, HIDDEN, 3, padding=1)
        if layer.endswith("spectral norm"):
            old = layer.startswith("old")  # a hook on the module, not a parametrization
            norm_of = nn.utils.spectral_norm if old else nn.utils.parametrizations.spectral_norm
            return nn.Sequential(norm_of(first), nn.ReLU(), nn.Conv2d(HIDDEN, c_out, 1))
        norm = nn.BatchNorm2d(HIDDEN) if layer == "BatchNorm" else nn.InstanceNorm2d(HIDDEN, track_running_stats=True)
        return nn.Sequential(first, norm, nn.ReLU(), nn.Conv2d(HIDDEN, c_out, 1))

    class WithContext(nn.Module):
        def __init__(self, c_in: int, c_out: int) -> None:
            super().__init__()
            self.net = net(c_in, c_out)

        def forward(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
            out: Tensor = self.net(inputs)
            return out

    torch.manual_seed(0)
    model, loss_of = {
        "normflows": (lambda: from_normflows(levels=1), normflows_loss),
        "nflows": (from_nflows, nflows_loss),
        "FrEIA": (from_freia, freia_loss),
    }[name]
    model = model()
    for module in model.modules():
        for attribute, made in (("param_map", net), ("transform_net", WithContext), ("subnet", net)):
            if hasattr(module, attribute):
                setattr(module, attribute, made(6, 12))
    model = noisy(model)
    theirs = copy.deepcopy(model)
    done = accelerate(model, memory)
    assert done.joined == {}
    assert sum("not joined: a" in reason and "in its net" in reason for reason in done.left.values()) == 3
    assert_same_gradients(model, theirs, loss_of, images())
    for (key, own), (_, wanted) in zip(model.named_buffers(), theirs.named_buffers(), strict=True):
        torch.testing.assert_close(
            own, wanted, rtol=1e-9, atol=1e-9, check_dtype=False, msg=lambda text, key=key: f"{key}: {text}"
        )


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("memory", ["checkpoint", "reversible"])
@pytest.mark.parametrize("name", ["normflows", "FrEIA"])
def test_a_spectral_norm_put_on_a_joined_net(name: str, memory: str, old: bool) -> None:
    """The steps run one by one then, in training: a net that changes when it runs cannot be run again."""
    model, loss_of, _ = prepared(name)
    theirs = copy.deepcopy(model)
    assert accelerate(model, memory).joined
    norm_of = nn.utils.spectral_norm if old else nn.utils.parametrizations.spectral_norm
    for item in (model, theirs):
        torch.manual_seed(5)
        convolution = [module for module in item.modules() if type(module) is nn.Conv2d][1]
        norm_of(convolution)
    assert_same_gradients(model, theirs, loss_of, images())
    for (key, own), (_, wanted) in zip(model.named_buffers(), theirs.named_buffers(), strict=True):
        torch.testing.assert_close(own, wanted, rtol=1e-9, atol=1e-9, msg=lambda text, key=key: f"{key}: {text}")


class TestInputs:
    @pytest.mark.parametrize("memory", [None, "reversible"])
    @pytest.mark.parametrize("name", ["normflows", "nflows"])
    def test_of_a_dtype_that_is_promoted(self, name: str, memory: str | None) -> None:
        """A float64 model takes float32 images where the library's does."""
        model, loss_of, _ = prepared(name)
        theirs = copy.deepcopy(model)
        accelerate(model, memory)
        x = images(dtype=torch.float32)
        torch.testing.assert_close(loss_of(model, x), loss_of(theirs, x), rtol=1e-6, atol=0, check_dtype=False)

    @pytest.mark.parametrize("name", ["nflows", "FrEIA"])
    def test_within_torch_func(self, name: str) -> None:
        """As layer by layer (those of normflows refuse it)."""
        model, loss_of, _ = prepared(name)
        theirs = copy.deepcopy(model)
        accelerate(model, "reversible")
        found, wanted = (torch.func.grad(lambda x, item=item: loss_of(item, x))(images()) for item in (model, theirs))
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)

    def test_in_bfloat16_the_layers_are_called(self) -> None:
        model, loss_of, _ = prepared("FrEIA")
        model = model.bfloat16()
        theirs = copy.deepcopy(model)
        accelerate(model, "reversible")
        x = images().bfloat16()
        torch.testing.assert_close(loss_of(model, x), loss_of(theirs, x))


class TestCalledAgain:
    @pytest.mark.parametrize("name", NAMES)
    def test_another_memory_is_not_taken_in_silence(self, name: str) -> None:
        model, loss_of, _ = prepared(name)
        expected = loss_of(model, images())
        first = accelerate(model, "reversible")
        second = accelerate(model, "checkpoint")
        assert second.joined == second.replaced == {}
        assert sum("joined before, memory reversible" in reason for reason in second.left.values()) >= 3
        second.undo()  # of nothing
        torch.testing.assert_close(loss_of(model, images()), expected, rtol=1e-12, atol=0)
        first.undo()
        torch.testing.assert_close(loss_of(model, images()), expected, rtol=1e-12, atol=0)

    @pytest.mark.parametrize("name", NAMES)
    def test_undone_in_order(self, name: str) -> None:
        model, loss_of, _ = prepared(name)
        classes = {key: type(module) for key, module in model.named_modules()}
        first = accelerate(model)
        second = accelerate(model, "reversible")
        with pytest.raises(RuntimeError, match="joined by a later call of accelerate; undo that first"):
            first.undo()
        loss_of(model, images()).backward()
        second.undo()
        first.undo()
        assert {key: type(module) for key, module in model.named_modules()} == classes

    def test_layers_that_were_ours_stay_ours(self) -> None:
        model = nn.ModuleList([normflows.flows.GlowBlock(4, 4), normflows.flows.GlowBlock(4, 4)])
        accelerate(model[0])
        classes = [type(module) for module in model.modules()]
        accelerate(model, "reversible").undo()
        assert [type(module) for module in model.modules()] == classes

    def test_a_copy_is_undone_by_a_copy(self) -> None:
        model, loss_of, _ = prepared("normflows")
        classes = {key: type(module) for key, module in model.named_modules()}
        done = accelerate(model, "reversible")
        twin = copy.deepcopy(done)
        twin.undo()
        assert {key: type(module) for key, module in twin.model.named_modules()} == classes
        torch.testing.assert_close(loss_of(twin.model, images()), loss_of(model, images()), rtol=1e-12, atol=0)
        assert done.joined

    @pytest.mark.parametrize("budget", [0, -1, "lots", 1.5])
    def test_a_wrong_budget_changes_nothing(self, budget: Any) -> None:
        model, _, _ = prepared("normflows")
        classes = [type(module) for module in model.modules()]
        with pytest.raises(ValueError, match="memory_budget: expected"):
            accelerate(model, "reversible", budget)
        assert [type(module) for module in model.modules()] == classes


def test_replicas_of_a_data_parallel_have_their_own_layers() -> None:
    model, _, _ = prepared("normflows")
    accelerate(model, "reversible")
    joined = joined_lists(model)[0]
    replica = joined._replicate_for_data_parallel()
    assert type(replica) is nn.ModuleList
    assert len(replica) == 4
    assert repr(joined).startswith("JoinedList")
