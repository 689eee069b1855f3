"""Delta nets in a draft: nodes attend over the nodes above them and read the committed state once,
so that no node needs a state of its own.

With c the sum of a path's log decays, S the committed state and u what a node writes:
u_i = beta_i (v_i - e^c_i S^T k_i - sum over j above i of e^(c_i - c_j) (k_j k_i) u_j)
o_i = e^c_i S^T q_i + sum over j above i, and i, of e^(c_i - c_j) (k_j q_i) u_j
This is the rule of delta_net.py along a path, in another order of sums: other bits.
T = rows, W = rows of a tree, K = taps, G / J = key / value heads, E / F = their sizes
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from subspec.runtime.model.delta_net import DeltaInputs
from subspec.runtime.model.delta_rule import L2_EPSILON
from subspec.runtime.model.net_state import NetState, TreeNodes, slice_of


def run_draft(state: NetState, inputs: DeltaInputs, z: Tensor, tree: TreeNodes) -> None:
    """Run nodes of a tree: the first `num_together` at once, as their parents have run before, then
    one by one. The outputs replace z [T, J F].

    Static shapes, nothing is read back: a graph can capture it.
    """
    num_rows = len(tree.nodes)
    together = num_rows if tree.num_together is None else tree.num_together
    for rows in (slice(together), *(slice(row, row + 1) for row in range(together, num_rows))):
        nodes = TreeNodes(
            tree.nodes[rows], tree.parents[rows], tree.above[rows], tree.windows[rows]
        )
        run_together(state, slice_of(inputs, rows), z[rows], nodes)


def run_together(state: NetState, inputs: DeltaInputs, z: Tensor, tree: TreeNodes) -> None:
    """Run nodes whose parents have run before."""
    weights, dtype = state.weights, z.dtype
    q, k, v = convolved(state, inputs.qkv, tree)  # f32 [G, T, E], [G, T, E], [J, T, F]
    beta = inputs.b.float().sigmoid().t()
    step = F.softplus(inputs.a.float() + weights.step_bias.float())
    decay = (step * -weights.decay_log.float().exp()).t()
    keys, updates, decays = (
        x[:, : tree.above.shape[1]] for x in (state.keys, state.updates, state.path_decays)
    )
    above_parent = decays[:, tree.parents].masked_fill(tree.parents == tree.nodes, 0.0)
    decay = decay + above_parent  # [J, T], of the whole path

    repeats, num_rows = len(v) // len(q), len(tree.nodes)
    both = torch.cat((k, q), dim=1)  # [G, 2 T, E]
    apart = decay[:, :, None] - decays[:, None]  # [J, T, W]
    shares = apart.masked_fill(~tree.above, -math.inf).exp_()
    scores = torch.bmm(both, keys.transpose(1, 2)).repeat_interleave(repeats, 0)
    scores.unflatten(1, (2, -1)).mul_(shares[:, None])
    reads = torch.bmm(both.repeat_interleave(repeats, 0), state.committed.memory)
    reads.unflatten(1, (2, -1)).mul_(decay.exp()[:, None, :, None])
    reads = torch.baddbmm(reads, scores, updates)
    known, out = reads.split(num_rows, dim=1)  # [J, T, F] each

    update = (v - known) * beta[:, :, None]
    for held, fresh in ((keys, k), (updates, update), (decays, decay)):
        held.index_copy_(1, tree.nodes, fresh)
    own = (k * q).sum(-1).repeat_interleave(repeats, 0)
    out = (out + own[:, :, None] * update).transpose(0, 1).to(dtype).float()  # [T, J, F]
    normed = F.rms_norm(out, out.shape[-1:], None, weights.epsilon).to(dtype)
    z.copy_((weights.norm * normed).flatten(1) * F.silu(z.float()))


def convolved(state: NetState, qkv: Tensor, tree: TreeNodes) -> tuple[Tensor, Tensor, Tensor]:
    """q and k f32 [G, T, E] of the lengths 1 / sqrt(E) and 1, and v f32 [J, T, F]."""
    state.nodes.qkv.index_copy_(0, tree.nodes, qkv.to(state.nodes.qkv.dtype))
    rows = torch.cat((state.committed.conv, state.nodes.qkv))[tree.windows]  # [T, K, C]
    taps = state.weights.conv.float()[:, 0].t()
    mixed = F.silu((rows.float() * taps).sum(1))
    num_heads, value_size = state.updates.shape[0], state.updates.shape[2]
    num_keys, key_size = state.keys.shape[0], state.keys.shape[2]
    keys = num_keys * key_size
    q, k, v = mixed.split((keys, keys, num_heads * value_size), dim=1)
    q, k = (x.unflatten(1, (num_keys, key_size)).transpose(0, 1) for x in (q, k))
    q, k = (x * (x.square().sum(-1, keepdim=True) + L2_EPSILON).rsqrt() for x in (q, k))
    return q * key_size**-0.5, k, v.unflatten(1, (num_heads, value_size)).transpose(0, 1)
