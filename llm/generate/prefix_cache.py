"""Prompts that begin alike are read once: full pages of keys and values are found again by the tokens they hold."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from llm.core.state import DecodeState, EmptyState, PagedKVState, Pages
from llm.core.states.paged import leaves


@dataclass(eq=False)
class _Node:
    """A full page of tokens behind those of its parents. pages: where it stands, one number for each pool."""

    parent: _Node | None
    tokens: tuple[int, ...]
    pages: tuple[int, ...]
    children: dict[tuple[int, ...], _Node] = field(default_factory=dict)


Chain = Sequence[_Node]
"""Pages that follow one another from the start of a text."""


class PrefixCache:
    """What is remembered of texts that were read, for those that begin with the same full pages of tokens.

    pages: of the states. max_bytes: of pages held here, whether rows hold them too or not; those that were of no use
    for the longest time go first, the end of a text before its beginning.
    """

    def __init__(self, pages: Pages, max_bytes: int) -> None:
        self.pages, self.max_bytes = pages, max_bytes
        self._root = _Node(None, (), ())
        # A node is moved behind its children whenever they are used, so the first one is always the end of a text.
        self._by_use: OrderedDict[_Node, None] = OrderedDict()

    def held_bytes(self) -> int:
        """Bytes of the pages held here."""
        return len(self._by_use) * self.pages.page_bytes()

    def find(self, tokens: Sequence[int]) -> list[_Node]:
        """The longest chain with which a prompt begins, which leaves at least one token to be read."""
        chain: list[_Node] = []
        while (key := self._page_of(tokens, len(tokens) - 1, len(chain))) is not None:
            found = (chain[-1] if chain else self._root).children.get(key)
            if found is None:
                break
            chain.append(found)
        self._used(chain)
        return chain

    def missing(self, tokens: Sequence[int], chain: Chain) -> object | None:
        """What the page behind a prompt's chain is known by: equal for prompts that would both read it. None: there is
        no such page."""
        key = self._page_of(tokens, len(tokens) - 1, len(chain))
        return None if key is None else (chain[-1] if chain else self._root, key)

    def begin(self, state: DecodeState, chains: Sequence[Chain]) -> list[int]:
        """Give each row of an empty state its chain; how many tokens of each that makes."""
        starts = [len(chain) * self.pages.size for chain in chains]
        n_paged = 0
        for part in leaves(state):
            if isinstance(part, PagedKVState):
                part.share([[node.pages[n_paged] for node in chain] for chain in chains])
                n_paged += 1
            else:
                part.length = torch.tensor(starts, dtype=torch.int64, device=part.length.device)
        return starts

    def keep(self, state: DecodeState, row: int, tokens: Sequence[int]) -> None:
        """Remember the full pages of a row, of which tokens are the first."""
        parts = [part for part in leaves(state) if isinstance(part, PagedKVState)]
        n_read = min(len(tokens), parts[0].ends[row])
        chain: list[_Node] = []
        while (key := self._page_of(tokens, n_read, len(chain))) is not None:
            parent = chain[-1] if chain else self._root
            node = parent.children.get(key)
            if node is None:
                node = _Node(parent, key, tuple(part.tables[row][len(chain)] for part in parts))
                for part, page in zip(parts, node.pages):
                    part.pool.hold([page])
                parent.children[key] = node
                self._by_use[node] = None
            chain.append(node)
        self._used(chain)
        while self._by_use and self.held_bytes() > self.max_bytes:
            self._forget(next(iter(self._by_use)))

    def clear(self) -> None:
        """Forget everything."""
        while self._by_use:
            self._forget(next(iter(self._by_use)))

    def _page_of(self, tokens: Sequence[int], n: int, number: int) -> tuple[int, ...] | None:
        """The tokens of a full page among the first n."""
        size = self.pages.size
        end = (number + 1) * size
        return tuple(tokens[end - size : end]) if end <= n else None

    def _used(self, chain: Chain) -> None:
        for node in reversed(chain):
            self._by_use.move_to_end(node)

    def _forget(self, node: _Node) -> None:
        assert not node.children and node.parent is not None
        del self._by_use[node], node.parent.children[node.tokens]
        for pool, page in zip(self.pages.pools.values(), node.pages):
            pool.drop([page])


def why_not(state: DecodeState) -> str | None:
    """Why prompts of a model with such states, in pages where they can be, are not shared; None: they are."""
    others = {type(part).__name__ for part in leaves(state) if not isinstance(part, PagedKVState | EmptyState)}
    if others:
        return f"the model's past is not in keys and values of every token alone: it has {', '.join(sorted(others))}"
    if not any(isinstance(part, PagedKVState) for part in leaves(state)):
        return "the model remembers nothing of its past"
    return None
