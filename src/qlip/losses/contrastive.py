"""Contrastive losses over the features of all ranks: CLIP's softmax (QLIP Eq 2) and SigLIP's sigmoid.

Shapes: `b` pairs on this rank, `B` pairs on all ranks, `e` projection width, `chunk` columns at a time. Pair i is row i
of images and texts, which have norm 1. Each rank scores its own rows against the pairs of every rank, gathered with
gradient: the mean of the ranks' losses is the loss of the joined batch, the mean of their gradients its gradient.

With a `chunk_size` the (b, B) matrix of logits never exists: the forward pass goes through blocks of (b, chunk) and
keeps at most two numbers per row and column, the backward pass computes the blocks again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from qlip.core.distributed import gather_with_grad, rank, world_size
from qlip.core.precision import float32_region


def clip_loss(image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor, *, chunk_size: int = 0) -> Tensor:
    """``-1/(2B) sum_i [log softmax_j(s v_i.w_j)_i + log softmax_j(s v_j.w_i)_i]``, s = exp(logit_scale). Scalar.

    image_embeds and text_embeds (b, e), the same b on every rank; logit_scale () or (1,). `chunk_size` 0 computes with
    the whole matrix, a positive one with that many columns at a time: the same loss and first derivatives in memory
    O(b chunk + B e); there is no second derivative then. Float32 also under autocast, float64 if given float64.
    The normaliser 1/(2B) is open_clip's; the paper prints the bare sum.
    """
    assert chunk_size >= 0
    with float32_region(image_embeds.device.type):  # logits up to 100
        images, texts, log_scale = at_least_float32(image_embeds, text_embeds, logit_scale)
        log_scale = log_scale.reshape(())
        all_images, all_texts = gather_with_grad(images), gather_with_grad(texts)
        first_pair = rank() * len(images)
        if chunk_size and world_size() == 1:
            return ChunkedSoftmax.apply(images, texts, log_scale, first_pair, chunk_size, True) / 2
        if chunk_size:
            image_to_text = ChunkedSoftmax.apply(images, all_texts, log_scale, first_pair, chunk_size, False)
            text_to_image = ChunkedSoftmax.apply(texts, all_images, log_scale, first_pair, chunk_size, False)
        else:
            scale = log_scale.exp()
            labels = torch.arange(len(images), device=images.device) + first_pair
            image_to_text = F.cross_entropy(scale * images @ all_texts.T, labels)
            text_to_image = F.cross_entropy(scale * texts @ all_images.T, labels)
        return (image_to_text + text_to_image) / 2


def siglip_loss(
    image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor, logit_bias: Tensor, *, chunk_size: int = 0
) -> Tensor:
    """``-1/B sum_ij log sigmoid(z_ij (s v_i.w_j + logit_bias))``, s = exp(logit_scale), z_ii = 1, else -1. Scalar.

    Shapes, precision and `chunk_size` as in `clip_loss`; logit_bias () or (1,). SigLIP (arXiv 2303.15343, Eq 1 and
    Algorithm 1), which starts from logit_scale = ln 10 and logit_bias = -10.
    """
    assert chunk_size >= 0
    with float32_region(image_embeds.device.type):
        images, texts, log_scale, bias = at_least_float32(image_embeds, text_embeds, logit_scale, logit_bias)
        log_scale, bias = log_scale.reshape(()), bias.reshape(())
        all_texts = gather_with_grad(texts)
        first_pair = rank() * len(images)
        if chunk_size:
            return ChunkedSigmoid.apply(images, all_texts, log_scale, bias, first_pair, chunk_size)
        negated = -log_scale.exp() * images @ all_texts.T - bias  # (b, B)
        signed = negated.diagonal_scatter(-negated.diagonal(first_pair), first_pair)
        del negated  # as large as what it takes to go on
        return -F.logsigmoid(signed).sum() / len(images)


def at_least_float32(image_embeds: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """All in float64 when the first is, else in float32."""
    dtype = torch.float64 if image_embeds.dtype == torch.float64 else torch.float32
    return tuple(x.to(dtype) for x in (image_embeds, *others))


def column_blocks(rows: Tensor, columns: Tensor, *, chunk_size: int) -> Iterator[tuple[slice, Tensor]]:
    """The products (b, e) x (B, e) -> (b, chunk) of all rows with the next columns, and which these are."""
    for start in range(0, len(columns), chunk_size):
        chunk = slice(start, start + chunk_size)
        yield chunk, rows @ columns[chunk].T


def pairs_of(block: Tensor, chunk: slice, first_pair: int) -> Tensor:
    """A view of the block's entries (b, chunk) that belong to pairs, row i and column first_pair + i; maybe none."""
    return block.diagonal(first_pair - chunk.start)


