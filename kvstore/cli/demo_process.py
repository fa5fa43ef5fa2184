"""Runs one of the demo's engine processes to its end, and tells what went wrong where it fails."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kvstore.errors import DeadlineExceeded, KVStoreError

if TYPE_CHECKING:
    from kvstore.cli.demo_engine import EngineReport, EngineTask

__all__ = ["run_engine"]

_TAIL_LINES: Final = 12
_PACKAGES: Final = ("kvstore", "kvstore_client", "kvstore_kernels")
_ENGINE_ENVIRONMENT: Final = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "DO_NOT_TRACK": "1",
    # Threads that wait for each other sleep: spinning ones stall a prefill when anything else needs a core.
    "OMP_WAIT_POLICY": "PASSIVE",
}


def run_engine(task: EngineTask, timeout_s: float) -> EngineReport:
    """Run one engine process to its end.

    Raises:
        KVStoreError: it failed; its last line is in the message, the lines before are a note.
        DeadlineExceeded: it was killed after ``timeout_s``.
    """
    import msgspec

    from kvstore.cli.demo_engine import ERROR_PREFIX, EngineReport

    try:
        ended = subprocess.run(
            [sys.executable, "-P", "-m", "kvstore.cli.demo_engine"],
            input=msgspec.json.encode(task),
            capture_output=True,
            timeout=timeout_s,
            env=_environment(task.model_directory),
            check=False,
        )
    except subprocess.TimeoutExpired as expired:
        error: KVStoreError = DeadlineExceeded(
            f"the demo's engine process ({task.role}) has not finished within {timeout_s:g} s; "
            "use a larger --timeout or a smaller --model-size"
        )
        error.add_note(_tail(expired.stderr))
        raise error from None
    if ended.returncode == 0:
        try:
            return msgspec.json.decode(ended.stdout, type=EngineReport)
        except msgspec.DecodeError as wrong:
            raise KVStoreError(f"the demo's engine process ({task.role}) gave no report: {wrong}") from None
    tail = _tail(ended.stderr)
    last = tail.splitlines()[-1].removeprefix(ERROR_PREFIX) if tail else "it said nothing"
    error = KVStoreError(f"the demo's engine process ({task.role}) ended with code {ended.returncode}: {last}")
    error.add_note(tail)
    raise error


def _tail(output: bytes | None) -> str:
    return "\n".join((output or b"").decode("utf-8", "replace").strip().splitlines()[-_TAIL_LINES:])


def _environment(model_directory: str) -> dict[str, str]:
    """This process's environment without kvstore's settings, offline, with these very packages importable."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("KVSTORE_")}
    environ |= _ENGINE_ENVIRONMENT
    environ["HF_HOME"] = model_directory
    roots = []
    for package in _PACKAGES:
        spec = find_spec(package)
        if spec is not None and spec.origin is not None:
            roots.append(str(Path(spec.origin).resolve().parents[1]))
    installed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    path = [root for root in dict.fromkeys(roots) if root not in installed]
    environ["PYTHONPATH"] = os.pathsep.join(filter(None, [*path, environ.get("PYTHONPATH", "")]))
    return environ
