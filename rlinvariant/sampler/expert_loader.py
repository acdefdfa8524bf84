"""Read the matrices of a mixture's experts into an engine: a checkpoint has one for each expert, and the model all in one.

vLLM's transformers backend renames weights, but does not join them.
"""

from collections.abc import Iterable, Iterator

from torch import Tensor, nn

from rlinvariant.errors import UserError
from rlinvariant.models.experts import place, places, rows_of


class ExpertLoader:
    """Takes the experts out of one pass over weights, and says which parameters it filled."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = {name: p for name, p in model.named_parameters() if p.dim() == 3}
        self.filled: dict[str, set[tuple[int, int]]] = {}

    def others(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights that are not one expert's, and copy each of one expert to its place.

        Raises:
            UserError: the model has no such expert, or its matrix has another shape.
        """
        for name, weight in weights:
            if (found := place(name)) is None:
                yield name, weight
                continue
            path, parameter, expert, part = found
            full = f"{path if path.startswith('model.') else f'model.{path}'}.{parameter}"
            if full not in self.parameters or expert >= len(self.parameters[full]):
                raise UserError(f"{name}: a weight of the checkpoint, not in the model; is its config.json another model's?")
            rows = rows_of(self.parameters[full], expert, part, parameter)
            if rows.shape != weight.shape:
                raise UserError(f"{name}: shape {list(weight.shape)}, expected {list(rows.shape)}")
            rows.copy_(weight)
            self.filled.setdefault(full, set()).add((expert, part))

    def loaded(self) -> set[str]:
        """Return the names of the parameters that were filled. Raises UserError if an expert of one is missing."""
        for name, filled in self.filled.items():
            if missing := sorted(places(self.parameters[name], name) - filled):
                raise UserError(f"{name}: expert {missing[0][0]} is missing from the checkpoint, first of {len(missing)} parts")
        return set(self.filled)
