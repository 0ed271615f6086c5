"""Runs the code blocks of a Markdown page as a reader would: from top to bottom, in one fresh folder.

    run_page(Path("README.md"), tmp_path)

What a fence holds decides what is done with it.

- ```python runs in one namespace for the page; with ">>>" in it, as a doctest.
- ```bash runs command by command: `fedmezo ...` in this process, `python FILE` as a script, ordinary tools by bash.
  Commands that install, build or reach other machines are only parsed.
- ```toml and ```json are read, a toml block as a configuration; with a name (first line `# file: NAME`, or a comment)
  they are written to that file. ```text and the like are for the reader, unless they have a name.

Comments right above a fence say more, and do not show:

    <!-- setup: COMMAND -->    runs first, in bash's words; may stand anywhere in the page
    <!-- with: ARGUMENTS -->   appended to each `fedmezo` command of the block that knows these options
    <!-- parsed: REASON -->    nothing runs: verbs, options and keys must exist, Python must compile
    <!-- file: NAME -->        the block is written to NAME
    <!-- exit: CODE -->        the last `fedmezo` command ends with this code instead of 0
"""

import doctest
import io
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import click

from fedmezo.cli import _command, main
from fedmezo.studies.config import Config, parse_config
from fedmezo.studies.keys import note_of

ROOT = Path(__file__).parent.parent
LINKS = ("configs", "examples")
LANGUAGES = {"python", "bash", "toml", "json"}
WORDS = {"setup", "with", "parsed", "file", "exit"}
# Run by bash, where nothing of them can reach further than the page's folder.
TOOLS = {
    "cat", "cp", "echo", "find", "grep", "head", "ls", "mkdir", "mv", "printf", "rm", "sed", "sort", "tail",
    "touch", "wc", "zcat",
}  # fmt: skip
# They install, build, serve for ever or reach another machine: never run here.
ELSEWHERE = {
    "python -m", "cd", "chromium", "convert_lora_to_gguf.py", "curl", "deactivate", "docker", "firewall-cmd",
    "flower-superlink", "flwr", "git", "gunzip", "jupyter", "llama-cli", "llama-server", "lm_eval", "lm-eval",
    "make", "mkdocs", "pip", "pytest", "ruff", "scp", "source", "ssh", "sudo", "systemctl", "tensorboard",
    "ufw", "unzip", "uv", "wandb", "wget", "wg",
}  # fmt: skip
FENCE = re.compile(r"^(?P<indent> *)(?P<marks>```+|~~~+) *(?P<language>[\w+-]*)(?P<rest>.*)$")
COMMENT = re.compile(r"<!--\s*(?P<text>.*?)\s*-->", re.DOTALL)


class BlockError(AssertionError):
    """A block does not do what a reader would expect."""


@dataclass(frozen=True)
class Block:
    """A fence of a page, or a hidden command (language "setup").

    Attributes:
      language: the word after the fence, in lower case; empty when there is none.
      text: what is between the fences, without their indentation.
      line: the line in the page at which it begins, from 1.
      notes: the comments right above it, by their word.
      rest: what stands behind the language, such as a title.
    """

    language: str
    text: str
    line: int
    notes: Mapping[str, str] = field(default_factory=dict)
    rest: str = ""

    @property
    def counts(self) -> bool:
        """Whether there is something to run or to read in it."""
        return self.language in LANGUAGES

    @property
    def parsed(self) -> bool:
        """Whether nothing of it runs: by its comment, or since all of its commands are of other places."""
        if "parsed" in self.notes or self.language != "bash":
            return "parsed" in self.notes
        return all(first_word(command) in ELSEWHERE for command in commands(self.text))


# --- reading ---------------------------------------------------------------------------------------------------------


def read_blocks(page: str) -> list[Block]:
    """Returns a page's fences and hidden commands, in their order."""
    found: list[Block] = []
    lines = page.splitlines()
    notes: dict[str, str] = {}
    at = 0
    while at < len(lines):
        if fence := FENCE.match(lines[at]):
            end = _closing(lines, at, fence)
            text = "\n".join(line[len(fence["indent"]) :] for line in lines[at + 1 : end])
            found.append(Block(fence["language"].lower(), text + "\n", at + 1, notes, fence["rest"]))
            notes, at = {}, end + 1
        elif lines[at].lstrip().startswith("<!--"):
            end = next(n for n in range(at, len(lines)) if "-->" in lines[n])
            for word, text in _words("\n".join(lines[at : end + 1]), line=at + 1):
                if word == "setup":
                    found.append(Block("setup", text + "\n", at + 1))
                else:
                    notes[word] = text
            at = end + 1
        else:
            if lines[at].strip() and notes:
                raise BlockError(f"line {at + 1}: {notes} stand above no fence")
            at += 1
    return found


def _closing(lines: Sequence[str], at: int, fence: re.Match[str]) -> int:
    for end in range(at + 1, len(lines)):
        if lines[end].strip() == fence["marks"]:
            return end
    raise BlockError(f"line {at + 1}: the fence is never closed")


