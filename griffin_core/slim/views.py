"""Slim views: built a layer at a time, shared by sessions of the same experts, kept while there is
room."""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Sequence

import torch

from griffin_core.backends.base import Layout, RunFF
from griffin_core.backends.batch import DENSE
from griffin_core.experts.expert_set import ExpertSet
from griffin_core.kv.budget import Budget
from griffin_core.model.decoder import Decoder
from griffin_core.slim.base import SlimForm, SlimTable
from griffin_core.slim.zeroed import ZeroedLayers, zeroed_bytes

Key = tuple[bytes, Layout]

MOST_UNUSED = 8
"""Views that are kept though no session uses them. A prompt that is asked again finds its view if
it comes soon; a budget that is a large part of the machine's memory is not filled for it."""


class SlimView:
    """The FF blocks of all layers on one expert set.

    Args:
        experts: the set it is, or is coming to be, built of.
        layout: for how many rows at once.
        nbytes: the most it will hold beyond the model's own weights.
    """

    def __init__(self, experts: ExpertSet, layout: Layout, nbytes: int) -> None:
        self.experts = experts
        self.layout: Layout = layout
        self.nbytes = nbytes
        self.slim_id = DENSE
        """See ``SlimTable``; set once the view has a place in it."""
        self.layers: list[RunFF] = []
        """The blocks that are built; those of all layers once the view is ready. The list is the
        same for as long as the view lives."""
        self.pending: deque[int] = deque(range(len(experts.layers)))
        """Layers that are to be built, or built anew."""
        self.error: Exception | None = None
        """Why it cannot be built."""
        self.users = 0

    @property
    def key(self) -> Key:
        """What views are told apart by."""
        return self.experts.digest, self.layout

    @property
    def ready(self) -> bool:
        """Whether all layers can run. Some may still run on the experts before a ``change``."""
        return len(self.layers) == len(self.experts.layers)


class WholeView:
    """All weights, dense or zeroed outside a set.

    Args:
        experts: the set; None for all neurons.
    """

    def __init__(self, layers: Sequence[RunFF], experts: ExpertSet | None = None) -> None:
        self.layers = layers
        self.experts = experts
        self.slim_id = DENSE


