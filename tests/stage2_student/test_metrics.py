"""The log of an arm: what TensorBoard reads, what a resumed run keeps, and what a full disk makes of it."""

import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.errors import RunError
from pipeline.run_dir import ArmDir
from stage2_student.metrics import MetricsLog


def write(folder, done, steps):
    with MetricsLog(folder, done) as log:
        for step in steps:
            log.write({"step": step, "loss": 10 * done + step, "lr": 0.5})
        log.flush()


def test_tensorboard_shows_a_resumed_run_once(tmp_path):
    """Steps after the checkpoint were taken twice: the file and the board have the second time only."""
    folder = ArmDir(tmp_path)
    write(folder, 0, [1, 2, 3])
    write(folder, 2, [3, 4])
    assert [(m["step"], m["loss"]) for m in map(json.loads, folder.metrics.read_text().splitlines())] == [
        (1, 1),
        (2, 2),
        (3, 23),
        (4, 24),
    ]
    board = EventAccumulator(str(folder.tensorboard)).Reload()
    assert sorted(board.Tags()["scalars"]) == ["loss", "lr"]
    assert [(event.step, event.value) for event in board.Scalars("loss")] == [(1, 1), (2, 2), (3, 23), (4, 24)]


def test_damaged_lines_are_left_out(tmp_path):
    """Bytes that are no UTF-8, JSON that is no step: no reason to stop a run that can go on."""
    folder = ArmDir(tmp_path)
    write(folder, 0, [1, 2])
    with folder.metrics.open("ab") as file:
        file.write(b'\xff\xfe\n3\n{}\n{"step": "2"}\n[]\n{"step": null}\n{"st')
    write(folder, 2, [3])
    assert [json.loads(line)["step"] for line in folder.metrics.read_text().splitlines()] == [1, 2, 3]


def test_the_first_error_is_the_one_told(tmp_path):
    """/dev/full takes nothing: neither the line, nor what is left of it when the file is closed."""
    folder = ArmDir(tmp_path)
    log = MetricsLog(folder, 0)
    log._opened.close()
    with pytest.raises(RunError, match="writing the metrics failed: No space left on device"), log:
        log._file = log._opened.enter_context(open("/dev/full", "w", buffering=1))  # noqa: PTH123, SIM115
        log.write({"step": 1, "loss": 1.0})
