"""Calls of every op with drawn arguments: good ones in odd memory, and ones with a fault. None may end the process.

``python -m support.fuzzed_ops FIRST COUNT`` runs the calls of these seeds. What an op takes must be what the reference
makes of the same numbers; what it does not take it must refuse by words. A call is written down before it runs, so that
the last line is the one that ended the process.
"""

from __future__ import annotations

import faulthandler
import functools
import random
import re
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyglow_fast import _backend, ops
from support.fuzzed_expectations import DESCRIPTION, EXPECTED, Arguments
from support.helpers import memory_layouts, tolerance
from support.net_chains import Shape, drawn_shape

REFUSALS = {
    # Names the argument, what it must be and what it is.
    ValueError: re.compile(r"^[\w ,\[\]]+: expected .+, found ", re.DOTALL),
    NotImplementedError: re.compile(r"^\w+: expected strided tensors on .+, found ", re.DOTALL),
}
DTYPES = (torch.float32, torch.float64)
FOREIGN_DTYPES = (*DTYPES, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.bool, torch.complex64)
INTEGERS = (-(2**63), -1, 0, 1, 2, 3, 4, 5, 6, 9, 2**31, 2**62)
FLOATS = (float("nan"), float("inf"), -float("inf"), -1.0, 0.0, 0.5, 1e-320, 100.0, 1e308)


class Draw:
    """A source of what one seed gives: sizes, counts, tensors."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = self.rng.choice(DTYPES)

    def normal(self, *sizes: int) -> Tensor:
        return torch.randn(sizes, generator=self.generator, dtype=torch.float64).to(self.dtype)

    def sizes(self, least: int = 0, most: int = 3) -> list[int]:
        """Draw spatial sizes, of which seldom one is 0."""
        dims = self.rng.randint(least, most)
        return [self.rng.choice((0, 1, 2, 3, 5) if self.rng.random() < 0.1 else (1, 2, 3, 4, 7)) for _ in range(dims)]

    def count(self) -> int:
        """Draw a number of samples or channels."""
        return self.rng.choice((0, 1, 1, 2, 3, 3, 4, 8))

    def flag(self) -> bool:
        return self.rng.random() < 0.5


def _map(draw: Draw, channels: int) -> tuple[Tensor, Tensor | None]:
    """A matrix, or scales and their index."""
    if draw.flag():
        return draw.normal(channels, channels), None
    return draw.normal(channels), torch.randperm(channels, generator=draw.generator)


def _codes(draw: Draw, with_direction: bool = True) -> Arguments:
    code = draw.rng.randrange(6)
    scaled = code == ops.SCALE_MAP_CODES["scaled_sigmoid"]
    found: Arguments = {"map": code, "order": draw.rng.randrange(2)}
    if with_direction:
        found["inverse"] = draw.flag()
    return found | {"bias": 1.5, "eps": 0.1 if scaled else 0.0, "clamp": 1.5, "factor": 0.7 if scaled else 1.0}


def _coupled(draw: Draw, name: str, with_direction: bool) -> tuple[Tensor, Arguments, Arguments]:
    """A state, with the net's output for it, and the numbers that say how it is coupled."""
    n, channels, spatial = draw.count(), draw.count(), draw.sizes()
    x, codes = draw.normal(n, channels, *spatial), _codes(draw, with_direction)
    width = draw.rng.randint(0, channels) * (1 if codes["map"] == 0 else 2)
    net_out = draw.normal(n, width, *spatial)
    if draw.dtype == torch.float32 and draw.rng.random() < 0.3:
        net_out = net_out.to(draw.rng.choice((torch.bfloat16, torch.float16)))
    return x, {name: x, "net_out": net_out}, codes


def _added(draw: Draw, x: Tensor) -> Tensor | None:
    width = draw.rng.randint(0, x.shape[1])
    return draw.normal(x.shape[0], width, *x.shape[2:]) if draw.flag() else None


