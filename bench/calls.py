"""One form of the operator on one case, as calls without arguments: forward, backward, or both."""

import torch
from interleave import DEVICE, Call
from providers import BACKENDS, FORMS, Function, Inputs
from shapes import Case


class Calls:
    """The passes of a form's functions over the same tensors."""

    def __init__(self, form: str, direction: str, case: Case) -> None:
        self.form, self.direction = FORMS[form], direction
        self.inputs: Inputs = self.form.inputs(case, DEVICE)
        self.first = (*self.inputs.leaves, *self.inputs.given)[0]
        self.leaves = [leaf.detach().requires_grad_(direction != "forward") for leaf in self.inputs.leaves]
        self.grad = torch.randn_like(self.first) if self.leaves else None

    def function(self, provider: str, backend: str | None) -> Function:
        """A provider's function of the leaves: one of theirs by its name, or ours by its backend's."""
        return self.form.theirs.get(provider, self.form.ours)(self.inputs, backend)

    def call(self, provider: str, backend: str | None) -> Call:
        """One pass of `provider`; a clone of x has one kind of pass."""
        if provider == "clone":
            return self.first.clone
        function = self.function(provider, backend)
        if self.direction == "forward":
            return lambda: function(*self.leaves)
        if self.direction == "backward":
            y = function(*self.leaves)
            return lambda: self._gradients(y, retain_graph=True)
        return lambda: self._gradients(function(*self.leaves))

    def _gradients(self, y: torch.Tensor, retain_graph: bool = False) -> object:
        return torch.autograd.grad(y, self.leaves, self.grad, retain_graph=retain_graph, allow_unused=True)


def backend_of(provider: str) -> str | None:
    """The backend to force: the provider's own where it is one of ours, else none."""
    return provider if provider in BACKENDS[DEVICE] else None
