"""Prompts that begin alike are read once: what was read is found again by its tokens, in blocks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from llm.core.state import DecodeState, EmptyState, PagedKVState, Pages
from llm.core.states.paged import leaves

PAGES_BETWEEN_SAVES = 16
"""Of a state that is saved whole, so many pages are read at once."""

Saved = list[dict[str, Tensor]]
"""Exports of one row of the states that are not in pages."""


@dataclass(eq=False)
class _Node:
    """A block of tokens behind those of its parents. pages: by pool, where its keys and values stand. saved: what other
    states were after it. n_bytes: of both."""

    parent: _Node | None
    tokens: tuple[int, ...] = ()
    pages: list[list[int]] = field(default_factory=list)
    saved: Saved = field(default_factory=list)
    n_bytes: int = 0
    children: dict[tuple[int, ...], _Node] = field(default_factory=dict)


Chain = Sequence[_Node]
"""Blocks that follow one another from the start of a text."""


class PrefixCache:
    """What is remembered of texts that were read, for those that begin with the same blocks of tokens.

    Keys and values are shared as they are, in pages, and a block is one page. States of other kinds are saved whole at
    the end of each block, when a row stands just there; `saves` says whether there are such. block: tokens, full pages.
    max_bytes: of all that is held here, whether rows hold it too or not; what was of no use for the longest time goes
    first, the end of a text before its beginning.
    """

    def __init__(self, pages: Pages, block: int, max_bytes: int, *, saves: bool) -> None:
        assert block % pages.size == 0
        self.pages, self.block, self.max_bytes, self.saves = pages, block, max_bytes, saves
        self._root = _Node(None)
        self._n_bytes = 0
        # A node is moved behind its children whenever they are used, so the first one is always the end of a text.
        self._by_use: OrderedDict[_Node, None] = OrderedDict()

    def held_bytes(self) -> int:
        """Bytes of what is held here."""
        return self._n_bytes

    def saved_bytes(self) -> int:
        """Bytes of the saved states alone."""
        return self._n_bytes - len(self._by_use) * self._block_bytes()

    def find(self, tokens: Sequence[int]) -> list[_Node]:
        """The longest chain with which a prompt begins, which leaves at least one token to be read."""
        chain = self._known(tokens, len(tokens) - 1)
        self._used(chain)
        return chain

    def missing(self, tokens: Sequence[int], chain: Chain) -> object | None:
        """What the block behind a prompt's chain is known by: equal for prompts that would both read it. None: there is
        no such block."""
        key = self._block_of(tokens, len(tokens) - 1, len(chain))
        return None if key is None else (chain[-1] if chain else self._root, key)

    def begin(self, state: DecodeState, chains: Sequence[Chain]) -> list[int]:
        """Give each row of an empty state its chain; how many tokens of each that makes."""
        starts = [len(chain) * self.block for chain in chains]
        n_paged = n_saved = 0
        for part in leaves(state):
            if isinstance(part, PagedKVState):
                part.share([[page for node in chain for page in node.pages[n_paged]] for chain in chains])
                n_paged += 1
            elif isinstance(part, EmptyState):
                part.length = torch.tensor(starts, dtype=torch.int64, device=part.length.device)
            else:
                if any(chains):
                    empty = _rows_of(part.export(), range(len(chains)))
                    part.restore(
                        _together([chain[-1].saved[n_saved] if chain else own for chain, own in zip(chains, empty)])
                    )
                n_saved += 1
        return starts

    def keep(self, state: DecodeState, rows: Sequence[int], texts: Sequence[Sequence[int]]) -> None:
        """Remember the full blocks of some rows, row rows[i] having read at least the beginning of texts[i]."""
        lengths = state.length.tolist()
        n_read = [min(len(text), lengths[row]) for row, text in zip(rows, texts, strict=True)]
        if self.saves:
            # A state can only be saved as it is now.
            here = [i for i, row in enumerate(rows) if lengths[row] == n_read[i] > 0 and not n_read[i] % self.block]
            rows, texts, n_read = [rows[i] for i in here], [texts[i] for i in here], [n_read[i] for i in here]
        saved = self._save(
            state, rows, [len(self._known(*each)) < each[1] // self.block for each in zip(texts, n_read)]
        )
        for row, text, n, own in zip(rows, texts, n_read, saved):
            self._keep_row(state, row, text, n, own)
        while self._by_use and self._n_bytes > self.max_bytes:
            self._forget(next(iter(self._by_use)))

    def clear(self) -> None:
        """Forget everything."""
        while self._by_use:
            self._forget(next(iter(self._by_use)))

    def _keep_row(self, state: DecodeState, row: int, text: Sequence[int], n: int, saved: Saved | None) -> None:
        parts = [part for part in leaves(state) if isinstance(part, PagedKVState)]
        n_pages = self.block // self.pages.size
        chain = self._known(text, n)
        while (key := self._block_of(text, n, len(chain))) is not None:
            end = (len(chain) + 1) * self.block
            if self.saves and (saved is None or end < n):
                break  # What came before has been forgotten: this state would never be found.
            parent = chain[-1] if chain else self._root
            node = _Node(parent, key, saved=saved or [])
            node.pages = [part.tables[row][len(chain) * n_pages :][:n_pages] for part in parts]
            for part, pages in zip(parts, node.pages):
                part.pool.hold(pages)
            tensors = [tensor for part in node.saved for tensor in part.values()]
            node.n_bytes = self._block_bytes() + sum(t.numel() * t.element_size() for t in tensors)
            self._n_bytes += node.n_bytes
            parent.children[key] = node
            self._by_use[node] = None
            chain.append(node)
        self._used(chain)

    def _block_bytes(self) -> int:
        return self.block // self.pages.size * self.pages.page_bytes()

    def _save(self, state: DecodeState, rows: Sequence[int], wanted: Sequence[bool]) -> list[Saved | None]:
        """What the states outside of pages are now in those rows for which it is wanted."""
        if not self.saves or not any(wanted):
            return [None] * len(rows)
        others = [part for part in leaves(state) if not isinstance(part, PagedKVState | EmptyState)]
        by_part = [_rows_of(part.export(), rows) for part in others]
        return [list(each) if want else None for each, want in zip(zip(*by_part), wanted)]

    def _known(self, tokens: Sequence[int], n: int) -> list[_Node]:
        """The longest chain of the first n tokens."""
        chain: list[_Node] = []
        while (key := self._block_of(tokens, n, len(chain))) is not None:
            found = (chain[-1] if chain else self._root).children.get(key)
            if found is None:
                break
            chain.append(found)
        return chain

    def _block_of(self, tokens: Sequence[int], n: int, number: int) -> tuple[int, ...] | None:
        """The tokens of a full block among the first n."""
        end = (number + 1) * self.block
        return tuple(tokens[end - self.block : end]) if end <= n else None

    def _used(self, chain: Chain) -> None:
        for node in reversed(chain):
            self._by_use.move_to_end(node)

    def _forget(self, node: _Node) -> None:
        assert not node.children and node.parent is not None
        del self._by_use[node], node.parent.children[node.tokens]
        self._n_bytes -= node.n_bytes
        for pool, pages in zip(self.pages.pools.values(), node.pages):
            pool.drop(pages)


def _rows_of(exported: dict[str, Tensor], rows: Iterable[int]) -> Saved:
    return [{name: tensor[row : row + 1].clone() for name, tensor in exported.items()} for row in rows]


def _together(rows: Saved) -> dict[str, Tensor]:
    """One export of rows, of which those with fewer tokens are filled up with zeros."""

    def longest(tensors: list[Tensor]) -> Tensor:
        if tensors[0].dim() < 2:
            return torch.cat(tensors)
        n = max(tensor.shape[1] for tensor in tensors)
        return torch.cat([F.pad(t, (0, 0) * (t.dim() - 2) + (0, n - t.shape[1])) for t in tensors])

    return {name: longest([row[name] for row in rows]) for name in rows[0]}


def saves_states(state: DecodeState) -> bool:
    """Whether something of a model's past is in no pages, of a state with its keys and values in pages where they can
    be."""
    return any(not isinstance(part, PagedKVState | EmptyState) for part in leaves(state))
