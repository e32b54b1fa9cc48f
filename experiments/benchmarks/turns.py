"""What the benchmarks share that time several things in turns: rounds between probes, those that count, their medians.

A round runs each candidate once, A B C A B C, with a probe before and after every one. It counts when its probes agree
to 10 % and reach a floor: machines that are shared change speed under one's feet. Nothing here needs JAX, so that the
interpreters of other libraries can read it too.
"""

import argparse
import itertools
import json
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

Round = dict[str, Any]  # {"seconds": {name: float}, "probe_gflops": [float], "counts": bool}


def parser(text: str | None) -> argparse.ArgumentParser:
    """A command line with what all of these scripts take."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="how often each candidate has its turn (default: 3)")
    parser.add_argument("--least-gflops", type=float, default=400, help="a slower probe voids a round (default: 400)")
    parser.add_argument("--json", type=pathlib.Path, help="write the readings here as well")
    return parser


def add_processes(parser: argparse.ArgumentParser, workers: Iterable[str], **libraries: str) -> None:
    """The options of a script whose candidates are processes of their own, some in other interpreters."""
    for name, needs in libraries.items():
        parser.add_argument(f"--{name}", help=f"interpreter that has {needs}")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of a process (default: 3)")
    parser.add_argument("--worker", choices=[*workers, "probe"], help="be one of the timed processes")


def rounds(runs: dict[str, Callable[[], float]], probe: Callable[[], float], args: argparse.Namespace) -> list[Round]:
    """`args.rounds` rounds; a run returns its seconds."""
    found = []
    for _ in range(args.rounds):
        probes, seconds = [probe()], {}
        for name, run in runs.items():
            seconds[name] = run()
            probes.append(probe())
        steady = max(probes) <= 1.1 * min(probes) and min(probes) >= args.least_gflops
        found.append({"seconds": seconds, "probe_gflops": probes, "counts": steady})
        told = {name: round(x, 4) for name, x in seconds.items()}
        said = f"probes {[round(x) for x in probes]}, seconds {told}, {'counts' if steady else 'void'}"
        print(said, file=sys.stderr, flush=True)
    return found


def processes(script: str, pythons: dict[str, str | None], options: list[str]) -> dict[str, Callable[[], float]]:
    """Runs that start `script --worker NAME` in the interpreter of that name, where there is one."""
    given = {name: python for name, python in pythons.items() if python}
    return {
        name: lambda name=name, python=python: statistics.median(process(python, script, name, options))
        for name, python in given.items()
    }


def process(python: str, script: str, worker: str, options: list[str]) -> Any:
    """What one process prints on its last line."""
    command = [python, script, "--worker", worker, *options]
    found = subprocess.run(command, capture_output=True, text=True)
    if found.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{found.stderr[-2000:]}")
    return json.loads(found.stdout.strip().splitlines()[-1])


def seconds(run: Callable[[], Any], repeats: int = 1) -> list[float]:
    """Times of `run()`."""
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return found


def once(run: Callable[[], Any]) -> Callable[[], float]:
    """The seconds of one call, as a run of `rounds`; called here first, so that nothing compiles in a turn."""
    run()
    return lambda: seconds(run)[0]


def between(stamps: list[float], warm: int) -> list[float]:
    """Seconds between successive stamps, without the first `warm` of them."""
    return [after - before for before, after in itertools.pairwise(stamps)][warm:]


def medians(found: list[Round]) -> dict[str, float]:
    """Median seconds over the rounds that count, over all where none does."""
    counted = counting(found)
    return {name: statistics.median(x["seconds"][name] for x in counted) for name in found[0]["seconds"]}


def ratios(found: list[Round], base: str) -> dict[str, float]:
    """The median, over the same rounds, of each candidate's seconds over those of `base` in its own round."""
    counted = counting(found)
    return {
        name: statistics.median(x["seconds"][name] / x["seconds"][base] for x in counted)
        for name in found[0]["seconds"]
    }


def counting(found: list[Round]) -> list[Round]:
    """The rounds that count, or all where none does."""
    return [x for x in found if x["counts"]] or found


def peak(found: list[Round]) -> float:
    """The median probe of those rounds, GFLOP/s."""
    return statistics.median(probe for x in counting(found) for probe in x["probe_gflops"])


def tally(found: list[Round]) -> str:
    """How many rounds count, for the head of a table."""
    count = sum(x["counts"] for x in found)
    return f"{count} of {len(found)} rounds count, probe {peak(found):.0f} GFLOP/s" + (
        "" if count else ": NO READING, medians of what does not count"
    )


def publish(report: dict, text: str, path: pathlib.Path | None) -> None:
    """Prints the table and writes the readings."""
    print(text)
    if path is not None:
        path.write_text(json.dumps(report, indent=2) + "\n")
