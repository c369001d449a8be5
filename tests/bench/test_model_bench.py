"""The model benchmark compares what computes the same, says what differs, and holds each side's best against bars."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.library_ops import use_library
from torch.utils._python_dispatch import TorchDispatchMode

from bench import model_cases, model_checks, model_plots, model_rows, models, precisions
from bench.memory_models import OurSteps, Shape
from bench.model_cases import CHANNELS_LAST, COMPILED, EAGER, LOG_PROB, PLAIN, SAMPLE, TRAIN, Candidate, Candidates
from bench.model_checks import Checks, Unequal, passing
from pyglow_fast import Glow

CPU = torch.device("cpu")
TINY = {"levels": Shape((3, 8, 8), 2, 2, 8, 2), "one step": Shape((12, 4, 4), 1, 1, 8, 2, squeezes=False)}
EVERY = list(model_cases.IMPLEMENTATIONS)
BFLOAT = torch.bfloat16
aten = torch.ops.aten


def candidates(which: str, names: list[str], workload: str, dtype: torch.dtype = torch.float32) -> Candidates:
    found = Candidates(TINY[which], CPU, names, compiled=[], dtype=dtype)
    for candidate in found.found:
        candidate.model.train(workload == TRAIN)
    return found


def both_variants(names: set[str]) -> set[tuple[str, str]]:
    return {(name, variant) for name in names for variant in (EAGER, CHANNELS_LAST)}


class TestCandidates:
    @pytest.mark.parametrize("workload", model_cases.WORKLOADS)
    @pytest.mark.parametrize("which", TINY)
    def test_all_pass_their_checks(self, which: str, workload: str) -> None:
        built = candidates(which, EVERY, workload)
        found, lines = passing(Checks(built, workload), built.of(workload))
        assert not lines
        missing = {line.split(" ")[0] for line in built.missing}
        names = set(EVERY) - missing if workload == TRAIN else {"store", PLAIN, *model_cases.PEER_STEPS} - missing
        assert {(c.implementation, c.variant) for c in found} == both_variants(names)

    @pytest.mark.parametrize("workload", model_cases.WORKLOADS)
    @pytest.mark.parametrize("which", TINY)
    def test_all_pass_their_checks_in_bfloat16(self, which: str, workload: str) -> None:
        built = candidates(which, EVERY, workload, BFLOAT)
        checks = Checks(built, workload)
        found, lines = passing(checks, built.of(workload))
        assert not lines
        missing = {line.split(" ")[0] for line in built.missing}
        names = set(EVERY) - missing if workload == TRAIN else {"store", PLAIN, *model_cases.PEER_STEPS} - missing
        beside = names & set(model_cases.FLOAT_BESIDE)
        assert {(c.implementation, c.variant) for c in found if c.dtype == BFLOAT} == both_variants(names)
        assert {(c.implementation, c.variant) for c in found if c.dtype == torch.float32} == both_variants(beside)
        assert len({c.name for c in found}) == len(found) == len(checks.errors)
        for candidate in found:
            errors = checks.errors[candidate.name]
            error = errors.gradients if workload == TRAIN else errors.values
            assert error is not None
            assert (error > 2e-6) == (candidate.dtype == BFLOAT)  # it does round

    def test_bfloat16_is_asked_for(self) -> None:
        """A model of ours by its precision, the others by autocast; what is in float32 is as it was."""
        built = candidates("levels", ["store", "normflows"], LOG_PROB, BFLOAT)
        ours = [c for c in built.found if c.implementation == "store"]
        assert [c.model.precision for c in ours] == ["bf16", "auto"] * 2
        assert built.ours is ours[1].model
        for candidate in built.found:
            with candidate.context():
                on = torch.is_autocast_enabled("cpu")
            assert on == (candidate.implementation == "normflows" and candidate.dtype == BFLOAT)
            assert candidate.run(LOG_PROB)().dtype == torch.float32

    def test_steps_of_one_level_have_a_precision(self) -> None:
        model = candidates("one step", ["store"], LOG_PROB, BFLOAT).found[0].model
        assert isinstance(model, OurSteps)
        assert model.precision == "bf16"

    def test_our_modes_share_a_model(self) -> None:
        found = candidates("levels", ["store", "reversible"], TRAIN).found
        assert found[0].model is found[1].model
        assert isinstance(found[0].model, Glow)
        for candidate in found[1::-1]:
            candidate.run(TRAIN)()
            assert candidate.model.memory == candidate.implementation

    def test_a_training_step_begins_without_gradients(self) -> None:
        step = candidates("one step", ["store"], TRAIN).found[0]
        assert isinstance(step.model, OurSteps)
        step.run(TRAIN)()
        first = [grad.clone() for grad in step.gradients()]
        step.run(TRAIN)()
        assert all(torch.equal(now, before) for now, before in zip(step.gradients(), first, strict=True))

    def test_missing_library(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(__import__("sys").modules, "nflows", None)
        built = Candidates(TINY["levels"], CPU, ["plain", "nflows"], compiled=[])
        assert {c.implementation for c in built.found} == {"plain"}
        assert [line.split(":")[0] for line in built.missing] == ["nflows is left out"]

    def test_what_is_compiled(self) -> None:
        built = Candidates(TINY["one step"], CPU, names := ["store", "reversible", "memcnn", "plain"], compiled=names)
        compiled = [c for c in built.found if c.variant == COMPILED]
        assert [c.implementation for c in compiled] == ["store", "plain"]
        assert built.missing[-1:] == [model_cases.MEMCNN_COMPILES_NOT]
        assert all(line.startswith("memcnn is left out: it cannot be imported") for line in built.missing[:-1])
        assert compiled[0].model is not built.found[0].model  # a mode that is set for others would compile it again


def spoil_log_prob(candidate: Candidate) -> None:
    right = candidate.log_prob
    candidate.log_prob = lambda x: right(x) * 1.01


def spoil_sample(candidate: Candidate) -> None:
    right = candidate.sample
    candidate.sample = lambda n: right(n) + 0.01


def spoil_inverse(candidate: Candidate) -> None:
    right = candidate.model.decode
    candidate.model.decode = lambda latents: right(latents) * float("nan")


class TestChecks:
    @pytest.mark.parametrize(
        ("workload", "implementation", "spoil", "text"),
        [
            (TRAIN, PLAIN, spoil_log_prob, "plain, eager, gradients"),
            (LOG_PROB, PLAIN, spoil_log_prob, "plain, eager, log_prob"),
            (SAMPLE, PLAIN, spoil_sample, "plain, eager, sample"),
            (SAMPLE, PLAIN, spoil_inverse, "decode"),
            (TRAIN, "FrEIA", spoil_log_prob, "FrEIA, eager, gradients"),
            (LOG_PROB, "FrEIA", spoil_log_prob, "FrEIA, eager, log_prob"),
        ],
    )
    def test_wrong_ones_fail(
        self, workload: str, implementation: str, spoil: Callable[[Candidate], None], text: str
    ) -> None:
        if implementation == "FrEIA":
            pytest.importorskip("FrEIA")
        built = candidates("levels", ["store", implementation], workload)
        checks = Checks(built, workload)
        wrong = next(c for c in built.of(workload) if c.implementation == implementation)
        for candidate in built.of(workload):  # what it is compared with, be it ours or its own other variant
            if candidate is not wrong:
                checks.check(candidate)
        spoil(wrong)
        with pytest.raises(Unequal, match=text):
            checks.check(wrong)

    @pytest.mark.filterwarnings("ignore:decode with nets")
    @pytest.mark.parametrize("implementation", ["store", "plain", "normflows"])
    @pytest.mark.parametrize("workload", model_cases.WORKLOADS)
    def test_wrong_ones_fail_in_bfloat16(self, workload: str, implementation: str) -> None:
        """Ours by one net of the other sign; a peer, whose state is rounded, by a tenth and more."""
        if implementation == "normflows":
            pytest.importorskip("normflows")
        built = candidates("levels", [implementation], workload, BFLOAT)
        checks = Checks(built, workload)
        wrong = next(c for c in built.of(workload) if c.dtype == BFLOAT)
        if implementation == "normflows":
            right, inverse = wrong.log_prob, wrong.model.decode
            wrong.log_prob = lambda x: 1.3 * right(x)
            wrong.model.decode = lambda latents: 1.1 * inverse(latents)
        else:
            checks._truth(wrong)
            model = wrong.model if implementation == "store" else built.ours
            net = model.levels[0].steps[0].coupling.net  # type: ignore[union-attr, index]
            with torch.no_grad():
                net.conv3.weight.mul_(-1.0)
        with pytest.raises(Unequal, match=f"{implementation}, eager, bfloat16"):
            checks.check(wrong)

    def test_nets_that_put_out_nothing_fail(self) -> None:
        built = candidates("levels", ["store"], TRAIN)
        torch.nn.init.zeros_(built.ours.levels[0].steps[0].coupling.net.conv3.weight)  # type: ignore[union-attr, index]
        with pytest.raises(Unequal, match="put out nothing"):
            Checks(built, TRAIN).check(built.found[0])

    def test_only_others_may_be_left_out(self) -> None:
        built = candidates("levels", ["store", "memcnn"], TRAIN)

        def broken(_: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("\nno such thing\nmore")

        other = next(c for c in built.found if c.implementation == "memcnn") if not built.missing else None
        if other is not None:
            other.log_prob = broken
            found, lines = passing(Checks(built, TRAIN), [other])
            assert (found, lines) == (
                [],
                ["memcnn, eager, train step is left out, it does not run: RuntimeError: no such thing"],
            )
        built.found[0].log_prob = broken
        with pytest.raises(RuntimeError, match="no such thing"):
            passing(Checks(built, TRAIN), [built.found[0]])
        compiled = dataclasses.replace(built.found[0], variant=COMPILED)
        compiled.log_prob = broken
        assert not passing(Checks(built, TRAIN), [compiled])[0]


class CutToTF32(TorchDispatchMode):
    """Convolutions of float32 multiply what is left of 11 bits, the others cut off: as far off as a GPU may be."""

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        operands = {aten.convolution.default: 2, aten.convolution_backward.default: 3}.get(func, 0)
        cut = [cut_to_tf32(value) if value.dtype == torch.float32 else value for value in args[:operands]]
        return func(*cut, *args[operands:], **(kwargs or {}))


def cut_to_tf32(x: torch.Tensor) -> torch.Tensor:
    return (x.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


@pytest.fixture
def like_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nets are the library's convolutions; the state is mapped by our kernels, as on a GPU."""
    use_library(monkeypatch)