def _words(text: str, *, line: int) -> Iterator[tuple[str, str]]:
    for comment in COMMENT.finditer(text):
        word, colon, rest = comment["text"].partition(":")
        if not colon or not word.isalpha():
            continue
        if word not in WORDS:
            raise BlockError(f"line {line}: unknown word {word!r} in a comment; known are {', '.join(sorted(WORDS))}")
        yield word, rest.strip()


def commands(text: str) -> list[str]:
    """Returns the commands of a bash text: lines, with continued ones joined and heredocs whole."""
    found: list[str] = []
    lines = iter(text.splitlines())
    for line in lines:
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        while line.endswith("\\"):
            line = line[:-1].rstrip() + " " + next(lines).strip()
        if heredoc := re.search(r"<<-?\s*['\"]?(\w+)['\"]?", line):
            for more in lines:
                line += "\n" + more
                if more.strip() == heredoc[1]:
                    break
        found.append(line.strip())
    return found


def _split(command: str) -> list[str]:
    """The words of a command, without its comment and the variables set in front of it."""
    words = shlex.split(command.split("\n")[0], comments=True)
    while words and re.fullmatch(r"[A-Za-z_]\w*=.*", words[0]):
        words = words[1:]
    return words


def first_word(command: str) -> str:
    """Returns the name of the program that a command starts, without its folder; a module of Python is of its own."""
    words = _split(command)
    if words[:2] == ["python", "-m"]:
        return "python -m"
    return words[0].rsplit("/", 1)[-1] if words else ""


# --- running ---------------------------------------------------------------------------------------------------------


def run_page(page: Path, folder: Path, *, only_parse: bool = False) -> int:
    """Runs a page's blocks in `folder` and returns how many there were.

    Raises:
      BlockError: a block fails; the message has the page and the line.
    """
    blocks = read_blocks(page.read_text(encoding="utf-8"))
    for name in LINKS:
        (folder / name).symlink_to(ROOT / name)
    with _inside(folder), _module() as module:
        for block in blocks:
            try:
                if only_parse or block.parsed:
                    parse_block(block)
                else:
                    run_block(block, module)
            except Exception as error:
                raise BlockError(f"{page.name}, line {block.line}: {type(error).__name__}: {error}") from error
    return sum(block.counts for block in blocks)


@contextmanager
def _inside(folder: Path) -> Iterator[None]:
    import torch

    before, threads, environment = Path.cwd(), torch.get_num_threads(), dict(os.environ)
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
        torch.set_num_threads(threads)
        os.environ.clear()
        os.environ.update(environment)


@contextmanager
def _module() -> Iterator[ModuleType]:
    """Lends the module in which a page's Python lives, so that its classes have a home."""
    module = ModuleType("page")
    sys.modules["page"] = module
    try:
        yield module
    finally:
        del sys.modules["page"]


def run_block(block: Block, module: ModuleType) -> None:
    """Runs one block in the current folder."""
    if block.language == "python":
        _run_python(block, module)
    elif block.language in ("bash", "setup"):
        _run_bash(block)
    else:
        _keep(block)


def _run_python(block: Block, module: ModuleType) -> None:
    if ">>>" not in block.text:
        exec(compile(block.text, f"line {block.line}", "exec"), module.__dict__)
        return
    test = doctest.DocTestParser().get_doctest(block.text + "\n", module.__dict__, "block", None, block.line)
    said: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=said.append, clear_globs=False)
    module.__dict__.update(test.globs)
    if said:
        raise BlockError("".join(said))


def _keep(block: Block) -> None:
    """Writes a block with a name to its file; otherwise what can be read must be readable."""
    first = re.match(r"# file: (\S+)\n", block.text)
    name = block.notes.get("file") or (first[1] if first else None)
    if name is None:
        _read(block)
        return
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(block.text, encoding="utf-8")


def _read(block: Block) -> None:
    if block.language == "toml":
        parse_config(tomllib.loads(block.text))
    elif block.language == "json":
        try:
            json.loads(block.text)
        except ValueError:
            for line in filter(str.strip, block.text.splitlines()):
                json.loads(line)


def _run_bash(block: Block) -> None:
    asked = commands(block.text)
    more = shlex.split(block.notes.get("with", ""))
    taken = False
    for number, command in enumerate(asked, start=1):
        name = first_word(command)
        if name == "fedmezo":
            expected = int(block.notes.get("exit", 0)) if number == len(asked) else 0
            taken |= _run_fedmezo(command, more, expected=expected)
        elif name in ELSEWHERE:
            parse_command(command)
        elif name == "export":
            os.environ.update(word.split("=", 1) for word in _split(command)[1:])
        elif name == "python" and not re.search(r"[|;&<>]", command):
            _run_script(_split(command)[1:])
        elif name in TOOLS or name == "python":
            _run_tool(command)
        else:
            raise BlockError(f"`{command}`: {name!r} is no command that runs here; write `parsed: REASON` above")
    if more and not taken:
        raise BlockError(f"no command of the block knows the options {more}")


