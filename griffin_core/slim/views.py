"""Slim views: built a layer at a time, shared by sessions of the same experts, kept while there is
room."""

from __future__ import annotations

import time
from collections import OrderedDict, deque

from griffin_core.budget import Budget
from griffin_core.experts.expert_set import ExpertSet
from griffin_core.model.decoder import Decoder
from griffin_core.model.linear import Rows
from griffin_core.slim.base import SlimFF, SlimForm

Key = tuple[bytes, Rows]


class SlimView:
    """The FF blocks of all layers on one expert set.

    Args:
        experts: what it is built of.
        rows: for how many at once.
        nbytes: the most it will hold beyond the model's own weights.
    """

    def __init__(self, experts: ExpertSet, rows: Rows, nbytes: int) -> None:
        self.experts = experts
        self.rows: Rows = rows
        self.nbytes = nbytes
        self.layers: list[SlimFF] = []
        self.error: Exception | None = None
        """Why it cannot be built."""
        self.users = 0

    @property
    def key(self) -> Key:
        """What views are told apart by."""
        return self.experts.digest, self.rows

    @property
    def ready(self) -> bool:
        """Whether all layers are built."""
        return len(self.layers) == len(self.experts.layers)


class SlimViews:
    """All slim views of an engine. Owned by the engine's thread.

    A view that nobody uses any more stays until its bytes are needed, for the next session that
    chooses the same experts: a prompt that is asked again, a kept session's next turn.

    Args:
        budget: what the views' bytes are taken from; when it runs short, unused views go first.
    """

    def __init__(self, decoder: Decoder, form: SlimForm, budget: Budget) -> None:
        self._decoder = decoder
        self._form = form
        self._budget = budget
        self._views: OrderedDict[Key, SlimView] = OrderedDict()  # longest unused first
        self._unbuilt: deque[SlimView] = deque()
        budget.on_short(self._drop_unused)

    def __len__(self) -> int:
        return len(self._views)

    def planned_bytes(self, k: int) -> int:
        """Most bytes a view of k experts a layer holds."""
        return sum(self._form.planned_bytes(layer, k) for layer in self._decoder.layers)

    def acquire(self, experts: ExpertSet, rows: Rows) -> SlimView:
        """The view of an expert set, perhaps still to be built. ``release`` it after use.

        Args:
            rows: how many tokens its users together will mostly run at once.
        """
        key: Key = experts.digest, rows
        view = self._views.get(key)
        if view is None:
            view = SlimView(experts, rows, self.planned_bytes(experts.indices.shape[1]))
            self._budget.take(view.nbytes)
            self._views[key] = view
            self._unbuilt.append(view)
        view.users += 1
        self._views.move_to_end(key)
        return view

    def release(self, view: SlimView) -> None:
        """One user less. A view that is not whole by then is not worth keeping."""
        view.users -= 1
        if not view.users and not view.ready:
            self._drop(view)

    def build(self, seconds: float) -> None:
        """Builds layers of the views that wait, in order, for about so long; at least one layer.
        What goes wrong becomes the view's ``error``."""
        until = time.monotonic() + seconds
        while self._unbuilt:
            view = self._unbuilt[0]
            layer = len(view.layers)
            experts = view.experts.layers[layer]
            try:
                block = self._form.build(self._decoder.layers[layer], experts, view.rows)
                view.layers.append(block)
            except Exception as error:
                view.error = error
            if view.ready or view.error:
                self._unbuilt.popleft()
            if time.monotonic() >= until:
                return

    @property
    def nbytes(self) -> int:
        """The most that all views hold."""
        return sum(view.nbytes for view in self._views.values())

    @property
    def building(self) -> bool:
        """Whether ``build`` has something to do."""
        return bool(self._unbuilt)

    def _drop_unused(self) -> bool:
        for view in self._views.values():
            if not view.users:
                self._drop(view)
                return True
        return False

    def _drop(self, view: SlimView) -> None:
        if view in self._unbuilt:
            self._unbuilt.remove(view)
        del self._views[view.key]
        self._budget.give_back(view.nbytes)
