"""Strategy contract checks of state: resume, the user's keys, and other numbers of ranks."""

from __future__ import annotations

import torch

from plugframe.testing.contracts import states
from plugframe.testing.contracts.batches import rule
from plugframe.testing.contracts.running import broken
from plugframe.testing.contracts.strategy_bench import EPOCHS, Bench, load, set_up_training, train
from plugframe.testing.contracts.strategy_rules import LAW_4, STATE


@rule(LAW_4)
def a_run_goes_on_from_its_checkpoint(bench: Bench) -> None:
    """Training resumed in a new job, from other weights, ends with the same bits, schedule included."""
    path = str(bench.folder / f"middle-{bench.world.world_size}")
    with bench.lite() as lite:
        training = set_up_training(bench, lite, seed=1)
        train(bench, lite, training, 1)
        lite.save(path, training)
        losses = train(bench, lite, training, EPOCHS)
        expected = bench.weights(lite, training["model"])
    with bench.lite() as lite:
        training = set_up_training(bench, lite, seed=2)
        load(lite, path, training)
        again = train(bench, lite, training, EPOCHS)
        found = bench.weights(lite, training["model"])
        scheduled = [group["lr"] for group in training["optimizer"].param_groups]
    differs = states.difference(expected, found)
    if differs:
        broken(LAW_4, f"the resumed run ends with other weights: {differs}")
    if losses != again:
        broken(LAW_4, f"the resumed run has the losses {again}, the uninterrupted one {losses}")
    steps = (1 + EPOCHS) * len(losses) // EPOCHS
    if scheduled != [0.01 * 0.5 ** (steps // 4)]:
        broken(LAW_4, f"after {steps} steps of the schedule the learning rate is {scheduled}")


@rule(STATE)
def a_state_is_the_users(bench: Bench) -> None:
    """The saved state has the keys, shapes and values of plain torch's."""
    plain = bench.model()
    path = str(bench.folder / f"state-{bench.world.world_size}")
    with bench.lite() as lite:
        training = set_up_training(bench, lite, seed=1)
        train(bench, lite, training, 1)
        lite.save(path, training)
        kept = bench.weights(lite, training["model"])
        shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in kept.items()}
        if shapes != {name: (tensor.shape, tensor.dtype) for name, tensor in plain.state_dict().items()}:
            broken(STATE, f"the full state of the model has {shapes}")
        held = lite.load(path)
        differs = states.difference(kept, {name: tensor.cpu() for name, tensor in held["model"].items()})
        if differs:
            broken(STATE, f"of the model in a checkpoint: {differs}")
        load = lite._hooks.strategy_load_module_state
        state = {name: value for name, value in held["model"].items() if name != "norm.weight"}
        missing, unexpected = load(module=training["model"], state={**state, "more": torch.ones(1)}, strict=False)
        wrong = ["norm.weight"] if "norm.weight" in kept else []
        if (list(missing), list(unexpected)) != (wrong, ["more"]):
            broken(
                STATE, f"of a state without {wrong} and with ['more'], missing is {missing}, unexpected {unexpected}"
            )


@rule(STATE)
def a_checkpoint_is_loaded_on_other_ranks(bench: Bench) -> None:
    """A checkpoint of another number of ranks loads here, with the same weights."""
    for other in (1, 2):
        path, weights = bench.folder / f"state-{other}", bench.folder / f"weights-{other}"
        if other == bench.world.world_size or not (path.exists() and weights.exists()):
            continue
        with bench.lite() as lite:
            training = set_up_training(bench, lite, seed=2)
            load(lite, str(path), training)
            found = bench.weights(lite, training["model"])
            differs = states.difference(torch.load(weights, weights_only=True), found)
            if differs:
                broken(
                    STATE,
                    f"a checkpoint of {other} ranks loads on {bench.world.world_size} with other weights: {differs}",
                )
            train(bench, lite, training, 1)


@rule(STATE)
def its_weights_are_left_for_others(bench: Bench) -> None:
    """Save the weights of `a_state_is_the_users` for the job with another number of ranks."""
    with bench.lite() as lite:
        held = lite.load(str(bench.folder / f"state-{bench.world.world_size}"))
        if lite.is_global_zero:
            weights = {name: tensor.cpu() for name, tensor in held["model"].items()}
            torch.save(weights, bench.folder / f"weights-{bench.world.world_size}")
