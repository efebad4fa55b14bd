"""The one exception of deepshare.secure."""


class SecureError(RuntimeError):
    """A secure run that could not be started or finished; the message says which argument, node or party, and why."""