class TestTF32:
    def candidates(self, which: str, names: list[str], workload: str, tf32: bool) -> Candidates:
        built = Candidates(TINY[which], CPU, names, compiled=[], tf32=tf32)
        for candidate in built.found:
            candidate.model.train(workload == TRAIN)
        return built

    @pytest.mark.parametrize("workload", model_cases.WORKLOADS)
    @pytest.mark.parametrize("which", TINY)
    def test_all_pass_what_is_derived(self, which: str, workload: str, like_a_gpu: None) -> None:
        built = self.candidates(which, EVERY, workload, tf32=True)
        checks = Checks(built, workload)
        with CutToTF32():
            found, lines = passing(checks, built.of(workload))
        assert not lines
        assert len(found) == len(built.of(workload))
        for candidate in found:
            errors = checks.errors[candidate.name]
            error = errors.gradients if workload == TRAIN else errors.values
            assert error is not None
            assert error > 2e-6  # it does round
            assert candidate.name.endswith(", tf32")

    def test_no_rounding_passes_too(self) -> None:
        built = self.candidates("levels", ["store", PLAIN], TRAIN, tf32=True)
        assert passing(Checks(built, TRAIN), built.found)[1] == []

    def test_what_float32_allows_is_too_little(self, like_a_gpu: None) -> None:
        built = self.candidates("levels", ["store"], TRAIN, tf32=False)
        with CutToTF32(), pytest.raises(Unequal, match="store, eager, gradients: off by"):
            passing(Checks(built, TRAIN), built.found)

    @pytest.mark.parametrize("workload", [TRAIN, LOG_PROB])
    def test_a_wrong_net_fails(self, workload: str, like_a_gpu: None) -> None:
        built = self.candidates("levels", ["store"], workload, tf32=True)
        checks = Checks(built, workload)
        checks._truth(built.found[0])
        net = built.ours.levels[0].steps[0].coupling.net  # type: ignore[union-attr, index]
        with torch.no_grad():
            net.conv3.weight.mul_(-1.0)
        with CutToTF32(), pytest.raises(Unequal, match="store, eager, tf32"):
            checks.check(built.found[0])

    def test_rows_say_it(self, tmp_path: Path) -> None:
        options = ["--configs", "d", "--workloads", LOG_PROB, "--implementations", PLAIN, "--precision", "tf32"]
        options += ["--quick", "--rounds", "1", "--malloc", "here", "--threads", "1", "--out", str(tmp_path)]
        assert models.main(options) == 0
        (path,) = tmp_path.glob("models-cpu-tf32*.json")
        content = json.loads(path.read_text())
        assert {row["dtype"] for row in content["rows"]} == {"tf32"}
        assert content["machine"]["precision"] == "tf32"
        assert model_rows.ModelRow.of(content["rows"][0]).shape == models.quick(model_cases.CONFIGS["d"])

    @pytest.mark.parametrize("allowed", [True, False])
    def test_the_librarys_setting_is_put_back(self, allowed: bool) -> None:
        cudnn: Any = torch.backends.cudnn
        before = cudnn.conv.fp32_precision, cudnn.allow_tf32
        with precisions.tf32(allowed), precisions.tf32_products():
            assert cudnn.allow_tf32 == allowed
            assert torch.backends.cuda.matmul.allow_tf32
        assert (cudnn.conv.fp32_precision, cudnn.allow_tf32) == before
        assert not torch.backends.cuda.matmul.allow_tf32

    def test_what_is_cut_off(self) -> None:
        """The unit is the largest error, and the bias of a product is what the derivation says."""
        x = 2.0 ** (8 * torch.rand(100_000))
        errors = (x - cut_to_tf32(x)) / x
        assert 0.99 * precisions.TF32_UNIT < float(errors.max()) <= precisions.TF32_UNIT
        assert float(errors.mean()) == pytest.approx(0.36 * precisions.TF32_UNIT, rel=0.02)
        rms = precisions.SPREAD_EVENLY * precisions.TF32_UNIT
        assert float(errors.square().mean().sqrt()) == pytest.approx(rms, rel=0.02)
        bias = 6 * 0.36 * precisions.TF32_UNIT  # of the three layers of a net
        assert bias < precisions.MARGIN * precisions.net_error(3, precisions.TF32_UNIT)


