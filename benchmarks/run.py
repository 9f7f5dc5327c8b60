"""All benchmarks side by side in one run, and benchmarks/RESULTS.md: what `make bench` does.

    python benchmarks/run.py                        everything, at most 25 minutes (--minutes) on two cores
    python benchmarks/run.py --only codecs links    some of it; --quick: a minute or two, to see that all scripts work
    python benchmarks/run.py --add --only pruning   that one anew, the other results as RESULTS.json beside the report has them
    python benchmarks/run.py --repeats 3            each script several times: medians of its numbers over the repeats

Every script runs in a process of its own and writes its result with --json (see results.py); a number that appears in every
repeat is given as the median over the repeats, and a ratio with its smallest and largest value. A script that fails or runs out
of time is named with the end of what it said, and the rest goes on. Peers that have an environment under .bench (``make
bench-peers``) are measured by the scripts that compare with them; where it is missing, the scripts say so.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from results import Ratio, machine  # noqa: E402


@dataclass(frozen=True)
class Script:
    """A benchmark: its file, its arguments, how often it runs and how long it may take each time (its share of the whole)."""

    file: str
    arguments: tuple[str, ...] = ()
    repeats: int = 1
    limit_s: int = 240


#: name -> script, in the order of the report
SCRIPTS = {
    "codecs": Script("codecs.py", ("--repeats", "3"), 2, 150),
    "data_parallel": Script("data_parallel.py", ("--rounds", "5"), 1, 200),
    "links": Script("links.py", ("--rounds", "3"), 1, 200),
    "prediction": Script("prediction.py", (), 1, 120),
    "federated": Script("federated.py", (), 1, 300),
    "federated_scale": Script("federated.py", ("--scale", "--clients", "1000"), 1, 180),
    "pretrain": Script("pretrain.py", (), 1, 180),
    "pipeline": Script("pipeline.py", ("padded", "unpadded", "--repeats", "1"), 1, 400),
    "pipeline_stragglers": Script("pipeline.py", ("stragglers", "--repeats", "1"), 1, 300),
    "vertical": Script("vertical.py", ("tls", "credit", "vertimosaic"), 1, 200),
    "vertical_sleeping": Script("vertical.py", ("sleeping",), 1, 300),
    "vertical_straggler": Script("vertical.py", ("straggler",), 1, 500),
    "pruning": Script("pruning.py", (), 1, 400),
}


def once(script: Script, quick: bool, folder: Path, limit_s: int) -> dict[str, Any]:
    """Run a script once: its result with "seconds" and "command", or with "fault" where there is none."""
    file = folder / "result.json"
    file.unlink(missing_ok=True)
    command = [sys.executable, str(HERE / script.file), *script.arguments, *(["--quick"] if quick else [])]
    shown = " ".join(["python", f"benchmarks/{script.file}", *command[2:]])
    value: dict[str, Any] = {"command": shown}
    if not (HERE / script.file).exists():
        return value | {"fault": "there is no such script"}
    began = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+") as told:
        child = subprocess.Popen([*command, "--json", str(file)], stdout=told, stderr=told, env=environment, start_new_session=True)
        try:
            code = child.wait(timeout=limit_s)
            fault = f"exit code {code}" if code else ""
        except subprocess.TimeoutExpired:
            _end(child)
            fault = f"not done within {limit_s} s"
        except BaseException:
            _end(child)
            raise
        told.seek(0)
        said = told.read().strip().splitlines()
    value["seconds"] = time.perf_counter() - began
    if not fault:
        try:
            got = json.loads(file.read_text(encoding="utf-8"))
            return value | {k: got[k] for k in ("title", "rows", "ratios")} | {"notes": got.get("notes", [])}
        except (OSError, ValueError, KeyError) as error:
            fault = f"wrote no result ({type(error).__name__}: {error})"
    return value | {"fault": fault, "said": said[-3:]}


def _end(child: subprocess.Popen[Any]) -> None:
    """TERM to the script's whole group, so that it takes down what it built, then KILL."""
    import signal

    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(child.pid, number)
        except ProcessLookupError:
            break
        try:
            child.wait(timeout=20)
        except subprocess.TimeoutExpired:
            continue


def middle(values: list[Any]) -> Any:
    """The median of numbers; of anything else the first."""
    numbers = [v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)]
    return statistics.median(numbers) if numbers and len(numbers) == len(values) else values[0]


def merged(results: list[dict[str, Any]]) -> dict[str, Any]:
    """One result of several: rows by position, ratios by name."""
    good = [r for r in results if "fault" not in r]
    if not good:
        return results[-1]
    first = good[0]
    value = {**first, "repeats": len(good), "seconds": sum(r.get("seconds", 0.0) for r in results)}
    alike = [r for r in good if len(r["rows"]) == len(first["rows"])]
    value["rows"] = [{key: middle([r["rows"][i].get(key) for r in alike]) for key in row} for i, row in enumerate(first["rows"])]
    ratios = []
    for ratio in first["ratios"]:
        found = [x["value"] for r in good for x in r["ratios"] if x["name"] == ratio["name"] and x["value"] is not None]
        again = Ratio(ratio["name"], statistics.median(found) if found else None, ratio.get("aim", ""), ratio.get("why", ""))
        spread = [min(found), max(found)] if len(found) > 1 else None
        met = again.met if again.met is not None else (ratio.get("met") if len(good) == 1 else None)
        ratios.append({**again.plain(), "met": met, "spread": spread})
    value["ratios"] = ratios
    return value


