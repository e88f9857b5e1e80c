"""matplotlib's backend in the sandbox: to show figures is to save them, as figure-1.png and so on.

Figures that were neither shown nor saved when the code ends are saved then: programs often leave out `plt.show()`.
"""

from __future__ import annotations

import itertools
import os
from typing import Any
from weakref import WeakSet

from matplotlib import pyplot
from matplotlib.backend_bases import FigureManagerBase
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

seen: WeakSet[Figure] = WeakSet()


class FigureManager(FigureManagerBase):
    @classmethod
    def pyplot_show(cls, *_: Any, **__: Any) -> None:
        for number in pyplot.get_fignums():
            save(pyplot.figure(number))
        pyplot.close("all")

    def show(self) -> None:
        save(self.canvas.figure)


class FigureCanvas(FigureCanvasAgg):
    manager_class = FigureManager

    def print_figure(self, *args: Any, **kwargs: Any) -> Any:
        seen.add(self.figure)
        return super().print_figure(*args, **kwargs)


def save(figure: Figure) -> None:
    number = next(n for n in itertools.count(1) if not os.path.exists(f"figure-{n}.png"))
    figure.savefig(f"figure-{number}.png")


def save_unseen() -> None:
    for number in pyplot.get_fignums():
        figure = pyplot.figure(number)
        if figure not in seen:
            save(figure)
