"""What figures are drawn with: matplotlib and its Pillow, which come with the extra `ovq[plots]`."""

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator
    from PIL import Image
except ImportError as error:
    # A ValueError as well, so that a command says it in one line.
    class MissingPlots(ImportError, ValueError):
        """Figures were asked for where matplotlib is not installed."""

    raise MissingPlots("figures: expected matplotlib, found none; pip install 'ovq[plots]'") from error

__all__ = ["Axes", "Figure", "FuncFormatter", "Image", "LogLocator", "NullFormatter", "NullLocator"]
