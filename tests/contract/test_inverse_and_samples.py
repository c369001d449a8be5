"""What a trained model is used for: exact likelihoods, latents and back, samples, and copies of it that agree.

Where a test below fails, a user's scores, reconstructions or samples are wrong though training went well, or a saved,
frozen or distributed model is not the one that was trained.
"""

from __future__ import annotations

import copy
import math
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from support.bijections import OwnNet
from support.commands import run_ranks
from support.covering import pairs
from support.glow_settings import CALM, CONDITION, CONFIGS, Loss, Setting
from support.gradients import assert_same_gradients, gradients, objective, perturbed
from support.helpers import assert_close, assert_equal, assert_kernel_close, jacobian
from support.plain_glow import plain_encode, plain_log_prob
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import pyglow_fast as pgf
from pyglow_fast import functional


@pytest.mark.parametrize("name", CONFIGS)
def test_log_prob_latents_and_back(name: str) -> None:
    """log_prob is the definition written out in plain torch, encode and decode undo each other, to rounding."""
    setting = Setting(name)
    model, x, y, cond = setting.model, setting.x, setting.y, setting.cond
    expected = plain_log_prob(setting.state, setting.config, x, y, cond)
    n_values = setting.config.n_values
    assert_close(model.log_prob(x, y, cond) / n_values, expected / n_values, condition=CONDITION)
    latents, log_det = model(x, cond)
    of_plain, plain_log_det = plain_encode(setting.state, setting.config, x, y, cond)
    assert_close(latents, [plain for plain, _, _ in of_plain], condition=CONDITION)
    assert_close(log_det / n_values, plain_log_det / n_values, condition=CONDITION)
    assert_close(model.decode(model.encode(x, cond), cond), x, condition=CONDITION)
    noise, _ = model.to_noise(x, y, cond)
    assert_close(model.from_noise(noise, y, cond)[0], x, condition=CONDITION)


@pairs(
    pytest.mark.parametrize("depth", [8, 32]),
    pytest.mark.parametrize("coupling", ["affine", "additive"]),
    pytest.mark.parametrize("permutation", ["invconv", "shuffle"]),
    pytest.mark.parametrize("mask", ["channels", "checkerboard"]),
)
def test_deep_flows_are_inverted(depth: int, coupling: str, permutation: str, mask: str) -> None:
    """inverse(forward(x)) == x in float64; in float32 it is off by at most twice what its steps lose one by one."""
    options = {"coupling": coupling, "permutation": permutation, "mask": mask}
    sequence = pgf.ReversibleSequence([pgf.FlowStep(4, 8, **options) for _ in range(depth)]).double()
    sequence.initialize(torch.randn(64, 4, 6, 6, dtype=torch.float64))
    perturbed(sequence, 0.02).eval()
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    z, log_det = sequence(x)
    condition = float(torch.linalg.cond(jacobian(lambda x: sequence(x)[0], x)).max())
    back, back_log_det = sequence.inverse(z)
    assert_close(back, x, condition * max(1.0, float(z.detach().abs().max())))
    assert_close(back_log_det / 144, -log_det / 144, condition * 144)

    sequence.float()
    z32 = sequence(x.float())[0]
    one_by_one = z32
    for step in reversed(list(sequence)):
        one_by_one = step.inverse(one_by_one)[0]
    assert_kernel_close(sequence.inverse(z32)[0], one_by_one, x, magnitude=float(z.detach().abs().max()))


