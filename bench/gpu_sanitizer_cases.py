"""Small calls of every CUDA op with odd shapes, for compute-sanitizer (whose checks cost a factor of 10 to 100)."""

from __future__ import annotations

import torch

from transferops import ops

for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
    for samples, dim, classes in ((1, 1, 1), (7, 3, 2), (65, 33, 5), (300, 129, 7), (1000, 20, 3)):
        features = torch.randn(2, samples, dim, device="cuda").to(dtype)
        for view in (features, features[:, 1:, 1:]):
            labels = torch.randint(classes, (view.shape[1],), device="cuda")
            moments = ops.class_moments(view, labels, classes)
            ops.norm_moments(view, moments.shift)
            ops.sample_gram(view)
torch.cuda.synchronize()
print("all calls made")
