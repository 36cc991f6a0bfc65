"""Elements of HTML and SVG, in which all text is escaped."""

from __future__ import annotations

from html import escape

# Elements without content and end tag.
VOID = ("img", "meta")
# No line ends after these: it would be a space in the text.
INLINE = ("a", "code", "time")


class Markup(str):
    """Text that is markup already; any other is escaped where it is put in."""

    __slots__ = ()


def tag(name: str, /, *content: str, **attributes: str | float) -> Markup:
    """An element with its content and its attributes.

    Args:
        name: of the element.
        content: text, which is escaped, and :class:`Markup`, which is not.
        attributes: ``class_`` stands for ``class`` and ``aria_label`` for ``aria-label``.

    Example:
        >>> tag("a", "R & D", href="#top", class_="link")
        '<a href="#top" class="link">R &amp; D</a>'
    """
    named = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_escaped(str(value))}"' for key, value in attributes.items()
    )
    inner = "".join(part if isinstance(part, Markup) else _escaped(part) for part in content)
    end = "" if name in VOID else f"</{name}>"
    return Markup(f"<{name}{named}>{inner}{end}" + ("" if name in INLINE else "\n"))


def _escaped(text: str) -> str:
    """JSON can hold halves of surrogate pairs, which no file in UTF-8 can."""
    return escape(text.encode("utf-8", "replace").decode())
