"""A model of what is no linear layer, for the tests of layers and of PEFT's."""

import torch
import torch.nn as nn

IDS = torch.tensor([[1, 2, 0, 5], [3, 3, 10, 4]])


class Net(nn.Module):
    """An embedding, a convolution of each number of dimensions, one in groups if asked for, and a linear layer."""

    def __init__(self, in_groups):
        super().__init__()
        self.table = nn.Embedding(11, 6, padding_idx=0)
        self.one = nn.Conv1d(6, 6, 3, padding=1)
        self.two = nn.Conv2d(1, 8, (3, 2), stride=2, padding=1)
        self.three = nn.Conv3d(1, 5, 2)
        self.groups = nn.Conv1d(6, 6, 3, padding=1, groups=3) if in_groups else nn.Identity()
        self.out = nn.Linear(6, 4)

    def forward(self, ids):
        h = self.table(ids)
        h = self.groups(self.one(h.mT)).mT
        a, b = self.two(h[:, None]), self.three(torch.stack([h, 2 * h], 1)[:, None])
        return self.out(h).mean(1) + a.mean((1, 2, 3))[:, None] + b.mean((1, 2, 3, 4))[:, None]


def net(in_groups=False):
    torch.manual_seed(0)
    return Net(in_groups).eval()