class ChunkedSoftmax(torch.autograd.Function):
    """``mean_i [log sum_j exp(z_ij) - z_i,first_pair+i]``, z = exp(log_scale) rows @ columns.T, in blocks of columns.

    `both` adds the same for the columns, ``mean_j [log sum_i exp(z_ij) - z_jj]``, from the same blocks; rows and
    columns are then the whole batch. A block holds whole columns, so their sums are final at once; a row's is carried
    along as its highest logit and the total of exp(z - highest), which rounds less than a log-sum-exp near 100 would.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, columns: Tensor, log_scale: Tensor, first_pair: int, chunk_size: int, both: bool
    ) -> Tensor:
        """rows (b, e), columns (B, e), log_scale () -> ()."""
        highest = rows.new_full((len(rows),), -torch.inf)
        total = torch.zeros_like(highest)
        pairs, column_highest, column_total = [], [], []
        for chunk, block in column_blocks(log_scale.exp() * rows, columns, chunk_size=chunk_size):
            pairs.append(pairs_of(block, chunk, first_pair).clone())  # a view would keep the block
            block_highest = torch.maximum(highest, block.amax(1))
            total = total * (highest - block_highest).exp() + (block - block_highest[:, None]).exp_().sum(1)
            highest = block_highest
            if both:
                column_highest.append(block.amax(0))
                column_total.append(block.sub_(column_highest[-1]).exp_().sum(0))
        loss = (total.log() + (highest - torch.cat(pairs))).mean()
        saved = [rows, columns, log_scale, highest, total]
        if both:
            saved += [torch.cat(column_highest), torch.cat(column_total)]
            loss = loss + (saved[-1].log() + (saved[-2] - torch.cat(pairs))).mean()
        ctx.save_for_backward(*saved)
        ctx.first_pair, ctx.chunk_size, ctx.both = first_pair, chunk_size, both
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient in z is (softmax - pairs) / b; of everything else, products of its blocks."""
        rows, columns, log_scale, highest, total, *of_columns = ctx.saved_tensors
        weight = grad_loss / len(rows)
        with float32_region(rows.device.type):  # also when called inside autocast
            gradients = Gradients(rows, columns, log_scale)
            for chunk, block in column_blocks(gradients.scaled_rows, columns, chunk_size=ctx.chunk_size):
                gradient = (block - highest[:, None]).exp_().mul_((weight / total)[:, None])
                if ctx.both:
                    column_highest, column_total = (x[chunk] for x in of_columns)
                    gradient += block.sub_(column_highest).exp_().mul_(weight / column_total)
                pairs_of(gradient, chunk, ctx.first_pair).sub_(2 * weight if ctx.both else weight)
                gradients.add(chunk, gradient)
            return *gradients.finished(), None, None, None


class ChunkedSigmoid(torch.autograd.Function):
    """``1/b sum_ij log(1 + exp(u_ij))`` in blocks of columns.

    u = exp(log_scale) rows @ columns.T + bias, negated where row and column are a pair.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, columns: Tensor, log_scale: Tensor, bias: Tensor, first_pair: int, chunk_size: int
    ) -> Tensor:
        """rows (b, e), columns (B, e), log_scale () and bias () -> ()."""
        sums = []
        for chunk, block in column_blocks(log_scale.exp() * rows, columns, chunk_size=chunk_size):
            block += bias
            pairs_of(block, chunk, first_pair).neg_()
            sums.append(F.logsigmoid(block.neg_()).sum())
        ctx.save_for_backward(rows, columns, log_scale, bias)
        ctx.first_pair, ctx.chunk_size = first_pair, chunk_size
        return -torch.stack(sums).sum() / len(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient in u is sigmoid(u) / b."""
        rows, columns, log_scale, bias = ctx.saved_tensors
        weight = grad_loss / len(rows)
        grad_bias = torch.zeros_like(bias)
        with float32_region(rows.device.type):
            gradients = Gradients(rows, columns, log_scale)
            for chunk, block in column_blocks(gradients.scaled_rows, columns, chunk_size=ctx.chunk_size):
                block += bias
                pairs_of(block, chunk, ctx.first_pair).neg_()
                gradient = block.sigmoid_().mul_(weight)
                pairs_of(gradient, chunk, ctx.first_pair).neg_()
                grad_bias += gradient.sum()
                gradients.add(chunk, gradient)
            return *gradients.finished(), grad_bias, None, None


class Gradients:
    """Gradients in rows (b, e), columns (B, e) and log_scale () from that in z = exp(log_scale) rows @ columns.T.

    Block by block: every column is in one block only, the rows' gradient grows with each.
    """

    def __init__(self, rows: Tensor, columns: Tensor, log_scale: Tensor) -> None:
        self.rows, self.columns, self.scale = rows, columns, log_scale.exp()
        self.scaled_rows = self.scale * rows
        self.grad_rows, self.grad_columns = torch.zeros_like(rows), torch.empty_like(columns)

    def add(self, chunk: slice, gradient: Tensor) -> None:
        """Take in the gradient (b, chunk) in one block of z."""
        self.grad_rows.addmm_(gradient, self.columns[chunk])
        torch.mm(gradient.T, self.scaled_rows, out=self.grad_columns[chunk])

    def finished(self) -> tuple[Tensor, Tensor, Tensor]:
        """In rows, columns and log_scale, after the last block."""
        self.grad_rows *= self.scale
        # sum_ij g_ij z_ij = sum_i rows_i . grad_rows_i: the blocks of z are not needed for it
        return self.grad_rows, self.grad_columns, (self.rows * self.grad_rows).sum()
