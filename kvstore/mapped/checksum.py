"""XXH3 (64 bits, seed 0, default secret) on raw addresses, alone or while copying, for compiled functions only.

The same value as the C library's ``xxh3_64`` for every length (``kvstore.format.record.checksum``). The algorithm is
https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md: beyond 240 bytes a stripe of 64 goes into eight
accumulators at a time, 16 stripes are a block, and the last 64 bytes count once more as a stripe of their own. A stripe
is one LLVM vector; AVX2, AVX-512 and NEON all come out of the same code. Bytes are read as little-endian words.

Covers: ``checksum_of``, ``copy_checksummed`` and the entry points for Python. Does not cover: seeds, other secrets,
hashing piecemeal. Addresses, lengths and checksums are int64; a checksum is its unsigned value's 64 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from kvstore.mapped import atomics
from kvstore.mapped.atomics import LINE_BYTES
from kvstore.mapped.compiled import compiled, inlined

__all__ = ["checksum_of", "copy_checksummed", "copy_xxh3_64", "copy_xxh3_64_nogil", "xxh3_64"]

_SECRET: Final = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221"
    "b8084674f743248ee03590e6813a264c3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
    "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364eac5ac8334d3ebc3c581a0fffa1363eb"
    "170ddd51b7f0da49d316552629d4689e2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)
_BLOCK_STRIPES: Final = 16
_SCRAMBLE_SECRET: Final = 128
_LAST_SECRET: Final = 121
_MERGE_SECRET: Final = 11
_BLOCK_BYTES: Final = LINE_BYTES * _BLOCK_STRIPES
_MIDDLE_BYTES: Final = 240
"""Longer inputs go through the accumulators."""
_SOURCE_AHEAD_BYTES: Final = 4096
"""How far ahead a long source is fetched into the second-level cache: across the end of a page."""
_TARGET_AHEAD_BYTES: Final = 1024
"""How far ahead the lines are claimed that ordinary stores are going to fill."""


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


_P32_1: Final = 0x9E3779B1
_P32_2: Final = 0x85EBCA77
_P32_3: Final = 0xC2B2AE3D
_P64_1: Final = _signed(0x9E3779B185EBCA87)
_P64_2: Final = _signed(0xC2B2AE3D27D4EB4F)
_P64_3: Final = _signed(0x165667B19E3779F9)
_P64_4: Final = _signed(0x85EBCA77C2B2AE63)
_P64_5: Final = _signed(0x27D4EB2F165667C5)
_MIX_1: Final = _signed(0x165667919E3779F9)
_MIX_2: Final = _signed(0x9FB21C651E98DF25)

_I8: Final = ir.IntType(8)
_I32: Final = ir.IntType(32)
_I64: Final = ir.IntType(64)
_STRIPE: Final = ir.VectorType(_I64, 8)
_ACCUMULATORS: Final = types.UniTuple(types.int64, 8)
_FIRST_ACCUMULATORS: Final = (_P32_3, _P64_1, _P64_2, _P64_3, _P64_4, _P32_2, _P64_5, _P32_1)


def _intrinsic(define: Callable[..., Any]) -> Any:
    """Numba's decorator, whose results mypy cannot follow."""
    return intrinsic(define)


def _every(value: int) -> ir.Constant:
    return ir.Constant(_STRIPE, [value] * 8)


def _secret_at(builder: Any, offset: Any, width: Any) -> Any:
    """The secret's words from a byte offset on; a constant of the module, thus at home in numba's cache as well."""
    name = "kvstore_xxh3_secret"
    secret = builder.module.globals.get(name)
    if secret is None:
        content = ir.Constant(ir.ArrayType(_I8, len(_SECRET)), bytearray(_SECRET))
        secret = cgutils.global_constant(builder, name, content)
        secret.unnamed_addr = True
    pointer = builder.gep(secret, [_I64(0), offset], inbounds=True)
    return builder.load(builder.bitcast(pointer, width.as_pointer()), align=1)


