"""
Write docs/command-line.md, the page of all flags, from the code: defaults, types and comments.

    python docs/command_line.py            write the page
    python docs/command_line.py --check    only compare it with the code: exit code 1 if it is not current

tests/test_docs.py makes the same comparison. It also uses `flags`, to check the commands on all pages.
"""

import inspect
import re
import sys
from dataclasses import asdict, fields
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "command-line.md"
sys.path.insert(0, str(ROOT))

import fineweb  # noqa: E402 (the path is set above)
import hellaswag  # noqa: E402
import sample  # noqa: E402
import train_gpt2  # noqa: E402

COMMANDS = {"fineweb.py": fineweb.command, "hellaswag.py": hellaswag.command, "sample.py": sample.command}
CONFIGS = (train_gpt2.GPTConfig, train_gpt2.TrainConfig)
RESUME = {"free": "yes", "named": "with `--override`", "fixed": "no"}
HEAD = """# Command line

This page is generated from the code by `python docs/command_line.py`. Do not edit it. `python SCRIPT --help` prints
the same, and `--version` prints the git revision and the versions of Python and torch.

Flags are spelled with `_` or `-`. A flag that is on or off is given as `--flag` or `--no_flag`. Exit codes: 0 for
success, 2 for a user error, which stderr explains, 75 for a training run that a signal stopped and `--resume` can
continue, 130 for Ctrl-C in the other scripts. Paths among the defaults are relative to the project's folder.
"""


def show(value) -> str:
    """Return a default as it is typed on the command line, in backquotes. Paths are relative to the project."""
    if isinstance(value, (tuple, list)):
        return " ".join(map(show, value)) or "none"
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    text = str(value)
    if Path(text).is_absolute():
        text = Path(text).relative_to(ROOT).as_posix()
    return "`" + text.replace("\n", "\\n") + "`"


def is_public(field) -> bool:
    """Return whether a field of a configuration is a flag. tyro hides those that are marked Suppress."""
    return "Suppress" not in str(field.type)


def comments(config) -> dict[str, str]:
    """Return {flag: its help text}, the comment on a field's line or the one above it."""
    lines, found = inspect.getsource(config).splitlines(), {}
    for above, line in zip([""] + lines, lines):
        if match := re.match(r"    (\w+): .*= flag\(.*?\)(?:  # (.*))?$", line):
            found[match[1]] = match[2] or above.strip().removeprefix("# ")
    return found


def arguments(function) -> dict[str, str]:
    """Return {flag: its help text} of the section Args in a function's docstring."""
    section = inspect.getdoc(function).partition("Args:\n")[2]
    found = re.findall(r"^    (\w+): (.*(?:\n     .*)*)", section, re.M)
    return {name: " ".join(text.split()) for name, text in found}


def flags(script: str) -> set[str]:
    """Return the names of a script's flags, without dashes and with underscores."""
    if script == "train_gpt2.py":
        own = [field for config in CONFIGS for field in fields(config) if is_public(field)]
        names = {field.name for field in own}
        return names | {f"no_{field.name}" for field in own if isinstance(field.default, bool)} | {"help", "version"}
    if script in COMMANDS:
        parameters = inspect.signature(COMMANDS[script]).parameters.values()
        names = {parameter.name for parameter in parameters}
        return names | {f"no_{p.name}" for p in parameters if isinstance(p.default, bool)} | {"help", "version"}
    source = (ROOT / script).read_text() + (ROOT / "benchmarks" / "measure.py").read_text()
    return set(re.findall(r'add_argument\("--(\w+)"', source)) | {"check", "help"}


def table(head: str, rows: list[list[str]]) -> str:
    """Return a Markdown table. `head` has the columns' names, divided by |."""
    columns = head.split("|")
    lines = [columns, ["---"] * len(columns), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def config_table(config) -> str:
    """Return the table of a configuration of train_gpt2.py."""
    texts = comments(config)
    rows = [
        [f"`--{field.name}`", show(field.default), texts[field.name], RESUME[field.metadata["resume"]]]
        for field in fields(config)
        if is_public(field)
    ]
    return table("flag|default|meaning|may a resumed run change it?", rows)


def preset_table() -> str:
    """Return the table of what each preset changes."""
    rows = []
    for name, configs in train_gpt2.PRESETS.items():
        values = {k: v for config in configs for k, v in asdict(config).items()}
        standard = {k: v for config in CONFIGS for k, v in asdict(config()).items()}
        changed = [k for k in values if values[k] != standard[k] and k not in ("preset", "vocab_size")]
        rows.append([f"`{name}`", ", ".join(f"`{k}` {show(values[k])}" for k in changed) or "the defaults above"])
    return table("preset|what it changes", rows)


def page() -> str:
    """Return the whole page."""
    parts = [HEAD, "## train_gpt2.py\n", "### The model\n", config_table(CONFIGS[0])]
    parts += ["### The run\n", config_table(CONFIGS[1]), "### Presets\n", preset_table()]
    for script, function in COMMANDS.items():
        texts, parameters = arguments(function), inspect.signature(function).parameters
        rows = [[f"`--{name}`", show(parameters[name].default), texts[name]] for name in parameters]
        parts += [f"## {script}\n", table("flag|default|meaning", rows)]
    parts += [
        "## Benchmarks\n",
        "Each script in `benchmarks/` prints its flags with `--help`: see [Benchmarks](benchmarks.md).\n",
    ]
    return "\n".join(parts)


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(PAGE.read_text(encoding="utf-8") != page())
    PAGE.write_text(page(), encoding="utf-8")
