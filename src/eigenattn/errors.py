"""The error that a user can do something about."""


class EigenAttnError(ValueError):
    """Bad input: the message is one line that says what was wrong and what to do.

    The command line prints the message alone and exits with status 1.
    """
