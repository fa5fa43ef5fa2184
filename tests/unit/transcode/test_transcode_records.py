"""Records in another codec and back: every byte, what stays, what is left as it is, what is refused."""

from __future__ import annotations

import threading
import tracemalloc

import msgspec
import numpy as np
import pytest
import torch
from codec_blocks import any_bits, normal_block, same_bits
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transcode_records import kv_bytes, lossless_record, payload_of, raw_record

from kvstore.errors import CorruptRecord, InvalidArgument
from kvstore.format.constants import DTYPE_SIZES, PAGE_BYTES, CodecId
from kvstore.format.record import checksum, decode_header, decode_record, encode_header, padded_bytes
from kvstore.transcode.pairs import PAIRS, VALUE_BYTES, mark_of, restored_bytes
from kvstore.transcode.records import SCRATCH_BYTES, restore, transcode
from kvstore_kernels.codecs import codec_of_id, get_codec
from kvstore_kernels.layout import ELEMENT_BYTES, KVLayout, Layout, MLALayout

RESTORED = [name for name, pair in PAIRS.items() if pair.restored]
KEPT = [name for name, pair in PAIRS.items() if not pair.restored]
KINDS = ["zeros", "noise", "period", "special", "bfloat16", "float16", "float32"]
KV = raw_record(kv_bytes(1 << 15), "bfloat16", (2, 2, 64, 2, 64), lineage=80)
LAYOUT = KVLayout(2, 2, 64, "bfloat16", 64)
LOSSLESS = lossless_record(normal_block(LAYOUT), LAYOUT, lineage=80)

every_restored = pytest.mark.parametrize("pair", RESTORED)


def transcoded(record: bytes, pair: str) -> bytes:
    made = transcode(record, pair)
    assert made is not None
    return bytes(made)


# ------------------------------------------------------------------ every byte


def test_pairs_of_this_test_are_all_there_are() -> None:
    assert (len(RESTORED), len(KEPT)) == (2, 1)


@every_restored
@settings(max_examples=120)
@given(
    dtype=st.sampled_from(sorted(DTYPE_SIZES)),
    dimensions=st.lists(st.integers(1, 9), min_size=0, max_size=5),
    last=st.integers(1, 40_000),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**32),
    lineage=st.integers(0, 255),
)
@example(dtype="uint8", dimensions=[], last=8 * 65536 + 4, kind="float32", seed=0, lineage=255)
@example(dtype="uint8", dimensions=[], last=4 * 65536 + 2, kind="bfloat16", seed=0, lineage=255)
@example(dtype="uint8", dimensions=[], last=300_001, kind="bfloat16", seed=0, lineage=255)
@example(dtype="float32", dimensions=[], last=65_537, kind="special", seed=0, lineage=255)
@example(dtype="bfloat16", dimensions=[], last=131_072, kind="bfloat16", seed=0, lineage=1)
def test_record_comes_back_byte_for_byte(
    pair: str, dtype: str, dimensions: list[int], last: int, kind: str, seed: int, lineage: int
) -> None:
    shape = dimensions if np.prod([*dimensions, last]) <= 1 << 20 else []
    shape = [*shape, last]
    length = int(np.prod(shape)) * DTYPE_SIZES[dtype]
    record = raw_record(payload_of(kind, length, seed), dtype, shape, lineage=lineage)

    made = transcode(record, pair)

    if made is None:
        return
    assert padded_bytes(made.nbytes) <= padded_bytes(len(record)) - PAGE_BYTES
    header, original = decode_header(made), decode_header(record)
    assert header == msgspec.structs.replace(
        original,
        codec=PAIRS[pair].target,
        codec_parameters=header.codec_parameters,
        section_bytes=(made.nbytes - 256,),
        payload_checksum=checksum(made[256:]),
    )
    assert restored_bytes(header) == len(record)
    assert restore(made) == record


