"""The one exception that a user's own mistake raises; the command line prints it as one line and exits 2."""


class UserError(ValueError):
    """Input that the user can mend: the message says what, where, what was expected and how to mend it."""
