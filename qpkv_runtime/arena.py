"""The arena: one uint8 buffer per device that holds every sequence's packed cache, allocated once.

Row r of a device's buffer is one contiguous extent: the blocks (`ledger.py`) of the layers on that device, in order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qpkv_runtime.ledger import Ledger


class Arena:
    """`num_rows` sequences under `ledger`; layer l lives on `layer_devices[l]`."""

    def __init__(self, ledger: Ledger, num_rows: int, layer_devices: list[torch.device]) -> None:
        self.num_rows = num_rows
        self._places: list[tuple[torch.device, int, int]] = []  # per layer: device, offset in the extent, size
        extents: dict[torch.device, int] = {}
        for layer, device in zip(ledger.layers, layer_devices, strict=True):
            offset = extents.get(device, 0)
            self._places.append((device, offset, layer.stored_bytes))
            extents[device] = offset + layer.stored_bytes
        self.buffers = {
            device: torch.zeros(num_rows, extent, dtype=torch.uint8, device=device)
            for device, extent in extents.items()
        }

    @property
    def allocated_bytes(self) -> int:
        """What torch really allocated, over all devices."""
        return sum(buffer.untyped_storage().nbytes() for buffer in self.buffers.values())

    def block(self, layer: int) -> Tensor:
        """uint8 [num_rows, the layer's stored_bytes], a view: writing to it writes to the arena."""
        device, offset, size = self._places[layer]
        return self.buffers[device][:, offset : offset + size]

    def extent(self, layer: int) -> tuple[Tensor, int]:
        """The whole buffer of the layer's device, uint8 [num_rows, extent], and where its block begins in every row."""
        device, offset, _ = self._places[layer]
        return self.buffers[device], offset

    def select_rows(self, rows: Tensor) -> None:
        """Row i becomes what row rows[i] was; in place while the number of rows stays."""
        for device, buffer in self.buffers.items():
            chosen = buffer.index_select(0, rows.to(device))
            if len(rows) == self.num_rows:
                buffer.copy_(chosen)
            else:
                self.buffers[device] = chosen
        self.num_rows = len(rows)