@pytest.mark.parametrize("name", ["default", "everything", "classes"])
def test_samples(name: str) -> None:
    """They follow the priors at the temperature and the class asked for, repeat with their generator, and at 0 are the
    mode; the global stream of random numbers is used only without a generator.
    """
    n = 1000
    setting = Setting(name, n=n, spread=CALM)
    model, y, cond = setting.model, setting.y, setting.cond
    noise = setting.standardised(model.sample(n, 0.7, y, cond)) / 0.7
    # Six standard errors of the mean and of the mean square of n standard normals, in every dimension.
    assert float(noise.mean(0).abs().max()) < 6.0 / math.sqrt(n)
    assert float((noise.square().mean(0) - 1.0).abs().max()) < 6.0 * math.sqrt(2.0 / n)
    correlation = noise.T @ noise / n - torch.diag(noise.square().mean(0))
    assert float(correlation.abs().max()) < 6.0 / math.sqrt(n)

    mode = setting.standardised(model.sample(n, 0.0, y, cond))
    assert_close(mode, torch.zeros_like(mode), condition=CONDITION)
    mixed = torch.where(torch.arange(n) % 2 == 0, 0.0, 0.5)
    before = torch.get_rng_state()
    seeded = [model.sample(n, t, y, cond, torch.Generator().manual_seed(1)) for t in (mixed, mixed, 0.5)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(seeded[0], seeded[1])
    assert_close(seeded[0][1::2], seeded[2][1::2], condition=CONDITION)
    assert not torch.equal(model.sample(n, 0.5, y, cond), model.sample(n, 0.5, y, cond))
    # The noise of the deepest level is drawn first, so what a seed gives is known outside of the model.
    generator = torch.Generator().manual_seed(1)
    shapes = reversed(model.latent_shapes)
    drawn = [0.5 * torch.randn(n, *shape, generator=generator, dtype=torch.float64) for shape in shapes]
    assert_close(model.from_noise(drawn[::-1], y, cond)[0], seeded[2], condition=CONDITION)


@pytest.mark.parametrize("memory", ["store", "checkpoint", "reversible"])
@pytest.mark.parametrize("name", ["default", "everything", "checkerboard"])
def test_samples_that_are_differentiated(name: str, memory: str) -> None:
    """They are the numbers that are drawn without a gradient, and have that of from_noise: at 0.7, of 0.7 eps."""
    setting = Setting(name, spread=CALM)
    model, y, cond = setting.model, setting.y, setting.cond
    model.memory = memory

    def drawn(differentiable: bool, cond: Tensor | None) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return model.sample(4, 0.7, y, cond, generator, differentiable)

    def run(x: Tensor, cond: Tensor | None) -> Tensor:
        found = drawn(True, cond)
        return objective((found, found.flatten(1).sum(1)))

    def expected_run(x: Tensor, cond: Tensor | None) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        shapes = reversed(model.latent_shapes)
        noise = [0.7 * torch.randn(4, *shape, generator=generator, dtype=torch.float64) for shape in shapes]
        found, _ = model.from_noise(noise[::-1], y, cond)
        return objective((found, found.flatten(1).sum(1)))

    plain = drawn(False, cond)
    assert not plain.requires_grad
    assert_close(drawn(True, cond), plain, condition=CONDITION)
    got = gradients(model, setting.x, cond, run)
    model.memory = "store"
    expected = gradients(model, setting.x, cond, expected_run)
    assert any("prior" in name for name in expected)
    assert_same_gradients(got, expected)


def test_sampling_changes_nothing() -> None:
    """A fresh model in training samples too, and still waits for its first batch; samples carry no graph."""
    model = pgf.Glow(image_shape=(3, 4, 4), n_levels=2, n_steps=1, hidden=4, net_actnorm=True)
    before = {key: value.clone() for key, value in model.state_dict().items() if isinstance(value, Tensor)}
    x = model.train().sample(5)
    assert x.shape == (5, 3, 4, 4)
    assert x.dtype == torch.float32
    assert x.isfinite().all()
    assert not x.requires_grad
    assert not model.is_initialized
    assert_equal({key: model.state_dict()[key] for key in before}, before)
    assert model.double().sample(1).dtype == torch.float64


def test_labels_are_drawn_if_none_are_given() -> None:
    """Samples of a model with classes are of all of them, as often."""
    setting = Setting("classes", spread=CALM)
    with torch.no_grad():
        setting.model.prior.class_offset[:, 0] = torch.tensor([-50.0, 0.0, 50.0])
    top = setting.model.encode(setting.model.sample(300, 0.0))[-1][:, 0].mean((1, 2)).round(decimals=-1)
    drawn = [int((top == value).sum()) for value in (-50.0, 0.0, 50.0)]
    assert sum(drawn) == 300
    assert min(drawn) > 50  # 100 +- 8 each


@pytest.mark.parametrize("name", ["default", "everything", "last checkerboard"])
def test_frozen_models_are_the_same(name: str) -> None:
    """freeze() for deployment gives the model's numbers, and leaves the model as it was."""
    setting = Setting(name, spread=CALM)
    model, x, y, cond = setting.model.eval(), setting.x, setting.y, setting.cond
    state = {key: value.clone() for key, value in setting.state.items() if isinstance(value, Tensor)}

    def numbers(of: pgf.Glow) -> list[Tensor]:
        with torch.no_grad():
            latents = of.encode(x, cond)
            drawn = of.sample(4, 0.7, y, cond, torch.Generator().manual_seed(1))
            return [of.log_prob(x, y, cond), *latents, of.decode(latents, cond), drawn]

    expected = [value.clone() for value in numbers(model)]
    frozen = model.freeze()
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert_close(numbers(frozen), expected, condition=CONDITION)
    assert_equal({key: model.state_dict()[key] for key in state}, state)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    assert_close(numbers(frozen), expected, condition=CONDITION)


def test_every_write_to_a_parameter_is_seen_by_the_next_call() -> None:
    """An optimizer's step, a write through ``.data``, another tensor in its place: no call is by old weights."""
    setting = Setting("everything", spread=CALM)
    model, x, y, cond = setting.model, setting.x, setting.y, setting.cond
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)

    def step() -> None:
        optimizer.zero_grad()
        (-model.log_prob(x, y, cond)).mean().backward()
        optimizer.step()

    def through_data() -> None:
        for parameter in model.parameters():
            parameter.data.mul_(0.99)

    def swapped() -> None:
        for module in model.modules():
            for key, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, key, nn.Parameter(1.01 * parameter.detach()))

    for training in (True, False):
        model.train(training)
        for write in (step, through_data, swapped):
            with torch.no_grad():
                model.log_prob(x, y, cond)
                model.sample(4, 0.5, y, cond)
            write()
            with torch.no_grad():
                found = model.log_prob(x, y, cond)
                drawn = model.sample(4, 0.5, y, cond, torch.Generator().manual_seed(1))
            expected = plain_log_prob(setting.state, setting.config, x, y, cond)
            assert_close(found / x[0].numel(), expected / x[0].numel(), condition=CONDITION)
            fresh = pgf.Glow(model.config).double()
            fresh.load_state_dict(model.state_dict())
            again = fresh.sample(4, 0.5, y, cond, torch.Generator().manual_seed(1))
            assert_close(drawn, again, condition=CONDITION)


