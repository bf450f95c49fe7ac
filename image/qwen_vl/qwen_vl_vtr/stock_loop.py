"""The stock loop of an lmms-eval wrapper over one batch, run in a thread ahead of the one that answers.

The loop reads, prepares and answers. A copy of the wrapper runs it, whose processor and model stop it where the turn of
the batch has to come first.
"""

from copy import copy, deepcopy
from functools import wraps
from queue import Empty, SimpleQueue
from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from strategy.evaluation.turns import Turn

NO_BAR = -1  # a rank for which the wrappers draw no progress bar


class ModelInTurn:
    """A model whose answers the calling thread generates; all else about it is the model's own."""

    def __init__(self, model: Any, turn: Turn) -> None:
        self._model, self._turn = model, turn

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate in the batch's turn."""
        return self._turn.call(self._model.generate, *args, **kwargs)


class StockLoop:
    """Runs the stock loop of a wrapper over single batches, by several threads at the same time.

    Args:
        wrapper: The wrapper, whose `answer_as_stock` runs the loop.
    """

    def __init__(self, wrapper: Any) -> None:
        self._wrapper = wrapper
        # Tokenizers cannot be shared by threads, and copies of them take seconds where vocabularies are large.
        self._readers: SimpleQueue[dict[str, Any]] = SimpleQueue()

    def __call__(self, requests: list[Any], turn: Turn) -> list[Any]:
        """Return the answers to one batch, whose requests are read and prepared before its turn."""
        try:
            readers = self._readers.get_nowait()
        except Empty:
            readers = self._copied_readers()
        try:
            for reader in readers.values():
                if isinstance(reader, ProcessorMixin):
                    reader.pause = turn.wait
            own = copy(self._wrapper)
            vars(own).update(readers, _model=ModelInTurn(self._wrapper.model, turn), _rank=NO_BAR)
            answers: list[Any] = own.answer_as_stock(requests)
            return answers
        finally:
            self._readers.put(readers)

    def _copied_readers(self) -> dict[str, Any]:
        """Return copies of the wrapper's processors and tokenizers, by the names under which it holds them."""
        kinds = (ProcessorMixin, PreTrainedTokenizerBase)
        readers = deepcopy({name: part for name, part in vars(self._wrapper).items() if isinstance(part, kinds)})
        for reader in readers.values():
            if isinstance(reader, ProcessorMixin):
                reader.__class__ = _pausing(type(reader))
        return readers


def _pausing(kind: type) -> type:
    """Return a class of processors that call `self.pause` once they have prepared a batch."""

    @wraps(kind.__call__)
    def prepare(self: Any, *args: Any, **kwargs: Any) -> Any:
        prepared = kind.__call__(self, *args, **kwargs)
        self.pause()  # the next thing that a wrapper does is to move the batch to the model's device
        return prepared

    return type(kind.__name__, (kind,), {"__call__": prepare})
