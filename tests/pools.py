"""Caches laid out in pages: random order, neighbours that hold NaN, tables that name no page past the length."""

from dataclasses import replace

import torch

from strategies import DEVICE, NAN

LOST = 10**6  # a page that does not exist, where a table names none


class Pool:
    """Pages of so many tokens, in random order among others that hold NaN, and what lies in them."""

    def __init__(self, case, page_size, n_shared=0):
        batch, width = len(case.lengths), case.capacity // page_size
        self.page_size, self.n_pages = page_size, batch * width + 3
        self.used = [-(-length // page_size) for length in case.lengths]
        order = torch.randperm(self.n_pages, generator=torch.Generator().manual_seed(case.seed)).int()
        self.pages, self.spare = order[:-3].view(batch, width), order[-3:]
        self.pages[1:, :n_shared] = self.pages[0, :n_shared]
        self.table = self.pages.clone()
        for s, n in enumerate(self.used):
            self.table[s, n:] = LOST

    def filled(self, *tensors):
        """Tensors [B, Hkv, T_max, …] side by side in one pool, and other numbers behind them → the parts of it."""
        widths = [each.shape[3:].numel() for each in tensors]
        shape = self.n_pages, tensors[0].shape[1], self.page_size, sum(widths) + 16
        is_number = tensors[0].is_floating_point()
        pool = torch.full(shape, NAN if is_number else 77, dtype=tensors[0].dtype, device=DEVICE)
        parts = []
        for part, tensor in zip(pool.split([*widths, 16], dim=3), tensors, strict=False):
            parts.append(part.unflatten(3, tensor.shape[3:]) if tensor.dim() > 3 else part[..., 0])
            for s, n in enumerate(self.used):
                for i in range(n):
                    own = tensor[s, :, i * self.page_size : (i + 1) * self.page_size]
                    parts[-1][self.pages[s, i], :, : own.shape[1]] = own.to(DEVICE)
        return parts

    def at(self, s, t):
        """Place of token t of sequence s in a pool."""
        return int(self.pages[s, t // self.page_size]), slice(None), t % self.page_size

    def read(self, pool, s, length):
        """Tokens of sequence s, [length, Hkv, …]."""
        found = [pool[self.at(s, t)] for t in range(length)]
        return torch.stack(found) if found else pool[0, :, 0].expand(0, *pool[0, :, 0].shape)


def in_pages(case, n_blocks):
    """A case with room for whole pages of so many blocks: splits go by the room there is."""
    page_size = n_blocks * case.block_size
    return replace(case, capacity=-(-case.capacity // page_size) * page_size), page_size