class TestQuick:
    def test_only_some_are_compiled(self) -> None:
        built = Candidates(TINY["one step"], CPU, ["store", PLAIN], compiled=[PLAIN])
        assert [c.implementation for c in built.found if c.variant == COMPILED] == [PLAIN]

    def test_options(self) -> None:
        parse = models.parser().parse_args
        assert parse([]).compile == []
        assert parse(["--compile"]).compile == list(model_cases.IMPLEMENTATIONS)
        assert parse(["--compile", "plain,store"]).compile == ["plain", "store"]

    @pytest.mark.parametrize("config", model_cases.CONFIGS)
    def test_the_model_is_of_the_same_kind(self, config: str) -> None:
        shape = model_cases.CONFIGS[config]
        small = models.quick(shape)
        assert (small.n_levels, small.squeezes, small.image[0]) == (shape.n_levels, shape.squeezes, shape.image[0])
        assert model_cases.net_flops(small, TRAIN) < 1e8


class TestArithmetic:
    def test_flops_of_one_step(self) -> None:
        shape = Shape((12, 64, 64), 1, 1, 32, 8, squeezes=False)
        positions = 8 * 64 * 64
        forward = 2 * positions * (54 * 32 + 32 * 32 + 32 * 108)
        assert model_cases.net_flops(shape, LOG_PROB) == forward
        assert model_cases.net_flops(shape, TRAIN) == 3 * forward

    def test_products_by_level(self) -> None:
        sizes = model_cases.net_products(model_cases.CONFIGS["a"])
        assert sizes[:3] == [(16 * 256, 54, 512), (16 * 256, 512, 512), (16 * 256, 512, 108)]
        assert sizes[6:] == [(16 * 16, 216, 512), (16 * 16, 512, 512), (16 * 16, 512, 432)]

    @pytest.mark.parametrize("which", TINY)
    def test_they_are_those_of_the_convolutions(self, which: str) -> None:
        """A fused multiply-add of each weight at each position, the nets' first to last."""
        shape, counted = TINY[which], 0

        def count(module: torch.nn.Module, _: Any, out: torch.Tensor) -> None:
            nonlocal counted
            assert isinstance(module, torch.nn.Conv2d)
            counted += 2 * module.weight.numel() * out.shape[0] * out.shape[2] * out.shape[3]

        peer = pytest.importorskip("FrEIA") and Candidates(shape, CPU, ["FrEIA"], compiled=[]).found[0]
        for part in peer.model.modules():
            if isinstance(part, torch.nn.Conv2d):
                part.register_forward_hook(count)
        peer.run(LOG_PROB)()
        assert counted == model_cases.net_flops(shape, LOG_PROB)


