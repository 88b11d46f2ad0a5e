"""The command line: ``upt-fast train | eval | predict | methods | verify | info | demo | ...``.

torch is imported when a command needs it, so that ``--help`` and mistyped options answer at once. What a user can get
wrong ends in one line on stderr and exit code 2; with ``--debug`` (or UPT_FAST_DEBUG=1) the traceback is shown.
"""

from __future__ import annotations

import argparse
import difflib
import json
import logging
import os
import re
import shlex
import sys
import warnings
from collections.abc import Sequence
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any, get_type_hints

from jsonargparse import ArgumentParser, Namespace

import upt_fast
from upt_fast.methods import Method, find_method
from upt_fast.train.config import TrainConfig, train_fields
from upt_fast.train.options import add_method_options, flag, read_train_arguments
from upt_fast.train.recipes import list_recipes

EXIT_FAILED = 1  # the run went wrong: the loss diverged, or memory ran out
EXIT_USAGE = 2  # the user can put it right
EXIT_INTERRUPTED = 130

CHATTY_LOGGERS = ("huggingface_hub", "urllib3", "httpx", "httpx2", "PIL")
DEVICES = "auto, cpu, cuda or cuda:N"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: its arguments; None: the process's.
    Returns:
        Exit code: 0, 1 (the run failed), 2 (bad input) or 130 (interrupted).
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments or os.environ.get("UPT_FAST_DEBUG", "") not in ("", "0")
    arguments = [argument for argument in arguments if argument != "--debug"]
    out: str | None = None
    try:
        options = _parse(arguments)
        command: Namespace = options[options.subcommand]
        out = command.get("out") if options.subcommand == "train" else None
        with _Messages(debug):
            return COMMANDS[options.subcommand](command)
    except SystemExit as done:  # --help, --version and --print_config
        return done.code if isinstance(done.code, int) else 0
    except KeyboardInterrupt:
        if debug:
            raise
        return _say(_interrupted(out), EXIT_INTERRUPTED)
    except BrokenPipeError:  # the reader of our output, such as head, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        failure = _failure(error)
        if debug or failure is None:
            raise
        return _say(f"error: {failure[0]}", failure[1])


def _say(message: str, code: int) -> int:
    print(f"upt-fast: {message}", file=sys.stderr)
    return code


def _interrupted(out: str | None) -> str:
    if out is None or not (Path(out) / "config.json").is_file():
        return "interrupted"
    config = shlex.quote(str(Path(out) / "config.json"))
    return f"interrupted; continue with: upt-fast train --config {config} --resume"


def _failure(error: Exception) -> tuple[str, int] | None:
    """The one line and the exit code for an error that is not ours, or None."""
    text = str(error).strip()
    if "Original Traceback" in text:  # from a loader process: its traceback's last line is the message
        text = text.splitlines()[-1].partition(": ")[2]
    message = " ".join(text.split())
    if isinstance(error, argparse.ArgumentError):
        return _option_message(message), EXIT_USAGE
    if isinstance(error, OSError):
        where = f": {error.filename}" if error.filename is not None else ""
        return f"{error.strerror or message}{where}", EXIT_USAGE
    if isinstance(error, ValueError):
        return message, EXIT_USAGE
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return "out of GPU memory; try --memory balanced or lean, or a smaller --batch-size", EXIT_FAILED
    if type(error).__name__ == "TrainingDivergedError":
        return message, EXIT_FAILED
    return None


