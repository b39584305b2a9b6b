"""Token and position embeddings of the CLIP text tower, and where its sentence state is read."""

from __future__ import annotations

import torch
from torch import Tensor, nn

LARGEST_ID_POOLING = 2  # the eos_token_id written in old CLIP files, whose real end-of-text id is the largest


class TextEmbeddings(nn.Module):
    """Token embedding plus learned position."""

    def __init__(self, *, vocab_size: int, hidden_size: int, num_positions: int) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, hidden_size)
        self.position_embedding = nn.Embedding(num_positions, hidden_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        """(b, t) int64 -> (b, t, d). Raises `ValueError` beyond the longest trained position."""
        length, longest = input_ids.shape[1], self.position_embedding.num_embeddings
        if length > longest:
            raise ValueError(f"texts have {length} tokens, this model reads {longest}: truncate them")
        positions = torch.arange(length, device=input_ids.device)
        return self.token_embedding(input_ids) + self.position_embedding(positions)


def pooled_positions(input_ids: Tensor, *, eos_token_id: int) -> Tensor:
    """(b, t) ids -> (b,) index of the end-of-text token whose state stands for the text.

    With `eos_token_id` 2 (old CLIP files) it is the first maximum of the ids, otherwise the first `eos_token_id`.
    """
    if eos_token_id == LARGEST_ID_POOLING:
        return input_ids.argmax(dim=-1)
    return input_ids.eq(eos_token_id).to(torch.int32).argmax(dim=-1)
