"""The daemon's settings: what there is to set, with units and defaults, and where values come from.

Covers: flags, environment, TOML file and defaults; every refusal as one line that names source, value and cause. Does
not cover: whether the sizes fit this machine, which the daemon finds out when it starts.

Sources, strongest first: flags (``overrides``), ``KVSTORE_*`` variables with ``__`` between levels
(``KVSTORE_DRAM__CAPACITY_BYTES=8GiB``), the TOML file, the defaults below.
"""

from __future__ import annotations

import grp
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from kvstore.errors import InvalidArgument
from kvstore.protocol.endpoint import (
    check_endpoint,
    check_event_endpoint,
    default_arena_directory,
    default_endpoint,
    default_event_endpoints,
    default_recording_directory,
)
from kvstore.protocol.version import MAX_LEASE_MS
from kvstore.settings_sources import load_settings
from kvstore.sizes import format_size, parse_size
from kvstore.transcode.pairs import pair_of

__all__ = [
    "AccessSettings",
    "DramSettings",
    "EventSettings",
    "EvictionSettings",
    "ExplainSettings",
    "LimitSettings",
    "QuotaSettings",
    "RecordSettings",
    "RetentionSettings",
    "Settings",
    "SsdSettings",
    "format_size",
    "parse_http",
    "parse_size",
]

_PAGE_BYTES: Final = 4096
_SMALLEST_CAPACITY_BYTES: Final = 1 << 20
_GRANT_BYTES_PER_SESSION: Final = 32 << 20
_RECORDS_FROM: Final = 1 << 16
_TYPICAL_RECORD_BYTES: Final = 16 << 10
_SMALLEST_EXPLAIN_BYTES: Final = 1 << 20
_MOST_QUOTAS: Final = 64
_LONGEST_NAME: Final = 512
_SMALLEST_RECORDING_BYTES: Final = 1 << 20
_MODES: Final = {0o600: "0600", 0o660: "0660", 0o666: "0666"}


def parse_http(address: str) -> tuple[str, int] | None:
    """Host and port of an ``http`` setting; None for ``"off"``.

    IPv6 hosts stand in brackets: ``[::1]:9477``. Port 0 takes any free port.

    Raises:
        InvalidArgument: neither ``HOST:PORT`` nor ``off``.
    """
    if address == "off":
        return None
    host, colon, port = address.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    name = host[1:-1] if bracketed else host
    plain = name and not any(character in "/[]@ \t" for character in name) and (bracketed or ":" not in name)
    if not colon or not plain or not (port.isascii() and port.isdigit() and int(port) <= 65535):
        raise InvalidArgument(f"{address!r} must be HOST:PORT, for example 127.0.0.1:9477, or off")
    return name, int(port)


def _check_http(address: str) -> str:
    parse_http(address)
    return address


def _no_bool(value: object) -> object:
    if isinstance(value, bool):
        raise InvalidArgument(f"must be a number, got {str(value).lower()}")
    return value


