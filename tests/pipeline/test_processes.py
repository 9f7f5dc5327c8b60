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
from xutrain.engine.record import Record, read_json, write_json
from xutrain.errors import Failed, Stopped, UsageError
from xutrain.loops import pipelined
from xutrain.recipe.delays import Delays
from xutrain.recipe.identity import group_id

METHODS = ["bp", "fr", "ddg", "pipedream", "fdg", "pipemare", "dni", "dsp"]


@pytest.fixture(scope="module", autouse=True)
def _warm(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Import and fill in this process what its forks would each do for themselves, seconds apart on a busy machine."""
    import torch.distributed.pipelining  # noqa: F401

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("xutrain.loops.pipeline_ledger.draw", lambda *args: None)
        watch(make("dsp", train__steps=1), tmp_path_factory.mktemp("warm"))


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


@pytest.mark.parametrize(("first", "second"), [("4", "null"), ("null", "4"), ("4", "3")])
def test_a_run_that_drained_elsewhere_is_not_gone_on_with(tmp_path: Path, first: str, second: str) -> None:
    """Where the queues drain is part of what is computed; the folder's name says so too."""
    assert group_id(make("dsp", checkpoint__every=first)) != group_id(make("dsp", checkpoint__every=second))
    ends = [make("dsp", checkpoint__every=every, runtime__drain="end") for every in (first, second)]
    assert group_id(ends[0]) == group_id(ends[1])
    (tmp_path / "STAY").touch()
    (tmp_path / "STOP").write_text("5")
    assert _stopped(make("dsp", checkpoint__every=first), tmp_path)
    (tmp_path / "STOP").unlink()
    with pytest.raises(UsageError, match=f"the run began with {first}".replace("null", "None")):
        watch(make("dsp", checkpoint__every=second), tmp_path)
    assert [s.updates for s in watch(make("dsp", checkpoint__every=first), tmp_path).job.stages] == [12] * 3


def test_stop_in_three_processes_and_resume_in_one(tmp_path: Path) -> None:
    chosen = make({"name": "dsp", "p": [2, 2, 0], "m": [6, 3, 0]}, runtime__poll=4)
    folder = tmp_path / "part"
    folder.mkdir()
    (folder / "STAY").touch()
    (folder / "STOP").write_text("5")
    assert run_forked(_stopped, 3, chosen, folder) == [True] * 3
    (folder / "STOP").unlink()
    whole = watch(chosen, tmp_path)
    assert same(_state(chosen, folder)[0], whole.job.state_dict())
    tables = [(place / "artefacts" / "staleness.csv").read_text() for place in (folder, whole.record.folder)]
    assert tables[0].count("\n") == 1 + 3 * 12
    assert sorted(tables[0].splitlines()) == sorted(tables[1].splitlines())
    measured = [read_json(place / "artefacts" / "pipeline.json")["staleness"] for place in (folder, whole.record.folder)]
    assert measured[0] == measured[1]


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
    """Rank 1 does not survive its seventh iteration, or the collective before it."""

    end = ""

    def _tick(self, n: int) -> None:
        if n == 6 and self.ctx.rank == 1:
            self._end()
        super()._tick(n)

    def _report(self, ticks: int) -> None:
        if ticks == 6 and self.ctx.rank == 1 and self.end == "killed before a collective":
            self._end()
        super()._report(ticks)

    def _end(self) -> None:
        if self.end != "raises":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("the middle stage is broken")


def _leave(rank: int, chosen: Any, folder: Path, end: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="3")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=3)
    ctx = Context.open(0)
    _Faulty.end = end
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