def channel_mix(draw: Draw) -> Arguments:
    code = draw.rng.choice((0, 0, 1, 2))
    n, channels, spatial = draw.count(), draw.count(), draw.sizes()
    if code:
        spatial, channels = draw.sizes(2, 2), 4 * draw.rng.randint(0, 2)
    if code == ops.SQUEEZE_CODES["input"]:
        x = draw.normal(n, channels // 4, *(2 * size for size in spatial))
    else:
        x = draw.normal(n, channels, *spatial)
    matrix, index = _map(draw, channels)
    return {
        "x": x,
        "matrix": matrix,
        "offset": draw.normal(channels),
        "subtract_first": draw.flag(),
        "squeeze": code,
        "index": index,
    }


def channel_mix_backward(draw: Draw) -> Arguments:
    squeezes = draw.rng.random() < 0.3
    n, channels, spatial = draw.count(), draw.count(), draw.sizes()
    if squeezes:
        channels, spatial = 4 * draw.rng.randint(0, 2), draw.sizes(2, 2)
    grad = draw.normal(n, channels, *spatial)
    x = draw.normal(n, channels // 4, *(2 * size for size in spatial)) if squeezes else torch.randn_like(grad)
    matrix, index = _map(draw, channels)
    center = draw.normal(channels) if draw.flag() else None
    given = {"x": x, "grad_u": grad, "matrix": matrix, "center": center, "added": _added(draw, grad)}
    return given | {"squeeze": squeezes, "index": index}


def coupling(draw: Draw) -> Arguments:
    _, tensors, codes = _coupled(draw, "x", True)
    return tensors | codes


def coupling_backward(draw: Draw) -> Arguments:
    x, tensors, codes = _coupled(draw, "out", True)
    grads = {"grad_out": draw.normal(*x.shape), "grad_log_det": draw.normal(x.shape[0])}
    return tensors | grads | codes | {"want_input": draw.flag()}


def coupling_mix(draw: Draw) -> Arguments:
    x, tensors, codes = _coupled(draw, "x", True)
    matrix, index = _map(draw, x.shape[1])
    return tensors | {"matrix": matrix, "offset": draw.normal(x.shape[1])} | codes | {"index": index}


def coupling_mix_backward(draw: Draw) -> Arguments:
    x, tensors, codes = _coupled(draw, "x", False)
    matrix, index = _map(draw, x.shape[1])
    grads = {"grad_out": draw.normal(*x.shape), "grad_log_det": draw.normal(x.shape[0]), "matrix": matrix}
    return tensors | grads | codes | {"added": _added(draw, x), "index": index}


def step_backward(draw: Draw) -> Arguments:
    y, tensors, codes = _coupled(draw, "y", False)
    matrix, index = _map(draw, y.shape[1])
    grads = {"grad_y": draw.normal(*y.shape), "grad_log_det": draw.normal(y.shape[0])}
    return tensors | grads | {"inverse_matrix": matrix, "offset": draw.normal(y.shape[1])} | codes | {"index": index}


def channel_moments(draw: Draw) -> Arguments:
    return {"x": draw.normal(draw.count(), draw.count(), *draw.sizes())}


def _normal_of(name: str) -> Callable[[Draw], Arguments]:
    def build(draw: Draw) -> Arguments:
        sizes = (draw.count(), draw.count(), *draw.sizes())
        return {name: draw.normal(*sizes), "mean": draw.normal(*sizes), "log_sd": draw.normal(*sizes)}

    return build


def gaussian_log_prob_backward(draw: Draw) -> Arguments:
    given = _normal_of("z")(draw)
    return given | {"grad_log_prob": draw.normal(given["z"].shape[0])}


def invert_matrices(draw: Draw) -> Arguments:
    channels = draw.count()
    return {"matrices": draw.normal(draw.count(), channels, channels) + 5.0 * torch.eye(channels, dtype=draw.dtype)}


def checkerboard_split(draw: Draw) -> Arguments:
    first, *rest = draw.sizes(1)
    x = draw.normal(draw.count(), draw.count(), 2 * first, *rest)
    return {"x": x, "parity": draw.rng.randrange(2), "both": draw.flag()}


def checkerboard_merge(draw: Draw) -> Arguments:
    both = draw.flag()
    halves = draw.normal(draw.count(), draw.count() * (2 if both else 1), *draw.sizes(1))
    return {"halves": halves, "parity": draw.rng.randrange(2), "both": both}


def _small_net(draw: Draw) -> Shape:
    while True:
        shape = drawn_shape(draw.rng)
        if shape.products < 1e5 and max(shape.widths) < 100:
            break
    samples = 0 if draw.rng.random() < 0.05 else shape.samples
    spatial = shape.spatial
    if spatial and draw.rng.random() < 0.05:
        spatial = (0, *spatial[1:])
    return shape._replace(samples=samples, spatial=spatial)


def net_chain(draw: Draw) -> Arguments:
    shape = _small_net(draw)
    n, spatial, widths = shape.samples, shape.spatial, shape.widths
    codes = [draw.rng.randrange(len(ops.ACTIVATION_CODES)) for _ in widths[2:]]
    return {
        "x": draw.normal(n, widths[0] - shape.cond, *spatial),
        "cond": draw.normal(n, shape.cond, *spatial) if shape.cond else None,
        "weights": [draw.normal(*size) / max(1, size[1]) ** 0.5 for size in shape.sizes],
        "biases": [draw.normal(width) for width in widths[1:]],
        "log_gain": 0.1 * draw.normal(widths[-1], *[1] * len(spatial)) if shape.gain else None,
        "activations": codes,
        "parameters": [0.5 for _ in codes],
        "dilations": [step for steps in shape.dilations for step in steps],
        "half": draw.dtype == torch.float32 and draw.rng.random() < 0.3,
        "keep": draw.flag(),
    }


def net_chain_backward(draw: Draw) -> Arguments:
    """Draw arguments, with some that the op does not take (UNTOLD): the biases and description of what was kept."""
    forward = net_chain(draw) | {"keep": True}
    out, kept = ops.net_chain(**forward)
    x, weights = forward["x"], forward["weights"]
    return {
        "grad_out": draw.normal(*out.shape),
        "x": x,
        "cond": forward["cond"],
        "kept": kept,
        "weights": weights,
        "last_bias": forward["biases"][-1] if forward["log_gain"] is not None or draw.flag() else None,
        **{name: forward[name] for name in ("log_gain", "activations", "parameters", "dilations", "half")},
        "want_weights": draw.flag(),
        "biases": forward["biases"],
        "kept_of": [forward[name] for name in DESCRIPTION],
    }


BUILDERS: dict[str, Callable[[Draw], Arguments]] = {
    "gaussian_log_prob": _normal_of("z"),
    "gaussian_sample": _normal_of("noise"),
    **{
        build.__name__: build
        for build in (
            *(channel_mix, channel_mix_backward, coupling, coupling_backward, coupling_mix, coupling_mix_backward),
            *(step_backward, channel_moments, gaussian_log_prob_backward, invert_matrices),
            *(checkerboard_split, checkerboard_merge, net_chain, net_chain_backward),
        )
    },
}

UNTOLD = {name: ("biases", "kept_of") if name == "net_chain_backward" else () for name in BUILDERS}


# ---- The same numbers elsewhere in memory, and faults ----


def moved(draw: Draw, x: Tensor, may_repeat: bool) -> tuple[str, Tensor]:
    """The values of x in other memory; where they may repeat also those of one index in place of all the others."""
    layouts: dict[str, Tensor] = {"itself": x}
    if x.dim():
        layouts |= memory_layouts(x)
        layouts["gap"] = torch.stack([x, torch.full_like(x, 77)], dim=-1)[..., 0]
    if x.dim() >= 2:
        layouts["transposed"] = x.mT.contiguous().mT
    if x.is_floating_point():
        layouts["negative"] = torch._neg_view(-x)
        layouts["with gradient"] = x.clone().requires_grad_()
    if may_repeat and x.dim() and x.numel():
        repeated = x
        for axis in draw.rng.sample(range(x.dim()), draw.rng.randint(1, x.dim())):
            repeated = repeated.narrow(axis, 0, 1)
        layouts["repeated"] = repeated.clone().expand_as(x)
    name = draw.rng.choice([*layouts])
    return name, layouts[name]


def broken(draw: Draw, x: Tensor) -> tuple[str, Tensor]:
    """x with another shape, dtype, layout or device."""
    rng = draw.rng
    ways: dict[str, Callable[[], Tensor]] = {
        "scalar": lambda: x.new_zeros(()),
        "nothing": lambda: x.new_zeros(0),
        "unsqueezed": lambda: x.unsqueeze(rng.choice((0, -1))),
        "dtype": lambda: x.to(rng.choice(FOREIGN_DTYPES)),
        "meta": lambda: x.to("meta"),
        "sparse": x.to_sparse,
    }
    if x.dim():
        axis = rng.randrange(x.dim())
        size = x.shape[axis]
        ways["grown"] = lambda: torch.cat([x, x.new_zeros([*x.shape[:axis], 1, *x.shape[axis + 1 :]])], dim=axis)
        ways["emptied"] = lambda: x.narrow(axis, 0, 0)
        ways["flat"] = x.flatten
        ways["repeated further"] = lambda: x.narrow(axis, 0, min(size, 1)).expand(
            [*x.shape[:axis], 5000 if size else 0, *x.shape[axis + 1 :]]
        )
        if size:
            ways["shrunk"] = lambda: x.narrow(axis, 0, size - 1)
            ways["selected"] = lambda: x.select(axis, 0)
    if x.dtype == torch.float32 and x.numel() and x.dim() <= 5:
        ways["mkldnn"] = x.to_mkldnn
    if x.dtype == torch.int64 and x.numel():
        ways["values"] = lambda: x + rng.choice((-1, 1, 2**40, -(2**62)))
    name = rng.choice([*ways])
    return name, ways[name]()


def _fault_in(draw: Draw, value: Any) -> tuple[str, Any]:
    if isinstance(value, Tensor):
        return broken(draw, value)
    if isinstance(value, bool):
        return "turned", not value
    if isinstance(value, int):
        return "number", draw.rng.choice(INTEGERS)
    if isinstance(value, float):
        return "number", draw.rng.choice(FLOATS)
    way = draw.rng.choice(("shorter", "longer", "element"))
    if way == "element" and value:
        place = draw.rng.randrange(len(value))
        inner, element = _fault_in(draw, value[place])
        return f"[{place}] {inner}", [*value[:place], element, *value[place + 1 :]]
    return way, value[:-1] if way == "shorter" else [*value, *value[-1:]]


def drawn_call(seed: int) -> tuple[str, list[str], Arguments]:
    """The op's name, what is odd about its arguments, and these."""
    draw = Draw(seed)
    name = sorted(BUILDERS)[seed % len(BUILDERS)]
    arguments, odd = BUILDERS[name](draw), []
    for key, value in arguments.items():
        if key in UNTOLD[name]:
            continue
        # What net_chain kept is of the numbers that it was given.
        may_repeat = name != "invert_matrices" and (name != "net_chain_backward" or key == "grad_out")
        if isinstance(value, Tensor):
            way, arguments[key] = moved(draw, value, may_repeat)
            odd.append(f"{key} {way}")
        elif isinstance(value, list) and value and isinstance(value[0], Tensor):
            arguments[key] = [moved(draw, element, may_repeat)[1] for element in value]
    if draw.rng.random() < 0.6:
        key = draw.rng.choice(
            [key for key, value in arguments.items() if value is not None and key not in UNTOLD[name]]
        )
        way, arguments[key] = _fault_in(draw, arguments[key])
        odd.append(f"{key}: {way}")
    return name, odd, arguments


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        place = f" {value.device} {value.layout}" if value.device.type != "cpu" or value.layout != torch.strided else ""
        stride = tuple(value.stride()) if value.layout == torch.strided else ""
        return f"{str(value.dtype)[6:]}{tuple(value.shape)}{stride}{place}"
    return f"[{', '.join(map(_described, value))}]" if isinstance(value, list) else repr(value)


def run_call(seed: int) -> bool:
    """Whether the op took the arguments."""
    name, odd, arguments = drawn_call(seed)
    described = ", ".join(f"{key}={_described(value)}" for key, value in arguments.items())
    print(f"seed {seed}: {name}({described}); {'; '.join(odd)}", flush=True)
    given = {key: value for key, value in arguments.items() if key not in UNTOLD[name]}
    try:
        with torch.no_grad():
            found = getattr(torch.ops.pyglow_fast, name)(**given)
    except tuple(REFUSALS) as error:
        words = next(pattern for error_type, pattern in REFUSALS.items() if isinstance(error, error_type))
        if not words.match(str(error)):
            raise AssertionError("an error that says too little") from error
        return False
    expect_results(name, [found] if isinstance(found, Tensor) else list(found), arguments)
    return True


def expect_results(name: str, found: list[Tensor], arguments: Arguments) -> None:
    """Check results against the reference in float64, up to the roundings of a chain of sums of so many terms."""
    tensors = [value for value in arguments.values() if isinstance(value, Tensor)]
    if all(value.is_meta for value in tensors):
        assert all(value.is_meta for value in found)
        return
    # What an eps of 1e308 gives, and its gradients, is a matter of the order of the operations.
    overflows = any(isinstance(value, float) and not abs(value) <= 100.0 for value in arguments.values())
    terms = max(1, *(value.numel() for value in tensors))
    dtype = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    for index, (actual, expected) in enumerate(zip(found, EXPECTED[name](arguments), strict=True)):
        if expected is None:
            continue
        assert actual.shape == expected.shape, f"result {index}: {tuple(actual.shape)}, not {tuple(expected.shape)}"
        if overflows or not expected.numel():
            continue
        finite = expected.detach()[expected.isfinite()].abs()
        largest = max(1.0, float(finite.max())) if finite.numel() else 1.0
        rounding = 0.0 if actual.dtype in DTYPES else torch.finfo(actual.dtype).eps
        bound = (tolerance(terms, dtype=dtype) + rounding) * largest
        torch.testing.assert_close(
            actual.double(),
            expected.detach(),
            rtol=0.0,
            atol=bound,
            equal_nan=True,
            msg=functools.partial("result {}: {}".format, index),
        )


def main(first: int, count: int) -> None:
    """Ends with the number of calls, and of those that were taken."""
    faulthandler.enable()
    torch.set_num_threads(1)
    _backend.require()
    # With this torch fills what it hands out unwritten with NaN: a result that nothing wrote shows.
    torch.use_deterministic_algorithms(True)
    taken = sum(run_call(seed) for seed in range(first, first + count))
    print(f"{count} calls, {taken} taken", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
