"""Which directories and sizes the SSD tier refuses, with which words, and that it touches nothing of them."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import pytest
import xxhash
from fakes.faulty_disk import FaultyDirectory

from kvstore.errors import KVStoreError, ResourceTaken, SettingsError
from kvstore.format.constants import PAGE_BYTES
from kvstore.observability.logs import get_log
from kvstore.policy.lru import Lru
from kvstore.server.ssd import SsdTier
from kvstore.settings import SsdSettings
from kvstore.tiers.disk import SsdDirectory

MIB = 1 << 20
SLAB_BYTES = 128 << 10


async def opened(path: Path, *, directory: Any = None, slot_bytes: int = SLAB_BYTES, **settings: Any) -> SsdTier:
    values = {"capacity_bytes": 8 * MIB, "slab_bytes": SLAB_BYTES, **settings}
    return await SsdTier.open(SsdSettings(directory=path, **values), slot_bytes, Lru(), lambda: 0, get_log(), directory)


async def close(tier: SsdTier) -> None:
    """What ``stop`` does of a tier that was not started."""
    await tier._recovered.log.close()
    tier._slabs.close()
    tier.directory.close()


async def refused(path: Path, words: str, **options: Any) -> None:
    """It is refused in one line, changes no file, and gives the lock back."""
    before = content(path)
    with pytest.raises(SettingsError, match=words) as caught:
        await opened(path, **options)
    assert "\n" not in str(caught.value)
    assert content(path) == before


def content(path: Path) -> dict[str, bytes] | None:
    return {name: (path / name).read_bytes() for name in sorted(os.listdir(path))} if path.is_dir() else None


async def a_store(path: Path) -> None:
    await close(await opened(path))


async def test_sizes_that_are_too_small(tmp_path: Path, no_leaks: None) -> None:
    path = tmp_path / "ssd"
    await refused(
        path, r"ssd.capacity_bytes \(1.0 MiB\) is too small: .* raise it \(--ssd-capacity\)", capacity_bytes=MIB
    )
    await refused(path, "too small.*lower ssd.max_records", max_records=100_000)
    await refused(path, "smaller than the largest slot .*raise ssd.slab_bytes", slab_bytes=64 << 10)
    assert not path.exists()
    await a_store(path)
    await refused(
        path, "smaller than the largest slot .*empty it to change them", slot_bytes=2 * SLAB_BYTES, slab_bytes=None
    )
    await refused(path, "too small", capacity_bytes=MIB)


async def test_slabs_that_are_larger_than_the_capacity(tmp_path: Path, no_leaks: None) -> None:
    path = tmp_path / "ssd"
    tier = await opened(path, slab_bytes=2 * MIB)
    tier._slabs.format(PAGE_BYTES, 2 * MIB)
    await close(tier)
    await refused(path, "one slab take 3.8 MiB", capacity_bytes=3 * MIB, slab_bytes=None)


async def test_slabs_of_another_size(tmp_path: Path, no_leaks: None) -> None:
    path = tmp_path / "ssd"
    await a_store(path)
    await refused(
        path, r"has slabs of 128.0 KiB, ssd.slab_bytes says 256.0 KiB; leave the setting out", slab_bytes=256 << 10
    )
    tier = await opened(path, slab_bytes=None)
    assert tier.ssd.slabs.slab_bytes == SLAB_BYTES
    await close(tier)


async def test_files_of_others(tmp_path: Path, no_leaks: None) -> None:
    path = tmp_path / "ssd"
    path.mkdir()
    (path / "letter").write_text("mine")
    await refused(path, r"holds other files \(letter\); give the SSD tier a directory of its own")
    # An empty file of that name is what the end of a first start leaves, and what somebody else may have.
    (path / "slabs").write_text("")
    await refused(path, r"holds other files \(letter\)")
    (path / "letter").unlink()
    (path / "slabs").write_bytes(bytes(3 * PAGE_BYTES))
    await refused(path, "wrong magic")
    (path / "slabs").write_bytes(os.urandom(3 * PAGE_BYTES))
    await refused(path, "wrong magic; empty the directory")
    (path / "slabs").write_bytes(bytes(PAGE_BYTES))
    await a_store(path)


async def test_another_version(tmp_path: Path, no_leaks: None) -> None:
    path = tmp_path / "ssd"
    await a_store(path)
    whole = bytearray((path / "slabs").read_bytes())

    def sealed(page: bytearray) -> bytes:
        return bytes(page[:56]) + xxhash.xxh3_64_intdigest(bytes(page[:56])).to_bytes(8, "little") + bytes(page[64:])

    page = whole.copy()
    struct.pack_into("<H", page, 8, 2)
    (path / "slabs").write_bytes(sealed(page))
    await refused(path, "is of format 2; this version knows 1; start the version that wrote it")
    page = whole.copy()
    struct.pack_into("<I", page, 12, 16_384)
    (path / "slabs").write_bytes(sealed(page))
    await refused(path, "pages of 16384 bytes; this version has 4096")
    page = whole.copy()
    page[20] ^= 1
    (path / "slabs").write_bytes(page)
    await refused(path, "checksum of the slab file is wrong")
    (path / "slabs").write_bytes(whole)
    await a_store(path)


async def test_a_directory_that_is_in_use(tmp_path: Path, no_leaks: None) -> None:
    path = tmp_path / "ssd"
    tier = await opened(path)
    with pytest.raises(ResourceTaken, match=rf"in use by another daemon \(pid {os.getpid()}\); stop it, or choose"):
        await opened(path)
    await close(tier)
    await a_store(path)


async def test_a_directory_that_cannot_be_written(tmp_path: Path, no_leaks: None) -> None:
    twin = FaultyDirectory(tmp_path)
    twin.read_only = True
    with pytest.raises(SettingsError, match="cannot use the SSD directory .*: Read-only file system; repair it"):
        await opened(tmp_path, directory=twin)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(KVStoreError, match="is no directory"):
        await opened(tmp_path / "file")


async def test_a_directory_that_is_read_is_not_changed(tmp_path: Path, no_leaks: None) -> None:
    path = tmp_path / "ssd"
    await a_store(path)
    (path / "log-0000000000000009.tmp").write_text("of an earlier life")
    before = content(path)
    directory = SsdDirectory(path, read_only=True)
    slabs = directory.open_slabs(create=False)
    with pytest.raises(OSError, match="Invalid argument"):
        slabs.truncate(0)
    slabs.close()
    assert directory.names() == ["log-0000000000000000", "slabs"]
    directory.close()
    assert content(path) == before
