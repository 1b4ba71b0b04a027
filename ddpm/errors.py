"""The one exception that means: a person can mend this, and the message says how."""


class UserError(Exception):
    """Shown as it is, without a traceback. One line a fault: what, its value, what is allowed or what to do."""


def legible(name: object) -> str:
    """A file's name as a message shows it: escaped where it would end the line or command the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(name))