@every_restored
@pytest.mark.parametrize("dtype", sorted(DTYPE_SIZES))
def test_every_dtype_is_transcoded_where_that_pays(pair: str, dtype: str) -> None:
    """The test above would pass if nothing ever got smaller."""
    record = raw_record(payload_of("period", 1 << 17, 1), dtype)
    assert restore(transcoded(record, pair)) == record
    assert len(transcoded(record, pair)) < len(record) // 4


@every_restored
@pytest.mark.parametrize("values", [65_535, 65_536, 65_537, 131_072, 200_001])
@pytest.mark.parametrize("dtype", ["float8_e5m2", "float16", "float32"])
def test_chunks_of_every_length_come_back(pair: str, dtype: str, values: int) -> None:
    payload = payload_of("period", values * DTYPE_SIZES[dtype], values)
    record = raw_record(payload, dtype, (values,))
    assert restore(transcoded(record, pair)) == record


@pytest.mark.parametrize("pair", KEPT)
@pytest.mark.parametrize("dtype", ELEMENT_BYTES)
@pytest.mark.parametrize("kind", [KVLayout(1, 5, 64, "int8", 257), MLALayout(2, 100, 24, "int8", 300)])
@settings(max_examples=8)
@given(seed=st.integers(0, 2**32), noise=st.booleans())
def test_kept_record_decodes_to_the_same_bits(pair: str, dtype: str, kind: Layout, seed: int, noise: bool) -> None:
    layout = type(kind)(*[getattr(kind, name) for name in kind.__slots__[:3]], dtype, kind.block_tokens)  # type: ignore[arg-type]
    block = any_bits(layout, seed)
    if not noise:
        # Exponents of small numbers are alike, whatever the dtype.
        block = (block.view(torch.uint8) & 0x1F).view(block.dtype)
    record = lossless_record(block, layout, PAIRS[pair].source.text)

    made = transcode(record, pair)

    if made is None:
        return
    header, payload = decode_record(made)
    codec = get_codec(PAIRS[pair].target.text)
    assert (header.codec, header.codec_parameters) == (codec.id, codec.digest)
    assert same_bits(codec.decode([payload], layout), block)
    assert restore(made) is not None
    assert mark_of(header) is None


@pytest.mark.parametrize("pair", KEPT)
def test_kept_record_is_an_ordinary_one_and_is_not_restored(pair: str) -> None:
    made = transcoded(LOSSLESS, pair)
    header, original = decode_header(made), decode_header(LOSSLESS)
    assert header == msgspec.structs.replace(
        original,
        codec=CodecId.LOSSLESS_ZSTD,
        codec_parameters=get_codec("lossless-zstd").digest,
        section_bytes=header.section_bytes,
        payload_checksum=header.payload_checksum,
    )
    assert restored_bytes(header) == len(made) < len(LOSSLESS)
    assert restore(made) == made
    assert same_bits(get_codec("lossless-zstd").decode([made[256:]], LAYOUT), normal_block(LAYOUT))


# ------------------------------------------------------------------ sizes


def test_kv_shrinks_by_its_exponents() -> None:
    """An exponent has about 2.6 bits of entropy; lz4 has no entropy coder."""
    assert len(transcoded(KV, "raw>lossless-zstd")) < 0.68 * len(KV)
    assert len(transcoded(KV, "raw>lossless")) < 0.86 * len(KV)
    assert len(transcoded(LOSSLESS, "lossless>lossless-zstd")) < 0.83 * len(LOSSLESS)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_opaque_payload_is_taken_apart_by_what_suits_it(dtype: str) -> None:
    payload = kv_bytes(1 << 16, dtype)
    opaque, typed = (transcoded(raw_record(payload, name), "raw>lossless-zstd") for name in ("uint8", dtype))
    mark = mark_of(decode_header(opaque))
    assert mark is not None
    assert mark.value_bytes == DTYPE_SIZES[dtype]
    assert len(opaque) == len(typed)


