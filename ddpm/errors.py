"""The one exception that means: the user can fix this, and the message says how."""

from collections.abc import Iterable


class UserError(Exception):
    """Printed as it is, without a traceback. One line per fault: the setting or file, its value, and what to do."""


def legible(name: object) -> str:
    """A file's name as a message shows it: escaped where it would end the line or control the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(name))


def listed(names: Iterable[object], most: int = 10) -> str:
    """The first of these names as a message shows them, and how many more there are."""
    shown = [legible(name) for name in names]
    return ", ".join(shown[:most]) + (f" and {len(shown) - most} more" if len(shown) > most else "")
