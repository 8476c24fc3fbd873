"""`deskroute`: a table of commands. A stage is imported only when its command is called, so that `deskroute --help` answers at once.

Exit codes: 0 done, 1 the work failed (and said why), 2 the arguments or the configuration are wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from persona_models.errors import DeskrouteError, InputError, registry_fault

Command = Callable[[argparse.Namespace], None]


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    args = _parser().parse_args(argv)
    # What libraries tell their own developers.
    warnings.simplefilter("ignore", FutureWarning)
    try:
        args.run(args)
    except DeskrouteError as e:
        print(f"deskroute: {e.message}", file=sys.stderr)
        return e.exit_code
    except ValidationError as e:
        from router.schema import first_fault

        print(f"deskroute: {first_fault(e.errors()).message}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader of our output, `head` for example, has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as e:
        print(f"deskroute: {e.filename or 'a file'}: {e.strerror or e}", file=sys.stderr)
        return 1
    except Exception as e:
        # When it goes away after it has answered.
        fault = registry_fault(e)
        if fault is None:
            raise
        print(f"deskroute: {fault}; run the same command again to go on", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("deskroute: interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="deskroute", description="An IT helpdesk on small language models, one per persona.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(name: str, run: Command, help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help)
        sub.add_argument("--config", type=Path, metavar="FILE", help="configuration (default: ./deskroute.yaml if it is there)")
        sub.set_defaults(run=run)
        return sub

    def exported(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--map", metavar="NAME|FILE", help="which columns carry what: servicenow, jira, zendesk, or a YAML file (default: usual names)"
        )
        sub.add_argument("--encoding", help="of the tickets file, where it is not UTF-8")
        sub.add_argument("--region", metavar="CC", help="country of phone numbers without a country code, for example DE")

    server = "the running server, where it is not on this state folder"

    sub = add("serve", _serve, "answer over HTTP until Ctrl-C")
    sub.add_argument("--host")
    sub.add_argument("--port", type=int)

    sub = add("route", _route, "score a prompt, or a file of them, without answering")
    sub.add_argument("text", nargs="?")
    sub.add_argument("--jsonl", type=Path, metavar="IN", help="one {id, text or messages, profile?} a line")
    sub.add_argument("--out", type=Path, metavar="OUT", help="where the results of --jsonl go (default: the terminal)")
    sub.add_argument("--profile", nargs="+", default=[], metavar="KEY=VALUE", help="title, department, tenure_days, location")

    sub.add_argument("--explain", action="store_true", help="for people: the text with the words that decided, in colour where this is a terminal")

    sub = add("ask", _ask, "route a prompt and stream its answer to the terminal")
    sub.add_argument("text")
    sub.add_argument("--persona", default="auto", help="auto, base or a persona")
    sub.add_argument("--profile", nargs="+", default=[], metavar="KEY=VALUE", help="title, department, tenure_days, location")

    sub = add("retrain", _retrain, "fine-tune, judge, register and promote a persona, the router, or all")
    sub.add_argument("what", metavar="PERSONA|router|all")
    sub.add_argument("--tickets", type=Path, metavar="FILE", help="CSV, JSONL or Parquet with requests and answers (default: the built-in corpus)")
    exported(sub)
    sub.add_argument(
        "--prompts", type=Path, metavar="FILE", help="router: CSV, JSONL or Parquet with texts and their personas, or labels of your own"
    )
    sub.add_argument("--unrouted", action="store_true", help="take tickets that name no persona for this one, instead of asking the router")
    sub.add_argument("--method", help="any PEFT method that changes weights: lora (default), rslora, dora, ia3, vera, loha ...")
    sub.add_argument("--steps", type=int, help="optimizer steps")
    sub.add_argument("--seed", type=int)
    sub.add_argument("--sweep", metavar="NAMES", help="try several settings first and use the best: lr,rank or lr=0.002:0.004,rank=8:16")
    sub.add_argument("--no-promote", action="store_true", help="register as challenger only")
    sub.add_argument("--gates", type=Path, metavar="FILE", help="promotion gates (default: mlflow/promotion.yaml)")
    sub.add_argument("--server", metavar="URL", help=server)
    sub.add_argument("--export", type=Path, metavar="DIR", help="also copy the finished artefacts there, for shipping")

    sub = add("nightly", _nightly, "the whole way for the router and every persona; what has not changed is skipped; for cron")
    sub.add_argument("--tickets", type=Path, metavar="FILE", help="the export to learn from (default: nightly.tickets of the configuration)")
    exported(sub)
    sub.add_argument("--gates", type=Path, metavar="FILE", help="promotion gates (default: mlflow/promotion.yaml)")
    sub.add_argument("--server", metavar="URL", help=server)
    sub.add_argument("--again", action="store_true", help="also what has not changed since the last night")
    sub.add_argument("--out", type=Path, metavar="DIR", help="where the report goes (default: reports in the state folder)")

    sub = add("tickets", _tickets, "check, redact and sort a ticket export without training on it")
    sub.add_argument("tickets", type=Path, metavar="FILE", help="CSV, JSONL or Parquet")
    exported(sub)
    sub.add_argument("--out", type=Path, required=True, metavar="DIR", help="where tickets.jsonl, quarantine.jsonl and report.json go")

    sub = add("evaluate", _evaluate, "measure routing, retrieval and answers on prompts that no training saw")
    sub.add_argument("--json", type=Path, metavar="FILE", help="also write the figures and every answer there")

    sub = add("compare", _compare, "champions and challengers side by side, and the URL that shows them in MLflow")
    sub.add_argument("--metric", default="eval/loss", help="metric of the table (default: eval/loss)")
    sub.add_argument("--ui", default="http://127.0.0.1:5000", metavar="URL", help="where the MLflow UI is (default: that of `deskroute ui`)")

    sub = add("promote", _promote, "make a registered version the champion")
    sub.add_argument("persona", metavar="PERSONA|router")
    sub.add_argument("version")
    how = sub.add_mutually_exclusive_group()
    how.add_argument("--canary", type=float, metavar="PERCENT", help="try it on this share of the persona's requests first")
    sub.add_argument("--minutes", type=float, help="how long the canary lasts; then it is promoted or withdrawn by its results")
    how.add_argument("--shadow", action="store_true", help="answer with the champion and record what this version would have said")
    sub.add_argument("--force", metavar="REASON", help="although it failed a gate; the reason is recorded")
    sub.add_argument("--server", metavar="URL", help=server)

    sub = add("rollback", _rollback, "end a trial, or make the champion before the champion again")
    sub.add_argument("persona", metavar="PERSONA|router")
    sub.add_argument("--server", metavar="URL", help=server)

    sub = add("ui", _ui, "the MLflow UI on the registry in force")
    sub.add_argument("--port", type=int, default=5000)

    sub = add("pretrain", _pretrain, "rebuild the built-in base from the corpus")
    sub.add_argument("--out", type=Path, metavar="DIR", help="where the base goes (default: base in the state folder)")
    sub.add_argument("--steps", type=int)
    sub.add_argument("--from", dest="start", type=Path, metavar="BASE", help="train on from this base, which `pretrain` made")

    sub = add("bench", _bench, "measure: router, engine, gateway, finetune or mixture")
    sub.add_argument("what", metavar="router|engine|gateway|finetune|mixture")
    sub.add_argument("--json", type=Path, metavar="FILE")

    add("doctor", _doctor, "what is installed, found and loaded, and what to do about what is not")
    return parser


def _config(args: argparse.Namespace, **overrides: Any) -> Any:
    from router.config import load_config

    return load_config(args.config, **overrides)


def _profile(pairs: list[str]) -> dict[str, str]:
    for pair in pairs:
        if "=" not in pair:
            raise InputError(f"--profile: {pair!r} is not KEY=VALUE; for example --profile title=Director tenure_days=400")
    return dict(pair.split("=", 1) for pair in pairs)


def _serve(args: argparse.Namespace) -> None:
    from router.server import serve_forever

    serve_forever(_config(args, http__host=args.host, http__port=args.port))


def _route(args: argparse.Namespace) -> None:
    from pipelines.local import explain, local_desk, route_file
    from router.query import Profile
    from router.schema import RouteInput

    if (args.text is None) == (args.jsonl is None):
        raise InputError("give either a TEXT or --jsonl FILE")
    if args.explain and args.jsonl:
        raise InputError("--explain is for one TEXT; --jsonl writes the reasons of each line already")
    desk = local_desk(_config(args), models=False)
    if args.explain:
        print(explain(desk, RouteInput(text=args.text, profile=_profile(args.profile)), colour=sys.stdout.isatty() and "NO_COLOR" not in os.environ))
    elif args.jsonl:
        route_file(desk, args.jsonl, args.out)
    else:
        Profile.from_metadata(_profile(args.profile))
        block = desk.plan_input(RouteInput(text=args.text, profile=_profile(args.profile)))
        print(json.dumps(block.model_dump(), indent=2, ensure_ascii=False))


def _ask(args: argparse.Namespace) -> None:
    from pipelines.local import ask, local_desk

    desk = local_desk(_config(args), models=True)
    asyncio.run(ask(desk, args.text, args.persona, _profile(args.profile)))


def _retrain(args: argparse.Namespace) -> None:
    from pipelines.promote import check_export, read_gates, registered_model

    config = _config(args, training__method=args.method, training__seed=args.seed)
    names = [p.id for p in config.catalogue()]
    wanted = names if args.what == "all" else [args.what]
    if args.what != "all":
        registered_model(config, args.what)
    if args.export:
        check_export(args.export, names)
    if args.steps is not None and args.steps < 1:
        raise InputError(f"--steps is {args.steps}; it must be at least 1")
    if args.what == "router" and args.tickets:
        raise InputError("--tickets retrains personas; the router learns from the corpus")
    if args.prompts and args.what != "router":
        raise InputError("--prompts retrains the router; personas learn from --tickets")
    if args.unrouted and (args.what == "all" or not args.tickets):
        raise InputError("--unrouted takes every ticket that names no persona for the one persona that is retrained; give --tickets and one PERSONA")
    if args.sweep and args.what == "router":
        raise InputError("--sweep varies the fine-tuning of personas; the router has none")
    if args.sweep and args.steps:
        raise InputError("--steps and --sweep: vary the steps with --sweep steps, on tickets with --sweep epochs, or set training.steps")
    read_gates(args.gates)
    grid = _grid(args.sweep, config) if args.sweep else None
    tickets = _import(config, args, config.state / "work" / "tickets", all_of=args.what if args.unrouted else None) if args.tickets else None
    if tickets:
        from pipelines.dataset import check_tickets

        for name in wanted:
            check_tickets(tickets.of(name), name)
    from pipelines.retrain import Retraining, export

    work = Retraining(config, gates=args.gates, server=args.server)
    outcomes = []
    for name in wanted:
        promote = not args.no_promote
        outcome = (
            work.router(promote=promote, prompts=args.prompts)
            if name == "router"
            else work.persona(name, tickets, promote=promote, steps=args.steps, grid=grid)
        )
        outcomes.append(outcome)
        print(outcome, flush=True)
    made = {o.name: o.adapter for o in outcomes if o.adapter}
    if args.what == "all":
        print_matrix(names, work.matrix(made))
    if args.export:
        for name, folder in made.items():
            export(folder, args.export / name)
        print(f"exported to {args.export}")
    if any(o.promoted and not o.live for o in outcomes):
        print("no server runs on this state folder; `deskroute serve` uses champions from its next start")
    print("`deskroute compare` shows them side by side")


def _grid(text: str, config: Any) -> Any:
    from pipelines.sweep import Grid

    return Grid.read(text, config.training)


def _import(config: Any, args: argparse.Namespace, out: Path, *, all_of: str | None = None) -> Any:
    from pipelines.imports import QUARANTINE, import_tickets
    from pipelines.tickets import read_map

    found = import_tickets(args.tickets, out, config, columns=read_map(args.map), encoding=args.encoding, region=args.region, all_of=all_of)
    print(f"{args.tickets}: {found}", file=sys.stderr)
    if found.facts["kept_aside"]:
        print(f"the rows kept aside, with their reasons: {out / QUARANTINE}", file=sys.stderr)
    return found


def _nightly(args: argparse.Namespace) -> None:
    if not sys.stderr.isatty():
        # Cron mails what a command prints, and nobody reads bars in a mail. tqdm reads this when it is imported.
        os.environ.setdefault("TQDM_DISABLE", "1")
    from pipelines.nightly import Nightly

    tickets = args.tickets.absolute() if args.tickets else None
    named = {"tickets": tickets, "map": args.map, "encoding": args.encoding, "region": args.region}
    config = _config(args, **{f"nightly__{k}": v for k, v in named.items()})
    out = args.out or config.state / "reports"
    if out.exists() and not out.is_dir():
        raise InputError(f"--out: {out} is no folder")
    report = Nightly(config, gates=args.gates, server=args.server, again=args.again).run(out)
    print(report.markdown())
    if not report.ok:
        raise DeskrouteError(f"{report.summary}; the report: {out}")


def _tickets(args: argparse.Namespace) -> None:
    config = _config(args)
    if args.out.exists() and not (args.out / "report.json").is_file():
        raise InputError(f"--out: {args.out} holds something else than an import and would be replaced; give another folder")
    found = _import(config, args, args.out)
    counts = {p.id: len(found.of(p.id)) for p in config.catalogue()}
    print(f"{args.out}: " + ", ".join(f"{n} {p}" for p, n in counts.items()))


def print_matrix(names: list[str], values: Any) -> None:
    """The persona matrix as a table; the best cell of a row is starred."""
    print("\nloss on held-out answers of (row) under (column):")
    print(" " * 18 + "".join(f"{c[:13]:>14}" for c in ["base", *names]))
    for name, row in zip(names, values, strict=True):
        best = row.argmin()
        print(f"{name:<18}" + "".join(f"{v:>13.3f}{'*' if j == best else ' '}" for j, v in enumerate(row)))


def _evaluate(args: argparse.Namespace) -> None:
    from pipelines.scorecard import evaluate, print_card

    if args.json and not args.json.absolute().parent.is_dir():
        raise InputError(f"--json: the folder of {args.json} does not exist")
    card = evaluate(_config(args))
    print_card(card, args.json)
    if card.matrix:
        print_matrix(*card.matrix)


def _compare(args: argparse.Namespace) -> None:
    from pipelines.compare import compare

    compare(_config(args), args.metric, args.ui)


def _promote(args: argparse.Namespace) -> None:
    from pipelines.promote import Promoter, read_gates

    if args.canary is not None and not 0 < args.canary < 100:
        raise InputError(f"--canary is {args.canary:g}; it is a share of the requests in percent, for example 10")
    if args.force is not None and not args.force.strip():
        raise InputError("--force needs the reason, which is recorded with the version")
    if args.minutes is not None and (args.canary is None or args.minutes <= 0):
        raise InputError("--minutes says how long a --canary lasts before it is promoted or withdrawn; give both")
    rule = read_gates().trial
    promoter = Promoter(_config(args), args.server)
    if args.canary is not None or args.shadow:
        how = "shadow" if args.shadow else f"canary {args.canary:g}"
        print(promoter.begin_trial(args.persona, args.version, how, forced=args.force), flush=True)
        if args.minutes:
            wait(args.minutes, f"canary of {args.persona} {args.version}")
            moved, why = promoter.end_canary(args.persona, args.version, rule, forced=args.force)
            print(f"{why}\n{moved}")
            return
        print(
            f"`deskroute compare` shows how it fares; then `deskroute promote {args.persona} {args.version}` or `deskroute rollback {args.persona}`"
        )
    else:
        print(promoter.promote(args.persona, args.version, forced=args.force))


def wait(minutes: float, title: str) -> None:
    """Let time pass, with a bar."""
    import time

    from tqdm import tqdm

    for _ in tqdm(range(round(60 * minutes)), desc=title, unit="s", dynamic_ncols=True):
        time.sleep(1)


def _rollback(args: argparse.Namespace) -> None:
    from pipelines.promote import Promoter

    print(Promoter(_config(args), args.server).roll_back(args.persona))


def _ui(args: argparse.Namespace) -> None:
    from pipelines.compare import run_ui

    run_ui(_config(args), args.port)


def _pretrain(args: argparse.Namespace) -> None:
    from pipelines.pretrain import pretrain_tracked

    if args.steps is not None and args.steps < 1:
        raise InputError(f"--steps is {args.steps}; it must be at least 1")
    pretrain_tracked(_config(args), args.out, args.steps, args.start)


def _bench(args: argparse.Namespace) -> None:
    from pipelines.bench import bench

    bench(args.what, args.json, _config(args))


def _doctor(args: argparse.Namespace) -> None:
    from pipelines.doctor import examine

    if not examine(args.config):
        raise DeskrouteError("something is missing; see the lines marked NO above")


if __name__ == "__main__":
    sys.exit(main())
