"""The benchmark suite.

python -m benchmarks                           the CPU report: tables, pictures, CSV
python -m benchmarks run --device cuda         on a GPU (see also python3 dev.py gpu)
python -m benchmarks compare OLD NEW           what changed beyond the noise; 1 if worse
python -m benchmarks gate                      the regression gate of CI
python -m benchmarks list                      suites, cases, providers
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from heteroakd_fast._pipes import quiet_broken_pipe


def main(arguments: Sequence[str] | None = None) -> int:
    with quiet_broken_pipe():
        return _main(arguments)


def _main(arguments: Sequence[str] | None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["gate"]:
        from . import gate

        return int(gate.main(arguments[1:]))
    if arguments[:1] not in (["run"], ["compare"], ["list"], ["-h"], ["--help"]):
        arguments.insert(0, "run")
    options = _parser().parse_args(arguments)
    try:
        code: int = options.command(options)
    except BrokenPipeError:
        raise
    except (ValueError, OSError, RuntimeError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="run | compare | gate | list")

    run = commands.add_parser("run", help="measure a suite and write its report")
    run.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    run.add_argument("--suite", help="cpu, gpu or smoke; by default that of the device")
    run.add_argument("--output", type=Path, help="directory; default runs/benchmarks/SUITE")
    run.add_argument("--seconds", type=float, default=None, help="limit of the whole run")
    run.add_argument(
        "--only",
        nargs="+",
        default=(),
        metavar="NAME",
        help="cases, groups, objectives or data sets as `list` prints them; * and ? stand for "
        "any text and any character",
    )
    run.add_argument("--providers", nargs="+", default=(), help="names, see `list`")
    run.add_argument("--visits", type=int, default=2, help="times that each case is come back to")
    run.add_argument("--rounds", type=int, default=5, help="rounds in each visit, at most")
    run.add_argument("--phases", nargs="+", help="times memory settings")
    run.set_defaults(command=_run)

    compare = commands.add_parser("compare", help="compare two runs; exit code 1 if one is worse")
    for name in ("before", "after"):
        compare.add_argument(name, type=Path, help="a run's results.csv, or the folder of it")
    compare.add_argument("--all", action="store_true", help="list what did not change too")
    compare.set_defaults(command=_compare)

    commands.add_parser(
        "list", help="suites, cases, objectives, data sets, providers"
    ).set_defaults(command=_list)
    return parser


def _run(options: argparse.Namespace) -> int:
    import torch

    from heteroakd_fast import _requirements

    from . import report, runner
    from .cases import SUITES, cases_of, select

    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device here")
    suite = options.suite or ("cpu" if options.device == "cpu" else "gpu")
    if suite not in SUITES:
        raise ValueError(f"--suite: got {suite!r}, expected one of {', '.join(SUITES)}")
    if options.visits < 1 or options.rounds < 1:
        raise ValueError("--visits, --rounds: expected at least 1")
    if options.seconds is not None and not 0 < options.seconds < float("inf"):
        raise ValueError(f"--seconds: got {options.seconds}, expected more than 0")
    phases = tuple(options.phases or runner.PHASES)
    if unknown := set(phases) - set(runner.PHASES):
        raise ValueError(f"--phases: got {sorted(unknown)}, known are {', '.join(runner.PHASES)}")
    if options.device == "cpu":
        # A machine with a GPU may have no network: there, what needs them is left out, and named.
        chosen = cases_of(select(suite, options.only))
        models = any(one.target.models for one in chosen)
        needed = ["matplotlib", *(["transformers"] if models else [])]
        if problem := _requirements.explain({name: name for name in needed}, "bench"):
            raise ValueError(problem)
    # The report of a CPU stays under ten minutes on two idle cores; a slower machine drops the
    # last cases rather than the promise.
    seconds = 560.0 if options.seconds is None and suite == "cpu" else (options.seconds or 0.0)
    plan = runner.Plan(
        suite=suite,
        device=options.device,
        output=options.output or Path("runs/benchmarks") / suite,
        seconds=seconds,
        only=tuple(options.only),
        providers=tuple(options.providers),
        visits=options.visits,
        rounds=options.rounds,
        phases=phases,
        say=lambda text: print(text, flush=True),
    )
    results = runner.run(plan)
    if not results.rows:
        raise ValueError("nothing was measured; see --phases, --seconds and --only")
    page = report.write(results, plan.output)
    print(report.summary(results))
    print(f"\nreport: {page}, figures: results.csv")
    return 130 if results.interrupted else 0


def _compare(options: argparse.Namespace) -> int:
    from .compare import compare, to_text
    from .results import load

    changes = compare(load(options.before), load(options.after))
    if not changes:
        raise ValueError(
            f"compare: got {options.before} and {options.after}, without a common case and "
            "provider; give two runs of the same --only and --providers"
        )
    print(to_text(changes, options.all))
    return int(any(change.verdict == "worse" for change in changes))


def _list(options: argparse.Namespace) -> int:
    from .cases import DATASETS, OBJECTIVES, SUITES, cases_of
    from .providers import find

    for name, suite in SUITES.items():
        print(f"{name}: {len(list(cases_of(suite)))} cases")
        for group, cases in suite.items():
            for one in cases:
                print(f"  {group:12} {one.key}")
    print("objectives:", ", ".join(OBJECTIVES))
    print("data sets:", ", ".join(DATASETS))
    print("providers:", ", ".join(find()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