MODES = ("store", "checkpoint", "reversible")
WHOLE_BATCH = torch.rand(8, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) - 0.5


class OfBothWays(Loss):
    """A loss of both directions."""

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        loss = super().forward(x, y)  # first, since it initialises
        shrunk = [0.9 * latent.detach() for latent in self.model.to_noise(x)[0]]
        return self.model.from_noise(shrunk)[0].square().mean() + loss


def trained(loss_of: nn.Module, x: Tensor) -> list[Tensor]:
    """The gradients of a first step, which initialises from the batch, and the parameters after a second one."""
    optimizer = torch.optim.SGD(loss_of.parameters(), 1e-3)
    found: list[Tensor] = []
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(x).backward()
        found += [value.grad.clone() for value in loss_of.parameters() if value.grad is not None]
        optimizer.step()
    return [*found, *(value.detach() for value in loss_of.parameters())]


def work_of_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    share = WHOLE_BATCH[4 * rank : 4 * rank + 4]
    found = {mode: trained(DistributedDataParallel(OfBothWays(mode)), share) for mode in MODES}
    torch.save(found, Path(folder) / f"{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_ranks_train_as_one_process(tmp_path: Path) -> None:
    """DistributedDataParallel: initialised from both ranks' batches, and the gradients are those of the whole batch."""
    ranks = run_ranks(work_of_rank, tmp_path, 2)
    expected = trained(OfBothWays("store"), WHOLE_BATCH)
    for mode in MODES:
        for found in ranks:
            assert_same_gradients(dict(enumerate(found[mode])), dict(enumerate(expected)), mode)
        assert_equal(ranks[0][mode], ranks[1][mode])  # else the ranks drift apart


def plain_model(**given: Any) -> pgf.Glow:
    return pgf.Glow(**{"image_shape": (3, 4, 4), "n_levels": 1, "n_steps": 1, "hidden": 4, **given})


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (255.0, 0.0), (2.0, -1.0)])
def test_pixels_in_another_range_are_noticed(scale: float, shift: float) -> None:
    """log_prob of images in [0, 1], 0..255 or [-1, 1] warns at a model's first call alone, with what mends it."""
    images = torch.rand(16, 3, 4, 4)
    given = scale * images + shift
    model = plain_model()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(2):
            model.log_prob(given)
        copy.deepcopy(model).log_prob(given)
    (warning,) = found
    (line,) = re.findall(r"-0\.5 to 0\.5.* x = (.*)$", str(warning.message))
    mended = eval(line, {"pyglow_fast": pgf, "x": given})
    assert float((mended + 0.5 - images).abs().max()) < 2 / 256  # a level, and the noise within one


