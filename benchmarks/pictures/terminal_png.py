"""A picture of a terminal application, cell by cell: blocks and lines as shapes, so that nothing gapes between rows.

Needs matplotlib (extra ``dev``), which brings Pillow and the DejaVu fonts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from PIL import Image, ImageDraw, ImageFont
from rich.segment import Segment
from textual.app import App

CELL = (12, 24)
FONT_PX = 20
MARGIN = 14
_FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
_SHADES = {"░": 0.25, "▒": 0.5, "▓": 0.75}
_LOWER = {glyph: at for at, glyph in enumerate("▁▂▃▄▅▆▇█", 1)}
_DOTS = ((0x01, 0, 0), (0x02, 0, 1), (0x04, 0, 2), (0x40, 0, 3), (0x08, 1, 0), (0x10, 1, 1), (0x20, 1, 2), (0x80, 1, 3))
_ARCS = {"╭": (1, 1), "╮": (-1, 1), "╰": (1, -1), "╯": (-1, -1)}
"""Where the two ends of a rounded corner point."""

Colour = tuple[int, int, int]


def terminal_png(app: App[Any], path: Path) -> None:
    """Write what an application shows as a PNG of at most 256 colours."""
    strips = app.screen._compositor.render_strips()  # the rows as they go to a terminal; there is no public way to them
    ground = _colour(app.theme_variables["ground"])
    text = _colour(app.theme_variables["text"])
    width, height = app.size
    size = (width * CELL[0] + 2 * MARGIN, height * CELL[1] + 2 * MARGIN)
    image = Image.new("RGB", size, ground)
    draw = ImageDraw.Draw(image)
    fonts = {
        bold: ImageFont.truetype(str(_FONTS / f"DejaVuSansMono{'-Bold' if bold else ''}.ttf"), FONT_PX)
        for bold in (False, True)
    }
    for row, strip in enumerate(strips):
        x = MARGIN
        for segment in strip:
            x = _draw_segment(draw, fonts, segment, x, MARGIN + row * CELL[1], text, ground)
    image.quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(path, optimize=True)


def _colour(value: str) -> Colour:
    return int(value[1:3], 16), int(value[3:5], 16), int(value[5:7], 16)


def _mixed(front: Colour, back: Colour, share: float) -> Colour:
    red, green, blue = (round(one * share + other * (1 - share)) for one, other in zip(front, back, strict=True))
    return red, green, blue


def _draw_segment(
    draw: ImageDraw.ImageDraw,
    fonts: dict[bool, ImageFont.FreeTypeFont],
    segment: Segment,
    x: int,
    y: int,
    text: Colour,
    ground: Colour,
) -> int:
    """Draw a run of one style; where the next one begins."""
    style = segment.style
    front, back, bold = text, ground, False
    if style is not None:
        if style.color is not None and not style.color.is_default:
            front = tuple(style.color.get_truecolor())
        if style.bgcolor is not None and not style.bgcolor.is_default:
            back = tuple(style.bgcolor.get_truecolor())
        if style.reverse:
            front, back = back, front
        bold = bool(style.bold)
        if style.dim:
            front = _mixed(front, back, 0.6)
    for glyph in segment.text:
        draw.rectangle((x, y, x + CELL[0] - 1, y + CELL[1] - 1), fill=back)
        if glyph != " ":
            _draw_glyph(draw, fonts[bold], glyph, x, y, front, back)
        x += CELL[0]
    return x


def _draw_glyph(
    draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont, glyph: str, x: int, y: int, front: Colour, back: Colour
) -> None:
    width, height = CELL
    right, bottom = x + width - 1, y + height - 1
    middle_x, middle_y = x + width // 2, y + height // 2
    if glyph in _LOWER:
        draw.rectangle((x, y + height - height * _LOWER[glyph] // 8, right, bottom), fill=front)
    elif glyph in _SHADES:
        draw.rectangle((x, y, right, bottom), fill=_mixed(front, back, _SHADES[glyph]))
    elif glyph == "─":
        draw.line((x, middle_y, right, middle_y), fill=front, width=2)
    elif glyph in "━╸":
        end = right if glyph == "━" else x + width // 2
        draw.rectangle((x, middle_y - 3, end, middle_y + 3), fill=front)
    elif glyph == "│":
        draw.line((middle_x, y, middle_x, bottom), fill=front, width=2)
    elif glyph in _ARCS:
        across, down = _ARCS[glyph]
        radius = width // 2
        draw.line((middle_x, middle_y + down * radius, middle_x, bottom if down > 0 else y), fill=front, width=2)
        draw.line((middle_x + across * radius, middle_y, right if across > 0 else x, middle_y), fill=front, width=2)
        centre_x, centre_y = middle_x + across * radius, middle_y + down * radius
        start = {(1, 1): 180, (-1, 1): 270, (1, -1): 90, (-1, -1): 0}[(across, down)]
        box = (centre_x - radius, centre_y - radius, centre_x + radius, centre_y + radius)
        draw.arc(box, start, start + 90, fill=front, width=2)
    elif 0x2800 <= ord(glyph) < 0x2900:
        for bit, column, row in _DOTS:
            if (ord(glyph) - 0x2800) & bit:
                left, top = x + column * width // 2 + 1, y + row * height // 4 + 1
                draw.rectangle((left, top, left + 3, top + 3), fill=front)
    else:
        draw.text((x, y), glyph, font=font, fill=front)
