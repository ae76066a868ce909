"""Numbers as short texts."""

from collections.abc import Sequence

BARS = "▁▂▃▄▅▆▇█"


def memory(num_bytes: float | None) -> str:
    """Return bytes in MiB or GiB."""
    if num_bytes is None:
        return "-"
    mib = num_bytes / 2**20
    return f"{mib:.0f} MiB" if mib < 1024 else f"{mib / 1024:.1f} GiB"


def duration(seconds: float | None) -> str:
    """Return seconds in the unit that fits."""
    if seconds is None:
        return "-"
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    return f"{minutes} min" if minutes < 120 else f"{hours} h {minutes % 60} min"


def count(number: float) -> str:
    """Return a number, rounded as far as it is large."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e4)):
        if number >= size:
            return f"{number / (1e3 if unit == 'k' else size):.1f} {unit}"
    return f"{number:.0f}" if number >= 10 or number == int(number) else f"{number:.2g}"


def sparkline(values: Sequence[float]) -> str:
    """Return a bar for each value, as high as it is among them."""
    top = max(values, default=0.0)
    if top <= 0:
        return BARS[0] * len(values)
    return "".join(BARS[min(7, int(each / top * 7.999))] for each in values)


def layout(axes: dict[str, int]) -> str:
    """Return the sizes of a mesh that are not 1."""
    return " ".join(f"{axis}={size}" for axis, size in axes.items() if size not in (0, 1, None))
