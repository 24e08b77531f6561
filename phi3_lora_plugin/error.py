"""The base of every error that this package raises by intent."""


class Phi3LoraError(ValueError):
    """Input, a file, a plugin or an installed library that cannot be used; the message says what, where, what to do.

    Subclasses that are a `RuntimeError` too are runs that failed on good input.
    """

    @property
    def exit_code(self) -> int:
        """What a command ends with: 1 failed, 2 wrong input."""
        return 1 if isinstance(self, RuntimeError) else 2