def _option_message(message: str) -> str:
    """jsonargparse's message with options in the place of its parser keys."""
    if message.startswith('expected "subcommand"'):
        return f"no command; wanted one of {', '.join(COMMANDS)}, for example upt-fast train --help"
    for command in COMMANDS:
        message = message.replace(f" {command}.", " --")
    if message.startswith("the following arguments are required: "):
        message = message.replace("_", "-")
    key = re.fullmatch(r'Parser key "([^"]+)"(?: element \d+)?: *(.*)', message)
    if key is None:
        return message
    option, reason = flag(key[1].rsplit(".", 1)[-1]), key[2]
    union = re.search(r"Subtypes: \[(.*?)\] Errors:.*Given value: (.*)", reason)
    single = re.fullmatch(r"Expected an? (.*?)\. Got value: (.*)", reason)
    got = union or single
    if got is None:
        return f"{option}: {reason}"
    wanted = re.sub(r"<class '(\w+)'>|typing\.Literal\[(.*?)\]", lambda kind: kind[1] or kind[2], got[1])
    return f"{option} {got[2]}: wanted {wanted.replace('NoneType', 'null').replace(', ', ' or ')}"


class _Messages(logging.Handler):
    """Shows this package's log and warnings as single lines on stderr, clear of progress bars.

    Args:
        debug: whether other libraries' logs are shown too; what they log of a failure comes again as its exception.
    """

    def __init__(self, debug: bool) -> None:
        super().__init__()
        self.debug = debug

    def __enter__(self) -> _Messages:
        self.levels_before = {name: logging.getLogger(name).level for name in CHATTY_LOGGERS}
        self.quiet = logging.NullHandler()
        if not self.debug:
            for name in CHATTY_LOGGERS:
                logging.getLogger(name).setLevel(logging.CRITICAL)
            logging.getLogger().addHandler(self.quiet)
        self.logger = logging.getLogger("upt_fast")
        self.level_before, self.propagate_before = self.logger.level, self.logger.propagate
        self.logger.addHandler(self)
        self.logger.setLevel(logging.INFO)
        self.logger.propagate = False
        self.catcher = warnings.catch_warnings()
        self.catcher.__enter__()
        warnings.filterwarnings("ignore", message="This DataLoader will create")  # --num-workers is the user's choice
        warnings.showwarning = self._warning  # type: ignore[assignment]
        return self

    def __exit__(self, *_: object) -> None:
        self.catcher.__exit__(None, None, None)
        self.logger.removeHandler(self)
        self.logger.setLevel(self.level_before)
        self.logger.propagate = self.propagate_before
        logging.getLogger().removeHandler(self.quiet)
        for name, level in self.levels_before.items():
            logging.getLogger(name).setLevel(level)

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "warning: " if record.levelno >= logging.WARNING else ""
        self._write(prefix + record.getMessage())

    def _warning(self, message: Warning | str, *_: object, **__: object) -> None:
        self._write(f"warning: {' '.join(str(message).split())}")

    def _write(self, line: str) -> None:
        from tqdm import tqdm

        tqdm.write(f"upt-fast: {line}", file=sys.stderr)


def _parse(arguments: list[str]) -> Namespace:
    method = find_method("upt")
    if arguments[:1] == ["train"]:
        arguments, method = read_train_arguments(arguments)
    parser = _parser()
    train_parser = _train_parser(method)
    parser.commands.add_subcommand("train", train_parser, help=HELP["train"])
    for name, build in (("eval", _eval_parser), ("predict", _predict_parser), ("methods", _methods_parser)):
        parser.commands.add_subcommand(name, build(), help=HELP[name])
    for name, build in (("verify", _verify_parser), ("info", _info_parser), ("demo", _demo_parser)):
        parser.commands.add_subcommand(name, build(), help=HELP[name])
    for name, build in (("import-checkpoint", _import_parser), ("export-checkpoint", _export_parser)):
        parser.commands.add_subcommand(name, build(), help=HELP[name])
    try:
        return parser.parse_args(arguments)
    except argparse.ArgumentError as error:
        if arguments[:1] == ["train"] and (unknown := _unknown_options(str(error))):
            raise ValueError(_unknown_message(unknown, method, train_parser)) from error
        raise


