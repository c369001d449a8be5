"""What a reversible run works together with: nets and gradients of any sort, threads, hooks, autocast, compilation."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.utils.checkpoint
from support.chain_cases import (
    CASES,
    WHOLE,
    Case,
    Mode,
    assert_same_gradients,
    counted_runs,
    gradients,
    objective,
    perturbed,
    relative_error,
    worst_error,
)
from support.covering import pairs
from support.user_steps import mixed
from torch import Tensor, nn

import pyglow_fast as pgf

MODES = [
    Mode("checkpoint"),
    Mode("reversible", 2),
    Mode("reversible", None),
    Mode("checkpoint", budget=1),
    Mode("reversible", budget=1),
]
PLAIN = next(case for case in CASES if case.name == "depth-3")


class DropoutNet(nn.Module):
    """Random in training, by a submodule or hidden in its forward."""

    halo = 1

    def __init__(self, module: bool = True) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 4, 1)
        self.dropout = nn.Dropout(0.4) if module else None

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv(x)
        dropped = self.dropout(hidden) if self.dropout else nn.functional.dropout(hidden, 0.4, self.training)
        return self.last(dropped)


def with_nets(*nets: nn.Module, **options: object) -> pgf.ReversibleSequence:
    sequence = pgf.ReversibleSequence([pgf.FlowStep(4, net=net, **options) for net in nets]).double()
    sequence.initialize(torch.randn(32, 4, 6, 3, dtype=torch.float64))
    return perturbed(sequence)


@pairs(
    pytest.mark.parametrize("mode", MODES, ids=str),
    pytest.mark.parametrize("module", [True, False]),
    pytest.mark.parametrize("leave_training", [False, True]),
)
def test_dropout(mode: Mode, module: bool, leave_training: bool) -> None:
    """The masks of the forward, drawn again; whoever draws numbers meanwhile gets those that would have come."""
    sequence, (x, _) = with_nets(*(DropoutNet(module) for _ in range(5))), PLAIN.batch()

    def run(x: Tensor, cond: Tensor | None) -> Tensor:
        torch.manual_seed(7)
        sequence.train()
        value = objective(sequence(x))
        following.append(torch.rand(3))
        if leave_training:  # the masks are those of the forward, whatever the mode is when the backward comes
            sequence.eval()
        return value

    following: list[Tensor] = []
    mode.apply(sequence)
    got = gradients(sequence, x, None, run)
    after = torch.rand(3)
    if mode.budget == 1:  # masks are drawn sample by sample: ordinary autograd has other ones
        sequence.memory, sequence.memory_budget = "checkpoint", 1
        expected = gradients(sequence, x, None, run)
    else:
        sequence.memory = "store"
        expected = gradients(sequence, x, None, run)
    assert_same_gradients(got, expected)
    assert torch.equal(following[0], following[1])
    assert torch.equal(after, torch.rand(3)), "the backward moved the caller's random stream"
    assert sequence.training is not leave_training


def test_dropout_hidden_in_a_net_that_is_cut_into_strips() -> None:
    """Their halos draw other numbers than their neighbours: once that shows, the net is run on whole samples."""
    sequence, (x, _) = with_nets(DropoutNet(module=False)), PLAIN.batch(2)
    Mode("checkpoint", budget=1).apply(sequence)
    heights: list[int] = []
    sequence[0].coupling.net.register_forward_pre_hook(lambda _, inputs: heights.append(inputs[0].shape[2]))
    sequence(x)
    strips = [2, 3, 3, 3, 3, 2]
    assert heights == [*strips, *strips, 6, 6]


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_nets_of_ones_own_that_draw_nothing(mode: Mode) -> None:
    """They repeat, also in strips: it is the sum over all strips of a sample that tells."""
    sequence, (x, _) = with_nets(DropoutNet(), DropoutNet(module=False)).eval(), PLAIN.batch()
    Mode("store").apply(sequence)
    expected = gradients(sequence, x)
    mode.apply(sequence)
    assert_same_gradients(gradients(sequence, x), expected)


class HalvedNet(pgf.CouplingNet):
    def forward(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        return 0.5 * super().forward(x, cond)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_subclass_of_the_coupling_net(mode: Mode) -> None:
    """Its own forward is what is differentiated, not the closed form of the net that it derives from."""
    sequence, (x, _) = with_nets(HalvedNet(2, 4, 5), HalvedNet(2, 4, 5)), PLAIN.batch()
    Mode("store").apply(sequence)
    expected = gradients(sequence, x)
    mode.apply(sequence)
    assert_same_gradients(gradients(sequence, x), expected)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_frozen_parameters(mode: Mode) -> None:
    sequence, (x, _) = PLAIN.build(), PLAIN.batch()
    for i, parameter in enumerate(sequence.parameters()):
        parameter.requires_grad_(i % 3 == 0)
    Mode("store").apply(sequence)
    expected = gradients(sequence, x)
    mode.apply(sequence)
    assert_same_gradients(gradients(sequence, x), expected)
    sequence.zero_grad()
    objective(sequence(x)).backward()
    assert [parameter.grad is None for parameter in sequence.parameters()] == [
        not parameter.requires_grad for parameter in sequence.parameters()
    ]


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("wanted", ["x", "cond", "parameters", "nets", "maps"])
def test_one_kind_of_gradient_alone(mode: Mode, wanted: str) -> None:
    case = next(case for case in CASES if case.name == "cond")
    sequence, (x, cond) = case.build(), case.batch()
    assert cond is not None
    for name, parameter in sequence.named_parameters():
        of_net = ".coupling." in name
        parameter.requires_grad_(wanted == "parameters" or wanted == ("nets" if of_net else "maps"))
    x.requires_grad_(wanted == "x")
    cond.requires_grad_(wanted == "cond")
    leaves = [leaf for leaf in (x, cond, *sequence.parameters()) if leaf.requires_grad]

    def run() -> dict[str, Tensor]:
        return {str(i): g for i, g in enumerate(torch.autograd.grad(objective(sequence(x, cond)), leaves))}

    Mode("store").apply(sequence)
    expected = run()
    mode.apply(sequence)
    assert_same_gradients(run(), expected)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_gradients_accumulate(mode: Mode) -> None:
    sequence, batches = PLAIN.build(), [PLAIN.batch()[0] for _ in range(2)]
    Mode("store").apply(sequence)
    singles = [gradients(sequence, x) for x in batches]
    mode.apply(sequence)
    for x in batches:
        objective(sequence(x)).backward()
    for name, parameter in sequence.named_parameters():
        assert parameter.grad is not None
        assert relative_error(parameter.grad, singles[0][name] + singles[1][name]) < 1e-10


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_two_forwards_then_two_backwards_in_either_order(mode: Mode) -> None:
    sequence, batches = PLAIN.build(), [PLAIN.batch(n)[0] for n in (2, 3)]
    Mode("store").apply(sequence)
    expected = [gradients(sequence, x) for x in batches]
    mode.apply(sequence)
    for order in ((0, 1), (1, 0)):
        leaves = [x.detach().requires_grad_() for x in batches]
        values = [objective(sequence(leaf)) for leaf in leaves]
        named = dict(sequence.named_parameters())
        for i in order:
            found = torch.autograd.grad(values[i], [leaves[i], *named.values()])
            assert_same_gradients(dict(zip(["x", *named], found, strict=True)), expected[i])


def test_two_models_in_two_threads() -> None:
    sequences, batches = [PLAIN.build() for _ in range(2)], [PLAIN.batch()[0] for _ in range(2)]
    for sequence in sequences:
        sequence.memory = "store"
    expected = [gradients(sequence, x) for sequence, x in zip(sequences, batches, strict=True)]
    found: list[list[dict[str, Tensor]]] = [[], []]

    def work(i: int) -> None:
        sequences[i].memory = "reversible"
        found[i].extend(gradients(sequences[i], batches[i]) for _ in range(8))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got, exact in zip(found, expected, strict=True):
        assert len(got) == 8
        for gradient in got:
            assert_same_gradients(gradient, exact)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("used", ["z", "log_det", "half"])
def test_unused_outputs(mode: Mode, used: str) -> None:
    sequence, (x, _) = PLAIN.build(), PLAIN.batch()

    def run(x: Tensor, cond: Tensor | None) -> Tensor:
        z, log_det = sequence(x)
        return {"z": z, "log_det": log_det, "half": z[:, 2:]}[used].square().sum()

    Mode("store").apply(sequence)
    expected = gradients(sequence, x, None, run)
    mode.apply(sequence)
    got = gradients(sequence, x, None, run)
    assert_same_gradients(got, {name: expected.get(name, torch.zeros_like(grad)) for name, grad in got.items()})
    assert expected.keys() <= got.keys()


def test_one_latent_of_a_glow() -> None:
    model = pgf.Glow(image_shape=(1, 8, 8), n_levels=3, n_steps=2, hidden=4).double()
    x = torch.rand(8, 1, 8, 8, dtype=torch.float64) - 0.5
    model.initialize(x)
    perturbed(model, 0.03)
    for i in range(3):

        def run(x: Tensor, cond: Tensor | None, i: int = i) -> Tensor:
            return model(x)[0][i].square().sum()

        model.memory = "store"
        expected = gradients(model, x, None, run)
        model.memory = "reversible"
        assert_same_gradients({k: v for k, v in gradients(model, x, None, run).items() if k in expected}, expected)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_shared_nets(mode: Mode) -> None:
    net = pgf.CouplingNet(2, 4, 5)
    sequence, (x, _) = with_nets(net, pgf.CouplingNet(2, 4, 5), net), PLAIN.batch()
    Mode("store").apply(sequence)
    expected = gradients(sequence, x)
    mode.apply(sequence)
    assert_same_gradients(gradients(sequence, x), expected)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_tied_and_computed_weights_within_a_net(mode: Mode) -> None:
    first = nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 4, 1))
    second = nn.Conv2d(4, 4, 1)
    net = nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), nn.Conv2d(4, 4, 1))
    net[4].weight = second.weight
    sequence, (x, _) = with_nets(net), PLAIN.batch()
    Mode("store").apply(sequence)
    expected = gradients(sequence, x)
    mode.apply(sequence)
    assert_same_gradients(gradients(sequence, x), expected)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_functional_call(mode: Mode) -> None:
    """Deep enough for states to be recomputed through nets of an earlier step, whose weights are the module's again."""
    case = next(case for case in CASES if case.name == "depth-8")
    sequence, (x, _) = case.build(), case.batch()
    others = {name: (value + 0.1).detach().requires_grad_() for name, value in sequence.named_parameters()}

    def run() -> dict[str, Tensor]:
        value = objective(torch.func.functional_call(sequence, others, (x,)))
        return dict(zip(others, torch.autograd.grad(value, list(others.values())), strict=True))

    Mode("store").apply(sequence)
    expected = run()
    mode.apply(sequence)
    assert_same_gradients(run(), expected)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_hooks_run_once(mode: Mode) -> None:
    sequence, (x, _) = PLAIN.build(), PLAIN.batch()
    mode.apply(sequence)
    seen: list[str] = []
    accumulated: list[str] = []
    for name, parameter in sequence.named_parameters():
        parameter.register_hook(lambda grad, name=name: seen.append(name))
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: accumulated.append(name))
    objective(sequence(x)).backward()
    assert sorted(seen) == sorted(accumulated) == sorted(name for name, _ in sequence.named_parameters())


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_without_gradients_nothing_is_kept(mode: Mode) -> None:
    sequence, (x, _) = PLAIN.build(), PLAIN.batch()
    mode.apply(sequence)
    with torch.no_grad():
        z, log_det = sequence(x)
    assert not z.requires_grad
    for parameter in sequence.parameters():
        parameter.requires_grad_(False)
    assert sequence(x)[0].grad_fn is None
    with torch.inference_mode():
        assert torch.allclose(sequence(x)[0], z)
        assert torch.allclose(sequence(x)[1], log_det)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("fused", [True, False], ids=["steps", "modules"])
