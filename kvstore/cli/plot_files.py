"""What pictures have in common: whether one can be written, before the work that it is to show, and how it looks."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Final

from kvstore.errors import InvalidArgument, KVStoreError

__all__ = ["check_plot", "plot_style"]

_FORMATS: Final = (".png", ".svg", ".pdf")


def check_plot(path: Path, extra: str) -> None:
    """See that ``--plot`` can be carried out.

    Args:
        path: of the picture.
        extra: of this distribution, that brings matplotlib.

    Raises:
        InvalidArgument: the format or the directory will not do.
        KVStoreError: matplotlib is missing.
    """
    if path.suffix not in _FORMATS:
        raise InvalidArgument(f"--plot: the file must end in {', '.join(_FORMATS)}, got {str(path)!r}")
    if not path.parent.is_dir():
        raise InvalidArgument(f"--plot: there is no directory {str(path.parent)!r}")
    if find_spec("matplotlib") is None:
        raise KVStoreError(f"--plot needs matplotlib: pip install 'kvstored[{extra}]'")


def plot_style(ink: str, faint: str) -> dict[str, object]:
    """Settings of matplotlib: colours of what is written, and of axes."""
    return {
        "font.size": 9,
        "font.family": "sans-serif",
        "text.color": ink,
        "axes.labelcolor": ink,
        "axes.edgecolor": faint,
        "xtick.color": ink,
        "ytick.color": ink,
        "svg.hashsalt": "kvstore",
    }