@pytest.mark.parametrize(
    ("end", "place"),
    [
        ("raises", "iteration 6: ValueError: the middle stage is broken"),
        ("killed", "iteration 6: the process ended without a word"),
        ("killed before a collective", "iteration 5: the process ended without a word"),
    ],
)
def test_a_lost_rank_is_named_by_all(tmp_path: Path, end: str, place: str) -> None:
    """Both others end within seconds and say which stage stopped, in which iteration, and why."""
    chosen = make("dsp", runtime__poll=1 if "collective" in end else 50)
    ranks = [multiprocessing.get_context("fork").Process(target=_leave, args=(r, chosen, tmp_path, end)) for r in range(3)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(100)
        assert not rank.is_alive()
    for rank in (0, 2):
        said = (tmp_path / f"said-{rank}").read_text()
        assert f"stage 1 (rank 1), {place}" in said
        assert f"stage {rank} (rank {rank}) waited for the" in said


LOSS = RuntimeError("Connection closed by peer")


def _fault(folder: Path, rank: int, text: str) -> None:
    write_json(folder / "logs" / f"fault-{rank}.json", {"time": time.time(), "error": [f"error: {text}"]})


def test_who_ends_of_another_loss_is_not_taken_for_the_first(tmp_path: Path, monkeypatch: Any) -> None:
    """Rank 2 writes whom it lost and ends while rank 0 looks for who is gone: rank 0 reports rank 1 all the same."""
    with Pulse(tmp_path, 0, 3, 1) as pulse:
        for rank in (2, 1):
            (tmp_path / "logs" / f"pulse-{rank}").write_text("6")

        def gone() -> list[int]:
            what = "the process ended without a word (killed?)"
            _fault(tmp_path, 2, f"stage 1 (rank 1), iteration 6: {what}; stage 2 (rank 2) waited for it in iteration 7")
            return [1, 2]

        monkeypatch.setattr(pulse, "_dead", gone)
        assert str(pulse.lost(LOSS)).startswith("error: stage 1 (rank 1), iteration 6: the process ended")


def test_a_reason_is_awaited_from_a_peer_that_still_lives(tmp_path: Path, monkeypatch: Any) -> None:
    """The connection breaks before the fault is written: whoever still holds its pulse has time to say why, in any number of lines."""
    with Pulse(tmp_path, 0, 3, 1) as pulse:
        looks = []

        def ending() -> list[int]:
            looks.append(0)
            if len(looks) == 3:
                _fault(tmp_path, 2, "stage 1 (rank 1), iteration 4: ValueError: one\ntwo; stage 2 (rank 2) waited for it in iteration 5")
            return []

        monkeypatch.setattr(pulse, "_dead", ending)
        told = pulse.lost(LOSS).issues[0]
        assert told.where == "stage 1 (rank 1), iteration 4"
        assert told.what == "ValueError: one\ntwo; stage 0 (rank 0) waited for the other stages in iteration 0"
        assert len(looks) == 3


def test_a_process_that_never_began_is_named(tmp_path: Path) -> None:
    with Pulse(tmp_path, 0, 2, 1) as pulse:
        assert "stage 1 (rank 1), iteration 0: the process ended without a word" in str(pulse.lost(LOSS))


def test_a_fault_counts_from_the_start_of_the_process_that_wrote_it(tmp_path: Path, monkeypatch: Any) -> None:
    """Not from the start of the one that reads it, which may be late; what it left in an earlier start is old."""
    _fault_path = tmp_path / "logs" / "fault-1.json"
    with Pulse(tmp_path, 1, 2, 1):
        _fault(tmp_path, 1, "stage 1 (rank 1), iteration 0: OSError: no data")
        with Pulse(tmp_path, 0, 2, 1) as pulse:
            assert "OSError: no data" in str(pulse.lost(LOSS))
            os.utime(_fault_path, (1, 1))
            monkeypatch.setattr("xutrain.engine.pulse._PATIENCE_S", 0.0)
            assert str(pulse.lost(LOSS)) == "error: stage 0 (rank 0), iteration 0: waited for the other stages: Connection closed by peer"


def test_nobody_is_called_dead_who_runs_elsewhere(tmp_path: Path, monkeypatch: Any) -> None:
    """Two machines of two processes each: the open files of the other machine cannot be seen."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with Pulse(tmp_path, 3, 4, 1) as pulse:
        assert pulse._dead() == [2]
        with Pulse(tmp_path, 2, 4, 1):
            assert pulse._dead() == []