class TestTurns:
    def test_every_case_every_round(self) -> None:
        calls: list[str] = []
        times = models.take_turns({name: lambda name=name: calls.append(name) for name in "xy"}, CPU, 4, 60.0)  # type: ignore[misc]
        assert {name: len(values) for name, values in times.items()} == {"x": 4, "y": 4}
        assert set(calls) == {"x", "y"}

    def test_time_ends_the_rounds(self) -> None:
        assert len(models.take_turns({"x": lambda: None}, CPU, 9, 0.0)["x"]) == models.LEAST_ROUNDS
        assert len(models.take_turns({"x": lambda: None}, CPU, 2, 0.0)["x"]) == 2


def row(implementation: str, seconds: float, **more: Any) -> model_rows.ModelRow:
    plain = {
        "config": "a",
        "workload": TRAIN,
        "implementation": implementation,
        "variant": EAGER,
        "malloc": "default",
        "device": "CPU",
        "dtype": "float32",
        "shape": model_cases.CONFIGS["a"],
        "seconds": seconds,
        "seconds_low": seconds,
        "seconds_high": seconds,
        "rounds": 5,
        "flops": 10**9,
        "gigaflops": 1 / seconds,
        "product_gigaflops": 1.0,
        "fraction_of_products": 1 / seconds,
    }
    return model_rows.ModelRow(**plain | more)


