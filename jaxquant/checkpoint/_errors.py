"""The one error for files that are not what they should be."""


class CheckpointError(ValueError):
    """A file or folder cannot be read as a model.

    The message is one line: what was being read, what was found, what was wanted, and what to do.
    It is a `ValueError` because the file is the caller's value; its own name lets the command line
    tell a bad file from a bug.
    """