def _size_or_zero(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise InvalidArgument(f"must be a size, got {value!r}")
    return 0 if value in (0, "0") else parse_size(value)


def _parse_quotas(value: object) -> dict[str, int]:
    """Sizes by tenant, from a table or from ``name=size`` pairs with commas between them."""
    pairs: list[tuple[object, Any]] = []
    if isinstance(value, str):
        for pair in filter(None, map(str.strip, value.split(","))):
            tenant, equals, quota = pair.rpartition("=")
            if not equals:
                raise InvalidArgument(f"must be NAME=SIZE pairs, for example chat=4GiB,batch=1GiB, got {pair!r}")
            pairs.append((tenant.strip(), quota.strip()))
    elif isinstance(value, Mapping):
        pairs = list(value.items())
    else:
        raise InvalidArgument(f"must be a table of sizes by tenant, got {value!r}")
    quotas: dict[str, int] = {}
    for name, size in pairs:
        if not isinstance(name, str) or not name or len(name) > _LONGEST_NAME:
            raise InvalidArgument(f"a tenant's name has 1 to {_LONGEST_NAME} characters, got {str(name)[:80]!r}")
        if name in quotas:
            raise InvalidArgument(f"tenant {name!r} has two quotas")
        try:
            quotas[name] = parse_size(size)
        except InvalidArgument as error:
            raise InvalidArgument(f"tenant {name!r}: {error}") from None
        if quotas[name] < _PAGE_BYTES:
            raise InvalidArgument(f"tenant {name!r}: a quota is at least {_PAGE_BYTES} bytes, got {size!r}")
    if len(quotas) > _MOST_QUOTAS:
        raise InvalidArgument(f"at most {_MOST_QUOTAS} tenants have quotas, got {len(quotas)}")
    return quotas


def _parse_mode(value: object) -> int:
    mode: object = value
    if isinstance(value, str):
        try:
            mode = int(value.removeprefix("0o"), 8)
        except ValueError:
            mode = None
    if isinstance(mode, bool) or not isinstance(mode, int) or mode not in _MODES:
        allowed = ", ".join(f'"{text}"' for text in _MODES.values())
        raise InvalidArgument(f"mode must be one of {allowed}, got {value!r}")
    return mode


def _check_directory(directory: Path) -> Path:
    expanded = directory.expanduser()
    if not expanded.is_absolute():
        raise InvalidArgument(f"'{directory}' must be an absolute path")
    return expanded


def _check_pair(name: str) -> str:
    if name:
        pair_of(name)
    return name


def _check_warm(wanted: str) -> str:
    if wanted not in ("", "hottest") and not wanted.startswith("/"):
        parse_size(wanted)
    return wanted


def _check_event_endpoint(endpoint: str) -> str:
    return check_event_endpoint(endpoint) if endpoint else ""


def _check_group(group: str) -> str:
    if group:
        _group_id(group)
    return group


def _group_id(group: str) -> int:
    if group.isascii() and group.isdigit():
        return int(group)
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        raise InvalidArgument(f"there is no group {group!r} on this machine; give a group's name or number") from None


def _conflict(message: str, *keys: str) -> PydanticCustomError:
    """An error between settings; the keys are attributed to their sources."""
    return PydanticCustomError("conflict", "{message}", {"message": message, "keys": keys})


SizeBytes = Annotated[int, BeforeValidator(parse_size)]
Count = Annotated[int, BeforeValidator(_no_bool), Field(ge=1, le=2**31 - 1)]
Seconds = Annotated[float, BeforeValidator(_no_bool), Field(gt=0, allow_inf_nan=False)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class DramSettings(_Section):
    """The DRAM tier."""

    directory: Annotated[Path, AfterValidator(_check_directory)] | None = None
    """Memory-backed directory of the arena; None: one under ``/dev/shm`` for this user and endpoint."""

    capacity_bytes: SizeBytes = 1 << 30
    """Most bytes of slots that hold blocks."""

    grant_bytes: SizeBytes = 64 << 20
    """Bytes of slots lent to clients for writing or not yet safe to use again; outside the capacity."""

    slab_bytes: SizeBytes | None = None
    """Unit in which memory moves between slot sizes, a multiple of 4096; None: chosen from the capacity."""

    mapped: bool = True
    """Whether clients of this host may read and write the arena themselves, without a message for each block."""

    max_records: Count | None = None
    """Most records at a time, for which the index has room (146 bytes each); None: chosen from the capacity."""

    verify: Literal["always", "sampled", "off"] = "sampled"
    """When a read checks the record's checksum. ``always`` costs about one more pass over the bytes."""

    verify_every: Count = 64
    """With ``sampled``: one read in this many is checked."""

    @property
    def verified_every(self) -> int:
        """One read in this many is verified, 0 for none."""
        return {"always": 1, "sampled": self.verify_every, "off": 0}[self.verify]

    @property
    def record_limit(self) -> int:
        """``max_records``, or one chosen so that the index stays near a hundredth of the capacity."""
        if self.max_records is not None:
            return self.max_records
        pages = self.capacity_bytes // _PAGE_BYTES
        return max(min(pages, max(_RECORDS_FROM, self.capacity_bytes // _TYPICAL_RECORD_BYTES)), 1)

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        capacity = format_size(self.capacity_bytes)
        if self.slab_bytes is not None and self.slab_bytes % _PAGE_BYTES:
            raise _conflict(
                f"dram.slab_bytes must be a multiple of {_PAGE_BYTES} bytes, got {self.slab_bytes}",
                "dram.slab_bytes",
            )
        if self.slab_bytes is not None and self.slab_bytes > self.capacity_bytes:
            raise _conflict(
                f"dram.slab_bytes ({format_size(self.slab_bytes)}) must not be more than dram.capacity_bytes "
                f"({capacity})",
                "dram.slab_bytes",
                "dram.capacity_bytes",
            )
        if self.slab_bytes is None and self.capacity_bytes < _SMALLEST_CAPACITY_BYTES:
            raise _conflict(
                f"dram.capacity_bytes must be at least {format_size(_SMALLEST_CAPACITY_BYTES)}, got {capacity}, "
                "unless dram.slab_bytes is set",
                "dram.capacity_bytes",
            )
        return self


class AccessSettings(_Section):
    """Who may use the socket, the arena and the session files: one trust domain."""

    mode: Annotated[int, BeforeValidator(_parse_mode)] = 0o600
    """Permission bits, written "0600" (this user), "0660" (a group) or "0666" (everybody)."""

    group: Annotated[str, AfterValidator(_check_group)] = ""
    """Group that owns them, by name or number; needs mode "0660"."""

    @property
    def group_id(self) -> int | None:
        """Number of the group, None where none is set."""
        return _group_id(self.group) if self.group else None

    @model_validator(mode="after")
    def _check_mode(self) -> Self:
        if self.group and self.mode != 0o660:
            raise _conflict(
                f'access.group {self.group!r} needs access.mode = "0660", got "{_MODES[self.mode]}"',
                "access.group",
                "access.mode",
            )
        return self


class LimitSettings(_Section):
    """Bounds that keep one client from harming others."""

    max_sessions: Annotated[Count, Field(le=65536)] = 1024
    """Clients at one time."""

    outbound_bytes_per_session: SizeBytes = 256 << 20
    """Reply bytes on their way to one client before its gets are throttled."""

    max_queue_delay_ms: Count = 1000
    """A request older than this when its turn comes is answered ``throttled``."""

    session_idle_s: Seconds = 300.0
    """A client silent for this long, and not known to live, is given up."""

    max_lease_s: Annotated[Seconds, Field(le=MAX_LEASE_MS / 1000)] = 60.0
    """Longest lease that a client gets."""

    lease_share: Annotated[float, BeforeValidator(_no_bool), Field(gt=0, le=0.9)] = 0.5
    """Part of each tier that leases may hold together; what goes beyond it gets none."""

    grant_bytes_per_session: SizeBytes = _GRANT_BYTES_PER_SESSION
    """Granted bytes that one client may hold; by default at most ``dram.grant_bytes``."""

    hazard_bytes_per_session: SizeBytes = 64 << 20
    """Bytes of blocks that one client may read in place at a time, at most a quarter of ``dram.capacity_bytes``."""

    reclaim_grace_s: Annotated[float, BeforeValidator(_no_bool), Field(ge=0, allow_inf_nan=False)] = 2.0
    """After a client with a device context died, how long its slots are left alone: transfers may still run."""


class SsdSettings(_Section):
    """The SSD tier: off unless it has a directory."""

    directory: Annotated[Path, AfterValidator(_check_directory)] | None = None
    """Directory of its files, for this daemon alone; None: there is no SSD tier."""

    capacity_bytes: SizeBytes | None = None
    """Most bytes that its files may take together; must be set with ``directory``."""

    slab_bytes: SizeBytes | None = None
    """Unit in which room moves between slot sizes, a multiple of 4096; None: chosen, or as the files have it."""

    reserve_bytes: Annotated[int, BeforeValidator(_size_or_zero)] = 1 << 30
    """Free space of the file system that is left to others."""

    max_records: Count | None = None
    """Most records at a time, for which log and checkpoints have room (576 bytes each); None: as they come."""

    threads: Annotated[Count, Field(le=64)] = 8
    """Reads and writes at a time."""

    group_records: Annotated[Count, Field(le=4096)] = 64
    """Records that become durable together, at most."""

    group_ms: Count = 20
    """How long the first of them waits for others."""

    recovery: Literal["lazy", "eager"] = "lazy"
    """When records found at the start are verified: as they are read, or all in the background as well."""

    admission: Literal["all", "predicted"] = "all"
    """What is written when it leaves DRAM: everything, or what is likely to be asked for again."""

    transcode: Annotated[str, AfterValidator(_check_pair)] = ""
    """Codecs of records on their way down, as ``raw>lossless``; empty: as they are."""

    prefetch_bytes: SizeBytes | None = None
    """Most bytes that wait to be brought up ahead of their use, half of it for one client; None: half of the DRAM."""

    warm: Annotated[str, AfterValidator(_check_warm)] = ""
    """What comes up into memory at the start: "hottest", a size of that, a list's path; empty: nothing."""

    prefill_tokens_per_s: Annotated[float, BeforeValidator(_no_bool), Field(ge=0, allow_inf_nan=False)] = 0.0
    """What the engine computes in a second; loads that would take longer are refused. 0: unknown, none is."""

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        if self.directory is not None and self.capacity_bytes is None:
            raise _conflict(
                "ssd.directory is set and ssd.capacity_bytes is not: say how many bytes it may take "
                "(--ssd-capacity 100GiB)",
                "ssd.directory",
            )
        if self.directory is None and self.capacity_bytes is not None:
            raise _conflict(
                "ssd.capacity_bytes is set and ssd.directory is not: say where (--ssd DIR)", "ssd.capacity_bytes"
            )
        if self.slab_bytes is not None and self.slab_bytes % _PAGE_BYTES:
            raise _conflict(
                f"ssd.slab_bytes must be a multiple of {_PAGE_BYTES} bytes, got {self.slab_bytes}", "ssd.slab_bytes"
            )
        return self


class EvictionSettings(_Section):
    """What leaves a full tier first."""

    policy: Annotated[str, Field(min_length=1)] = "lru"
    """Name of the policy of DRAM; see ``kvstore.policy.registry``."""

    ssd_policy: Annotated[str, Field(min_length=1)] = "lru"
    """Name of the policy of the SSD."""


Quotas = Annotated[dict[str, int], BeforeValidator(_parse_quotas)]
"""Bytes by tenant."""


class QuotaSettings(_Section):
    """What tenants may occupy. A tenant is all namespaces of one name; one that is not named here has no limit."""

    tenants: Quotas = {}
    """Most bytes of DRAM slots that hold blocks of each of them."""

    ssd_tenants: Quotas = {}
    """Most bytes of SSD slots that hold records of each of them."""


class RetentionSettings(_Section):
    """Blocks that clients want to stay for longer than the eviction policy would have them."""

    budget_bytes: Annotated[int, BeforeValidator(_size_or_zero)] | None = None
    """Most bytes of DRAM slots that are retained together; None: a quarter of ``dram.capacity_bytes``; 0: none."""

    hint_s: Annotated[Seconds, Field(le=3600)] = 30.0
    """How long blocks are retained of which a hint says that they are needed soon."""


class ExplainSettings(_Section):
    """Why lookups miss."""

    memory_bytes: Annotated[int, BeforeValidator(_size_or_zero)] = 32 << 20
    """Memory for what is remembered of blocks that left (88 bytes each); 0: misses are not explained."""

    @model_validator(mode="after")
    def _check_memory(self) -> Self:
        if 0 < self.memory_bytes < _SMALLEST_EXPLAIN_BYTES:
            raise _conflict(
                f"explain.memory_bytes must be 0 (nothing is explained), or at least "
                f"{format_size(_SMALLEST_EXPLAIN_BYTES)}, got {self.memory_bytes}",
                "explain.memory_bytes",
            )
        return self


class EventSettings(_Section):
    """KV events: which blocks come and go, for routers."""

    publish: bool = False
    """Whether they are published."""

    endpoint: Annotated[str, AfterValidator(_check_event_endpoint)] = ""
    """Where subscribers connect, ``ipc://`` or ``tcp://``; empty: the daemon's own endpoint with ``.events``."""

    replay_endpoint: Annotated[str, AfterValidator(_check_event_endpoint)] = ""
    """Where missed batches and snapshots are had; empty: the daemon's own endpoint with ``.replay``."""

    topic: str = ""
    """First frame of each batch."""

    buffer_steps: Count = 10_000
    """Batches that are kept for replays."""

    hwm: Count = 10_000
    """Batches that wait for one subscriber before it loses some."""

    heartbeat_s: Annotated[Seconds, Field(ge=0.01, le=3600)] = 1.0
    """After how long without a batch an empty one is published."""


class RecordSettings(_Section):
    """Recording of lookups, for ``kvstore tune``: begins when it is asked for, or with the daemon."""

    enabled: bool = False
    """Whether it begins with the daemon."""

    directory: Annotated[Path, AfterValidator(_check_directory)] | None = None
    """For recordings; None: one for this user and endpoint under ``$XDG_STATE_HOME`` or ``~/.local/state``."""

    max_bytes: SizeBytes = 256 << 20
    """Most bytes of all recordings in the directory; the oldest files go first."""

    files: Annotated[Count, Field(ge=2, le=1000)] = 8
    """Files that share them evenly."""

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        if self.max_bytes // self.files < _SMALLEST_RECORDING_BYTES:
            raise _conflict(
                f"record.max_bytes ({format_size(self.max_bytes)}) must be at least "
                f"{format_size(_SMALLEST_RECORDING_BYTES)} for each of the {self.files} files of record.files",
                "record.max_bytes",
                "record.files",
            )
        return self


class Settings(BaseSettings):
    """All settings of a daemon; immutable. ``Settings.load`` reads them, the constructor takes explicit values."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", validate_default=True)

    endpoint: Annotated[str, BeforeValidator(check_endpoint)] = Field(default_factory=default_endpoint)
    """Where clients reach the daemon."""

    http: Annotated[str, AfterValidator(_check_http)] = "127.0.0.1:9477"
    """HOST:PORT of ``/metrics``, ``/healthz`` and ``/readyz``, or ``off``."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["text", "json"] = "text"
    dram: DramSettings = DramSettings()
    access: AccessSettings = AccessSettings()
    limits: LimitSettings = LimitSettings()
    ssd: SsdSettings = SsdSettings()
    eviction: EvictionSettings = EvictionSettings()
    quota: QuotaSettings = QuotaSettings()
    retention: RetentionSettings = RetentionSettings()
    explain: ExplainSettings = ExplainSettings()
    events: EventSettings = EventSettings()
    record: RecordSettings = RecordSettings()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The constructor reads no environment; ``load`` combines the sources, so that it can name them."""
        return (init_settings,)

    @classmethod
    def load(
        cls,
        config: Path | None = None,
        overrides: Mapping[str, object] | None = None,
        *,
        flags: Mapping[str, str] | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> Self:
        """Combine all sources.

        Args:
            config: TOML file; None reads the one that ``KVSTORE_CONFIG`` names, if any.
            overrides: the strongest values, by dotted key: ``{"dram.capacity_bytes": "8GiB"}``.
            flags: what to call overrides in errors, by dotted key: ``{"dram.capacity_bytes": "--capacity"}``.
            environ: environment, by default this process's.

        Raises:
            SettingsError: one line with the source, the value and what is wrong with it.
        """
        return load_settings(cls, config, overrides or {}, flags or {}, os.environ if environ is None else environ)

    @property
    def arena_directory(self) -> Path:
        """Directory of the arena, derived from the endpoint unless it is set."""
        return self.dram.directory or default_arena_directory(self.endpoint)

    @property
    def recording_directory(self) -> Path:
        """Directory of recordings, derived from the endpoint unless it is set."""
        return self.record.directory or default_recording_directory(self.endpoint)

    @property
    def event_endpoints(self) -> tuple[str, str]:
        """Where KV events are published and replayed, derived from the endpoint unless they are set."""
        published, replayed = default_event_endpoints(self.endpoint)
        return self.events.endpoint or published, self.events.replay_endpoint or replayed

    @property
    def retention_budget_bytes(self) -> int:
        """``retention.budget_bytes``, or a quarter of the DRAM tier."""
        budget = self.retention.budget_bytes
        return self.dram.capacity_bytes // 4 if budget is None else budget

    @model_validator(mode="after")
    def _check_retention(self) -> Self:
        budget, capacity = self.retention.budget_bytes, self.dram.capacity_bytes
        if budget is not None and budget > capacity:
            raise _conflict(
                f"retention.budget_bytes ({format_size(budget)}) must not be more than dram.capacity_bytes "
                f"({format_size(capacity)})",
                "retention.budget_bytes",
                "dram.capacity_bytes",
            )
        return self

    @model_validator(mode="after")
    def _check_quotas(self) -> Self:
        if self.quota.ssd_tenants and self.ssd.directory is None:
            raise _conflict(
                "quota.ssd_tenants is set and there is no SSD tier: set ssd.directory, or leave it out",
                "quota.ssd_tenants",
            )
        for tenants, capacity, key, of in (
            (self.quota.tenants, self.dram.capacity_bytes, "quota.tenants", "dram.capacity_bytes"),
            (self.quota.ssd_tenants, self.ssd.capacity_bytes or 0, "quota.ssd_tenants", "ssd.capacity_bytes"),
        ):
            for name, quota in tenants.items():
                if quota > capacity:
                    raise _conflict(
                        f"the quota of tenant {name!r} ({format_size(quota)}) must not be more than {of} "
                        f"({format_size(capacity)})",
                        key,
                        of,
                    )
        return self

    @model_validator(mode="after")
    def _check_event_endpoints(self) -> Self:
        if not self.events.publish:
            return self
        published, replayed = self.event_endpoints
        if len({self.endpoint, published, replayed}) < 3:
            raise _conflict(
                f"endpoint ({self.endpoint}), events.endpoint ({published}) and events.replay_endpoint ({replayed}) "
                "must be three different ones",
                "events.endpoint",
                "events.replay_endpoint",
            )
        for endpoint in (published, replayed):
            try:
                check_event_endpoint(endpoint)
            except InvalidArgument as error:
                raise _conflict(f"{error}; or set events.endpoint and events.replay_endpoint", "endpoint") from None
        return self

    @model_validator(mode="after")
    def _check_grants(self) -> Self:
        limits, grant_bytes = self.limits, self.dram.grant_bytes
        if limits.grant_bytes_per_session <= grant_bytes:
            return self
        if "grant_bytes_per_session" in limits.model_fields_set:
            raise _conflict(
                f"limits.grant_bytes_per_session ({format_size(limits.grant_bytes_per_session)}) must not be more "
                f"than dram.grant_bytes ({format_size(grant_bytes)})",
                "limits.grant_bytes_per_session",
                "dram.grant_bytes",
            )
        lowered: dict[str, Any] = {"grant_bytes_per_session": grant_bytes}
        object.__setattr__(self, "limits", limits.model_copy(update=lowered))  # frozen, and not shared yet
        return self
