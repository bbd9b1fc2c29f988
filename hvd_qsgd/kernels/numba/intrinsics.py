"""32-bit operations that Numba's own typing would widen to 64 bits.

Numba types ``uint32 * uint32`` as uint64, and the vector multiplication of 64-bit products
has half the lanes. These intrinsics emit the 32-bit instructions directly.
"""

from __future__ import annotations

import llvmlite.ir as ir
from numba import types
from numba.extending import intrinsic

from hvd_qsgd.codecs.random_words import MULTIPLIER_1, MULTIPLIER_2

I32 = ir.IntType(32)


def constant(value: int) -> ir.Constant:
    return ir.Constant(I32, value)


@intrinsic
def random_word(typingctx, index, key_low, key_high):  # type: ignore[no-untyped-def]
    """One word of :func:`hvd_qsgd.codecs.random_words.words`; all arguments and the result are uint32."""

    def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        index, key_low, key_high = arguments
        h = builder.add(index, key_low)
        h = builder.xor(h, builder.lshr(h, constant(16)))
        h = builder.mul(h, constant(MULTIPLIER_1))
        h = builder.xor(h, builder.lshr(h, constant(15)))
        h = builder.add(h, key_high)
        h = builder.mul(h, constant(MULTIPLIER_2))
        return builder.xor(h, builder.lshr(h, constant(15)))

    return types.uint32(types.uint32, types.uint32, types.uint32), codegen


@intrinsic
def low_half(typingctx, word):  # type: ignore[no-untyped-def]
    """Bits 0..15 of a uint32, as int32."""
    return types.int32(types.uint32), lambda c, builder, s, a: builder.and_(a[0], constant(0xFFFF))


@intrinsic
def high_half(typingctx, word):  # type: ignore[no-untyped-def]
    """Bits 16..31 of a uint32, as int32."""
    return types.int32(types.uint32), lambda c, builder, s, a: builder.lshr(a[0], constant(16))


@intrinsic
def offset_level(typingctx, scaled, fraction, offset):  # type: ignore[no-untyped-def]
    """``(rint(scaled) + fraction + offset) >> 16``: a level plus s, as int32.

    ``scaled`` is float32 within 2^24 of zero; the others are int32.
    """

    def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        scaled, fraction, offset = arguments
        rint = builder.module.declare_intrinsic("llvm.rint", [ir.FloatType()])
        fixed = builder.fptosi(builder.call(rint, [scaled]), I32)
        value = builder.add(builder.add(fixed, fraction), offset)
        return builder.lshr(value, constant(16))

    return types.int32(types.float32, types.int32, types.int32), codegen


@intrinsic
def move_field(typingctx, byte, right, mask, left):  # type: ignore[no-untyped-def]
    """``((byte >> right) & mask) << left`` on uint8, without leaving 8 bits."""

    def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        byte, right, mask, left = arguments
        return builder.shl(builder.and_(builder.lshr(byte, right), mask), left)

    return types.uint8(types.uint8, types.uint8, types.uint8, types.uint8), codegen


@intrinsic
def join_bytes(typingctx, a, b):  # type: ignore[no-untyped-def]
    """``a | b`` on uint8."""
    return types.uint8(types.uint8, types.uint8), lambda c, builder, s, arguments: builder.or_(*arguments)


@intrinsic
def dequantize(typingctx, code, zero, scale, unit):  # type: ignore[no-untyped-def]
    """``scale * (float32(code - zero) * unit)``; ``code`` is uint8, ``zero`` int32."""

    def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        code, zero, scale, unit = arguments
        level = builder.sitofp(builder.sub(builder.zext(code, I32), zero), ir.FloatType())
        return builder.fmul(scale, builder.fmul(level, unit))

    return types.float32(types.uint8, types.int32, types.float32, types.float32), codegen


@intrinsic
def add_level(typingctx, word, code, zero, shift):  # type: ignore[no-untyped-def]
    """``word + ((code - zero) << shift)`` on int32, modulo 2^32."""

    def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        word, code, zero, shift = arguments
        return builder.add(word, builder.shl(builder.sub(code, zero), shift))

    return types.int32(types.int32, types.int32, types.int32, types.int32), codegen


@intrinsic
def level_of(typingctx, word, offset, shift, mask, largest):  # type: ignore[no-untyped-def]
    """``(((word + offset) >> shift) & mask) - largest`` on int32, modulo 2^32; the shift fills with zeros."""

    def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        word, offset, shift, mask, largest = arguments
        digit = builder.and_(builder.lshr(builder.add(word, offset), shift), mask)
        return builder.sub(digit, largest)

    return types.int32(*[types.int32] * 5), codegen


@intrinsic
def float_of(typingctx, bits):  # type: ignore[no-untyped-def]
    """The float32 with these bits, a uint32."""
    return types.float32(types.uint32), lambda c, builder, s, a: builder.bitcast(a[0], ir.FloatType())


@intrinsic
def bits_of(typingctx, value):  # type: ignore[no-untyped-def]
    """The bits of a float32, as uint32."""
    return types.uint32(types.float32), lambda c, builder, s, a: builder.bitcast(a[0], I32)
