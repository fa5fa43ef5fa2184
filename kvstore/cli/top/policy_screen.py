"""A choice of policies for the running daemon: nothing changes before one is entered."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Final, NamedTuple

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.screen import ModalScreen
from textual.widgets import OptionList
from textual.widgets.option_list import Option

from kvstore.cli.top.text import line
from kvstore.policy.registry import POLICIES
from kvstore.protocol.statistics import EvictionStats

__all__ = ["Choice", "PolicyScreen", "choices"]

_ADMISSIONS: Final = ("all", "predicted")


class Choice(NamedTuple):
    """A name that something may be set to.

    Attributes:
        argument: of ``Client.configure``.
        name: the policy's.
        what: what it is for, for people.
        now: whether it is what the daemon has.
    """

    argument: str
    name: str
    what: str
    now: bool


def choices(eviction: EvictionStats) -> Iterator[Choice]:
    """What may be chosen: the policies that this version knows; the daemon refuses what it does not."""
    for argument, what, names, current in (
        ("policy", "DRAM", sorted(POLICIES), eviction.policy),
        ("ssd_policy", "SSD", sorted(POLICIES), eviction.ssd_policy),
        ("admission", "to the SSD", _ADMISSIONS, eviction.admission),
    ):
        if current:
            for name in names:
                yield Choice(argument, name, what, name == current)


class PolicyScreen(ModalScreen[Choice | None]):
    """Ends with the choice, or with None."""

    DEFAULT_CSS = """
    PolicyScreen { align: center middle; background: $ground 60%; }
    PolicyScreen OptionList, PolicyScreen OptionList:focus {
        width: 44; height: auto; max-height: 90%;
        border: round $accent; border-title-color: $accent;
        border-subtitle-color: $faint; background: $ground; color: $text;
    }
    PolicyScreen OptionList > .option-list--option-highlighted,
    PolicyScreen OptionList:focus > .option-list--option-highlighted {
        background: $accent; color: $ground; text-style: bold;
    }
    PolicyScreen OptionList > .option-list--separator { color: $track; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,e,q", "leave", show=False)]

    def __init__(self, eviction: EvictionStats) -> None:
        super().__init__()
        self._choices = list(choices(eviction))

    def compose(self) -> ComposeResult:
        """A list, what is for one thing together."""
        options: list[Option | None] = []
        for at, choice in enumerate(self._choices):
            if at and choice.argument != self._choices[at - 1].argument:
                options.append(None)
            mark = "●" if choice.now else " "
            options.append(Option(line(f" {choice.what:<11}", f"{mark} ", (choice.name, "bold")), id=str(at)))
        shown = OptionList(*options)
        shown.border_title = "Policies of the running daemon"
        shown.border_subtitle = "enter switches · esc leaves"
        yield shown

    def on_mount(self) -> None:
        """Begin at what there is now."""
        shown = self.query_one(OptionList)
        shown.highlighted = next((at for at, choice in enumerate(self._choices) if choice.now), 0)
        shown.focus()

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """Enter, or a click."""
        choice = self._choices[int(event.option.id or 0)]
        self.dismiss(None if choice.now else choice)

    def action_leave(self) -> None:
        """Change nothing."""
        self.dismiss(None)
