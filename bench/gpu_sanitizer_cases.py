"""Small calls of every CUDA op with odd shapes, for compute-sanitizer (whose checks cost a factor of 10 to 100)."""

from __future__ import annotations

import torch

from transferops import ops

for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
    for samples, dim, classes in ((1, 1, 1), (7, 3, 2), (65, 33, 5), (300, 129, 7), (1000, 20, 3), (35, 775, 2)):
        features = torch.randn(2, samples, dim, device="cuda").to(dtype)
        for view in (features, features[:, 1:, 1:]):
            labels = torch.randint(classes, (view.shape[1],), device="cuda")
            moments = ops.class_moments(view, labels, classes)
            for precision in ("float32", "tf32", "bfloat16"):
                ops.class_moments(view, labels, classes, precision=precision)
            ops.norm_moments(view, moments.shift)
            ops.sample_gram(view)
    for samples, positions, inputs, outputs in (
        (1, 1, 1, 1),
        (140, 1, 33, 65),  # contraction
        (90, 3, 33, 65),  # products between positions, of several samples
        (3, 150, 33, 65),  # and of many positions
        (7, 40, 330, 317),
        (7, 170, 392, 264),  # aligned to 16 bytes
    ):
        a, b = (torch.randn(samples, positions, width, device="cuda").to(dtype) for width in (inputs, outputs))
        directions = torch.randn(3, outputs, inputs, device="cuda", dtype=dtype)
        ops.linear_fisher_diagonal(a, b)
        ops.linear_fisher_projection(a, b, directions)
        ops.linear_grad_norm(a, b)
        layer = {"kernel_size": (3, 3), "stride": 2, "padding": 1, "groups": 2}
        for columns, rows in ((4, 6), (32, 16)):
            image = torch.randn(samples, columns, 7, 6, device="cuda").to(dtype)
            signal = torch.randn(samples, rows, 4, 3, device="cuda").to(dtype)
            moves = torch.randn(2, rows, columns // 2, 3, 3, device="cuda", dtype=dtype)
            ops.conv_fisher_diagonal(image, signal, **layer)
            ops.conv_fisher_projection(image, signal, moves, **layer)
            ops.conv_grad_norm(image, signal, **layer)
        ops.softmax_fisher_gram(b[:, 0], torch.randn(3, samples, outputs, device="cuda", dtype=dtype))
    gradients = [[torch.randn(n * 37 % 5003, device="cuda").to(dtype) for n in range(300)] for _ in range(11)]
    for squares in (None, [torch.zeros(len(x), device="cuda") for x in gradients[0]]):
        means = [torch.zeros(len(x), device="cuda") for x in gradients[0]]
        for count, sample in enumerate(gradients[:3]):
            ops.gradient_expectation_(means, squares, sample, count)
        for lists in (2, 7, 10):
            others = [[torch.zeros_like(x) for x in means] for _ in range(lists - 1)]
            changed = None if squares is None else [squares]
            ops.gradient_expectation_gram_([means, *others], changed, gradients[:1], [3])
    for lists in (1, 3, 7, 11):
        ops.gradient_gram(gradients[:lists])
    rows = torch.randn(19, 5003, device="cuda").to(dtype)
    for view in (rows, rows[:, 3:], rows[:, :33], rows[:, :4096]):
        for count in (1, 5, 11):
            ops.weighted_gram(view[:count], view[0], view[1])
            ops.gradient_fisher_gram(view, view[:count])
torch.cuda.synchronize()
print("all calls made")
