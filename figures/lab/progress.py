"""Bars on a terminal: of the training on an experience, and of several runs."""

from collections.abc import Iterable, Iterator
from threading import Event, Thread
from typing import TypeVar

from avalanche.training.plugins import SupervisedPlugin
from avalanche.training.templates import SupervisedTemplate
from tqdm import tqdm

T = TypeVar("T")


class ProgressBar(SupervisedPlugin):
    """Show how far the training on an experience is: a bar on a terminal, else nothing.

    :param name: what is trained.
    """

    disable: bool | None = None  # None: where there is no terminal; True: beside other runs

    def __init__(self, name: str):
        super().__init__()
        self.name, self.bar = name, None

    def before_training_exp(self, strategy: SupervisedTemplate, **kwargs):
        """Begin a bar; remove one that an interrupted experience has left."""
        self.close()
        place = f"{strategy.experience.current_experience + 1}"
        if hasattr(stream := strategy.experience.origin_stream, "__len__"):  # it isn't online
            place += f"/{len(stream)}"
        self.bar = tqdm(
            total=strategy.train_epochs * len(strategy.dataloader),
            desc=f"experience {place}, {self.name}",
            leave=False,
            mininterval=0.2,
            disable=self.disable,
        )

    def after_training_iteration(self, strategy: SupervisedTemplate, **kwargs):
        """Go on by one."""
        self.bar.update()

    def after_training_exp(self, strategy: SupervisedTemplate, **kwargs):
        """Remove the bar."""
        self.close()

    def close(self) -> None:
        """Remove the bar, if there is one."""
        if self.bar is not None:
            self.bar.close()
        self.bar = None


def bar_of_runs(results: Iterable[T], count: int) -> Iterator[T]:
    """Yield the results of runs as they come, and count them in a bar.

    The lines that other processes print take its place, so it is drawn anew every second.
    """

    def draw_anew() -> None:
        """Draw the bar until the runs are over."""
        while not over.wait(1):
            bar.refresh()

    over = Event()
    with tqdm(total=count, desc="runs", leave=False, disable=None) as bar:
        thread = Thread(target=draw_anew, daemon=True)
        thread.start()
        try:
            for result in results:
                bar.update()
                yield result
        finally:
            over.set()
            thread.join()
