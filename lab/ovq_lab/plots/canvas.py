"""Imports of matplotlib and Pillow, which come with the extra `./lab[plots]`."""

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator
    from PIL import Image
except ImportError as error:
    # Also a ValueError, which commands report in one line.
    class MissingPlots(ImportError, ValueError):
        """Figures were requested, but matplotlib is not installed."""

    raise MissingPlots("figures: expected matplotlib, found none; pip install './lab[plots]'") from error

__all__ = [
    "Axes",
    "ConstrainedLayoutEngine",
    "Figure",
    "FuncFormatter",
    "Image",
    "LogLocator",
    "NullFormatter",
    "NullLocator",
]
