"""What a disk holds after a crash: contents and names, each with what is durable and what may be lost.

Bytes are kept by pages of 4 KiB. Until a sync a page has several versions, and each of them, or a mixture of two
neighbouring ones by sectors of 512 bytes, can be what a crash leaves. So it is with sizes (of a file that grows any
size between is possible, which tears a log at any byte) and with the names of a directory (each creation, renaming and
removal may have come through or not, as file systems with and without a journal leave it).

``Choose`` decides: ``choose(n)`` gives a number below ``n``; 0 is always the most harmless. One is
``random.Random(7).randrange``, a draw of hypothesis another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

PAGE_BYTES = 4096
SECTOR_BYTES = 512
_ZEROS = bytes(PAGE_BYTES)

Choose = Callable[[int], int]


def lose_everything(count: int) -> int:
    """Of each file and of the names only what is durable."""
    return 1


T = TypeVar("T")


class Versions(Generic[T]):
    """The durable value of something and, behind it, those that it had since the last sync."""

    def __init__(self, durable: T) -> None:
        self.values = [durable]
        self._forgotten = 0

    @property
    def now(self) -> T:
        return self.values[-1]

    @property
    def number(self) -> int:
        """Of the newest value; counts up."""
        return self._forgotten + len(self.values) - 1

    def make_durable(self, number: int) -> None:
        """The value of this number; a later one may be durable already."""
        count = max(0, number - self._forgotten)
        del self.values[:count]
        self._forgotten += count


@dataclass(frozen=True)
class SyncBegan:
    """What had been written when a sync began; later writes are not of its concern."""

    pages: dict[int, int]
    size: int


class Content:
    """The bytes of a file, by pages; one that is a hole is ``None``."""

    def __init__(self, pages: dict[int, bytes] | None = None, size_bytes: int = 0) -> None:
        self._pages: dict[int, Versions[bytes | None]] = {at: Versions(page) for at, page in (pages or {}).items()}
        self._size = Versions(size_bytes)
        self._given_up: dict[int, int] = {}
        """Pages that a sync failed to write, with the version that is lost to later syncs."""

    @property
    def size_bytes(self) -> int:
        return self._size.now

    @property
    def allocated_pages(self) -> int:
        return sum(page.now is not None for page in self._pages.values())

    @property
    def unsynced_pages(self) -> int:
        return sum(len(page.values) > 1 for page in self._pages.values())

    def is_hole(self, page: int) -> bool:
        return self._page(page) is None

    def _page(self, page: int) -> bytes | None:
        found = self._pages.get(page)
        return found.now if found is not None else None

    def read(self, offset: int, length_bytes: int) -> bytes:
        """Bytes as a reader sees them now, fewer at the end."""
        end = min(offset + length_bytes, self.size_bytes)
        found = bytearray()
        while offset < end:
            page, begin = divmod(offset, PAGE_BYTES)
            take = min(PAGE_BYTES - begin, end - offset)
            found += (self._page(page) or _ZEROS)[begin : begin + take]
            offset += take
        return bytes(found)

    def write(self, offset: int, data: bytes) -> None:
        at = 0
        while at < len(data):
            page, begin = divmod(offset + at, PAGE_BYTES)
            take = min(PAGE_BYTES - begin, len(data) - at)
            old = self._page(page) or _ZEROS
            new = old[:begin] + data[at : at + take] + old[begin + take :]
            self._pages.setdefault(page, Versions(None)).values.append(new)
            at += take
        if data and offset + len(data) > self.size_bytes:
            self._size.values.append(offset + len(data))

    def truncate(self, size_bytes: int) -> None:
        for at, page in self._pages.items():
            kept = max(0, min(PAGE_BYTES, size_bytes - at * PAGE_BYTES))
            if kept < PAGE_BYTES and page.now is not None:
                page.values.append(page.now[:kept] + _ZEROS[kept:] if kept else None)
        if size_bytes != self.size_bytes:
            self._size.values.append(size_bytes)

    def flip(self, offset: int, mask: int) -> None:
        """Change bits of a byte on the medium, which is no write of the program."""
        at, begin = divmod(offset, PAGE_BYTES)
        page = self._pages.setdefault(at, Versions(_ZEROS))
        page.values = [old and old[:begin] + bytes([old[begin] ^ mask]) + old[begin + 1 :] for old in page.values]

    # -------------------------------------------------------------- durability

    def begin_sync(self) -> SyncBegan:
        return SyncBegan({at: page.number for at, page in self._pages.items()}, self._size.number)

    def end_sync(self, began: SyncBegan) -> None:
        """Make durable what was written before the sync began, but for what the kernel gave up."""
        for at, number in began.pages.items():
            if number > self._given_up.get(at, -1):
                self._pages[at].make_durable(number)
        self._size.make_durable(began.size)

    def fail_sync(self, began: SyncBegan) -> None:
        """The kernel takes pages that it could not write for clean: no later sync writes them, unless written anew."""
        for at, number in began.pages.items():
            if len(self._pages[at].values) > 1:
                self._given_up[at] = max(number, self._given_up.get(at, -1))

    def survive(self, choose: Choose) -> Content:
        """What a crash leaves of it."""
        how = choose(4)
        pages = {}
        for at, page in self._pages.items():
            left = _survivor(page.values, how, choose)
            if left is not None:
                pages[at] = left
        sizes = self._size.values
        size_bytes = (sizes[-1], sizes[0])[how] if how < 2 else _some_size(sizes, choose)
        content = Content(pages, size_bytes)
        content.truncate(size_bytes)
        content.end_sync(content.begin_sync())
        return content


def _some_size(sizes: list[int], choose: Choose) -> int:
    at = len(sizes) - 1 - choose(len(sizes))
    growth = sizes[at + 1] - sizes[at] if at + 1 < len(sizes) else 0
    return sizes[at] + (choose(growth) if growth > 0 else 0)


def _survivor(versions: list[bytes | None], how: int, choose: Choose) -> bytes | None:
    if how == 0 or len(versions) == 1:
        return versions[-1]
    if how == 1:
        return versions[0]
    at = len(versions) - 1 - choose(len(versions))
    if how == 2 or at + 1 == len(versions):
        return versions[at]
    older, newer = versions[at] or _ZEROS, versions[at + 1] or _ZEROS
    sectors = [(newer, older)[choose(2)][begin : begin + SECTOR_BYTES] for begin in range(0, PAGE_BYTES, SECTOR_BYTES)]
    return b"".join(sectors)


Change = tuple[str, str, Content | None]
"""The name that goes ("" for none), the name that comes, and whose it becomes."""


class Names:
    """The names of a directory."""

    def __init__(self, names: dict[str, Content] | None = None) -> None:
        self.now = dict(names or {})
        self._durable = dict(self.now)
        self._changes: dict[int, Change] = {}
        """Since the last sync, in order, by number."""
        self._count = 0

    def create(self, name: str) -> Content:
        content = Content()
        self._change(("", name, content))
        return content

    def rename(self, source: str, target: str) -> None:
        self._change((source, target, self.now[source]))

    def remove(self, name: str) -> None:
        self._change((name, "", None))

    def _change(self, change: Change) -> None:
        self._changes[self._count] = change
        self._count += 1
        _apply(self.now, change)

    def begin_sync(self) -> int:
        return self._count

    def end_sync(self, began: int) -> None:
        for number in [number for number in self._changes if number < began]:
            _apply(self._durable, self._changes.pop(number))

    def survive(self, choose: Choose) -> Names:
        """What a crash leaves: all changes, none, the first ones, or any of them."""
        how = choose(4)
        changes = list(self._changes.values())
        if how == 1:
            changes = []
        elif how == 2:
            changes = changes[: len(changes) - choose(len(changes) + 1)]
        elif how == 3:
            changes = [change for change in changes if not choose(2)]
        names = dict(self._durable)
        for change in changes:
            _apply(names, change)
        return Names({name: content.survive(choose) for name, content in names.items()})


def _apply(names: dict[str, Content], change: Change) -> None:
    source, target, content = change
    names.pop(source, None)
    if content is not None:
        names[target] = content