def test_the_gradient_of_a_sum(fused: bool, mode: Mode) -> None:
    """It comes in as one number, expanded: no memory layout at all."""
    sequence, (x, _) = PLAIN.build() if fused else mixed(), PLAIN.batch()

    def run(x: Tensor, cond: Tensor | None) -> Tensor:
        z, log_det = sequence(x)
        return z.sum() + log_det.sum()

    Mode("store").apply(sequence)
    expected = gradients(sequence, x, None, run)
    mode.apply(sequence)
    assert_same_gradients(gradients(sequence, x, None, run), expected)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("fused", [True, False], ids=["steps", "modules"])
def test_what_is_saved_may_be_moved_elsewhere(fused: bool, mode: Mode) -> None:
    """By hooks on saved tensors, as save_on_cpu; and the run may lie inside torch.utils.checkpoint."""
    sequence, (x, _) = PLAIN.build() if fused else mixed(), PLAIN.batch()
    Mode("store").apply(sequence)
    expected = gradients(sequence, x)
    mode.apply(sequence)

    def moved(x: Tensor, cond: Tensor | None) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda value: value.detach().clone(), lambda value: value):
            return objective(sequence(x))

    def checkpointed(x: Tensor, cond: Tensor | None) -> Tensor:
        return objective(torch.utils.checkpoint.checkpoint(sequence, x, use_reentrant=False))

    assert_same_gradients(gradients(sequence, x, None, checkpointed), expected)
    assert_same_gradients(gradients(sequence, x, None, moved), expected)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_second_backward_of_a_retained_graph(mode: Mode) -> None:
    sequence, (x, _) = PLAIN.build(), PLAIN.batch()
    mode.apply(sequence)
    x.requires_grad_()
    value = objective(sequence(x))
    leaves = [x, *sequence.parameters()]
    first = torch.autograd.grad(value, leaves, retain_graph=True)
    for one, other in zip(first, torch.autograd.grad(value, leaves), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(value, leaves)


class TestAutocast:
    """Nets in bfloat16, the state in float32."""

    @pytest.mark.parametrize("backward_inside", [False, True])
    @pytest.mark.parametrize("mode", [Mode("checkpoint"), Mode("reversible", 1), Mode("reversible", 4)], ids=str)
    def test_gradients_are_as_near_as_bfloat16_is(self, mode: Mode, backward_inside: bool) -> None:
        case = Case("", 8, (4, 8, 8), options={"hidden": 16})
        sequence, (x, _) = case.build(), case.batch(8)
        Mode("store").apply(sequence)
        exact = gradients(sequence, x)
        sequence.float()
        single = x.float()

        def run(x: Tensor, cond: Tensor | None) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                z, log_det = sequence(x)
            assert z.dtype == log_det.dtype == torch.float32
            return objective((z, log_det))

        def found() -> dict[str, Tensor]:
            with torch.autocast("cpu", torch.bfloat16, enabled=backward_inside):
                return gradients(sequence, single, None, run)

        stored = found()
        cost = worst_error(stored, exact)
        mode.apply(sequence)
        got = found()
        assert all(grad.dtype == torch.float32 for grad in got.values())
        assert 1e-3 < cost < 0.5
        assert worst_error(got, stored) <= 2.0 * cost

    def test_an_exact_state_is_not_taken_for_a_drifted_one(self) -> None:
        """What judges the state must not be rounded to bfloat16: nets without any rounding show no drift."""
        sequence = pgf.ReversibleSequence([pgf.FlowStep(4, net=Constant()) for _ in range(6)], anchor_every=None).eval()
        x = torch.randn(4, 4, 8, 8, requires_grad=True)
        for inside in (False, True):
            with torch.autocast("cpu", torch.bfloat16):
                value = objective(sequence(x))
            with torch.autocast("cpu", torch.bfloat16, enabled=inside):
                value.backward()
            report = sequence.memory_report()
            assert report["trips"] == 0, report


class Constant(nn.Module):
    """The same shift and scale everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.value.reshape(1, 4, 1, 1).expand(x.shape[0], 4, *x.shape[2:])


@pytest.mark.parametrize("fused", [True, False], ids=["steps", "modules"])
def test_code_around_it_compiles(fused: bool) -> None:
    """The run itself is called, not traced, and keeps what its memory mode says."""
    sequence, (x, _) = PLAIN.build() if fused else mixed(), PLAIN.batch()
    Mode("store").apply(sequence)
    expected = gradients(sequence, x)
    Mode("reversible", 2, WHOLE).apply(sequence)

    @torch.compile(backend="aot_eager")
    def run(x: Tensor) -> Tensor:
        z, log_det = sequence(2.0 * x / 2.0)
        return objective((z * 1.0, log_det))

    with counted_runs(sequence) as runs:
        got = gradients(sequence, x, None, lambda x, _: run(x))
    assert_same_gradients(got, expected)
    per_net = 2 if fused else 3  # a module that is not known is inverted and differentiated in two runs
    assert len(runs) == per_net * sum(isinstance(module, pgf.Coupling) for module in sequence.modules())
    assert sequence.memory_report()["passes"] == 1
