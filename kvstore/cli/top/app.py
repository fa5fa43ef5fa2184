"""The terminal application: what it shows when, and its keys."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import ClassVar, Final

from textual import events, work
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Container
from textual.widgets import Input

from kvstore.cli.top import bars
from kvstore.cli.top.arrangement import Arrangement, Need, arrange
from kvstore.cli.top.frame import Frame, Order
from kvstore.cli.top.help_screen import HelpScreen
from kvstore.cli.top.history import History
from kvstore.cli.top.lines_widget import LinesWidget
from kvstore.cli.top.panel import Panel
from kvstore.cli.top.panel_widget import PanelWidget
from kvstore.cli.top.policy_screen import Choice, PolicyScreen
from kvstore.cli.top.poller import Lost, Poller, Seen
from kvstore.cli.top.registry import ABOVE, DECK, PANELS
from kvstore.cli.top.themes import THEMES, usual_theme
from kvstore.errors import KVStoreError

__all__ = ["INTERVALS_S", "TopApp"]

INTERVALS_S: Final = (0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_TICK_S: Final = 1.0
_MESSAGE_S: Final = 4.0
_LATE_S: Final = 1.0
"""How much later than it was due an answer is before the header says so."""

_CLOCK: Final = "%H:%M:%S"
_LONGEST_NEEDLE: Final = 64


class Body(Container):
    """Holds the panels, at places that the app gives them."""

    DEFAULT_CSS = "Body { height: 1fr; background: $ground; }"

    def on_resize(self, event: events.Resize) -> None:
        """The terminal has another size."""
        app = self.app
        if isinstance(app, TopApp):
            app.arrange_panels()


class TopApp(App[None]):
    """``kvstore top``.

    Args:
        endpoint: the daemon's, None for the usual one.
        interval_s: between polls.
        timeout_s: how long an answer may take.
        theme: "dark" or "light", None for what the terminal says.

    Raises:
        InvalidArgument: ``endpoint`` is none.
    """

    ENABLE_COMMAND_PALETTE = False
    AUTO_FOCUS = None
    CSS = """
    Screen { background: $ground; color: $text; layers: base; }
    #header { height: 1; background: $raised; }
    #banner { height: 1; background: $alarm; color: $text; display: none; }
    #tabs { position: absolute; height: 1; width: 100%; display: none; }
    #footer { height: 1; background: $raised; }
    #needle { height: 1; border: none; padding: 0 1; background: $raised; display: none; }
    #waiting { width: 100%; height: auto; padding: 2 4; }
    .stale PanelWidget { opacity: 55%; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q", "quit", show=False),
        Binding("ctrl+c", "quit", show=False, priority=True),
        Binding("p,space", "pause", show=False),
        Binding("d,enter", "details", show=False),
        Binding("escape", "back", show=False),
        Binding("s", "sort(False)", show=False),
        Binding("S", "sort(True)", show=False),
        Binding("slash", "filter", show=False),
        Binding("plus,equals_sign", "interval(1)", show=False),
        Binding("minus", "interval(-1)", show=False),
        Binding("e", "policy", show=False),
        Binding("t", "other_theme", show=False),
        Binding("question_mark,f1", "help", show=False),
        *(Binding(str(number % 10), f"panel({number})", show=False) for number in range(1, 11)),
    ]

    def __init__(
        self, endpoint: str | None = None, *, interval_s: float = 1.0, timeout_s: float = 5.0, theme: str | None = None
    ) -> None:
        super().__init__()
        self.animation_level = "none"
        for one in THEMES.values():
            self.register_theme(one)
        self._wear(theme or usual_theme())
        self.title = "kvstore top"
        self._poller = Poller(endpoint, interval_s=interval_s, timeout_s=timeout_s, tell=self._told)
        self._history = History()
        self._frame: Frame | None = None
        self._lost: Lost | None = None
        self._lost_since_s = 0.0
        self._seen_s = 0.0
        self._paused = False
        self._waiting_frame: Frame | None = None
        self._needle = ""
        self._filtering = False
        self._orders: dict[str, Order] = {}
        self._selected = self._below = DECK[0].name
        self._zoomed = False
        self._arrangement = Arrangement()
        self._message = ""
        self._message_until_s = 0.0

    def _wear(self, theme: str) -> None:
        self.theme = f"{theme}-grey" if self.no_color else theme

    # -------------------------------------------------------------- life

    def compose(self) -> ComposeResult:
        """Header, banner, panels, footer."""
        yield LinesWidget(id="header")
        yield LinesWidget(id="banner")
        with Body(id="body"):
            yield LinesWidget(id="waiting")
            yield LinesWidget(id="tabs")
            for number, panel in enumerate((*ABOVE, *DECK), 1):
                made = PanelWidget(panel, number)
                made.display = False
                yield made
        yield Input(id="needle", placeholder="filter clients, namespaces and tenants", max_length=_LONGEST_NEEDLE)
        yield LinesWidget(id="footer")

    def on_mount(self) -> None:
        """Begin to poll."""
        self._poll()
        self.set_interval(_TICK_S, self._draw_edges)
        self._draw_edges()

    @work(exclusive=True, group="poll", exit_on_error=True)
    async def _poll(self) -> None:
        await self._poller.run()

    def _told(self, news: Seen | Lost) -> None:
        if isinstance(news, Lost):
            if self._lost is None:
                self._lost_since_s = self._seen_s if self._frame is not None else news.at_s
            self._lost = news
            self._draw_edges()
            return
        self._lost = None
        self._seen_s = time.monotonic()
        self._history.add(news.stats, news.at_s)
        frame = Frame(
            news.stats,
            self._history,
            interval_s=self._poller.interval_s,
            took_s=news.took_s,
            own_pid=os.getpid(),
        )
        if self._paused and self._frame is not None:
            self._waiting_frame = frame
            self._draw_edges()
            return
        self._show(frame)

    def _show(self, frame: Frame) -> None:
        """A new frame; panels come and go with what the daemon has."""
        self._frame = self._chosen(frame)
        self.arrange_panels()
        self._draw_edges()

    def _chosen(self, frame: Frame) -> Frame:
        """The frame as the person at the keyboard wants it."""
        return replace(frame, needle=self._needle.lower(), orders=dict(self._orders))

    # -------------------------------------------------------------- drawing

    def _panels(self) -> Iterator[PanelWidget]:
        return iter(self.query(PanelWidget))

    def _deck(self) -> list[Panel]:
        frame = self._frame
        return [panel for panel in DECK if frame is not None and panel.there(frame)]

    def arrange_panels(self) -> None:
        """Give panels their places for the terminal's size, and draw them."""
        frame = self._frame
        if frame is None or not self.is_running:
            return
        deck = self._deck()
        names = [panel.name for panel in (*ABOVE, *deck)]
        if self._selected not in names:
            self._selected = deck[0].name
            self._zoomed = False
        if any(self._selected == panel.name for panel in deck):
            self._below = self._selected
        size = self.query_one(Body).size
        if not size.width or not size.height:
            return
        needs = {panel.name: Need(panel.name, panel.least, panel.wanted(frame)) for panel in (*ABOVE, *deck)}
        self._arrangement = arrange(
            size.width,
            size.height,
            above={panel.name: needs[panel.name] for panel in ABOVE},
            deck=[needs[panel.name] for panel in deck],
            page_of=self._below,
            zoomed=self._selected if self._zoomed else "",
        )
        for widget in self._panels():
            widget.place(self._arrangement.boxes.get(widget.panel.name), zoomed=self._zoomed)
            widget.show_frame(frame)
        shown = self._arrangement.boxes
        if self._selected in shown and not self._filtering:
            self.query_one(f"#{self._selected}").focus(scroll_visible=False)
        self.query_one("#waiting").display = False
        self._draw_tabs()

    def _draw_tabs(self) -> None:
        tabs = self.query_one("#tabs", LinesWidget)
        y = self._arrangement.tabs_y
        tabs.display = y is not None
        if y is None:
            return
        numbers = {panel.name: number for number, panel in enumerate((*ABOVE, *DECK), 1)}
        pages = [[(numbers[name], name, PANELS[name].title) for name in page] for page in self._arrangement.pages]
        tabs.styles.offset = (0, y)
        tabs.show([bars.tabs(pages, self._selected, self._below, self.size.width)])

    def _draw_edges(self) -> None:
        if not self.is_running:
            return
        width = self.size.width
        lost = self._lost
        late = self._frame is not None and time.monotonic() - self._seen_s > self._poller.interval_s + _LATE_S
        state = "lost" if lost is not None else "paused" if self._paused else "late" if late else "live"
        self.query_one("#header", LinesWidget).show(
            [
                bars.header(
                    self._frame,
                    self._poller.endpoint,
                    state=state,
                    interval_s=self._poller.interval_s,
                    clock=time.strftime(_CLOCK),
                    width=width,
                )
            ]
        )
        banner = self.query_one("#banner", LinesWidget)
        banner.display = lost is not None and self._frame is not None
        self.query_one(Body).set_class(lost is not None and self._frame is not None, "stale")
        if lost is not None:
            for_s = time.monotonic() - self._lost_since_s
            banner.show([bars.lost_banner(lost.reason, for_s, width)])
            if self._frame is None:
                self.query_one("#waiting", LinesWidget).show(bars.waiting(self._poller.endpoint, lost.reason))
        if self._message and time.monotonic() > self._message_until_s:
            self._message = ""
        self.query_one("#footer", LinesWidget).show([bars.footer(self._message, self._needle, width)])

    def say(self, message: str) -> None:
        """A short message at the bottom, for a few seconds."""
        self._message, self._message_until_s = message, time.monotonic() + _MESSAGE_S
        self._draw_edges()

    def _redraw(self) -> None:
        if self._frame is not None:
            self._show(self._frame)

    # -------------------------------------------------------------- keys

    def on_panel_widget_chosen(self, event: PanelWidget.Chosen) -> None:
        """A panel has the focus."""
        if event.name != self._selected:
            self._selected = event.name
            self.arrange_panels()

    def _names(self) -> Sequence[str]:
        return [panel.name for panel in (*ABOVE, *self._deck())]

    def action_next_panel(self, step: int) -> None:
        """To the next panel, or the one before."""
        names = self._names()
        self._select(names[(names.index(self._selected) + step) % len(names)])

    def action_panel(self, number: int) -> None:
        """To a panel by its number."""
        panels = (*ABOVE, *DECK)
        if number > len(panels):
            return
        panel = panels[number - 1]
        if panel.name in self._names():
            self._select(panel.name)
        elif self._frame is not None:
            self.say(f"this daemon has nothing to show under {panel.title}")

    def _select(self, name: str) -> None:
        if self._frame is None:
            return
        self._selected = name
        self.arrange_panels()

    def action_pause(self) -> None:
        """Hold the picture, or let it go on with what is new."""
        if self._frame is None:
            return
        self._paused = not self._paused
        if self._paused:
            # What comes in meanwhile must not move the charts of the picture that is held.
            frame = self._frame
            self._frame = replace(frame, history=frame.history.copy())
        elif self._waiting_frame is not None:
            self._show(self._waiting_frame)
            self._waiting_frame = None
        self._draw_edges()

    def action_details(self) -> None:
        """The panel alone, or all again."""
        if self._frame is not None:
            self._zoomed = not self._zoomed
            self.arrange_panels()

    async def action_back(self) -> None:
        """Leave what was entered last: details, then the filter."""
        if self._zoomed:
            self._zoomed = False
            self.arrange_panels()
        elif self._needle:
            self._filter_by("")

    def action_sort(self, reverse: bool) -> None:
        """Sort the table by its next column, or the other way round."""
        panel = PANELS[self._selected]
        frame = self._frame
        if frame is None:
            return
        if not panel.sorts:
            self.say(f"{panel.title} is not a table; tab moves to one")
            return
        current = self._orders.get(panel.name) or panel.order
        assert current is not None
        if reverse:
            new = replace(current, reverse=not current.reverse)
        else:
            new = Order(panel.sorts[(panel.sorts.index(current.column) + 1) % len(panel.sorts)])
        self._orders[panel.name] = new
        self._redraw()

    def action_interval(self, step: int) -> None:
        """Poll less often, or more often."""
        current = self._poller.interval_s
        others = [one for one in INTERVALS_S if (one > current if step > 0 else one < current)]
        if not others:
            self.say(f"polled every {current:g} s, which is the {'least' if step > 0 else 'most'} often")
            return
        self._poller.interval_s = min(others) if step > 0 else max(others)
        self._draw_edges()

    def action_policy(self) -> None:
        """Choose another policy."""
        if self._frame is None:
            return
        if self._lost is not None:
            self.say("the daemon does not answer")
            return
        self.push_screen(PolicyScreen(self._frame.stats.eviction), self._switch)

    def _switch(self, choice: Choice | None) -> None:
        if choice is not None:
            self._configure(choice)

    @work(exclusive=True, group="switch")
    async def _configure(self, choice: Choice) -> None:
        try:
            await self._poller.configure(**{choice.argument: choice.name})
        except KVStoreError as error:
            self.say(f"not switched: {error}")
        else:
            self.say(f"{choice.what}: {choice.name} from now on")

    def action_other_theme(self) -> None:
        """Dark or light."""
        self._wear("light" if self.current_theme.dark else "dark")
        self._redraw()

    def action_help(self) -> None:
        """Keys and colours."""
        self.push_screen(HelpScreen())

    # -------------------------------------------------------------- filter

    def action_filter(self) -> None:
        """Type what rows must contain."""
        self._filtering = True
        needle = self.query_one("#needle", Input)
        needle.value = self._needle
        needle.display = True
        self.query_one("#footer").display = False
        needle.focus()

    def on_input_changed(self, event: Input.Changed) -> None:
        """Rows follow each letter."""
        if self._filtering:
            self._filter_by(event.value)

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Keep the filter."""
        self._leave_filter()

    def on_key(self, event: events.Key) -> None:
        """Escape in the filter drops it."""
        if event.key == "escape" and self._filtering:
            event.stop()
            event.prevent_default()
            self._filter_by("")
            self._leave_filter()

    def _leave_filter(self) -> None:
        self._filtering = False
        needle = self.query_one("#needle", Input)
        needle.display = False
        self.query_one("#footer").display = True
        if self._frame is not None:
            self.query_one(f"#{self._selected}").focus(scroll_visible=False)
        self._redraw()

    def _filter_by(self, needle: str) -> None:
        self._needle = needle.strip()
        self._redraw()
        self._draw_edges()
