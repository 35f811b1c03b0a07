"""What the processes of a run must have in common."""

import dataclasses

import pytest
import yaml
from command_line import TINY

from dynamo_jax.config import load_config
from dynamo_jax.run import agreement
from dynamo_jax.run.agreement import check_same_run
from dynamo_jax.run.folder import RunFolder
from dynamo_jax.tasks.task import build_task


@pytest.fixture
def told(monkeypatch):
    """What this process tells the others; they tell 7, if it is asked for that."""
    numbers, others = [], []

    def agreed(flag):
        numbers.append(flag)
        return max([flag, *(other if flag > 0 else -other for other in others)])

    monkeypatch.setattr(agreement, "agreed", agreed)
    return numbers, others


def run(tmp_path, *overrides):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"run_dir": str(tmp_path / "run"), **TINY}))
    config = load_config(path, overrides)
    return config, build_task(config)


def test_other_configs_and_other_data_tell_other_numbers(tmp_path, told):
    numbers, _ = told
    config, task = run(tmp_path)
    with RunFolder(config.run_dir) as folder:
        folder.check_or_write_config(config)
        for one, data in (
            (config, task),
            (config, task),
            (run(tmp_path, "optimizer.learning_rate=1e-9")[0], task),
            (config, dataclasses.replace(task, train=run(tmp_path, "seed=1")[1].train)),
            (config, dataclasses.replace(task, evals=run(tmp_path, "seed=1")[1].evals)),
        ):
            check_same_run(one, data.fingerprints)
    assert all(0 <= number < 2**31 for number in numbers[::2])  # what an int32 can carry
    first, again, *others = numbers[::2]
    assert first == again
    assert len({first, *others}) == 4


def test_processes_that_differ_are_refused(tmp_path, told):
    told[1].append(7)
    config, task = run(tmp_path)
    with pytest.raises(ValueError, match=r"different configs or different data. Start the same command"):
        check_same_run(config, task.fingerprints)


def test_a_folder_that_is_not_shared_is_refused(tmp_path, told):
    config, task = run(tmp_path)
    with pytest.raises(ValueError, match=r"does not see the folder .* a disk that all hosts share, or in a bucket"):
        check_same_run(config, task.fingerprints)