@every_restored
@pytest.mark.parametrize("length", [1, 100, 3840, 3841, 4096, 7936])
def test_record_of_few_pages_is_never_made_longer(pair: str, length: int) -> None:
    for kind in KINDS:
        record = raw_record(payload_of(kind, length, 1))
        made = transcode(record, pair)
        assert made is None or padded_bytes(made.nbytes) < padded_bytes(len(record))
        assert len(record) > PAGE_BYTES or made is None


@pytest.mark.parametrize("pair", PAIRS)
def test_noise_stays_as_it_is(pair: str) -> None:
    record = raw_record(payload_of("noise", 1 << 18, 3))
    if PAIRS[pair].source is not CodecId.RAW:
        record = lossless_record(any_bits(LAYOUT, 3), LAYOUT)
    assert transcode(record, pair) is None


@every_restored
def test_record_is_transcoded_where_exactly_one_page_is_saved(pair: str) -> None:
    """Around the border, of noise with more and more zeros: None exactly where no page is saved."""
    seen = set()
    for zeros in range(0, 12_000, 500):
        record = raw_record(payload_of("noise", 40_000 - zeros, 5) + bytes(zeros), "int8")
        made = transcode(record, pair)
        seen.add(made is not None)
        if made is not None:
            assert padded_bytes(made.nbytes) <= padded_bytes(len(record)) - PAGE_BYTES
    assert seen == {False, True}


# ------------------------------------------------------------------ what is left alone


@pytest.mark.parametrize("pair", PAIRS)
def test_records_of_other_codecs_stay_as_they_are(pair: str) -> None:
    others = [KV, LOSSLESS, lossless_record(normal_block(LAYOUT), LAYOUT, "lossless-zstd")]
    taken = [transcode(record, pair) is not None for record in others]
    source = PAIRS[pair].source
    assert taken == [source is CodecId.RAW, source is CodecId.LOSSLESS, False]


def test_transcoded_record_is_not_transcoded_again() -> None:
    for made in (transcoded(KV, "raw>lossless"), transcoded(KV, "raw>lossless-zstd")):
        assert [transcode(made, pair) for pair in PAIRS] == [None] * len(PAIRS)


def test_record_that_was_put_is_not_restored() -> None:
    for record in (KV, LOSSLESS):
        assert restore(record) == record
        assert restored_bytes(decode_header(record)) == len(record)


# ------------------------------------------------------------------ memory


@pytest.mark.parametrize("pair", PAIRS)
def test_result_lies_in_the_memory_that_was_given(pair: str) -> None:
    record = KV if PAIRS[pair].restored else LOSSLESS
    out = bytearray(padded_bytes(len(record)) - PAGE_BYTES)
    made = transcode(record, pair, memoryview(out))
    assert made == transcoded(record, pair)
    assert bytes(out[: made.nbytes]) == made
    back = np.full(len(record) + 100, 7, np.uint8)
    again = restore(made, back.data)
    if PAIRS[pair].restored:
        assert back[: len(record)].tobytes() == record == again
        assert (back[len(record) :] == 7).all()
    else:
        assert (back == 7).all()
        assert again == made


def test_memory_that_is_too_small_or_read_only_is_refused() -> None:
    most = padded_bytes(len(KV)) - PAGE_BYTES
    with pytest.raises(InvalidArgument, match=f"out must be writable memory of {most} bytes, got memory of {most - 1}"):
        transcode(KV, "raw>lossless", memoryview(bytearray(most - 1)))
    with pytest.raises(InvalidArgument, match="got read-only memory"):
        transcode(KV, "raw>lossless", memoryview(bytes(most)))
    with pytest.raises(InvalidArgument, match=f"memory of {len(KV)} bytes"):
        restore(transcoded(KV, "raw>lossless"), memoryview(bytearray(len(KV) - 1)))


def test_scratch_is_bounded_whatever_the_record() -> None:
    record = raw_record(kv_bytes(4 << 20), "bfloat16")
    out, back = (np.zeros(len(record), np.uint8).data for _ in range(2))
    for _ in range(2):  # The second time nothing is made anew.
        tracemalloc.start()
        try:
            made = transcode(record, "raw>lossless-zstd", out)
            assert made is not None
            restore(made, back)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 2 * SCRATCH_BYTES + (1 << 18)