class TestBars:
    def test_each_side_at_its_own_best(self) -> None:
        rows = [row("store", 2.0), row("store", 1.6, variant=CHANNELS_LAST, malloc="tuned"), row("plain", 1.7)]
        rows += [row("normflows", 3.0), row("normflows", 2.4, variant=COMPILED), row("nflows", 4.0, malloc="tuned")]
        assert model_rows.verdicts(rows) == [
            "(a) 3x32x32 L=3 K=8 hidden 512 batch 16, train step",
            "  store 1600.00 ms (channels_last, tuned malloc); times as fast as",
            "    1.50, within 1.3: normflows (torch.compile, default malloc), the fastest external peer",
            "    1.06, beyond 1.1: plain (eager, default malloc)",
            "    0.62, beyond 0.75: of the rate of the library's products beside it",
        ]

    def test_less_work_is_said(self) -> None:
        rows = [row("reversible", 2.0), row("FrEIA", 2.08), row("memcnn", 2.5)]
        lines = [line.strip() for line in model_rows.verdicts(rows)]
        assert lines[2] == "1.04, beyond 1.05: FrEIA (eager, default malloc), the fastest external peer"
        assert lines[3] == "1.25: memcnn (eager, default malloc), the fastest that does as much work"
        assert not any("plain" in line for line in lines)

    def test_time_of_recomputing(self) -> None:
        rows = [row("store", 1.0), row("checkpoint", 1.2), row("reversible", 1.5), row("torch checkpoint", 3.0)]
        rows += [row("plain", 2.0), row("memcnn", 3.5)]
        assert [line.strip() for line in model_rows.verdicts(rows)][-4:] == [
            "1.20, within 1.38: time of checkpoint over store",
            "1.50, beyond 1.38: time of reversible over store",
            "1.50: time of torch checkpoint over plain",
            "1.75: time of memcnn over plain",
        ]

    def test_no_bar_and_no_peer(self) -> None:
        rows = [row("store", 1.0, config="d", workload=SAMPLE), row("plain", 2.0, config="d", workload=SAMPLE)]
        assert [line.strip() for line in model_rows.verdicts(rows)[2:]] == [
            "2.00: plain (eager, default malloc)",
            "1.00: of the rate of the library's products beside it",
        ]

    def test_other_configurations_do_not_count(self) -> None:
        rows = [row("store", 1.0), row("normflows", 0.1, config="b"), row("normflows", 0.1, workload=SAMPLE)]
        assert not any("external" in line for line in model_rows.verdicts(rows))

    def test_table_is_in_order_of_speed(self) -> None:
        lines = model_rows.table([row("plain", 3.0), row("FrEIA", 2.0, note="less work")]).splitlines()
        assert [line.split()[0] for line in lines[2:]] == ["FrEIA", "plain"]
        assert lines[2].endswith("0.50          less work")

    def test_table_shows_dtypes_and_errors(self) -> None:
        half = row("store", 1.0, dtype="bfloat16", product_gigaflops=9.0, gradient_error=2e-3)
        lines = model_rows.table([half, row("store", 2.0, value_error=1e-7)]).splitlines()
        assert lines[0].endswith("library's products 9 GFLOP/s (bfloat16), 1 GFLOP/s (float32)")
        assert [line.split()[2] for line in lines[2:]] == ["bfloat16", "float32"]
        assert [line.split()[-1] for line in lines[2:]] == ["2.0e-03", "1.0e-07"]

    def test_bfloat16_against_everything(self) -> None:
        half = {"dtype": "bfloat16", "malloc": "tuned"}
        rows = [row("store", 1.0, gradient_error=7e-3, **half), row("plain", 3.0, gradient_error=6e-3, **half)]
        rows += [row("FrEIA", 2.0, **half), row("nflows", 4.0, **half), row("reversible", 1.5, **half)]
        rows += [row("store", 1.8), row("FrEIA", 2.2), row("normflows", 2.5), row("reversible", 2.7)]
        where = "(eager, bfloat16, tuned malloc)"
        lines = [line.strip() for line in model_rows.verdicts(rows)]
        assert lines[1:11] == [
            f"store 1000.00 ms {where}; times as fast as",
            "1.80: store (eager, default malloc), ours in float32",
            f"2.00: FrEIA {where}, the fastest external peer under autocast",
            f"4.00: nflows {where}, the fastest that does as much work under autocast",
            "2.20: FrEIA (eager, default malloc), the fastest external peer in float32",
            "2.50: normflows (eager, default malloc), the fastest that does as much work in float32",
            f"3.00: plain {where}",
            "1.00: of the rate of the library's products beside it",
            "7.0e-03: relative error of all gradients, plain's 6.0e-03",
            f"reversible 1500.00 ms {where}; times as fast as",
        ]
        assert "store 1800.00 ms (eager, default malloc); times as fast as" in lines
        assert "1.22, beyond 1.3: FrEIA (eager, default malloc), the fastest external peer" in lines
        assert lines[-2:] == [
            "1.50: time of reversible over store, bfloat16",
            "1.50, beyond 1.38: time of reversible over store",
        ]

    def test_row_from_json(self) -> None:
        first = row("store", 1.0)
        assert model_rows.ModelRow.of(json.loads(json.dumps(dataclasses.asdict(first)))) == first


