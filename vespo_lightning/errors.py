"""Errors that are the user's to solve. Entry points print them as one sentence and exit with status 1."""


class UserError(Exception):
    """Something in the configuration, the data or the machine stops the run.

    The message is one sentence that names the config key, its value and the way out.
    """
