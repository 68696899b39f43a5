"""Vision towers that take all pictures as one long row of patches (Qwen, GLM): one attention call a layer.

Without FlashAttention transformers cuts the row and calls attention once for each picture (for each window in
Qwen2.5-VL). Pictures of one size have pieces of one length, which are a batch: one call does it, and the numbers are
the same. What these towers derive from the pictures' sizes (positions, windows, interpolation) is prepared once on the
CPU, so that no step waits for the device to tell it. H heads, S patches of all pictures, D width of a head.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel, vision_utils

NAME = "vlm4vla_flash_pieces"
"""Transformers tells only implementations with "flash" in their name where the pieces begin."""


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """(1, H, S, D) each -> (1, S, H, D); every piece attends to itself alone."""
    _one, heads, length, width = query.shape
    parts = (query, key, value)
    if length == max_length_q * (len(cu_seq_lens_q) - 1):  # no piece is longer, so all are as long
        batched = [part.view(heads, -1, max_length_q, width).transpose(0, 1) for part in parts]
        out = F.scaled_dot_product_attention(*batched, dropout_p=dropout, scale=scaling)
        return out.transpose(1, 2).reshape(1, length, heads, width), None
    lengths = cu_seq_lens_q.diff().tolist()
    pieces = zip(*(part.split(lengths, dim=2) for part in parts), strict=True)
    out = [F.scaled_dot_product_attention(*piece, dropout_p=dropout, scale=scaling) for piece in pieces]
    return torch.cat(out, 2).transpose(1, 2), None


AttentionInterface.register(NAME, attention)


class PackedVision:
    """A vision tower of this kind, switched to ``attention``."""

    def __init__(self, tower: Any):
        self.tower = tower
        # Not set_attn_implementation(), which would look for a kernel package of that name.
        tower.config._attn_implementation = NAME
        self.known: dict[tuple, dict[str, Any]] = {}
        if hasattr(tower, "embeddings"):  # GLM looks the pictures' sizes up for each patch, on the patches' device
            tower.embeddings.register_forward_pre_hook(_together)

    def prepared(self, grid: Tensor, device: torch.device) -> dict[str, Any]:
        """Arguments for the model's forward pass: all that the tower derives from ``image_grid_thw`` (B, 3)."""
        key = (device, *map(tuple, grid.tolist()))
        if key not in self.known:
            made = self._derive(grid.cpu())
            self.known[key] = {
                f"image_{name}": value.to(device) if isinstance(value, Tensor) else value
                for name, value in made.items()
            }
        return self.known[key]

    def _derive(self, grid: Tensor) -> dict[str, Any]:
        tower, merge = self.tower, self.tower.spatial_merge_size
        made: dict[str, Any] = {
            "cu_seqlens": vision_utils.get_vision_cu_seqlens(grid),
            "position_ids": vision_utils.get_vision_position_ids(grid, merge),
        }
        made["max_seqlen"] = int(made["cu_seqlens"].diff().max())
        if hasattr(tower, "window_size"):
            made["window_index"], made["cu_window_seqlens"] = vision_utils.get_vision_window_index(
                grid, merge, tower.window_size, tower.patch_size
            )
            made["max_window_seqlen"] = int(made["cu_window_seqlens"].diff().max())
        if hasattr(tower, "num_grid_per_side"):
            made["interp_indices"], made["interp_weights"] = vision_utils.get_vision_interpolation_indices_and_weights(
                grid,
                tower.num_grid_per_side,
                mode=tower.interpolation_mode,
                align_corners=tower.interpolation_align_corners,
                spatial_merge_size=merge,
            )
        return made


def _together(_module: nn.Module, args: tuple) -> tuple:
    """A module's tensors on the device of the first."""
    return tuple(value.to(args[0].device) if isinstance(value, Tensor) else value for value in args)


def packed_vision(vlm: PreTrainedModel) -> PackedVision | None:
    """``vlm``'s vision tower where it is of this kind."""
    tower = vlm.get_encoder(modality="image")
    return PackedVision(tower) if hasattr(tower, "spatial_merge_size") else None
