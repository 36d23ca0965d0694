"""The command line: finding a verb, parsing its words, and one line for what goes wrong.

The verbs themselves are in the other files, each a thin call of a public function; heavy imports wait until
a verb is chosen.
"""

import contextlib
import errno
import functools
import io
import itertools
import os
import sys
from collections.abc import Callable
from typing import Any

import tyro

from llamita.cli import corpora, data, launch, models, quality, runs, surgery, training, verbs, vocabularies
from llamita.config import nearest
from llamita.data import recipe as data_recipe
from llamita.recipes.runs import RECIPES, recipe, sources

VERBS: dict[str, Callable[..., Any]] = {
    "demo": verbs.demo, "tokenizer train": vocabularies.train,
    "tokenizer compare": vocabularies.compare, "tokenizer advise": vocabularies.advise,
    "tokenizer view": vocabularies.view, "data build": corpora.build, "data task": corpora.task,
    "data label": quality.label, "data judge": quality.judge, "data where": data.where, "data inspect": data.inspect,
    "data card": data.card, "data export": data.export, "plan data": data.plan,
    "doctor": training.doctor, "train": verbs.train, "sft": verbs.sft,
    "generate": verbs.generate, "chat": verbs.chat, "eval": verbs.evaluate,
    "import": models.import_, "export": models.export, "report": verbs.report, "show": models.show,
    "surgery vocab": surgery.vocab, "surgery tie": surgery.tie, "surgery untie": surgery.untie,
    "surgery average": surgery.average, "surgery lora": surgery.lora, "surgery layers": surgery.layers,
    "surgery rope": surgery.rope, "extend": runs.extend, "verify-resume": runs.verify_resume([]),
    "launch": launch.launch([]),
}  # fmt: skip
COMMANDED: dict[str, Callable[[list[str]], Callable[..., Any]]] = {  # these take a whole command behind --
    "launch": launch.launch, "verify-resume": runs.verify_resume,
}  # fmt: skip


# What is wrong with a place on the disk is the user's to mend; any other OSError is a bug and shows its traceback.
PLACES = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR,
    errno.EISDIR, errno.ENOENT, errno.ENAMETOOLONG,
}  # fmt: skip
RULE = set("─-╭╮╰╯+")


def find_verb(words: list[str]) -> tuple[str, list[str]]:
    """The verb, of one word or two, and the words behind it. Raises ValueError that names the nearest."""
    for count in (2, 1):
        if " ".join(words[:count]) in VERBS:
            return " ".join(words[:count]), words[count:]
    raise ValueError(f"no verb is called {' '.join(words[:1])!r}{nearest(' '.join(words[:2]), VERBS)}")


def parse(wanted: Any, words: list[str], prog: str, default: Any = tyro.MISSING_NONPROP) -> Any:
    """tyro's parser for a function or a dataclass, its boxed complaint turned into a one-line ValueError."""
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(wanted, args=words, prog=prog, default=default, config=(tyro.conf.AvoidSubcommands,))
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ValueError(f"{one_line(complaint.getvalue())} ({prog} --help tells more)") from None


def later(verb: Callable[..., None]) -> Callable[..., Callable[[], None]]:
    """The verb as a function that takes the same arguments and does nothing yet."""

    @functools.wraps(verb)
    def bound(*args: Any, **kwargs: Any) -> Callable[[], None]:
        return functools.partial(verb, *args, **kwargs)

    return bound


def one_line(boxed: str) -> str:
    """What tyro's box (drawn in Unicode or in ASCII) says first, and the option that it thinks was meant."""
    lines = [line.strip("│| ") for line in boxed.splitlines()[1:]]
    parts = [list(part) for ruled, part in itertools.groupby(lines, lambda line: set(line) <= RULE) if not ruled]
    said = " ".join(parts[0])
    meant = [line.split()[0].rstrip(",") for part in parts[1:] for line in part if line.startswith("--")]
    return f"{said}; did you mean {meant[0]}?" if meant and said.startswith("Unrecognized") else said


def run_verb(verb: str, words: list[str]) -> None:
    """Call a verb whose settings are a whole Run, started from a recipe."""
    if verb != "sft" and (not words or words[0].startswith("-")) and "--help" not in words:
        raise ValueError(f"name a recipe: llamita {verb} RECIPE; there are: {', '.join(RECIPES)}")
    named = words.pop(0) if words and not words[0].startswith("-") else "sft"
    start = recipe(named)
    kinds: dict[str, Any] = {"train": verbs.Started, "sft": verbs.Tuned, "doctor": training.Examined}
    blanks = {"train": ("dir",), "sft": ("dir", "base", "conversations"), "doctor": ()}
    blank = kinds[verb](run=start, **dict.fromkeys(blanks[verb], tyro.MISSING))
    chosen = parse(kinds[verb], words, f"llamita {verb}" + f" {named}" * (verb != "sft"), blank)
    VERBS[verb](chosen, sources(chosen.run, start, f"recipe {named}", "command line"))


def run_build(words: list[str]) -> None:
    """Call the verb whose settings are a data recipe."""
    if not words or words[0].startswith("-"):
        if "--help" not in words:
            known = ", ".join(data_recipe.RECIPES)
            raise ValueError(f"name a recipe: llamita data build RECIPE PATHS; there are: {known}")
        words = ["plain", *words]
    start, missing = data_recipe.recipe(words[0]), tyro.MISSING
    blank = corpora.Built(recipe=start, paths=missing, tokenizer=missing, out=missing)
    corpora.build(parse(corpora.Built, words[1:], f"llamita data build {words[0]}", blank))


def main(argv: list[str] | None = None) -> int:
    """Run a verb; 0 on success, 2 on bad input with one line that says what to do, 130 when interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    group = words[0] if words and any(verb.startswith(f"{words[0]} ") for verb in VERBS) else ""
    try:
        if all(word in ("-h", "--help") for word in words) or words in ([group], [group, "-h"], [group, "--help"]):
            told = [(verb, function) for verb, function in VERBS.items() if verb.startswith(group)]
            lines = [f"  {verb:18}{(function.__doc__ or '').splitlines()[0]}" for verb, function in told]
            print("usage: llamita VERB ... (llamita VERB --help tells more)\n\n" + "\n".join(lines))
            return 0
        verb, rest = find_verb(words)
        if verb in COMMANDED and "--" in rest:
            here = rest.index("--")
            parse(later(COMMANDED[verb](rest[here + 1 :])), rest[:here], f"llamita {verb}")()
        elif verb in ("train", "sft", "doctor"):
            run_verb(verb, rest)
        elif verb == "data build":
            run_build(rest)
        else:
            parse(later(VERBS[verb]), rest, f"llamita {verb}")()
    except ValueError as error:
        print(f"llamita: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output has left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in PLACES:
            raise
        print(f"llamita: {error.strerror}: {error.filename or 'the disk'}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        goes_on = " ".join(words[:2]).startswith(("demo", "train", "sft", "extend", "tokenizer train", "data build"))
        print("llamita: stopped" + "; the same command goes on from what was saved" * goes_on, file=sys.stderr)
        return 130
    return 0