def test_names_are_checked() -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="expected some of a, b, found 'a,z'"):
        models.chosen(["a", "b"])("a,z")
    assert models.chosen(["a", "b"])("b, a") == ["b", "a"]


@pytest.mark.full
def test_in_processes_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(models, "CONFIGS", {"a": TINY["levels"], "d": TINY["one step"]})
    options = ["--implementations", "store,reversible,normflows", "--workloads", "train step,sample"]
    assert models.main([*options, "--rounds", "1", "--threads", "1", "--out", str(tmp_path)]) == 0
    files = sorted(path.name for path in tmp_path.glob("*.json"))
    assert files in (["models-cpu-default-malloc.json", "models-cpu-tuned-malloc.json"], ["models-cpu.json"])
    for name in files:
        content = json.loads((tmp_path / name).read_text())
        assert {"device", "torch", "commit", "malloc"} <= content["machine"].keys()
        found = {(r["config"], r["workload"], r["implementation"], r["variant"]) for r in content["rows"]}
        peers = 0 if any("normflows" in line for line in content["notes"]) else 1
        assert len(found) == len(content["rows"]) == 2 * 2 * (2 + peers + 1 + peers)  # of ours one alone samples
        assert all(r["seconds_low"] <= r["seconds"] <= r["seconds_high"] for r in content["rows"])
    out = capfd.readouterr().out
    assert out.count("L=2 K=2 hidden 8 batch 2, train step") == len(files) + 1  # a table each, and the verdict
    assert "bench memory" in out
    assert (tmp_path / "models-cpu.png").exists() or "no plot" in out


