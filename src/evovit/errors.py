"""The one exception for wrong input: a sentence with what was given, what is allowed and what to do."""


class EvoViTError(ValueError):
    """Wrong input from outside. The command line prints its message and exits with code 2."""