def test_other_data_is_taken_without_a_word() -> None:
    """Pixels as they should be, features of another net, a call that torch transforms: a warning would be noise."""
    x = torch.rand(16, 3, 4, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain_model().log_prob(x - 0.5)
        plain_model().bits_per_dim((255 * x).long())
        plain_model().log_prob(torch.randn(16, 3, 4, 4))
        plain_model().log_prob(100 * torch.randn(16, 3, 4, 4))
        model = plain_model().eval()
        torch.func.vmap(lambda x: model.log_prob(x[None]))(x)
    with pytest.warns(UserWarning, match="dequantize"):
        model.log_prob(x)  # the first call whose values could be looked at


def test_a_model_that_has_seen_no_data_says_so() -> None:
    """Sampling it, or scoring in evaluation mode, warns; not in training, nor once it has seen a batch or weights."""
    x = torch.rand(16, 3, 4, 4) - 0.5
    with pytest.warns(UserWarning, match="seen no data"):
        plain_model().sample(2)
    with pytest.warns(UserWarning, match="seen no data"):
        plain_model().decode([x.new_zeros(1, *shape) for shape in plain_model().latent_shapes])
    with pytest.warns(UserWarning, match="seen no data"):
        plain_model().eval().log_prob(x)
    model = plain_model()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.log_prob(x)
        model.eval().sample(2)
        loaded = plain_model()
        loaded.load_state_dict(model.state_dict())
        loaded.eval().sample(2)


@pytest.mark.parametrize("what", ["weights", "step", "prior", "checkerboard"])
def test_a_likelihood_that_is_not_finite_names_what_made_it(what: str) -> None:
    """After a step that was too large: the weights that are NaN, or the first step whose output overflows."""
    boards = {"n_checkerboard": 1} if what == "checkerboard" else {}
    model = plain_model(n_levels=2, n_steps=2, image_shape=(3, 8, 8), **boards)
    x = torch.rand(4, 3, 8, 8) - 0.5
    model.log_prob(x)
    step = model.levels[1].steps[0]
    with torch.no_grad():
        if what == "weights":
            step.actnorm.bias[0] = math.nan
        elif what == "prior":
            model.prior.mean_log_sd.fill_(-100.0)
        else:
            step.actnorm.log_scale.fill_(100.0)
    expected = {
        "weights": "4 of 4 images: levels.1.steps.0.actnorm.bias is not finite",
        "step": "levels.1.steps.0 is the first step",
        "prior": "the output of every step is finite",
        "checkerboard": "levels.1.steps.0 is the first step",
    }[what]
    with pytest.warns(UserWarning, match=expected):
        assert not model.log_prob(x).isfinite().all()


def test_a_multi_scale_flow_of_ones_own() -> None:
    """Of layers alone, without Glow: a Glow's own likelihood, with all noise that left taken as standard normal."""
    setting = Setting("default", spread=CALM)
    model, x = setting.model, setting.x
    log_prob, rest = torch.zeros(len(x), dtype=x.dtype), x
    for i, level in enumerate(model.levels):
        layers = [pgf.Squeeze(), level.steps, *model.splits[i : i + 1]]
        for layer in layers:
            rest, log_det = layer(rest)
            log_prob = log_prob + log_det
        if i < len(model.splits):
            rest, noise = model.splits[i].parts(rest)
            log_prob = log_prob - 0.5 * (noise.square() + math.log(2 * math.pi)).flatten(1).sum(1)
    log_prob = log_prob + functional.gaussian_log_prob(rest, *model.prior(rest, None))
    n_values = x[0].numel()
    assert_close(log_prob / n_values, model.log_prob(x) / n_values, condition=CONDITION)


def test_a_preset_with_ones_own_nets() -> None:
    """A preset is plain data, and the nets are given beside it."""
    config = pgf.GlowConfig.preset("realnvp", image_shape=(1, 16, 16), n_steps=4, n_checkerboard=2)
    model = pgf.Glow(config, net=OwnNet)
    objective((model(torch.rand(4, 1, 16, 16) - 0.5)[0][0], torch.zeros(4))).backward()
    assert {type(module.net) for module in model.modules() if isinstance(module, pgf.Coupling)} == {OwnNet}
    assert pgf.GlowConfig.from_dict(model.config.to_dict()) == config