@pytest.mark.full
def test_bfloat16_has_files_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(models, "CONFIGS", {"a": TINY["levels"]})
    options = ["--configs", "a", "--precision", "bf16", "--implementations", "store,reversible,plain,FrEIA"]
    options += ["--malloc", "default", "--rounds", "1", "--threads", "1", "--workloads", "train step,log_prob"]
    assert models.main([*options, "--out", str(tmp_path)]) == 0
    assert [path.name for path in tmp_path.glob("*.json")] == ["models-cpu-bf16-default-malloc.json"]
    content = json.loads((tmp_path / "models-cpu-bf16-default-malloc.json").read_text())
    rows = [model_rows.ModelRow.of(values) for values in content["rows"]]
    peers = {"FrEIA"} - {line.split(" ")[0] for line in content["notes"]}
    found = {(r.workload, r.implementation, r.dtype) for r in rows}
    halves = {"store", "plain", *peers}
    assert {name for workload, name, dtype in found if (workload, dtype) == (LOG_PROB, "bfloat16")} == halves
    assert {name for workload, name, dtype in found if (workload, dtype) == (TRAIN, "float32")} == {
        *("store", "reversible"),
        *peers,
    }
    assert all(r.gradient_error is not None and r.gradient_error_worst is not None for r in rows if r.workload == TRAIN)
    assert all(r.value_error is not None for r in rows if r.workload == LOG_PROB)
    assert len({(r.workload, r.dtype, r.product_gigaflops) for r in rows}) == 4
    assert "ours in float32" in capfd.readouterr().out
    assert not (tmp_path / "models-cpu.png").exists()


def test_rows_in_bfloat16() -> None:
    arguments = models.parser().parse_args(["--precision", "bf16", "--implementations", "store", "--rounds", "1"])
    arguments.shapes, arguments.workloads = {"d": TINY["one step"]}, [TRAIN]
    rows = models.Measurement(arguments).config("d")
    assert {(row.variant, row.dtype) for row in rows} == {
        (variant, dtype) for variant in (EAGER, CHANNELS_LAST) for dtype in ("float32", "bfloat16")
    }
    for found in rows:
        assert found.gradient_error is not None
        assert (found.gradient_error > 1e-5) == (found.dtype == "bfloat16")


def test_plot(tmp_path: Path) -> None:
    rows = [row("store", 1.0), row("plain", 2.0), row("store", 1.0, config="b"), row("store", 0.5, dtype="bfloat16")]
    said = model_plots.draw(rows, tmp_path / "models.png")
    assert said.startswith("no plot") or (tmp_path / "models.png").stat().st_size > 0


def test_tolerances_would_see_an_error() -> None:
    """NaN is no small error."""
    with pytest.raises(Unequal):
        model_checks._hold("x", float("nan"), 1.0)
