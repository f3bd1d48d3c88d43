"""Slim views: built layer by layer, shared by sessions with the same experts, and cached while
memory allows."""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Sequence

import torch

from griffin_core.backends.base import Layout, RunFF
from griffin_core.backends.batch import DENSE
from griffin_core.experts.slim_spec import SlimSpec
from griffin_core.kv.budget import Budget
from griffin_core.model.decoder import Decoder
from griffin_core.slim.base import SlimForm, SlimTable
from griffin_core.slim.corrected import corrected_block, plain_block
from griffin_core.slim.zeroed import ZeroedLayers, zeroed_bytes

Key = tuple[bytes, Layout, str]

MOST_UNUSED = 8
"""The most unused views that are kept. A prompt that soon comes again finds its view, and unused
views do not fill a large memory budget."""


class SlimView:
    """The FF blocks of all layers on one expert set.

    Args:
        slim: what it is built from, or will be once ``pending`` is empty.
        layout: the number of rows that its blocks are laid out for.
        nbytes: the most bytes that it will hold beyond the model's own weights.
        shares_with: who may use it; see ``SlimViews.acquire``.
    """

    def __init__(self, slim: SlimSpec, layout: Layout, nbytes: int, shares_with: str = "") -> None:
        self.shares_with = shares_with
        self.slim = slim
        self.layout: Layout = layout
        self.nbytes = nbytes
        self.slim_id = DENSE
        """See ``SlimTable``; set once the view is added to the table."""
        self.layers: list[RunFF] = []
        """The blocks built so far; those of all layers once the view is ready. It stays the same
        list object for as long as the view lives."""
        self.pending: deque[int] = deque(range(len(slim.counts)))
        """The layers to build, or to build again."""
        self.error: Exception | None = None
        """The error that keeps the view from being built."""
        self.users = 0

    @property
    def key(self) -> Key:
        """The key that identifies the view."""
        return self.slim.digest, self.layout, self.shares_with

    @property
    def ready(self) -> bool:
        """Whether all layers can run. After a ``change`` some may still run on the old experts."""
        return len(self.layers) == len(self.slim.counts)


class WholeView:
    """A view of all weights, dense or zeroed outside a set.

    Args:
        slim: the set; None for all neurons.
    """

    def __init__(self, layers: Sequence[RunFF], slim: SlimSpec | None = None) -> None:
        self.layers = layers
        self.slim = slim
        self.slim_id = DENSE