def _unknown_options(message: str) -> list[str]:
    """The options that jsonargparse's message says it does not know."""
    if message.startswith("unrecognized arguments: "):
        return [word.partition("=")[0] for word in message.split() if word.startswith("--")]
    found = re.search(r"does not accept option '([^']+)'", message)
    return [flag(found[1])] if found else []


def _unknown_message(unknown: list[str], method: Method, parser: ArgumentParser) -> str:
    known = [name for action in parser._actions for name in action.option_strings]
    close = [name for option in unknown for name in difflib.get_close_matches(option, known, n=1)]
    guess = f"; did you mean {', '.join(close)}?" if close else ";"
    return (
        f"train with method {method.name!r} has no option {', '.join(unknown)}{guess} "
        f"see upt-fast train --method {method.name} --help"
    )


class _Parser(ArgumentParser):
    commands: Any


def _parser() -> _Parser:
    parser = _Parser(
        prog="upt-fast",
        description="Prompt learning on a frozen CLIP: Unified Prompt Tuning, exact and fast.",
        version=upt_fast.__version__,
        exit_on_error=False,
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error (or UPT_FAST_DEBUG=1)")
    parser.commands = parser.add_subcommands(required=True)
    return parser


def _subparser(name: str) -> ArgumentParser:
    return ArgumentParser(description=HELP[name], exit_on_error=False)


def _train_parser(method: Method) -> ArgumentParser:
    parser = _subparser("train")
    parser.description = f"{HELP['train']}; shown for {method.title}, another with --method"
    recipes = ", ".join(list_recipes())
    parser.add_argument(
        "--config",
        action="config",
        help=f"YAML or JSON file of these options, or a recipe by name ({recipes}); later options override it",
    )
    hints = get_type_hints(TrainConfig)
    for option in (option for option in fields(TrainConfig) if option.name in train_fields()):
        settings: dict[str, Any] = {"help": option.metadata["help"]}
        if option.name == "resume":
            settings["action"] = "store_true"
        else:
            settings["type"] = hints[option.name]
            settings |= {"required": True} if option.default is MISSING else {"default": option.default}
        parser.add_argument(flag(option.name), **settings)
    add_method_options(parser, method)
    return parser


def _eval_parser() -> ArgumentParser:
    parser = _subparser("eval")
    _add_model_options(parser)
    parser.add_argument("--data", type=str, required=True, help="directory of images, laid out as for train")
    parser.add_argument("--split", type=str | None, default=None, help="train, val or test; none: the test images")
    parser.add_argument(
        "--classes-from", type=str | None, default=None, help="which folders are classes: top or leaf; none: as trained"
    )
    parser.add_argument(
        "--classnames",
        type=str | None,
        default=None,
        help="JSON or CSV file, class folder -> name: which class of the model a folder means",
    )
    parser.add_argument("--batch-size", type=int, default=100, help="images per forward pass")
    parser.add_argument("--num-workers", type=int | None, default=None, help="processes that load images")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _predict_parser() -> ArgumentParser:
    parser = _subparser("predict")
    parser.add_argument("images", nargs="+", type=str, metavar="IMAGE", help="image files")
    _add_model_options(parser)
    parser.add_argument("--top-k", type=int, default=5, help="classes per image")
    parser.add_argument(
        "--classnames",
        type=str | None,
        default=None,
        help="JSON or CSV file, class folder of training -> what to call the class in the answer",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _add_model_options(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint", type=str, required=True, help="folder of a run, its last or best, or a saved model"
    )
    parser.add_argument(
        "--method", type=str | None, default=None, help="FILE.py:CLASS of a method from outside: models import no code"
    )
    parser.add_argument("--device", type=str, default="auto", help=DEVICES)
    parser.add_argument("--backend", type=str, default="auto", help="how operations are computed")


def _methods_parser() -> ArgumentParser:
    parser = _subparser("methods")
    parser.add_argument("--clip", type=str, default="ViT-B-16", help="CLIP model, of which no weights are read")
    parser.add_argument("--classes", type=int, default=100, help="number of classes, of Caltech101 or ImageNet")
    parser.add_argument("--batch-size", type=int, default=32, help="images per training step")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _verify_parser() -> ArgumentParser:
    parser = _subparser("verify")
    parser.add_argument(
        "directory", nargs="?", type=str | None, default=None, metavar="DIR", help="folder of test vectors"
    )
    parser.add_argument("--device", type=str, default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--dtype", type=str, default="float64", help="float64, float32, bfloat16, float16 or fp8")
    parser.add_argument("--backend", type=str, default="auto", help="how operations are computed")
    return parser


def _info_parser() -> ArgumentParser:
    parser = _subparser("info")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _demo_parser() -> ArgumentParser:
    parser = _subparser("demo")
    parser.add_argument("--out", type=str | None, default=None, help="folder of the demo; none: a new one under runs")
    parser.add_argument("--methods", nargs="+", type=str, default=None, help="one or more; none: coop vpt_deep upt")
    parser.add_argument("--all", action="store_true", help="all methods, about three times as long")
    parser.add_argument("--shots", nargs="+", type=int, default=None, help="images per class, one or more numbers")
    parser.add_argument("--seeds", nargs="+", type=int, default=None, help="seeds, one or more numbers")
    parser.add_argument("--workers", type=int | None, default=None, help="processes; none: one per core, at most 4")
    return parser


def _import_parser() -> ArgumentParser:
    parser = _subparser("import-checkpoint")
    parser.add_argument("file", type=str, metavar="FILE", help="model.pth.tar-50, model-best.pth.tar, ...")
    parser.add_argument("--clip", type=str, required=True, help="the CLIP it was trained on: open_clip's name")
    parser.add_argument("--pretrained", type=str | None, default=None, help="open_clip's tag, or a checkpoint file")
    parser.add_argument(
        "--quick-gelu",
        type=bool | None,
        default=None,
        help="whether the CLIP has QuickGELU (true) or GELU (false); none: as the tag, the file or else the name says",
    )
    parser.add_argument(
        "--classnames", type=str, required=True, help="file of the class names in their order: one a line, or JSON"
    )
    parser.add_argument("--out", type=str, required=True, help="folder of the model")
    parser.add_argument("--method", type=str | None, default=None, help="none: found from the file")
    parser.add_argument(
        "--options", nargs="+", type=str, default=[], metavar="KEY=VALUE", help="of the method: half_prompts=true ..."
    )
    return parser


def _export_parser() -> ArgumentParser:
    parser = _subparser("export-checkpoint")
    parser.add_argument(
        "checkpoint", type=str, metavar="CHECKPOINT", help="folder of a run, its last or best, or a saved model"
    )
    parser.add_argument("--out", type=str, required=True, help="folder that becomes their --model-dir")
    parser.add_argument("--epoch", type=int | None, default=None, help="their --load-epoch; none: the run's, else 1")
    parser.add_argument("--clip", type=str | None, default=None, help="another name for the CLIP; none: as saved")
    parser.add_argument("--pretrained", type=str | None, default=None, help="with --clip: open_clip's tag, or a file")
    parser.add_argument(
        "--quick-gelu", type=bool | None, default=None, help="with --clip: its activation, true or false"
    )
    return parser


def _train(options: Namespace) -> int:
    values = options.as_dict()
    values.pop("config", None)
    config = TrainConfig.from_dict(values)  # before torch, so that a bad value is told at once
    from upt_fast.train.loop import train

    results = train(config)
    test = results["test"]
    print(f"accuracy {100 * test['accuracy']:.2f} %  results in {Path(config.out) / 'results.json'}")
    return 0


def _eval(options: Namespace) -> int:
    from upt_fast.train.loop import evaluate_run

    evaluation, where = evaluate_run(
        options.checkpoint,
        options.data,
        split=options.split,
        batch_size=options.batch_size,
        num_workers=options.num_workers,
        device=options.device,
        backend=options.backend,
        method=options.method,
        classes_from=options.classes_from,
        classnames=options.classnames,
    )
    if options.json:
        print(json.dumps({"images_from": where, **asdict(evaluation)}, indent=2))
    else:
        print(f"accuracy {100 * evaluation.accuracy:.2f} %")
        print(f"mean over classes {100 * evaluation.mean_class_accuracy:.2f} %")
        print(f"{evaluation.num_images} images: {where}")
    return 0


def _predict(options: Namespace) -> int:
    from upt_fast.train.evaluation import predict
    from upt_fast.train.loop import class_names, load_run

    missing = [path for path in options.images if not Path(path).exists()]
    if missing:
        raise ValueError(f"{len(missing)} image file(s) do not exist: {', '.join(missing[:10])}")
    model = load_run(options.checkpoint, options.device, options.backend, options.method)
    names = class_names(options.checkpoint, model, options.classnames)
    predictions = predict(model, options.images, options.top_k, classnames=names)
    if options.json:
        print(json.dumps([asdict(prediction) for prediction in predictions], indent=2))
        return 0
    for prediction in predictions:
        print(prediction.path)
        for name, probability in zip(prediction.classnames, prediction.probabilities, strict=True):
            print(f"  {100 * probability:6.2f} %  {name}")
    return 0


def _methods(options: Namespace) -> int:
    from upt_fast.flops import main_methods

    return main_methods(options.clip, options.classes, options.batch_size, options.json)


def _verify(options: Namespace) -> int:
    from upt_fast.verify import run_verify

    directory = None if options.directory is None else Path(options.directory)
    return run_verify(directory, options.device, options.dtype, options.backend)


def _info(options: Namespace) -> int:
    from upt_fast.info import main_info

    return main_info(options.json)


def _demo(options: Namespace) -> int:
    from upt_fast.demo.run import run_demo

    lists = ("methods", "shots", "seeds")
    given: dict[str, Any] = {name: tuple(options[name]) for name in lists if options[name] is not None}
    if options.all:
        from upt_fast.demo.methods import ALL_METHODS

        if "methods" in given:
            raise ValueError(f"--all and --methods {' '.join(given['methods'])}; wanted one or the other")
        given["methods"] = ALL_METHODS
    if options.workers is not None:
        given["workers"] = options.workers
    run_demo(out_dir=None if options.out is None else Path(options.out), **given)
    return 0


def _import_checkpoint(options: Namespace) -> int:
    from upt_fast.released.commands import run_import

    run_import(
        options.file,
        options.classnames,
        options.out,
        clip=options.clip,
        pretrained=options.pretrained,
        quick_gelu=options.quick_gelu,
        method=options.method,
        options=options.options,
    )
    return 0


def _export_checkpoint(options: Namespace) -> int:
    from upt_fast.released.commands import run_export

    run_export(
        options.checkpoint,
        options.out,
        epoch=options.epoch,
        clip=options.clip,
        pretrained=options.pretrained,
        quick_gelu=options.quick_gelu,
    )
    return 0


COMMANDS = {"train": _train, "eval": _eval, "predict": _predict, "verify": _verify, "info": _info, "demo": _demo}
COMMANDS |= {"methods": _methods, "import-checkpoint": _import_checkpoint, "export-checkpoint": _export_checkpoint}
HELP = {
    "train": "train prompts on a directory of images",
    "eval": "accuracy of a trained model on a directory of images",
    "predict": "classify image files with a trained model",
    "methods": "what can be trained: parameters, prompted layers, cost of a step, source",
    "verify": "check this installation against test vectors",
    "info": "what runs here, and why not",
    "demo": "a small training run that downloads nothing",
    "import-checkpoint": "read a checkpoint of CoOp's, CoCoOp's, MaPLe's or UPT's repository",
    "export-checkpoint": "write a checkpoint that those repositories read",
}