def number(value: Any) -> str:
    """A cell of a table."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return str(value).replace("|", "\\|")


def tables(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown tables, one for each value of "table"."""
    lines: list[str] = []
    for name in dict.fromkeys(str(r.get("table", "")) for r in rows):
        mine = [{k: v for k, v in r.items() if k != "table"} for r in rows if str(r.get("table", "")) == name]
        columns = list(dict.fromkeys(k for r in mine for k in r))
        columns = [c for c in columns if any(r.get(c) is not None for r in mine)]
        lines += ["", *([f"**{name}**", ""] if name else [])]
        lines += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        lines += ["| " + " | ".join(number(r.get(c)) for c in columns) + " |" for r in mine]
    return lines


def report(results: dict[str, dict[str, Any]], quick: bool) -> str:
    """RESULTS.md."""
    found = machine("transformers", "torchvision")
    lines = ["# Benchmarks", ""]
    minutes = sum(result.get("seconds", 0.0) for result in results.values()) / 60
    lines += [f"Written by `make bench` (`python benchmarks/run.py`) on {datetime.date.today()}, {minutes:.0f} minutes in all."]
    if quick:
        lines += ["", "**Made with --quick: shows that the scripts work. No number here is to be quoted.**"]
    lines += ["", ", ".join(f"{k} {v}" for k, v in found.items()) + "."]
    lines += ["Each process computes on one thread. Aims are ratios within one run; a missed one is followed by its reason."]
    aims = [(name, r) for name, result in results.items() for r in result.get("ratios", [])]
    met = sum(r["met"] is True for _, r in aims)
    asked = sum(r["met"] is not None for _, r in aims)
    lines += ["", "## Aims", "", f"{met} of {asked} met.", "", "| benchmark | what | value | aim | met |", "|---|---|---|---|---|"]
    for name, r in aims:
        spread = f" ({number(r['spread'][0])} to {number(r['spread'][1])})" if r.get("spread") else ""
        says = {True: "yes", False: "**no**", None: ""}[r["met"]]
        why = f": {r['why']}" if r.get("why") and r["met"] is not True else ""
        lines.append(f"| {name} | {number(r['name'])} | {number(r['value'])}{spread} | {r.get('aim') or 'none'} | {says}{number(why)} |")
    for name, result in results.items():
        lines += ["", f"## {result.get('title', name)}", "", f"`{result['command']}`"]
        if "fault" in result:
            lines += ["", f"No result: {result['fault']}.", *[f"    {line}" for line in result.get("said", [])]]
            continue
        repeats = result.get("repeats", 1)
        lines[-1] += f", {result.get('made', '')}, {result['seconds']:.0f} s" + (f", medians over {repeats} runs" if repeats > 1 else "")
        lines += ["", *[f"- {note}" for note in result.get("notes", [])]] if result.get("notes") else []
        lines += tables(result["rows"])
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(SCRIPTS), metavar="NAME", help=f"of {', '.join(SCRIPTS)}")
    parser.add_argument("--add", action="store_true", help="keep the results of others that an earlier run left in the .json")
    parser.add_argument("--quick", action="store_true", help="every script in its small form")
    parser.add_argument("--repeats", type=int, help="how often each script runs", default=None)
    parser.add_argument("--minutes", type=float, default=25, help="no script starts a further run after this long")
    parser.add_argument("--out", type=Path, default=HERE / "RESULTS.md", help="the report; a .json with everything is laid beside it")
    given = parser.parse_args()
    if given.repeats is not None and given.repeats < 1:
        parser.error("--repeats must be at least 1")
    kept_at = given.out.with_suffix(".json")
    if given.add and given.out.exists() and not kept_at.exists():
        parser.error(f"{given.out} was made elsewhere: {kept_at.name} is not beside it, and its results would be lost; give another --out")
    began = time.perf_counter()
    results: dict[str, dict[str, Any]] = {}
    if given.add and kept_at.exists():
        results = json.loads(kept_at.read_text(encoding="utf-8"))["results"]
    with tempfile.TemporaryDirectory() as folder:
        for name in given.only or SCRIPTS:
            script = SCRIPTS[name]
            runs: list[dict[str, Any]] = []
            for _ in range(given.repeats or (1 if given.quick else script.repeats)):
                left = given.minutes * 60 - (time.perf_counter() - began)
                if left <= 5:
                    runs = runs or [{"command": f"python benchmarks/{script.file}", "fault": f"--minutes {given.minutes:g} were over"}]
                    break
                runs.append(once(script, given.quick, Path(folder), min(script.limit_s, int(left))))
                told = runs[-1].get("fault", "done")
                print(f"{name}: {told}, {runs[-1].get('seconds', 0):.0f} s", flush=True)
            results[name] = {**merged(runs), "made": f"{datetime.datetime.now():%Y-%m-%d %H:%M}"}
            results = {known: results[known] for known in SCRIPTS if known in results}
            given.out.write_text(report(results, given.quick), encoding="utf-8")
            kept = {"machine": machine(), "results": results}
            kept_at.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    faults = [name for name, r in results.items() if "fault" in r]
    print(f"{given.out}: {len(results) - len(faults)} of {len(results)} benchmarks{', without ' + ', '.join(faults) if faults else ''}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
