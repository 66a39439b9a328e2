"""AdamW whose two moments are kept in bfloat16 or in 8 bits, 4 or 2.03 bytes a number in place of 8.

It computes in float32, a few million numbers at a time, and is plain PyTorch, so it runs on CPUs and GPUs, and on ZeRO's shards.

    bfloat16  the second moment is rounded up or down at random (stochastic rounding; Gupta et al. 2015): what a step adds to it is
              less than half of bfloat16's spacing, and would be lost by rounding to the nearest
    8bit      block-wise dynamic quantization (Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization", section 2.2):
              256 numbers share a float32 scale, their largest magnitude, and each has the code of one of 256 values

In 8 bits a second moment that is not 0 never becomes 0: divided by, it would make a step as large as 1 / epsilon.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

Format = Literal["bfloat16", "8bit"]
BLOCK = 256  # numbers that share a scale
CHUNK = 2**22  # numbers updated at once; a multiple of BLOCK
MOMENTS = {"exp_avg": True, "exp_avg_sq": False}  # name → whether it has a sign


class LowPrecisionAdamW(torch.optim.Optimizer):
    """AdamW with `betas` and `eps` of each group, whose state is `step` and for each moment a tensor of the parameter's shape.

    In 8 bits that tensor holds codes (uint8), and `<moment>_scale` one float32 for each `BLOCK` of them.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], kind: Format, **defaults: Any) -> None:
        super().__init__(groups, {"weight_decay": 0.0, **defaults})
        self._kind = kind
        self._scales: dict[int, tuple[Tensor, Tensor]] = {}  # address of codes → their scales, and the values of all codes
        self._shared: dict[tuple[int, int], Tensor] = {}  # address and block → values written to a block that others share

    def begin_state(self, parameter: Tensor, steps: int) -> None:
        """Sets the state of `parameter` to moments of 0 after `steps` steps."""
        state: dict[str, Tensor] = {"step": torch.tensor(float(steps))}
        for name in MOMENTS:
            dtype = torch.bfloat16 if self._kind == "bfloat16" else torch.uint8
            state[name] = torch.zeros_like(parameter, dtype=dtype)
            if self._kind == "8bit":
                state[name].fill_(int(_code_values(MOMENTS[name]).eq(0).nonzero()))
                state[f"{name}_scale"] = parameter.new_zeros(-(-parameter.numel() // BLOCK), dtype=torch.float32)
        self.state[parameter] = state
        self._scales.clear()  # an earlier state's, whose addresses the new one may have
        self._shared.clear()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Updates all parameters that have gradients, which are float32 as they are."""
        self._shared.clear()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    if not self.state[parameter]:
                        self.begin_state(parameter, 0)
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2), rate = self.state[parameter], group["betas"], group["lr"]
        state["step"] += 1
        steps = int(state["step"])
        # The same numbers after a resume: they depend on the step alone.
        noise = torch.Generator(parameter.device).manual_seed(steps)
        correction1, correction2 = 1.0 - beta1**steps, 1.0 - beta2**steps
        weights, gradients = parameter.view(-1), parameter.grad.view(-1)  # type: ignore[union-attr]
        first, second = (state[name].view(-1) for name in MOMENTS)
        for part in _chunks(weights.numel()):
            gradient = gradients[part].float()
            mean = self.read(first[part]).lerp_(gradient, 1.0 - beta1)
            square = self.read(second[part]).mul_(beta2).addcmul_(gradient, gradient, value=1.0 - beta2)
            self.write(first[part], mean)
            self.write(second[part], square, noise)
            root = square.div_(correction2).sqrt_().add_(group["eps"])
            weights[part].mul_(1.0 - rate * group["weight_decay"]).addcdiv_(mean, root, value=-rate / correction1)

    def read(self, moment: Tensor) -> Tensor:
        """Values (float32, a copy) of `moment`, a flat, contiguous part of a tensor of the state."""
        if moment.dtype != torch.uint8:
            return moment.to(torch.float32, copy=True)
        scale, values, before = self._scale_of(moment)
        blocks = (torch.arange(moment.numel(), device=moment.device) + before) // BLOCK if before else None
        decoded = values[moment.int()]
        return decoded.mul_(_repeat(scale, moment.numel()) if blocks is None else scale[blocks])

    def write(self, moment: Tensor, values: Tensor, noise: torch.Generator | None = None) -> None:
        """Sets `moment`, as in `read`, to `values`. With `noise` bfloat16 is rounded at random, else to the nearest."""
        if moment.dtype == torch.bfloat16:
            moment.copy_(values if noise is None else _round_at_random(values, noise))
        elif moment.dtype == torch.uint8:
            self._write_codes(moment, values.float())
        else:
            moment.copy_(values)

    def _write_codes(self, moment: Tensor, values: Tensor) -> None:
        scale, code_values, before = self._scale_of(moment)
        end = before + moment.numel()
        whole = _whole(moment)[_offset(moment) - before :][: -(-end // BLOCK) * BLOCK]
        if before or end < whole.numel():  # blocks at the ends hold other numbers too, which are encoded again with the new scale
            ahead, behind = self._block(whole[:BLOCK]), self._block(whole[(end - 1) // BLOCK * BLOCK :])
            values = torch.cat([ahead[:before], values, behind[behind.numel() - (whole.numel() - end) :]])
            self._set_block(whole[:BLOCK], values[:BLOCK])
            self._set_block(whole[(end - 1) // BLOCK * BLOCK :], values[(end - 1) // BLOCK * BLOCK :])
            moment = whole
        padded = torch.nn.functional.pad(values, (0, -values.numel() % BLOCK)).view(-1, BLOCK)
        scale.copy_(padded.abs().amax(dim=1))
        unit = values / _repeat(scale.clamp_min(torch.finfo(torch.float32).tiny), values.numel())
        codes = torch.bucketize(unit, (code_values[1:] + code_values[:-1]) / 2, out_int32=True)
        if code_values[0] == 0:
            codes.clamp_min_((unit > 0).int())
        moment.copy_(codes)

    def _block(self, codes: Tensor) -> Tensor:
        """Values of a block of `codes`: those written since the last step, exactly, else what the codes say."""
        values = self._shared.get((codes.untyped_storage().data_ptr(), _offset(codes)))
        return self.read(codes) if values is None else values

    def _set_block(self, codes: Tensor, values: Tensor) -> None:
        self._shared[codes.untyped_storage().data_ptr(), _offset(codes)] = values

    def _scale_of(self, moment: Tensor) -> tuple[Tensor, Tensor, int]:
        """Scales of the blocks in which the codes `moment` lie, values of all codes, and codes of the first block before them."""
        address = moment.untyped_storage().data_ptr()
        if address not in self._scales:
            self._scales = {
                state[name].untyped_storage().data_ptr(): (
                    state[f"{name}_scale"],
                    _code_values(signed).to(state[name].device),
                )
                for state in self.state.values()
                for name, signed in MOMENTS.items()
            }
        scale, values = self._scales[address]
        first, before = divmod(_offset(moment), BLOCK)
        return scale[first : -(-(_offset(moment) + moment.numel()) // BLOCK)], values, before


def _chunks(numbers: int) -> Iterator[slice]:
    return (slice(start, min(start + CHUNK, numbers)) for start in range(0, numbers, CHUNK))


def _offset(moment: Tensor) -> int:
    return int(moment.storage_offset())


def _whole(moment: Tensor) -> Tensor:
    """The flat tensor of which `moment` is a part."""
    return moment.as_strided((moment.untyped_storage().nbytes(),), (1,), 0)


def _repeat(scale: Tensor, numbers: int) -> Tensor:
    """The scale of each of `numbers` numbers, of which the first is the first of a block."""
    return scale.repeat_interleave(BLOCK)[:numbers]


@cache
def _code_values(signed: bool) -> Tensor:
    """The values in [-1, 1], or [0, 1], that codes stand for, in order: float32.

    The number of zeros before a code's first one is its decimal exponent, what follows it the fraction, so that small values are as
    exact in proportion as a few bits allow, and large ones exact to 1%.
    """
    bits = 7 if signed else 8
    magnitudes = []
    for zeros in range(bits):
        edges = torch.linspace(0.1, 1.0, 2 ** (bits - 1 - zeros) + 1, dtype=torch.float64)
        magnitudes.append((edges[:-1] + edges[1:]) / 2 * 10.0**-zeros)
    positive = torch.cat(magnitudes) / max(float(part.max()) for part in magnitudes)
    parts = [-positive, torch.zeros(1), positive] if signed else [torch.zeros(1), positive]
    return torch.cat(parts).sort().values.float()


def _round_at_random(values: Tensor, noise: torch.Generator) -> Tensor:
    """`values` (float32) as bfloat16: up or down, each as likely as the other one is far, so that the mean is right."""
    bits = values.view(torch.int32)
    low = torch.randint(0, 2**16, values.shape, generator=noise, dtype=torch.int32, device=values.device)
    return (bits + low).bitwise_and_(-(2**16)).view(torch.float32).to(torch.bfloat16)


def state_bytes(kind: Format) -> float:
    """Bytes of both moments for a number."""
    return 4.0 if kind == "bfloat16" else 2 * (1 + 4 / BLOCK)
