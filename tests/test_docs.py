"""
The pages: README.md, CONTRIBUTING.md and docs/. Links, names of code, flags and commands must be those of the code.

A block of code whose info string ends with `cpu` (```bash cpu, ```python cpu) is run by the slow test, page by page
and in the order of the page, in a fresh copy of the repository. There is no network there, and no model. `my.txt` is a
text of the project's own pages. Every `train_gpt2.py` gets the flags SMALL, so each run takes seconds. A block
```text output after such a block is what it prints: numbers may differ by a tenth.
"""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

sys.path.insert(0, str(ROOT / "docs"))
import command_line  # noqa: E402 (the path is set above)

PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")])
BLOCK = re.compile(r"^```(\w*) ?([\w ]*)\n(.*?)^```$", re.M | re.S)
SMALL = "--max_steps 6 --warmup_steps 2 --eval_interval 3 --save_interval 3 --sample_interval 3 --val_tokens 4096"
# the shell in which blocks run: every training is short
SHELL = f"""set -e
python() {{ if [ "$1" = train_gpt2.py ]; then set -- "$@" {SMALL}; fi; command python "$@"; }}
torchrun() {{ if [[ "$*" == *train_gpt2.py* ]]; then set -- "$@" {SMALL}; fi; command torchrun "$@"; }}
"""


def ids(path):
    return path.relative_to(ROOT).as_posix()


def blocks(path):
    """Return [(language, words after it, text)] of a page's blocks of code."""
    return BLOCK.findall(path.read_text(encoding="utf-8"))


def prose(path):
    """Return a page without its blocks of code."""
    return BLOCK.sub("", path.read_text(encoding="utf-8"))


def anchors(path):
    """Return the names by which links reach a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(path), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 220


@pytest.mark.parametrize("path", PAGES, ids=ids)
def test_links_resolve(path):
    """To other pages, to their headings, and to files."""
    for text, target in re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", prose(path)):
        if re.match(r"https?://|mailto:", target):
            continue
        name, _, anchor = target.partition("#")
        linked = (path.parent / name).resolve() if name else path
        assert linked.exists(), f"[{text}]({target})"
        assert not anchor or anchor in anchors(linked), f"[{text}]({target}): {sorted(anchors(linked))}"


def test_every_page_is_reached_from_the_index():
    linked = re.findall(r"\]\(([\w-]+\.md)\)", prose(ROOT / "docs" / "README.md"))
    assert sorted(linked) == sorted(path.name for path in ROOT.glob("docs/*.md") if path.name != "README.md")


def defined_names(path):
    """Return the names that a file defines: functions, classes, their methods, and global variables."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
            names |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return names


@pytest.mark.parametrize("path", PAGES, ids=ids)
def test_named_code_exists(path):
    """[file.py: name](../file.py) names something that the file defines."""
    for file, name, target in re.findall(r"\[([\w/]+\.py): ([\w.]+)\]\(([^)]+)\)", prose(path)):
        assert (path.parent / target).resolve() == ROOT / file
        assert name in defined_names(ROOT / file), f"{file}: {name}"


def test_the_lecture_links_to_code():
    text = prose(ROOT / "docs" / "lecture.md")
    assert len(set(re.findall(r"\[[\w/]+\.py: [\w.]+\]", text))) > 40
    assert text.count("**In the code:**") > 20 and text.count("**Differs:**") > 20


def test_the_command_line_page_is_current():
    """If this fails: python docs/command_line.py"""
    assert command_line.PAGE.read_text(encoding="utf-8") == command_line.page()


def commands(text):
    """Yield (script, its flags) for each call of a script of ours in a text of shell commands."""
    for line in text.replace("\\\n", " ").splitlines():
        for part in re.split(r"\|\||&&|[|;&]", line):
            try:
                words = shlex.split(part, comments=True)
            except ValueError:  # a quotation that goes over several lines
                words = part.split()
            scripts = [i for i, word in enumerate(words) if word.endswith(".py") and (ROOT / word).exists()]
            if scripts and ({"python", "torchrun", "srun"} & set(words) or scripts[0] == 0):
                flags = [match[1] for word in words[scripts[0] :] if (match := re.match(r"--([\w-]+)", word))]
                yield words[scripts[0]], [flag.replace("-", "_") for flag in flags]


@pytest.mark.parametrize("path", PAGES, ids=ids)
def test_flags_exist(path):
    """Every flag of a command on a page exists in that script, in blocks and in the text."""
    shell = [text for language, _, text in blocks(path) if language in ("bash", "sh")]
    inline = re.findall(r"`([^`]*\.py [^`]*)`", prose(path).replace("\n", " "))
    for script, flags in (call for text in shell + inline for call in commands(text)):
        assert set(flags) <= command_line.flags(script), f"{script}: {set(flags) - command_line.flags(script)}"


def test_commands_are_found():
    """The parser above sees the commands that it checks."""
    text = "a=1 torchrun --x=1 train_gpt2.py --lr 1 \\\n  --no_shuffle  # python sample.py --no\n"
    text += "python fineweb.py | head --b"
    assert list(commands(text)) == [("train_gpt2.py", ["lr", "no_shuffle"]), ("fineweb.py", [])]


def alike(printed, expected):
    """Return whether two outputs have the same words. Numbers may differ by a tenth."""
    pattern = re.compile(r"[-+]?\d[\d,]*\.?\d*(?:e[-+]\d+)?")
    values = [[float(number.replace(",", "")) for number in pattern.findall(text)] for text in (printed, expected)]
    words = [pattern.sub("", text).split() for text in (printed, expected)]
    return words[0] == words[1] and values[0] == pytest.approx(values[1], rel=0.1, abs=1e-9)


def test_alike():
    assert alike("step 1 loss 2.00\n", "step 1 loss 2.05") and not alike("loss 2.0", "loss 3.0")
    assert not alike("True", "False") and alike("1e-08 1,000", "1.01e-08 1000")


CPU_PAGES = [path for path in PAGES if any("cpu" in words.split() for _, words, _ in blocks(path))]


@pytest.mark.slow
@pytest.mark.parametrize("path", CPU_PAGES, ids=ids)
@pytest.mark.skipif(os.name != "posix" or not shutil.which("bash"), reason="needs bash")
def test_commands_run(path, tmp_path):
    """What a page tells a reader without a GPU to do works, in the order of the page."""
    copy = tmp_path / "copy"
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in tracked.splitlines():
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    (copy / "my.txt").write_text("\n".join(page.read_text(encoding="utf-8") for page in PAGES), encoding="utf-8")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg"}
    printed = None
    for language, words, text in blocks(path):
        if words == "output":
            assert alike(printed, text), f"printed:\n{printed}\nthe page has:\n{text}"
        if "cpu" not in words.split():
            continue
        command = [sys.executable, "-"] if language == "python" else ["bash", "-c", SHELL + text]
        done = subprocess.run(
            command, input=text if language == "python" else None, cwd=copy, env=environment,
            capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
        printed = done.stdout
