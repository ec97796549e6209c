"""Figures in the colours of a dark page."""

from __future__ import annotations

import re

PAPER, INK = 0x16, 0xEC  # grey levels of the page's ground and text in the dark (page.html.j2)
LIGHTER = 0.4  # share of white that colours are mixed with, so that they stand out from a dark ground
COLOUR = re.compile(r"""((?:fill|stroke)(?:: |="))#([0-9a-f]{2})([0-9a-f]{2})([0-9a-f]{2})""")


def dark_svg(svg: str) -> str:
    """Return one of matplotlib's SVG files with dark ground, light text, reversed greys and lighter colours."""
    # What matplotlib draws in black has no fill of its own, and inherits that of the root.
    return COLOUR.sub(_swapped, svg).replace("<svg ", f'<svg fill="{_hex(INK, INK, INK)}" ', 1)


def _swapped(found: re.Match[str]) -> str:
    levels = [int(text, 16) for text in found.groups()[1:]]
    if len(set(levels)) == 1:
        return found[1] + _hex(*[round(INK + (PAPER - INK) * level / 255) for level in levels])
    return found[1] + _hex(*[round(level + LIGHTER * (255 - level)) for level in levels])


def _hex(*levels: int) -> str:
    return "#" + "".join(f"{level:02x}" for level in levels)
