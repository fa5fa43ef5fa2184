"""The codecs once more, from ``docs/codecs.md`` alone: numpy and plain loops, nothing of the package but the layouts.

Written for comparison, not for speed: bits are placed one code at a time, by the formulas of the page as they stand
there, and numbers of eight bits are found by search. It decodes from the same formulas.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kvstore_kernels.layout import Layout, Rule

F32: Final = np.float32
LIMIT, FLOOR = F32(61440), np.uint16(0x00A8).view(np.float16).astype(F32)
LEVELS: Final = {
    4: [263, 795, 1345, 1930, 2573, 3314, 4237, 5596],
    3: [502, 1548, 2752, 4407],
    2: [927, 3093],
}
THRESHOLDS: Final = {4: [529, 1070, 1637, 2251, 2943, 3776, 4917], 3: [1025, 2150, 3580], 2: [2010]}
WIDTHS: Final = {"4": (4, 4), "3": (3, 3), "2": (2, 2), "4-3": (4, 3), "4-2": (4, 2), "3-2": (3, 2)}
"""Bits a key and a value of turbo and centred codecs, by what follows their names."""

Array = NDArray[Any]


def encode(codec: str, layout: Layout, block: Array) -> tuple[list[bytes], int]:
    """Sections and void groups.

    Args:
        block: the block's values as float32; bytes of exact planes are cut from the dtype's own bytes by the caller.
    """
    sections, void_groups = [], 0
    for planes, x in zip(layout.planes, layout.split(block), strict=True):
        if planes.rule is Rule.EXACT:
            sections.append(b"")
            continue
        regions: list[list[bytes]] = []
        for plane in x.reshape(-1, *x.shape[2:]):
            parts, void = encode_plane(codec, planes.rule, plane)
            regions.append(parts)
            void_groups += void
        sections.append(b"".join(b"".join(parts[at] for parts in regions) for at in range(len(regions[0]))))
    return sections, void_groups


def encode_plane(codec: str, rule: Rule, x: Array) -> tuple[list[bytes], int]:
    """The regions of one plane ``[T, D]``, and its void groups."""
    with np.errstate(all="ignore"):
        bits = rotated_bits(codec, rule)
        if bits:
            return _centred(x, bits) if is_centred(codec, rule) else _turbo(x, bits)
        if codec == "fp8":
            return _fp8(x)
        if codec == "int8":
            return _int8(x)
        if codec in ("kivi4", "kivi2") and rule is Rule.CHANNEL:
            return _kivi_key(x, 4 if codec == "kivi4" else 2)
        return _kivi2_value(x) if codec == "kivi2" else _int4(x)


def rotated_bits(codec: str, rule: Rule) -> int:
    """Bits of a rotated code, 0 where codes are not rotated."""
    match = re.fullmatch("(?:turbo|centred)(.*)", codec)
    return WIDTHS[match[1]][rule is Rule.TOKEN] if match else 0


def is_centred(codec: str, rule: Rule) -> bool:
    return codec.startswith("centred") and rule is Rule.CHANNEL


def f16(x: Any) -> Any:
    rounded = np.float16(F32(x))
    return F32(0) if rounded == 0 else F32(rounded)


def _half(*numbers: Any) -> bytes:
    return np.array(numbers, np.float16).tobytes()


def _is_void(group: Array) -> bool:
    return bool((~np.isfinite(group)).any() or (np.abs(group) > LIMIT).any())


def _symmetric(group: Array, quotient: int) -> tuple[Array, Any, bool]:
    if _is_void(group):
        return np.zeros_like(group), F32(0), True
    scale = max(f16(np.abs(group).max() * F32(1 / quotient)), FLOOR)
    return group * (F32(1) / scale), scale, False


def _asymmetric(group: Array, bits: int) -> tuple[list[int], Any, Any, bool]:
    if _is_void(group):
        return [0] * len(group), F32(0), F32(0), True
    low, high, most = group.min(), group.max(), F32(2**bits - 1)
    minimum = f16(low)
    scale = max(f16((high - low) * F32(1 / (2**bits - 1))), FLOOR)
    inverse = F32(1) / scale
    codes = [int(np.rint(min(max((value - minimum) * inverse, F32(0)), most))) for value in group]
    return codes, scale, minimum, False


E4M3: Final = [(1 + (c & 7) / 8) * 2.0 ** ((c >> 3) - 7) if c >> 3 else (c & 7) / 8 * 2.0**-6 for c in range(127)]
"""Magnitudes of E4M3 by their code; 127 is NaN."""


def e4m3_code(y: float) -> int:
    """Code of the nearest E4M3 number, of two the even one."""
    magnitude = min(abs(y), 448.0)
    nearest = min(range(127), key=lambda code: (abs(E4M3[code] - magnitude), code & 1))
    return nearest | (0x80 if math.copysign(1, y) < 0 else 0)


def _fp8(x: Array) -> tuple[list[bytes], int]:
    codes, scales, voids = b"", b"", 0
    for at in range(0, len(x), 64):
        y, scale, void = _symmetric(x[at : at + 64].reshape(-1), 448)
        codes += bytes(e4m3_code(float(value)) for value in y)
        scales += _half(scale)
        voids += void
    return [codes, scales], voids


def _int8(x: Array) -> tuple[list[bytes], int]:
    codes, scales, voids = b"", b"", 0
    for token in x:
        y, scale, void = _symmetric(token, 127)
        codes += bytes(int(np.rint(value)) & 255 for value in y)
        scales += _half(scale)
        voids += void
    return [codes, scales], voids


def _int4(x: Array) -> tuple[list[bytes], int]:
    group = 64 if x.shape[1] % 64 == 0 else 32 if x.shape[1] % 32 == 0 else 16
    out, parameters, voids = bytearray(), b"", 0
    for values in x.reshape(-1, group):
        codes, scale, minimum, void = _asymmetric(values, 4)
        if group == 64:
            for j in range(8):
                word = 0
                for k in range(4):
                    word |= (codes[16 * k + 2 * j] | codes[16 * k + 2 * j + 1] << 4) << (8 * k)
                out += word.to_bytes(4, "little")
        else:
            out += bytes(codes[i] | codes[i + 1] << 4 for i in range(0, group, 2))
        parameters += _half(scale, minimum)
        voids += void
    return [bytes(out), parameters], voids


def _kivi_key(x: Array, bits: int) -> tuple[list[bytes], int]:
    group, fit = (64, 4) if bits == 4 else (32, 8)
    out, parameters, voids = bytearray(), b"", 0
    for at in range(0, len(x), group):
        channels = [_asymmetric(channel, bits) for channel in x[at : at + group].T]
        for first in range(0, group, fit):
            for j in range(x.shape[1] // 2):
                word = 0
                for t in range(fit):
                    place = 2 * bits * t
                    word |= channels[2 * j][0][first + t] << place
                    word |= channels[2 * j + 1][0][first + t] << (place + bits)
                out += word.to_bytes(4, "little")
        parameters += _half(*(scale for _, scale, _, _ in channels))
        parameters += _half(*(minimum for _, _, minimum, _ in channels))
        voids += sum(void for *_, void in channels)
    return [bytes(out), parameters], voids


def _kivi2_value(x: Array) -> tuple[list[bytes], int]:
    dim = x.shape[1]
    group = 32 if dim % 32 == 0 else 16
    out, parameters, voids = bytearray(), b"", 0
    for token in x:
        codes: list[int] = []
        for values in token.reshape(-1, group):
            of_group, scale, minimum, void = _asymmetric(values, 2)
            codes += of_group
            parameters += _half(scale, minimum)
            voids += void
        if dim % 64 == 0:
            for first in range(0, dim, 64):
                for j in range(8):
                    word = 0
                    for i in range(4):
                        word |= codes[first + 16 * i + 2 * j] << (4 * i)
                        word |= codes[first + 16 * i + 2 * j + 1] << (4 * i + 2)
                    out += word.to_bytes(2, "little")
        else:
            out += bytes(sum(codes[i + e] << (2 * e) for e in range(4)) for i in range(0, dim, 4))
    return [bytes(out), parameters], voids


def sign(i: int) -> int:
    return hashlib.sha256(b"kvstore turbo signs").digest()[i // 8] >> (i % 8) & 1


def butterfly(x: Array) -> Array:
    x, distance = x.copy(), 1
    while distance < len(x):
        for i in range(len(x)):
            if not i & distance:
                x[i], x[i + distance] = x[i] + x[i + distance], x[i] - x[i + distance]
        distance *= 2
    return x


def sum_of_squares(x: Array) -> Any:
    pairs = [x[2 * j] * x[2 * j] + x[2 * j + 1] * x[2 * j + 1] for j in range(len(x) // 2)]
    while len(pairs) > 1:  # rows of 8, then lanes: halving the flat list is both
        middle = len(pairs) // 2
        pairs = [pairs[i] + pairs[i + middle] for i in range(middle)]
    return pairs[0]


def _turbo(x: Array, bits: int) -> tuple[list[bytes], int]:
    size = _vector_size(x.shape[1])
    magnitudes: list[int] = []
    signs: list[int] = []
    scales, voids = b"", 0
    for vector in x.reshape(-1, size):
        squares = sum_of_squares(vector)
        void = bool(not squares <= F32(2.0**26))
        voids += void
        if void or squares < F32(2.0**-40):
            magnitudes += [0] * size
            signs += [0] * size
            scales += _half(0)
            continue
        norm = np.sqrt(squares)
        turned = butterfly(np.array([-v if sign(i) else v for i, v in enumerate(vector)], F32))
        whole = [int(np.rint(value * (F32(2048) / norm))) for value in turned]
        index = [sum(abs(value) > threshold for threshold in THRESHOLDS[bits]) for value in whole]
        dot = sum(abs(value) * LEVELS[bits][m] for value, m in zip(whole, index, strict=True))
        magnitudes += index
        signs += [int(value < 0) for value in whole]
        scales += _half(f16((norm * F32(math.sqrt(size) * 2.0**22)) / F32(dot)))
    packed = [_pack_rows(magnitudes, signs, bits)]
    if bits == 3:
        flags = bytearray()
        for row in range(0, len(signs), 128):
            flags += bytes(sum(signs[row + 16 * j + i] << j for j in range(8)) for i in range(16))
        packed.append(bytes(flags))
    return [*packed, scales], voids


def _vector_size(dim: int) -> int:
    return next(size for size in (128, 64, 32, 16) if dim % size == 0)


def _group_size(tokens: int) -> int:
    return 64 if tokens % 128 else 128


def power(k: int, *, down: bool) -> Any:
    """2^(k/2), or its inverse, of k brought into its bounds."""
    k = min(max(k, -20), 20)
    return F32(2.0 ** (-k / 2 if down else k / 2))


def _centred(x: Array, bits: int) -> tuple[list[bytes], int]:
    size, voids = _vector_size(x.shape[1]), 0
    x, w = x.copy(), np.zeros_like(x)
    vectors = [slice(at, at + size) for at in range(0, x.shape[1], size)]
    far: list[bool] = []
    scales, codes, exponents = b"", b"", b""
    for token in x:
        for vector in vectors:
            if not sum_of_squares(token[vector]) <= F32(2.0**26):
                token[vector], voids = 0, voids + 1
                token[vector.start] = np.nan  # Marks it until its group is centred.
    for first in range(0, len(x), _group_size(len(x))):
        group = x[first : first + _group_size(len(x))]
        marked = np.isnan(group)
        group[marked] = 0
        mean = [_sum(column) * F32(1 / len(group)) for column in group.T]
        quotients, scale, _ = _symmetric(np.array(mean, F32), 127)
        code = np.rint(quotients)
        centred = group - code * scale
        chosen = group.copy()
        for t in range(len(group)):
            for vector in vectors:
                beyond = bool(marked[t, vector].any())
                beyond = beyond or bool(sum_of_squares(group[t, vector]) < sum_of_squares(centred[t, vector]))
                far.append(beyond)
                if not beyond:
                    chosen[t, vector] = centred[t, vector]
        for d, column in enumerate(chosen.T):
            bits_of_sum = int(np.array(_sum(column * column), F32).view(np.uint32))
            k = min(max(((bits_of_sum >> 23) - 127 + 1) >> 1, -20), 20)
            exponents += k.to_bytes(1, "little", signed=True)
            w[first : first + len(group), d] = column * power(k, down=True)
        scales += _half(scale)
        codes += code.astype(np.int8).tobytes()
    *parts, turbo_scales = _turbo(w, bits)[0]
    signed = [-value if beyond else value for value, beyond in zip(np.frombuffer(turbo_scales, "f2"), far, strict=True)]
    return [*parts, _half(*signed), scales, codes, exponents], voids


def _sum(numbers: Array) -> Any:
    total = numbers[0]
    for number in numbers[1:]:
        total = total + number
    return total


def _pack_rows(magnitudes: list[int], signs: list[int], bits: int) -> bytes:
    codes = magnitudes if bits == 3 else [m + (s << (bits - 1)) for m, s in zip(magnitudes, signs, strict=True)]
    width = 2 if bits == 3 else bits
    a_word = 16 // width
    out = bytearray()
    for first in range(0, len(codes), 16 * a_word):
        for i in range(16):
            word = sum(codes[first + 16 * j + i] << (width * j) for j in range(a_word))
            out += word.to_bytes(2, "little")
    return bytes(out)


# ------------------------------------------------------------------ decoding


def decode(codec: str, layout: Layout, sections: list[bytes]) -> list[Array]:
    """Values of each section's planes ``[L, H, T, D]`` in float32, before they are rounded to the dtype."""
    decoded = []
    for planes, section in zip(layout.planes, sections, strict=True):
        if planes.rule is Rule.EXACT:
            decoded.append(np.zeros(0, F32))
            continue
        count, tokens, dim = planes.num_layers * planes.num_heads, layout.block_tokens, planes.dim
        sizes = [size // count for size in _region_bytes(codec, planes.rule, count * tokens, dim, count)]
        assert sum(sizes) * count == len(section)
        out = np.zeros((count, tokens, dim), F32)
        for plane in range(count):
            parts, begin = [], 0
            for size in sizes:
                parts.append(section[begin + plane * size : begin + (plane + 1) * size])
                begin += size * count
            for token, channel, value in _values(codec, planes.rule, parts, tokens, dim):
                out[plane, token, channel] = value
        decoded.append(out.reshape(planes.num_layers, planes.num_heads, tokens, dim))
    return decoded


def _region_bytes(codec: str, rule: Rule, tokens: int, dim: int, planes: int) -> list[int]:
    values = tokens * dim
    rotated = rotated_bits(codec, rule)
    if rotated:
        codes = [values // 4, values // 8] if rotated == 3 else [values * rotated // 8]
        groups = tokens // _group_size(tokens // planes) if is_centred(codec, rule) else 0
        parameters = [2 * groups, dim * groups, dim * groups] if groups else []
        return [*codes, 2 * values // math.gcd(dim, 128), *parameters]
    if codec == "fp8":
        return [values, 2 * planes * -(-tokens // planes // 64)]
    if codec == "int8":
        return [values, 2 * tokens]
    bits = 2 if codec == "kivi2" else 4
    if codec.startswith("kivi") and rule is Rule.CHANNEL:
        return [values * bits // 8, 4 * values // (16 * bits)]
    group = next(g for g in ((64, 32, 16) if bits == 4 else (32, 16)) if dim % g == 0)
    return [values * bits // 8, 4 * values // group]


def _values(codec: str, rule: Rule, parts: list[bytes], tokens: int, dim: int) -> Iterator[tuple[int, int, Any]]:
    """Token, channel and value of every element of a plane."""
    bits = rotated_bits(codec, rule)
    if bits:
        turn = _centred_values if is_centred(codec, rule) else _turbo_values
        yield from turn(parts, bits, tokens, dim)
        return
    numbers = [F32(v) for v in np.frombuffer(parts[-1], np.float16)]
    code = parts[0]
    for t in range(tokens):
        for d in range(dim):
            at = t * dim + d
            if codec == "fp8":
                magnitude = F32(E4M3[code[at] & 127]) * numbers[t // 64]
                yield t, d, -magnitude if code[at] & 128 else magnitude
            elif codec == "int8":
                yield t, d, F32(code[at] - 256 if code[at] > 127 else code[at]) * numbers[t]
            elif codec.startswith("kivi") and rule is Rule.CHANNEL:
                bits = 4 if codec == "kivi4" else 2
                group, fit = 16 * bits, 16 // bits
                word_at = 4 * (((t // fit) * (dim // 2)) + d // 2)
                word = int.from_bytes(code[word_at : word_at + 4], "little")
                number = word >> (2 * bits * (t % fit) + bits * (d % 2)) & (2**bits - 1)
                first = t // group * 2 * dim
                yield t, d, F32(number) * numbers[first + d] + numbers[first + dim + d]
            else:
                yield t, d, _by_token(codec, code, numbers, at, dim)


def _by_token(codec: str, code: bytes, numbers: list[Any], at: int, dim: int) -> Any:
    bits = 2 if codec == "kivi2" else 4
    group = next(g for g in ((64, 32, 16) if bits == 4 else (32, 16)) if dim % g == 0)
    if dim % 64 == 0:
        first, e = at // 64 * 64, at % 64
        j, k, odd = e % 16 // 2, e // 16, e % 2
        word_bytes = bits
        begin = first * bits // 8 + word_bytes * j
        word = int.from_bytes(code[begin : begin + word_bytes], "little")
        number = word >> (2 * bits * k + bits * odd) & (2**bits - 1)
    else:
        number = code[at * bits // 8] >> (at * bits % 8) & (2**bits - 1)
    return F32(number) * numbers[at // group * 2] + numbers[at // group * 2 + 1]


def _turbo_values(parts: list[bytes], bits: int, tokens: int, dim: int) -> Iterator[tuple[int, int, Any]]:
    size = math.gcd(dim, 128)
    width = 2 if bits == 3 else bits
    a_word = 16 // width
    levels = []
    for at in range(tokens * dim):
        j, i = at % (16 * a_word) // 16, at % 16
        begin = at // (16 * a_word) * 32 + 2 * i
        number = int.from_bytes(parts[0][begin : begin + 2], "little") >> (width * j) & (2**width - 1)
        if bits == 3:
            negative = parts[1][at // 128 * 16 + i] >> (at % 128 // 16) & 1
        else:
            negative, number = number >> (bits - 1), number & (2 ** (bits - 1) - 1)
        level = F32(LEVELS[bits][number]) / F32(2048)
        levels.append(-level if negative else level)
    scales = np.frombuffer(parts[-1], np.float16)
    for vector in range(len(levels) // size):
        z = butterfly(np.array(levels[vector * size : (vector + 1) * size], F32))
        factor = F32(scales[vector]) * F32(1 / math.sqrt(size))
        for i, value in enumerate(z):
            at = vector * size + i
            turned = value * factor
            yield at // dim, at % dim, -turned if sign(i) else turned


def _centred_values(parts: list[bytes], bits: int, tokens: int, dim: int) -> Iterator[tuple[int, int, Any]]:
    *turbo, mean_scales, mean_codes, exponents = parts
    scales = np.frombuffer(turbo[-1], np.float16)
    far = np.signbit(scales)
    size, length = _vector_size(dim), _group_size(tokens)
    for t, d, turned in _turbo_values([*turbo[:-1], np.abs(scales).tobytes()], bits, tokens, dim):
        at = t // length * dim + d
        value = turned * power(np.frombuffer(exponents, np.int8)[at].item(), down=False)
        if not far[(t * dim + d) // size]:
            scale = F32(np.frombuffer(mean_scales, np.float16)[t // length])
            value = value + F32(np.frombuffer(mean_codes, np.int8)[at]) * scale
        yield t, d, value