class SlimViews:
    """All slim views of an engine. Owned by the engine's thread.

    A view that is no longer used stays until its bytes are needed, for the next session that
    chooses the same experts: a prompt that is asked again, a kept session's next turn.

    Args:
        table: gives the views their slim ids.
        form: how blocks are built; None where the table itself holds the sets, and a step decides
            how it runs them: views are then complete at once.
        budget: what the views' bytes are taken from; when it runs short, unused views go first.
        builds: whether there are views at all; else sessions run on all weights, dense or zeroed.
    """

    def __init__(
        self,
        decoder: Decoder,
        table: SlimTable,
        form: SlimForm | None,
        budget: Budget,
        *,
        builds: bool = True,
    ) -> None:
        self.builds = builds
        self.dense = WholeView([layer.ff for layer in decoder.layers])
        """What sessions on all neurons run on."""
        self._decoder = decoder
        self._table = table
        self._form = form
        self._budget = budget
        self._views: OrderedDict[Key, SlimView] = OrderedDict()  # longest unused first
        self._owned: list[SlimView] = []  # of groups, which change them
        self._unbuilt: deque[SlimView] = deque()
        self._zeroed = 0  # bytes of sessions that run zeroed
        budget.on_short(self._drop_unused)

    def __len__(self) -> int:
        return len(self._views) + len(self._owned)

    @property
    def copies(self) -> bool:
        """Whether views are blocks that take memory and time to build."""
        return self._form is not None

    def planned_bytes(self, k: int) -> int:
        """Most bytes a view of k experts a layer holds."""
        if not self.builds:
            return 0
        if self._form is None:
            return self._table.set_bytes(k)
        return sum(self._form.planned_bytes(layer, k) for layer in self._decoder.layers)

    def zeroed_bytes(self, k: int) -> int:
        """Most bytes a session of k experts a layer holds to run zeroed: none where views are
        numbers, which a step reads either way."""
        runs_zeroed = self.copies and k < self._decoder.spec.ff_width
        return zeroed_bytes(self._decoder) if runs_zeroed else 0

    def acquire_zeroed(self, size: int) -> None:
        """Counts the bytes of a session that may run zeroed from now on."""
        self._budget.acquire(size)
        self._zeroed += size

    def release_zeroed(self, size: int) -> None:
        """Counts these bytes as free again: the session has ended."""
        self._budget.release(size)
        self._zeroed -= size

    def zeroed(self, experts: ExpertSet) -> WholeView:
        """A view of all weights, zeroed outside a set. It needs no building.

        Raises:
            MemoryError: the table has no place for another set.
        """
        layers = ZeroedLayers(self._decoder, experts) if self.copies else self.dense.layers
        view = WholeView(layers, experts)
        view.slim_id = self._table.add(view)
        return view

    def acquire(self, experts: ExpertSet, layout: Layout, *, own: bool = False) -> SlimView:
        """The view of an expert set, perhaps still to be built. ``release`` it after use.

        Args:
            layout: for how many tokens its users together mostly run at once.
            own: for one user alone, who may ``change`` it.
        """
        # A digest takes the set to the host, which waits for the device; numbers that are there at
        # once are not worth it.
        own = own or not self.copies
        view = self._views.get((experts.digest, layout)) if self.copies else None
        if own and view is not None and view.users:
            view = None
        if view is None:
            view = SlimView(experts, layout, self.planned_bytes(experts.indices.shape[1]))
            self._budget.acquire(view.nbytes)
            self._begin(view)
        elif own:
            del self._views[view.key]
        if own:
            self._owned.append(view)
        else:
            self._views[view.key] = view
            self._views.move_to_end(view.key)
        view.users += 1
        return view

    def _begin(self, view: SlimView) -> None:
        try:
            view.slim_id = self._table.add(view)
        except Exception as error:
            view.error = error
            return
        if self.copies:
            self._unbuilt.append(view)
        else:
            view.layers += self.dense.layers  # never run: a step reads the set from the table
            view.pending.clear()

    def change(self, view: SlimView, experts: ExpertSet) -> None:
        """Lets a view of ``acquire(own=True)`` run on other experts, as many: at once where the
        table holds the sets, else layer by layer as ``build`` comes to them. Until then a layer
        runs on its old ones. Layers whose experts stay are not touched."""
        if not self.copies:
            view.experts = experts
            self._table.update(view)
            return
        pairs = zip(view.experts.layers, experts.layers, strict=True)
        changed = [layer for layer, (old, new) in enumerate(pairs) if not torch.equal(old, new)]
        view.experts = experts
        view.pending += [layer for layer in changed if layer not in view.pending]
        if view.pending and view not in self._unbuilt:
            self._unbuilt.append(view)

    def release(self, view: SlimView) -> None:
        """Drops a reference. A view that is unfinished by then is discarded."""
        view.users -= 1
        if view in self._owned:
            self._owned.remove(view)
            whole = self.copies and not view.pending and view.error is None
            if whole and view.key not in self._views:
                self._views[view.key] = view
            else:
                self._discard(view)
        elif not view.users and (view.pending or view.error is not None):
            del self._views[view.key]
            self._discard(view)
        while sum(not view.users for view in self._views.values()) > MOST_UNUSED:
            self._drop_unused()

    def build(self, seconds: float) -> None:
        """Builds layers of the views that wait, in order, for about so long; at least one layer.
        What goes wrong becomes the view's ``error``."""
        until = time.monotonic() + seconds
        while self._unbuilt:
            view = self._unbuilt[0]
            layer = view.pending.popleft()
            experts = view.experts.layers[layer]
            of = self._decoder.layers[layer]
            if layer < len(view.layers):
                view.layers[layer] = of.ff  # the old copy goes first: never two of a layer
            try:
                assert self._form is not None
                block = self._form.build(of, experts, view.layout)
                if layer < len(view.layers):
                    view.layers[layer] = block
                else:
                    view.layers.append(block)
            except Exception as error:
                view.error = error
            if view.error or not view.pending:
                self._unbuilt.popleft()
            if time.monotonic() >= until:
                return

    @property
    def held(self) -> Sequence[SlimView]:
        """All views, used or not."""
        return [*self._views.values(), *self._owned]

    @property
    def nbytes(self) -> int:
        """The most that all views hold, with what lets sessions run zeroed."""
        return sum(view.nbytes for view in self.held) + self._zeroed

    @property
    def building(self) -> bool:
        """Whether ``build`` has something to do."""
        return bool(self._unbuilt)

    def _drop_unused(self) -> bool:
        for view in self._views.values():
            if not view.users:
                del self._views[view.key]
                self._discard(view)
                return True
        return False

    def _discard(self, view: SlimView) -> None:
        if view in self._unbuilt:
            self._unbuilt.remove(view)
        self._budget.release(view.nbytes)
