"""One process or many, on time or late, stopped or not: the same numbers bit for bit; and what happens when a rank dies."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.conftest import run_forked
from tests.pipeline.conftest import CONFIGURATIONS, Watched, make, same, watch
from xutrain.engine.context import Context
from xutrain.engine.pulse import Pulse
from xutrain.engine.record import Record, write_json
from xutrain.errors import Failed, Stopped
from xutrain.loops import pipelined
from xutrain.recipe.delays import Delays

METHODS = ["bp", "fr", "ddg", "pipedream", "fdg", "pipemare", "dni", "dsp"]


def _state(chosen: Any, folder: Path) -> tuple[Any, Any, list[Any], Any]:
    pipeline = watch(chosen, folder)
    lines = [{k: v for k, v in line.items() if k != "wall_s"} for line in pipeline.record.read()] if pipeline.ctx.is_main else []
    return pipeline.job.state_dict(), pipeline.metrics, lines, pipeline.ctx.meter.state()  # type: ignore[attr-defined]


def _equal(chosen: Any, folder: Path, processes: int, other: Any = None) -> None:
    alone = _state(chosen, folder / "alone")
    for state, metrics, lines, meter in run_forked(_state, processes, other or chosen, folder / "many"):
        assert same(state, alone[0])
        assert metrics == alone[1]
        assert not lines or lines == alone[2]
        assert meter == alone[3]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_the_same_in_many_processes(tmp_path: Path, method: str) -> None:
    words = {"model__norm": "true", "model__dropout": 0.2, "eval__every": 5, "log__every": 1, "runtime__poll": 4}
    _equal(make(method, **words), tmp_path, 3)


@pytest.mark.parametrize(("p", "m"), CONFIGURATIONS)
def test_sleeping_stages_change_no_number(tmp_path: Path, p: list[int], m: list[int]) -> None:
    dsp = {"name": "dsp", "p": p, "m": m}
    late = make(dsp, stages=len(p), model__depth=5, straggler__probability=0.4, straggler__slowdown=4, runtime__unit_ms=1)
    _equal(make(dsp, stages=len(p), model__depth=5), tmp_path, len(p), late)


def test_two_stages_a_process(tmp_path: Path) -> None:
    _equal(make("dsp", stages=4, runtime__take="together"), tmp_path, 2)


@pytest.mark.parametrize("method", ["gpipe", "1f1b"])
def test_torch_schedules_agree_with_one_process(tmp_path: Path, method: str) -> None:
    chosen = make({"name": method, "micro_batches": 5}, train__steps=4, runtime__unit_ms=0.2)
    alone = _state(chosen, tmp_path / "alone")[0]
    for state, *_ in run_forked(_state, 3, chosen, tmp_path / "many"):
        assert all((state[n] - t).abs().max() < 1e-5 for n, t in alone.items())


def _stopped(chosen: Any, folder: Path) -> bool:
    try:
        watch(chosen, folder)
    except Stopped:
        return True
    return False


@pytest.mark.parametrize("method", [*METHODS, {"name": "ddg", "mix": True}, {"name": "dsp", "p": [3, 1, 0]}], ids=str)
def test_stop_and_resume_is_never_having_stopped(tmp_path: Path, method: Any) -> None:
    chosen = make(method, model__norm="true", model__dropout=0.2, log__every=1, optimizer__name="adam" if method == "dsp" else "sgd")
    whole = _state(chosen, tmp_path / "whole")
    folder = tmp_path / "part"
    folder.mkdir()
    (folder / "STAY").touch()
    (folder / "STOP").write_text("7")
    assert _stopped(chosen, folder)
    (folder / "STOP").unlink()
    state, metrics, lines, meter = _state(chosen, folder)
    assert same(state, whole[0])
    assert (metrics, lines, meter) == (whole[1], whole[2], whole[3])


def test_stop_in_three_processes_and_resume_in_one(tmp_path: Path) -> None:
    chosen = make({"name": "dsp", "p": [2, 2, 0], "m": [6, 3, 0]}, runtime__poll=4)
    folder = tmp_path / "part"
    folder.mkdir()
    (folder / "STAY").touch()
    (folder / "STOP").write_text("5")
    assert run_forked(_stopped, 3, chosen, folder) == [True] * 3
    (folder / "STOP").unlink()
    assert same(_state(chosen, folder)[0], _state(chosen, tmp_path / "whole")[0])


def test_drained_checkpoints_empty_the_queues(tmp_path: Path) -> None:
    chosen = make("dsp", checkpoint__every=4)
    pipeline = watch(chosen, tmp_path)
    assert pipeline.iterations == 3 * (4 + 4)
    assert [s.updates for s in pipeline.job.stages] == [12] * 3
    _equal(chosen, tmp_path, 3)


@pytest.mark.parametrize(("p", "m"), CONFIGURATIONS)
def test_every_stage_has_its_preset_staleness(tmp_path: Path, p: list[int], m: list[int]) -> None:
    for steps in (12, 3):
        pipeline = watch(make({"name": "dsp", "p": p, "m": m}, stages=len(p), model__depth=5, train__steps=steps), tmp_path)
        assert pipeline.iterations == steps + m[0]
        for k, stage in enumerate(pipeline.job.stages):
            assert stage.updates == steps
            assert stage.most_kept == min(steps, m[k] + 1)
            counts = pipeline.ledger.counts[k]
            assert counts == {**{s: 1 for s in range(min(m[k], steps))}, **({m[k]: steps - m[k]} if steps > m[k] else {})}


def test_forecast_equals_the_meter(tmp_path: Path) -> None:
    for method in ("dsp", "dni", {"name": "gpipe", "micro_batches": 2}):
        chosen = make(method, checkpoint__every=5)
        pipeline, forecast = watch(chosen, tmp_path), pipelined.forecast(chosen)
        assert (forecast.up, forecast.down) == (pipeline.ctx.meter.up, pipeline.ctx.meter.down)
        assert forecast.details["ticks"] == pipeline.iterations


def test_messages_in_flight_are_what_the_closed_form_says() -> None:
    delays = Delays((2, 1, 0), (6, 3, 0))
    assert [delays.sent(0, t, 4) for t in range(1, 13)] == [(min(t, 4), min(max(t - 2 - 3, 0), 4)) for t in range(1, 13)]


class _Faulty(Watched):
    """Rank 1 does not survive its seventh iteration."""

    killed = False

    def _tick(self, n: int) -> None:
        if n == 6 and self.ctx.rank == 1:
            if self.killed:
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("the middle stage is broken")
        super()._tick(n)


def _leave(rank: int, chosen: Any, folder: Path, killed: bool) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="3")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=3)
    ctx = Context.open(0)
    _Faulty.killed = killed
    try:
        with Pulse(folder, rank, 3, 1) as pulse:
            _Faulty(chosen, ctx, Record(folder, ctx.meter, is_main=rank == 0), pulse).train()
    except Failed as fault:
        # what xutrain.worker writes before the process ends
        lines = [line for issue in fault.issues for line in issue.lines()]
        write_json(folder / "logs" / f"fault-{rank}.json", {"time": time.time(), "error": lines})
        (folder / f"said-{rank}").write_text(str(fault))
    finally:
        os._exit(0)


@pytest.mark.parametrize("killed", [False, True])
def test_a_lost_rank_is_named_by_all(tmp_path: Path, killed: bool) -> None:
    """Both neighbours end within seconds and say which stage stopped, in which iteration, and why."""
    ranks = [multiprocessing.get_context("fork").Process(target=_leave, args=(r, make("dsp"), tmp_path, killed)) for r in range(3)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
        assert not rank.is_alive()
    cause = "the process ended without a word" if killed else "ValueError: the middle stage is broken"
    for rank in (0, 2):
        said = (tmp_path / f"said-{rank}").read_text()
        assert f"stage 1 (rank 1), iteration 6: {cause}" in said
        assert f"stage {rank} (rank {rank}) waited for the" in said


def test_who_ends_of_another_loss_is_not_taken_for_the_first(tmp_path: Path, monkeypatch: Any) -> None:
    """Rank 2 writes whom it lost and ends while rank 0 looks for who is gone: rank 0 reports rank 1 all the same."""
    with Pulse(tmp_path, 0, 3, 1) as pulse:
        for rank in (2, 1):
            (tmp_path / "logs" / f"pulse-{rank}").write_text("6")

        def gone(rank: int) -> bool:
            error = "error: stage 1 (rank 1), iteration 6: the process ended without a word (killed?); stage 2 (rank 2) waited for it"
            write_json(tmp_path / "logs" / "fault-2.json", {"time": time.time(), "error": [error]})
            return False

        monkeypatch.setattr(pulse, "_alive", gone)
        assert "stage 1 (rank 1), iteration 6" in str(pulse.lost(RuntimeError("Connection closed by peer")))
