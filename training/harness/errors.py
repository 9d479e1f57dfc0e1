"""The error for everything a user of the scripts can put right."""


class UsageError(ValueError):
    """A setting, a file or a checkpoint is not what the script needs; the message says what to do."""