class SlimViews:
    """All slim views of an engine. Owned by the engine's thread.

    An unused view is kept until its bytes are needed, for the owner's next session with the same
    experts: a repeated prompt, or a kept session's next turn.

    Args:
        table: gives the views their slim ids.
        form: builds the blocks; None if the table itself holds the sets and each step chooses how
            to run them: views are then complete at once.
        budget: the budget that holds the views' bytes; when it runs short, unused views are evicted
            first.
        builds: whether views are built; if not, sessions run on all weights, dense or zeroed.
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
        """The view that sessions on all neurons use."""
        self._decoder = decoder
        self._table = table
        self._form = form
        self._budget = budget
        self._views: OrderedDict[Key, SlimView] = OrderedDict()  # longest unused first
        self._owned: list[SlimView] = []  # views of expert groups, which change their experts
        self._unbuilt: deque[SlimView] = deque()
        self._zeroed = 0  # bytes for sessions that run zeroed
        budget.on_short(self._drop_unused)

    def __len__(self) -> int:
        return len(self._views) + len(self._owned)

    @property
    def copies(self) -> bool:
        """Whether views are blocks that take memory and time to build."""
        return self._form is not None

    @property
    def max_rank(self) -> int | None:
        """See ``SlimTable``."""
        return self._table.max_rank

    def planned_bytes(self, counts: Sequence[int]) -> int:
        """Returns the most bytes that a view of K experts of each layer holds."""
        if not self.builds:
            return 0
        if self._form is None:
            return self._table.set_bytes(counts)
        pairs = zip(self._decoder.layers, counts, strict=True)
        return sum(self._form.planned_bytes(layer, k) for layer, k in pairs)

    def zeroed_bytes(self, counts: Sequence[int]) -> int:
        """Returns the most bytes that a session of K experts of each layer needs to run zeroed: 0
        if views are indices, which a step reads in every mode."""
        runs_zeroed = self.copies and min(counts) < self._decoder.spec.intermediate_size
        return zeroed_bytes(self._decoder) if runs_zeroed else 0

    def acquire_zeroed(self, size: int) -> None:
        """Counts the bytes of a session that may run zeroed from now on."""
        self._budget.acquire(size)
        self._zeroed += size

    def release_zeroed(self, size: int) -> None:
        """Frees the bytes of a session that has ended."""
        self._budget.release(size)
        self._zeroed -= size

    def zeroed(self, slim: SlimSpec) -> WholeView:
        """Returns a view of all weights, zeroed outside a set. It needs no building.

        Raises:
            MemoryError: the table has no place for another set.
        """
        layers = ZeroedLayers(self._decoder, slim) if self.copies else self.dense.layers
        view = WholeView(layers, slim)
        view.slim_id = self._table.add(view)
        return view

    def acquire(
        self, slim: SlimSpec, layout: Layout, *, own: bool = False, shares_with: str = ""
    ) -> SlimView:
        """Returns the view of an expert set, which may not be built yet. ``release`` it after use.

        Args:
            layout: the number of rows that its users together usually run in a step.
            own: whether the view is for this caller only, which may ``change`` it.
            shares_with: only users with the same value find the view. Whether a view is there
                already shows in how long it takes, and so whether somebody has sent a prompt.
        """
        # A digest needs the set on the host, which synchronizes; that does not pay for indices,
        # which are complete at once.
        own = own or not self.copies
        view = self._views.get((slim.digest, layout, shares_with)) if self.copies else None
        if own and view is not None and view.users:
            view = None
        if view is None:
            view = SlimView(slim, layout, self.planned_bytes(slim.counts), shares_with)
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
            view.layers += self.dense.layers  # never called: a step reads the set from the table
            view.pending.clear()

    def change(self, view: SlimView, slim: SlimSpec) -> None:
        """Changes the experts of a view from ``acquire(own=True)``. If the table holds the sets,
        all layers change at once; otherwise ``build`` changes them layer by layer, and a layer runs
        on its old experts until then. Layers whose experts are the same are not rebuilt, and get
        their new correction at once."""
        if not self.copies:
            view.slim = slim
            self._table.update(view)
            return
        nbytes = self.planned_bytes(slim.counts)
        self._budget.acquire(max(0, nbytes - view.nbytes))
        self._budget.release(max(0, view.nbytes - nbytes))
        view.nbytes = nbytes
        pairs = zip(view.slim.layers, slim.layers, strict=True)
        changed = [layer for layer, (old, new) in enumerate(pairs) if not torch.equal(old, new)]
        view.slim = slim
        for layer in set(range(len(view.layers))) - {*changed, *view.pending}:
            block = plain_block(view.layers[layer])
            backend = self._decoder.backend
            view.layers[layer] = corrected_block(backend, block, slim.correction, layer)
        view.pending += [layer for layer in changed if layer not in view.pending]
        if view.pending and view not in self._unbuilt:
            self._unbuilt.append(view)

    def release(self, view: SlimView) -> None:
        """Drops a reference, and discards the view if it is unfinished."""
        view.users -= 1
        if view in self._owned:
            self._owned.remove(view)
            whole = self.copies and not view.pending and view.error is None and not _large(view)
            if whole and view.key not in self._views:
                self._views[view.key] = view
            else:
                self._discard(view)
        elif not view.users and (view.pending or view.error is not None or _large(view)):
            del self._views[view.key]
            self._discard(view)
        while sum(not view.users for view in self._views.values()) > MOST_UNUSED:
            self._drop_unused()

    def build(self, seconds: float) -> None:
        """Builds layers of pending views, in order, for about ``seconds``; at least one layer. An
        exception becomes the view's ``error``."""
        until = time.monotonic() + seconds
        while self._unbuilt:
            view = self._unbuilt[0]
            layer = view.pending.popleft()
            experts = view.slim.layers[layer]
            of = self._decoder.layers[layer]
            if layer < len(view.layers):
                view.layers[layer] = of.ff  # frees the old copy before the new one is made
            try:
                assert self._form is not None
                block = self._form.build(of, experts, view.layout)
                correction = view.slim.correction
                block = corrected_block(self._decoder.backend, block, correction, layer)
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
        """All views, used and unused."""
        return [*self._views.values(), *self._owned]

    @property
    def nbytes(self) -> int:
        """The most bytes that all views and all sessions that run zeroed hold."""
        return sum(view.nbytes for view in self.held) + self._zeroed

    @property
    def building(self) -> bool:
        """Whether ``build`` has work to do."""
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


def _large(view: SlimView) -> bool:
    """Returns whether a view holds a residual, whose bytes only a session's reservation covers."""
    return view.slim.correction is not None and view.slim.correction.rank > 0
