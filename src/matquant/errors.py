"""The user's mistakes. Each message has three parts: what was asked, what was found, what would do."""


class InputError(ValueError):
    """Something the user gave cannot be used. The command line prints it without a traceback and exits with 2."""
