"""The one exception that means: a person can mend this, and the message says how."""


class UserError(Exception):
    """Shown as it is, without a traceback. One line a fault: what, its value, what is allowed or what to do."""