def _run_fedmezo(command: str, more: Sequence[str], *, expected: int) -> bool:
    """Runs a command of ours in this process; tells whether it took the further arguments."""
    words, sign, rest = _cut(command)
    takes = bool(more) and {word for word in more if word.startswith("--")} <= _options(words)
    with redirect_stdout(io.StringIO()) if sign else nullcontext() as heard:
        code = main([*map(os.path.expandvars, words), *(more if takes else ())])
    if code != expected:
        raise BlockError(f"`{command}` ended with {code}, not with {expected}")
    if sign:
        _run_tool(f"cat {sign} {rest}", given=heard.getvalue())
    return takes


def _cut(command: str) -> tuple[list[str], str, str]:
    """The words of a command of ours, the sign that ends them (| or >), and what comes after it."""
    parts = shlex.shlex(command, posix=True, punctuation_chars="|<>;&")
    parts.whitespace_split = True
    words = list(parts)
    words = words[words.index("fedmezo") + 1 :]
    at = next((n for n, word in enumerate(words) if word and not word.strip("|<>;&")), len(words))
    sign = words[at] if at < len(words) else ""
    if sign not in ("", "|", ">"):
        raise BlockError(f"`{command}`: of bash's signs only | and > are understood after a command of ours")
    return (
        words[:at],
        sign,
        " ".join(word if not word.strip("|<>;&") else shlex.quote(word) for word in words[at + 1 :]),
    )


def _options(words: Sequence[str]) -> set[str]:
    """The options that the verb in these words knows."""
    command = _command()
    for word in words:
        command = getattr(command, "commands", {}).get(word, command)
    return {option for parameter in command.params for option in parameter.opts}


def _run_script(words: Sequence[str]) -> None:
    """Runs a Python file as a program, in this process: its imports are there already."""
    script, before = Path(words[0]), (sys.argv, sys.path[:])
    sys.argv, sys.path[:0] = list(words), [str(script.parent.resolve())]
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise BlockError(f"{script} ended with {end.code}") from end
    finally:
        sys.argv, sys.path[:] = before


def _run_tool(command: str, *, given: str | None = None) -> None:
    """Runs a command by bash, where `python` and `fedmezo` are ours."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-ec", command],
        input=given,
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    sys.stdout.write(done.stdout)
    if done.returncode:
        raise BlockError(f"`{command}` ended with {done.returncode}: {done.stderr[-2000:]}")


# --- parsing only ----------------------------------------------------------------------------------------------------


def parse_block(block: Block) -> None:
    """Checks a block without running it."""
    if block.language == "python":
        text = block.text if ">>>" not in block.text else doctest.script_from_examples(block.text)
        compile(text, f"line {block.line}", "exec")
    elif block.language == "toml":
        tomllib.loads(block.text)
    elif block.language == "bash":
        for command in commands(block.text):
            parse_command(command)


def parse_command(command: str) -> None:
    """Checks that what a command names is there: our verbs, options and keys, scripts, targets, extras."""
    words, name = _split(command), first_word(command)
    if name == "fedmezo":
        _parse_fedmezo([word for word in words[1:] if word != "&"])
    for word in words[1:]:
        if name in ("python", "pytest") and word.endswith(".py") and "/" in word:
            _there(ROOT / word, command)
        if (
            name == "make"
            and "=" not in word
            and not re.search(rf"^{re.escape(word)}:", _text("Makefile"), re.MULTILINE)
        ):
            raise BlockError(f"`{command}`: the Makefile has no target {word!r}")
        if name == "pip" and (extras := re.fullmatch(r"(?:fedmezo|.*\.whl|\.)\[(.*)\]", word)):
            _known(extras[1].split(","), tomllib.loads(_text("pyproject.toml"))["project"]["optional-dependencies"])


def _text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def _there(path: Path, command: str) -> None:
    if not path.exists():
        raise BlockError(f"`{command}`: there is no {path.relative_to(ROOT)}")


def _known(wanted: Sequence[str], extras: Mapping[str, object]) -> None:
    if missing := set(wanted) - set(extras):
        raise BlockError(f"pyproject.toml has no extra {', '.join(sorted(missing))}")


def _parse_fedmezo(words: Sequence[str]) -> None:
    command, context, rest = _command(), None, list(words)
    try:
        while True:
            context = command.make_context(command.name, rest, parent=context)
            if not isinstance(command, click.Group) or not (left := [*context._protected_args, *context.args]):
                break
            _, command, rest = command.resolve_command(context, left)
    except click.exceptions.Exit:
        return
    for setting in context.params.get("settings") or ():
        section, _, name = setting.partition("=")[0].partition(".")
        if f"{section}.{name}" not in _keys():
            raise BlockError(f"--set {setting}: no such key")


def _keys() -> set[str]:
    """Every key of a configuration, by our names and the customary ones."""
    kinds = {name: field.annotation for name, field in Config.model_fields.items()}
    ours = {f"{section}.{name}" for section, kind in kinds.items() for name in kind.model_fields}
    return ours | {
        f"{section}.{other}"
        for section, kind in kinds.items()
        for name in kind.model_fields
        for other in note_of(kind, name, "also")
    }
