"""2, 3 and 4 bits on average by SLiM-LLM: groups of columns that matter more get a bit more, others a bit less."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from qratk.core.errors import ConfigurationError, QuantizationError
from qratk.quantizers._checks import require_finite
from qratk.quantizers._compensation import compensated, inverse_factor, require_moments
from qratk.quantizers.base import Moments, PackedBytes, Quantizer, quantizers

if TYPE_CHECKING:
    import torch

_SMALLER_GROUPS = (64, 32, 16, 8)
_STEPS = 20  # of the calibration to each side of the whole range
_SALIENT = 3.0  # standard deviations above the mean


@quantizers.register("slim")
@dataclass(frozen=True)
class SlimQuantizer(Quantizer):
    """GPTQ with bits by group: as many groups one bit up as down (Huang et al. 2024, arXiv:2405.14917).

    A group is `group_size` neighbouring columns of all rows; each row of it has a scale and a zero point. Salience of a
    weight is w^2 / [U]_jj^2, with U the Cholesky factor of the inverse second moment of the inputs. Salience-determined
    bit allocation: the k most salient groups get a bit more and the k least salient ones a bit less, with the k of the
    least output error after rounding to nearest. Salience-weighted quantiser calibration: scales between 1 - `range`
    and 1 + `range` times that of the whole range are tried, for the least sum of two norms of the error: over the
    salient weights of the group (salience over three standard deviations above its mean), and over the others.
    Then Algorithm 1 of GPTQ.

    Departures: the paper compares outputs by the divergence of their softmax on calibration tokens, of which only the
    second moment is known here: the error is E ||(W - Q(W)) x||^2, and k may be 0. Its groups of 1 bit are a
    sign times a scale plus a mean; here the mean is left out.

    Codes take exactly `bits` bits a weight on average, as do zero points. There is no native layer: no library has
    groups of different bits. Without moments, as in `quantize`, all groups have the same bits.

    Args:
        group_size: columns that share a bit-width; d_in must divide by it, and d_out by 8.
        metadata_dtype: type of scales. In float16 a scale cannot be under 6e-8: smaller weights become zero.
        range: how far scales are tried from that of the whole range, as a share of it. The paper has 0.1; at 2 bits
            more of it, as in 0.6, clips more.
        damping: share of the mean diagonal of E[x x^T] that is added to the diagonal.
    """

    group_size: int = 64
    metadata_dtype: Literal["float16", "bfloat16"] = "float16"
    range: float = 0.1
    damping: float = 0.01

    calibrated: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.group_size < 8 or self.group_size % 8:
            raise ConfigurationError(f"group_size must be a multiple of 8, as 64; got {self.group_size}")
        if self.metadata_dtype not in ("float16", "bfloat16"):
            raise ConfigurationError(f"metadata_dtype must be 'float16' or 'bfloat16', got {self.metadata_dtype!r}")
        if not 0 <= self.range < 1:
            raise ConfigurationError(f"range must be at least 0 and below 1, as 0.1; got {self.range}")
        if not 0 < self.damping <= 1:
            raise ConfigurationError(f"damping must be above 0 and at most 1, as 0.01; got {self.damping}")

    @property
    def supported_bits(self) -> tuple[int, ...]:
        """2, 3 and 4."""
        return (2, 3, 4)

    def alternatives(self) -> tuple[Self, ...]:
        """The same with smaller groups, largest first: what to try for a shape that this one cannot take."""
        return tuple(replace(self, group_size=size) for size in _SMALLER_GROUPS if size < self.group_size)

    def check(self, shape: tuple[int, int], bits: int) -> None:
        """Raise `QuantizationError` when columns do not divide into groups, or rows into bytes."""
        if bits not in self.supported_bits:
            raise QuantizationError(f"'slim' does {self.supported_bits} bits, got {bits}")
        if shape[0] % 8 or shape[1] % self.group_size:
            raise QuantizationError(
                f"'slim': a weight of {shape[0]} x {shape[1]} does not divide into bytes of 8 rows and groups of "
                f"{self.group_size} columns; give a smaller group_size or another quantizer"
            )

    def packed_bytes(self, shape: tuple[int, int], bits: int) -> PackedBytes:
        """`bits` bits a weight; for each group a byte, and for each row of it two bytes of scale and `bits` bits."""
        self.check(shape, bits)
        groups = shape[1] // self.group_size
        return PackedBytes(shape[0] * shape[1] * bits // 8, groups * (1 + 2 * shape[0] + shape[0] * bits // 8))

    def quantize(self, weight: torch.Tensor, bits: int) -> dict[str, torch.Tensor]:
        """`codes`, `zero` and `widths` uint8, and `scale` (d_out, groups); all groups have the same bits."""
        import torch

        self._require(weight, bits)
        dense = weight.detach().float()
        widths = [bits] * (weight.shape[1] // self.group_size)
        one = torch.ones(weight.shape[1], device=weight.device)
        codes, scale, zero = self._nearest(dense, widths, one)
        return self._packed(codes, scale, zero, widths)

    def quantize_calibrated(self, weight: torch.Tensor, bits: int, moments: Moments) -> dict[str, torch.Tensor]:
        """As `quantize`, with the bits of each group by salience, and errors made up for."""
        self._require(weight, bits)
        require_moments("'slim'", weight, moments)
        dense, size = weight.detach().float(), self.group_size
        factor = inverse_factor(moments.second.double(), self.damping).float()
        scaled = factor.diagonal().square()
        widths = self._widths(dense, bits, scaled, moments.second)
        empty = dense.new_empty(len(dense), len(widths))
        codes, scale, zero = compensated(
            dense,
            size,
            factor,
            (empty, empty.clone()),
            lambda group, values, step, offset: _codes(values, step, offset, widths[group]),
            grid_of=lambda group, own: self._grid(own, widths[group], scaled[group * size : (group + 1) * size]),
        )
        return self._packed(codes, scale, zero, widths)

    def _require(self, weight: torch.Tensor, bits: int) -> None:
        self.check((weight.shape[0], weight.shape[1]), bits)
        require_finite("slim", weight)

    def _widths(self, weight: torch.Tensor, bits: int, scaled: torch.Tensor, second: torch.Tensor) -> list[int]:
        """Bits of each group, by salience."""
        import torch

        size, groups = self.group_size, weight.shape[1] // self.group_size
        salience = (weight.square() / scaled).sum(dim=0).reshape(groups, size).sum(dim=1)
        order = torch.argsort(salience, stable=True).tolist()
        left = {b: weight - self._dense(weight, b, scaled) for b in (bits - 1, bits, bits + 1)}
        best, least = [bits] * groups, float("inf")
        widths = list(best)
        for k in range(groups // 2 + 1):
            if k:
                widths[order[k - 1]], widths[order[-k]] = bits - 1, bits + 1
            error = torch.cat([left[b][:, g * size : (g + 1) * size] for g, b in enumerate(widths)], dim=1)
            cost = float(((error @ second) * error).sum())
            if cost < least:
                best, least = list(widths), cost
        return best

    def _dense(self, weight: torch.Tensor, bits: int, scaled: torch.Tensor) -> torch.Tensor:
        codes, scale, zero = self._nearest(weight, [bits] * (weight.shape[1] // self.group_size), scaled)
        size = self.group_size
        return (codes - zero.repeat_interleave(size, dim=1)) * scale.repeat_interleave(size, dim=1)

    def _nearest(
        self, weight: torch.Tensor, widths: Sequence[int], scaled: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Codes, and scales and zero points (d_out, groups), rounded to nearest."""
        import torch

        codes, scales, zeros = torch.empty_like(weight), [], []
        for group, bits in enumerate(widths):
            columns = slice(group * self.group_size, (group + 1) * self.group_size)
            scale, zero = self._grid(weight[:, columns], bits, scaled[columns])
            codes[:, columns] = _codes(weight[:, columns], scale, zero, bits)
            scales.append(scale)
            zeros.append(zero)
        return codes, torch.cat(scales, dim=1), torch.cat(zeros, dim=1)

    def _grid(self, weight: torch.Tensor, bits: int, scaled: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero point (d_out, 1) of a group's weights (d_out, group_size), by the salience of each."""
        import torch

        from qratk.quantizers._search import rounded_scale, searched_grid

        dtype = getattr(torch, self.metadata_dtype)
        if bits == 1:
            scale = rounded_scale(2 * weight.abs().mean(dim=1, keepdim=True), dtype)
            return scale, torch.full_like(scale, 0.5)
        salience = weight.square() / scaled
        salient = salience > salience.mean() + _SALIENT * salience.std()

        def loss(errors: torch.Tensor, rows: slice) -> torch.Tensor:
            squares = errors.square_()
            both = squares.sum(dim=-1)
            own = (squares * salient[rows]).sum(dim=-1)
            return own.sqrt() + (both - own).clamp_(min=0).sqrt_()

        factors = [1.0]
        for step in range(1, _STEPS + 1) if self.range else ():
            factors += [1.0 + self.range * step / _STEPS, 1.0 - self.range * step / _STEPS]
        return searched_grid(weight, bits, factors=factors, dtype=dtype, loss=loss, fit=False)

    def _packed(
        self, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, widths: Sequence[int]
    ) -> dict[str, torch.Tensor]:
        """Rows of codes are the groups one after the other; zero points are the groups' columns one after the other."""
        import torch

        from qratk.quantizers.bitstream import pack_bits

        size = self.group_size
        rows = [pack_bits(codes[:, g * size : (g + 1) * size], bits) for g, bits in enumerate(widths)]
        zeros = [pack_bits(zero[:, g].floor(), bits) for g, bits in enumerate(widths)]  # of one bit: there is none
        return {
            self.CODES: torch.cat(rows, dim=1),
            "scale": scale.to(getattr(torch, self.metadata_dtype)),
            "zero": torch.cat(zeros),
            "widths": torch.tensor(widths, dtype=torch.uint8, device=codes.device),
        }

    def dequantize(
        self, packed: dict[str, torch.Tensor], shape: tuple[int, int], bits: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """Weight (d_out, d_in), in `dtype` throughout."""
        import torch

        from qratk.quantizers.bitstream import unpack_bits

        (d_out, d_in), size, widths = shape, self.group_size, packed["widths"].tolist()
        dense = torch.empty(d_out, d_in, dtype=dtype, device=packed[self.CODES].device)
        first = 0  # in bits of a group's share
        for group, width in enumerate(widths):
            begin, end = first, first + width
            codes = unpack_bits(packed[self.CODES][:, begin * size // 8 : end * size // 8], width).to(dtype)
            zero = unpack_bits(packed["zero"][begin * d_out // 8 : end * d_out // 8], width).to(dtype)
            zero = torch.full_like(zero, 0.5) if width == 1 else zero
            columns = slice(group * size, (group + 1) * size)
            torch.mul(codes.sub_(zero[:, None]), packed["scale"][:, [group]].to(dtype), out=dense[:, columns])
            first = end
        return dense


def _codes(values: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int) -> torch.Tensor:
    from qratk.quantizers._search import codes_on

    return codes_on(values, scale, zero, 2**bits - 1)
