"""A resumed run of every method has the bits of one that never stopped, and refuses another."""

import shutil

import pytest

from tests.faults.runs import last_arrays, losses, make_trainer

METHODS = {
    "dora from pissa": {"use_dora": True, "init_lora_weights": "pissa"},
    "olora and tokens": {"init_lora_weights": "olora", "trainable_token_indices": [3, 7, 5]},
}
STEPS = 4


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(method, tmp_path):
    options = {"lora": METHODS[method], "train__max_steps": STEPS}
    straight, events = make_trainer(tmp_path / "straight", **options)
    straight.train()
    run = shutil.copytree(tmp_path / "straight", tmp_path / "run")
    for later in (3, 4):
        shutil.rmtree(run / "checkpoints" / f"step-{later:09d}")
    resumed, found = make_trainer(run, resume=True, **options)
    resumed.train()
    assert last_arrays(run, STEPS) == last_arrays(tmp_path / "straight", STEPS)
    assert losses(found) == {s: loss for s, loss in losses(events).items() if s > 2}
    with pytest.raises(ValueError, match="adapter"):
        make_trainer(run, resume=True, train__max_steps=STEPS)[0].train()
