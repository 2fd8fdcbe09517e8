"""Values that are reduced and gathered over ranks: by key, exact, objects too."""
# variants: numbers keys otherkeys inplace objects unsendable

import sys

import torch

from plugframe import Lite

kind = sys.argv[1]
lite = Lite()
n, r = lite.world_size, lite.global_rank
wrong = []


def check(what, found, want):
    if found != want:
        wrong.append(f"{what}: {found!r}, right is {want!r}")


if kind == "numbers":
    check("sum of floats", lite.all_reduce(16777217.0, reduce_op="sum").item(), 16777217.0 * n)
    check("mean of integers", lite.all_reduce(r).item(), (n - 1) / 2)
    check("count of flags", lite.all_reduce(torch.tensor([True, r == 0]), reduce_op="sum").tolist(), [n, 1])
    small = torch.full((3,), 120, dtype=torch.int8)
    check("sum of int8", lite.all_reduce(small, reduce_op=torch.distributed.ReduceOp.SUM).tolist(), [120 * n] * 3)
    half = torch.tensor([1024.0 if r == 0 else 1.0], dtype=torch.bfloat16)
    check("sum of bfloat16", lite.all_reduce(half, reduce_op="sum").item(), 1024.0 + n - 1)
elif kind == "keys":
    metrics = {"loss": 1.0 + r, "accuracy": 0.5}
    found = lite.all_reduce(metrics if r % 2 else dict(reversed(metrics.items())))
    check("loss by key", found["loss"].item(), (n + 1) / 2)
    check("accuracy by key", found["accuracy"].item(), 0.5)
elif kind == "otherkeys":
    lite.all_reduce({"loss": 1.0, f"of rank {r}": 2.0})
elif kind == "inplace":
    tensor = torch.full((4,), float(r))
    lite.all_reduce(tensor)
    check("a tensor reduced in place", tensor.tolist(), [(n - 1) / 2] * 4)
    weight = torch.ones(2, requires_grad=True)
    lite.all_reduce(weight * (r + 1), reduce_op="sum").sum().backward()
    check("its gradient", weight.grad.tolist(), [float(n * (r + 1))] * 2)
elif kind == "objects":
    check("strings", lite.all_gather({"name": f"rank {r}"})["name"], [f"rank {rank}" for rank in range(n)])
    check("lists of unequal lengths", lite.all_gather(["x"] * r, as_object=True), [["x"] * rank for rank in range(n)])
else:
    lite.broadcast((lambda: 1) if r == 0 else None)

if wrong:
    print("WRONG", *wrong, sep="\n  ")
    sys.exit(1)
print("right", kind)
