"""Numbers in the units that people read."""


def format_bytes(count: float) -> str:
    """Write a number of bytes in GiB or, if there are fewer than one, in MiB."""
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"


def format_seconds(seconds: float) -> str:
    """Write a time in seconds or, if it is shorter than a tenth of one, in milliseconds."""
    return f"{seconds:,.2f} s" if seconds >= 0.1 else f"{seconds * 1e3:.1f} ms"
