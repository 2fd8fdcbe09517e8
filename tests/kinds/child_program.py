"""a rank starts another program that has a Lite of its own"""

# variants: subprocess environment spawn torn_down
# strategies: ddp fsdp
import multiprocessing
import os
import subprocess
import sys

from plugframe import Lite


def evaluate() -> None:
    lite = Lite(accelerator="cpu")
    lite.barrier()
    sys.exit(0 if (lite.world_size, lite.global_rank) == (1, 0) else 3)


def main(how: str) -> None:
    lite = Lite()
    lite.barrier()
    code = 0
    if how == "torn_down":
        lite.teardown()
    if lite.global_rank == lite.world_size - 1:  # alone: if its program joined the job it would wait for the others
        if how == "spawn":
            process = multiprocessing.get_context("spawn").Process(target=evaluate)
            process.start()
            process.join()
            code = process.exitcode or 0
        else:
            variables = {**os.environ, "CUDA_VISIBLE_DEVICES": ""} if how == "environment" else None
            code = subprocess.run([sys.executable, __file__, "evaluate"], env=variables, timeout=60).returncode
    if how != "torn_down":
        code = int(lite.all_reduce(code, reduce_op="max"))
    print("WRONG: the program of a rank is not alone" if code else "right: the program of a rank runs by itself")
    sys.exit(1 if code else 0)


if __name__ == "__main__":
    if sys.argv[1] == "evaluate":
        evaluate()
    main(sys.argv[1])