def _make_plain_load(width: ir.IntType) -> Any:
    @_intrinsic
    def load_plain(typing_context: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            value = builder.load(builder.inttoptr(args[0], width.as_pointer()), align=1)
            return value if width is _I64 else builder.zext(value, _I64)

        return types.int64(types.int64), generate

    return load_plain


_byte_at: Callable[[int], int] = _make_plain_load(_I8)
_half_at: Callable[[int], int] = _make_plain_load(_I32)
_word_at: Callable[[int], int] = _make_plain_load(_I64)


@_intrinsic
def _secret_word(typing_context: Any, offset: Any) -> Any:
    """Eight bytes of the secret from an offset on."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _secret_at(builder, args[0], _I64)

    return types.int64(types.int64), generate


def _make_wrapping(operation: str) -> Any:
    """Arithmetic modulo 2**64: numba's own on int64 is ``nsw``, LLVM draws conclusions from its never overflowing."""

    @_intrinsic
    def compute(typing_context: Any, left: Any, right: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return getattr(builder, operation)(*args)

        return types.int64(types.int64, types.int64), generate

    return compute


_plus: Callable[[int, int], int] = _make_wrapping("add")
_times: Callable[[int, int], int] = _make_wrapping("mul")
_shift_right: Callable[[int, int], int] = atomics.shift_right
_multiply_fold: Callable[[int, int], int] = atomics.multiply_fold


@_intrinsic
def _swap_bytes(typing_context: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bswap(args[0])

    return types.int64(types.int64), generate


def _accumulate(builder: Any, accumulators: Any, stripe: Any, secret: Any) -> Any:
    """Each accumulator takes its neighbour's word and the product of its own keyed word's halves."""
    keyed = builder.xor(stripe, secret)
    product = builder.mul(builder.and_(keyed, _every(0xFFFFFFFF)), builder.lshr(keyed, _every(32)))
    neighbours = builder.shuffle_vector(
        stripe, ir.Constant(_STRIPE, ir.Undefined), ir.Constant(ir.VectorType(_I32, 8), [1, 0, 3, 2, 5, 4, 7, 6])
    )
    return builder.add(accumulators, builder.add(product, neighbours))


def _scramble(builder: Any, accumulators: Any) -> Any:
    mixed = builder.xor(accumulators, builder.lshr(accumulators, _every(47)))
    mixed = builder.xor(mixed, _secret_at(builder, _I64(_SCRAMBLE_SECRET), _STRIPE))
    return builder.mul(mixed, _every(_P32_1))


def _load_once(builder: Any, address: Any) -> Any:
    """A stripe out of memory that another process may change: one load, whose value all uses share.

    To LLVM a load that races with a store is undefined, and each use of it might see another value. ``freeze`` makes
    it one value.
    """
    stripe = builder.load(builder.inttoptr(address, _STRIPE.as_pointer()), align=1)
    frozen = ir.Instruction(builder.block, _STRIPE, "freeze", [stripe])
    builder._insert(frozen)
    return frozen


def _plain_store(builder: Any, stripe: Any, address: Any) -> None:
    builder.store(stripe, builder.inttoptr(address, _STRIPE.as_pointer()), align=1)


def _streaming_store(builder: Any, stripe: Any, address: Any) -> None:
    stored = builder.store(stripe, builder.inttoptr(address, _STRIPE.as_pointer()), align=LINE_BYTES)
    stored.set_metadata("nontemporal", builder.module.add_metadata([_I32(1)]))


def _no_store(builder: Any, stripe: Any, address: Any) -> None:
    pass


def _prefetch(builder: Any, address: Any, *, write: int, locality: int) -> None:
    pointer = _I8.as_pointer()
    function = builder.module.declare_intrinsic(
        "llvm.prefetch", (pointer,), ir.FunctionType(ir.VoidType(), [pointer, _I32, _I32, _I32])
    )
    builder.call(function, [builder.inttoptr(address, pointer), _I32(write), _I32(locality), _I32(1)])


def _make_stripes(put: Callable[[Any, Any, Any], None], put_last: Callable[[Any, Any, Any], None]) -> Any:
    """Intrinsic that takes ``stripes`` (at least one) from a source, puts them to a target and accumulates them."""

    @_intrinsic
    def take_stripes(typing_context: Any, target: Any, source: Any, stripes: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            target, source, stripes = args

            def take(accumulators: Any, at: Any, secret_offset: Any, store: Any) -> Any:
                stripe = _load_once(builder, builder.add(source, at))
                store(builder, stripe, builder.add(target, at))
                return _accumulate(builder, accumulators, stripe, _secret_at(builder, secret_offset, _STRIPE))

            def loop(name: str, count: Any, step: int, at: Any, accumulators: Any, body: Any) -> tuple[Any, Any]:
                """Run ``body(at, accumulators)`` ``count`` times, ``step`` bytes further each time."""
                before = builder.block
                head, inside, after = (builder.append_basic_block(name + part) for part in (".head", "", ".after"))
                stop = builder.add(at, builder.mul(count, _I64(step)))
                builder.branch(head)
                builder.position_at_end(head)
                now_at, now = builder.phi(_I64), builder.phi(_STRIPE)
                now_at.add_incoming(at, before)
                now.add_incoming(accumulators, before)
                builder.cbranch(builder.icmp_signed("<", now_at, stop), inside, after)
                builder.position_at_end(inside)
                next_accumulators = body(now_at, now)
                next_at = builder.add(now_at, _I64(step))
                now_at.add_incoming(next_at, builder.block)
                now.add_incoming(next_accumulators, builder.block)
                builder.branch(head)
                builder.position_at_end(after)
                return now_at, now

            def block_ahead(start: Any, at: Any, distance: int) -> Any:
                """Address of a block to fetch, never past the last whole stripe: what lies there is not ours."""
                ahead, final = builder.add(at, _I64(distance)), builder.sub(end, _I64(_BLOCK_BYTES))
                return builder.add(start, builder.select(builder.icmp_signed("<", ahead, final), ahead, final))

            def take_block(at: Any, accumulators: Any) -> Any:
                source_ahead = block_ahead(source, at, _SOURCE_AHEAD_BYTES)
                target_ahead = block_ahead(target, at, _TARGET_AHEAD_BYTES)
                for index in range(_BLOCK_STRIPES):
                    offset = _I64(LINE_BYTES * index)
                    _prefetch(builder, builder.add(source_ahead, offset), write=0, locality=2)
                    if put is _plain_store:
                        _prefetch(builder, builder.add(target_ahead, offset), write=1, locality=3)
                    accumulators = take(accumulators, builder.add(at, offset), _I64(8 * index), put)
                return _scramble(builder, accumulators)

            def secret_of(at: Any) -> Any:
                return builder.and_(builder.lshr(at, _I64(3)), _I64(8 * (_BLOCK_STRIPES - 1)))

            def take_one(at: Any, accumulators: Any) -> Any:
                return take(accumulators, at, secret_of(at), put)

            # The last stripe is put in a way of its own, so both loops stop before it.
            end = builder.mul(stripes, _I64(LINE_BYTES))
            before_last = builder.sub(stripes, _I64(1))
            blocks, rest = builder.lshr(before_last, _I64(4)), builder.and_(before_last, _I64(_BLOCK_STRIPES - 1))
            accumulators = ir.Constant(_STRIPE, list(_FIRST_ACCUMULATORS))
            at, accumulators = loop("blocks", blocks, _BLOCK_BYTES, _I64(0), accumulators, take_block)
            at, accumulators = loop("stripes", rest, LINE_BYTES, at, accumulators, take_one)
            accumulators = take(accumulators, at, secret_of(at), put_last)
            whole_block = builder.icmp_signed("==", builder.and_(stripes, _I64(_BLOCK_STRIPES - 1)), _I64(0))
            accumulators = builder.select(whole_block, _scramble(builder, accumulators), accumulators)
            return _as_tuple(context, builder, accumulators)

        return _ACCUMULATORS(types.int64, types.int64, types.int64), generate

    return take_stripes


def _as_tuple(context: Any, builder: Any, accumulators: Any) -> Any:
    words = [builder.extract_element(accumulators, _I32(index)) for index in range(8)]
    return context.make_tuple(builder, _ACCUMULATORS, words)


_read_stripes = _make_stripes(_no_store, _no_store)
_copy_stripes = _make_stripes(_plain_store, _plain_store)
_stream_stripes = _make_stripes(_streaming_store, _plain_store)


@_intrinsic
def _take_last(typing_context: Any, accumulators: Any, address: Any) -> Any:
    """Accumulate the last 64 bytes of an input, whose stripe has a secret of its own."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = ir.Constant(_STRIPE, ir.Undefined)
        for index, word in enumerate(cgutils.unpack_tuple(builder, args[0], 8)):
            vector = builder.insert_element(vector, word, _I32(index))
        stripe = builder.load(builder.inttoptr(args[1], _STRIPE.as_pointer()), align=1)
        secret = _secret_at(builder, _I64(_LAST_SECRET), _STRIPE)
        return _as_tuple(context, builder, _accumulate(builder, vector, stripe, secret))

    return _ACCUMULATORS(_ACCUMULATORS, types.int64), generate


@inlined
def _avalanche(value: int) -> int:
    value = _times(value ^ _shift_right(value, 37), _MIX_1)
    return value ^ _shift_right(value, 32)


@inlined
def _avalanche_short(value: int) -> int:
    value = _times(value ^ _shift_right(value, 33), _P64_2)
    value = _times(value ^ _shift_right(value, 29), _P64_3)
    return value ^ _shift_right(value, 32)


@inlined
def _rotate_left(value: int, bits: int) -> int:
    return (value << bits) | _shift_right(value, 64 - bits)


@inlined
def _mix_16(address: int, offset: int) -> int:
    low, high = _word_at(address) ^ _secret_word(offset), _word_at(address + 8) ^ _secret_word(offset + 8)
    return _multiply_fold(low, high)


@inlined
def _up_to_16(address: int, length: int) -> int:
    if length > 8:
        low = _word_at(address) ^ _secret_word(24) ^ _secret_word(32)
        high = _word_at(address + length - 8) ^ _secret_word(40) ^ _secret_word(48)
        return _avalanche(_plus(_plus(_swap_bytes(low), high), _plus(_multiply_fold(low, high), length)))
    if length >= 4:
        value = _half_at(address + length - 4) | (_half_at(address) << 32)
        value ^= _secret_word(8) ^ _secret_word(16)
        value = _times(value ^ _rotate_left(value, 49) ^ _rotate_left(value, 24), _MIX_2)
        value = _times(value ^ (_shift_right(value, 35) + length), _MIX_2)
        return value ^ _shift_right(value, 28)
    if length > 0:
        first, middle, last = _byte_at(address), _byte_at(address + (length >> 1)), _byte_at(address + length - 1)
        value = (first << 16) | (middle << 24) | last | (length << 8)
        word = _secret_word(0)
        return _avalanche_short(value ^ ((word ^ _shift_right(word, 32)) & 0xFFFFFFFF))
    return _avalanche_short(_secret_word(56) ^ _secret_word(64))


@inlined
def _up_to_128(address: int, length: int) -> int:
    value = _times(length, _P64_1)
    for pair in range(_shift_right(length - 1, 5) + 1):
        value = _plus(value, _mix_16(address + 16 * pair, 32 * pair))
        value = _plus(value, _mix_16(address + length - 16 * (pair + 1), 32 * pair + 16))
    return _avalanche(value)


@inlined
def _up_to_240(address: int, length: int) -> int:
    value = _times(length, _P64_1)
    for index in range(8):
        value = _plus(value, _mix_16(address + 16 * index, 16 * index))
    value = _avalanche(value)
    for index in range(8, _shift_right(length, 4)):
        value = _plus(value, _mix_16(address + 16 * index, 16 * (index - 8) + 3))
    return _avalanche(_plus(value, _mix_16(address + length - 16, 119)))


@inlined
def _short_checksum(address: int, length: int) -> int:
    if length <= 16:
        return _up_to_16(address, length)
    if length <= 128:
        return _up_to_128(address, length)
    return _up_to_240(address, length)


@inlined
def _merged(accumulators: tuple[int, ...], last_stripe: int, length: int) -> int:
    words = _take_last(accumulators, last_stripe)
    value = _times(length, _P64_1)
    for pair in range(4):
        offset = _MERGE_SECRET + 16 * pair
        left, right = words[2 * pair] ^ _secret_word(offset), words[2 * pair + 1] ^ _secret_word(offset + 8)
        value = _plus(value, _multiply_fold(left, right))
    return _avalanche(value)


@inlined
def checksum_of(address: int, length: int) -> int:
    """xxh3_64 of ``length`` bytes (at least 0)."""
    if length <= _MIDDLE_BYTES:
        return _short_checksum(address, length)
    accumulators = _read_stripes(0, address, _shift_right(length - 1, 6))
    return _merged(accumulators, address + length - LINE_BYTES, length)


@inlined
def copy_checksummed(target: int, source: int, length: int, streaming: int) -> int:
    """Copy and hash in one pass; the result is xxh3_64 of what now stands in the target.

    That holds even if another process changes the source meanwhile: each stripe is loaded once, and the rest, whose
    bytes count twice or are fewer than a stripe, is hashed out of the target, which is the caller's alone. The two
    ranges must not overlap.

    Args:
        target: any alignment; bytes outside ``length`` are not written.
        source: any alignment.
        length: bytes, at least 0.
        streaming: not 0 to bypass the caches with non-temporal stores, where the target is aligned to 64 (elsewhere
            and for short lengths the stores are ordinary). ``fence_streams`` has been done when this returns.
    """
    if length <= _MIDDLE_BYTES:
        atomics.copy(target, source, length)
        atomics.fence_acquire()
        return _short_checksum(target, length)
    stripes = _shift_right(length - 1, 6)
    copied = stripes * LINE_BYTES
    streams = streaming != 0 and target & (LINE_BYTES - 1) == 0
    accumulators = _stream_stripes(target, source, stripes) if streams else _copy_stripes(target, source, stripes)
    atomics.copy(target + copied, source + copied, length - copied)
    # The last 64 bytes lie in the tail and in the last whole stripe. Both were stored with ordinary stores even when
    # streaming: reading them back hits the cache instead of waiting for a write-combining buffer to reach memory. The
    # fence keeps LLVM from taking them out of the source again.
    atomics.fence_acquire()
    checksum = _merged(accumulators, target + length - LINE_BYTES, length)
    if streams:
        atomics.fence_streams()
    return checksum


@compiled("int64(int64, int64)")
def xxh3_64(address: int, length: int) -> int:
    """``checksum_of``, for Python."""
    return checksum_of(address, length)


@compiled("int64(int64, int64, int64, int64)")
def copy_xxh3_64(target: int, source: int, length: int, streaming: int) -> int:
    """``copy_checksummed``, for Python."""
    return copy_checksummed(target, source, length, streaming)


@compiled("int64(int64, int64, int64, int64)", nogil=True)
def copy_xxh3_64_nogil(target: int, source: int, length: int, streaming: int) -> int:
    """``copy_checksummed`` without the interpreter lock, for long copies beside other threads."""
    return copy_checksummed(target, source, length, streaming)
