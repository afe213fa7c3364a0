"""The one exception that is meant for the person at the keyboard."""


class UserError(ValueError):
    """Something the user can mend: one line, what was wrong, what is allowed, what to do.

    The command lines print its text without a traceback and exit with status 2.
    """