def test_threads_do_not_share_what_they_write_to() -> None:
    records = [raw_record(kv_bytes(1 << 18, seed=seed), "bfloat16") for seed in range(4)]
    wrong: list[int] = []

    def work(number: int) -> None:
        for turn in range(6):
            pair = RESTORED[(number + turn) % 2]
            if restore(transcoded(records[number], pair)) != records[number]:
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong
    assert not any(thread.is_alive() for thread in threads)


# ------------------------------------------------------------------ what is refused


def test_unknown_pair_is_refused() -> None:
    with pytest.raises(
        InvalidArgument, match=r"unknown pair of codecs 'raw>kivi4' to transcode; there are raw>lossless"
    ):
        transcode(KV, "raw>kivi4")


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("at", [0, 40, 190, 256, 300, -1])
def test_damaged_record_is_refused(pair: str, at: int) -> None:
    record = bytearray(KV if PAIRS[pair].restored else LOSSLESS)
    record[at] ^= 1
    with pytest.raises(CorruptRecord):
        transcode(record, pair)
    made = bytearray(transcoded(KV if PAIRS[pair].restored else LOSSLESS, pair))
    made[at] ^= 1
    with pytest.raises(CorruptRecord):
        restore(made)


def test_cut_and_empty_records_are_refused() -> None:
    made = transcoded(KV, "raw>lossless")
    for record in (b"", made[:255], made[:-1], made + b"\0"):
        with pytest.raises(CorruptRecord):
            restore(record)
        with pytest.raises(CorruptRecord):
            transcode(record, "raw>lossless")


def resealed(record: bytes, section: bytes) -> bytes:
    """A record with another section and right checksums, as a program with a bug would write it."""
    header = msgspec.structs.replace(
        decode_header(record), section_bytes=(len(section),), payload_checksum=checksum(section)
    )
    return encode_header(header) + section


@every_restored
@settings(max_examples=150)
@given(at=st.integers(0, 1 << 30), bit=st.integers(0, 7), cut=st.integers(0, 20))
@example(at=-1, bit=0, cut=0)
@example(at=0, bit=0, cut=0)
@example(at=3, bit=7, cut=0)
def test_section_that_was_changed_is_never_restored_to_other_bytes(pair: str, at: int, bit: int, cut: int) -> None:
    record = raw_record(payload_of("special", 20_000, 1), "bfloat16")
    made = transcoded(record, pair)
    section = bytearray(made[256:])
    section[at % len(section)] ^= 1 << bit
    wrong = resealed(made, bytes(section[: len(section) - cut]))
    try:
        restored = restore(wrong)
    except CorruptRecord:
        return
    assert restored == record  # Bits at the end of a stream that say nothing.


def test_lossless_section_that_does_not_decode_is_refused() -> None:
    section = bytearray(LOSSLESS[256:])
    section[3] ^= 0x80
    with pytest.raises(CorruptRecord, match="a record of lossless cannot be decoded: plane 0"):
        transcode(resealed(LOSSLESS, bytes(section)), "lossless>lossless-zstd")


def test_mark_of_values_that_do_not_fit_is_refused() -> None:
    record = raw_record(payload_of("zeros", 20_001, 1), "int8")
    made = transcoded(record, "raw>lossless")
    parameters = PAIRS["raw>lossless"].parameters(2)
    header = msgspec.structs.replace(decode_header(made), codec_parameters=parameters)
    with pytest.raises(CorruptRecord, match="20001 bytes are not whole values of 2"):
        restore(encode_header(header) + made[256:])


def test_every_width_that_a_mark_may_say_is_tried_in_these_tests() -> None:
    assert sorted(set(DTYPE_SIZES.values())) == sorted(VALUE_BYTES)
    assert codec_of_id(CodecId.LOSSLESS_ZSTD).name == "lossless-zstd"
